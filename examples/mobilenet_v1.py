"""A MobileNetV1 written with quantized layers, on real weights: what each choice of numbers costs.

python examples/mobilenet_v1.py [FOLDER WITH WEIGHTS AND IMAGES]
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

import bitsmith as bs
from bitsmith.evaluate import evaluate, model_size
from bitsmith.recipe import bits_recipe

sys.path.insert(0, str(Path(__file__).parent))
from imagenet_sample import find_data, images, load_weights

WIDTHS = (64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024)  # of the 1 x 1 convolutions
STRIDED = (2, 4, 6, 12)  # depthwise layers with stride 2


class QuantMobileNetV1(nn.Module):
    """Howard et al., MobileNets (arXiv 1704.04861), width 0.25; ``pointwise`` is the 1 x 1 layers' weight spec."""

    def __init__(self, alpha: float = 0.25, pointwise: Any = None) -> None:
        super().__init__()
        conv, channels = bs.nn.QuantConv2d, int(32 * alpha)
        self.input = bs.nn.QuantIdentity()
        self.conv1, self.conv1_bn = conv(3, channels, 3, 2, bias=False), nn.BatchNorm2d(channels, eps=1e-3)
        self.act = bs.nn.QuantReLU(limit=6.0)
        for k, width in enumerate(WIDTHS, 1):
            out, stride = int(width * alpha), 2 if k in STRIDED else 1
            depthwise = conv(channels, channels, 3, stride, 2 - stride, groups=channels, bias=False)
            for name, layer, size in (
                ("dw", depthwise, channels),
                ("pw", conv(channels, out, 1, bias=False, weights=pointwise), out),
            ):
                self.add_module(f"conv_{name}_{k}", layer)
                self.add_module(f"conv_{name}_{k}_bn", nn.BatchNorm2d(size, eps=1e-3))
                self.add_module(f"act_{name}_{k}", bs.nn.QuantReLU(limit=6.0))
            channels = out
        self.fc = bs.nn.QuantLinear(channels, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.conv1_bn(self.conv1(F.pad(self.input(x), (0, 1, 0, 1)))))
        for k in range(1, len(WIDTHS) + 1):
            x = F.pad(x, (0, 1, 0, 1)) if k in STRIDED else x  # the Keras layout pads on two sides only
            for name in (f"dw_{k}", f"pw_{k}"):
                x = getattr(self, f"act_{name}")(getattr(self, f"conv_{name}_bn")(getattr(self, f"conv_{name}")(x)))
        return self.fc(x.mean((2, 3)))


def main(folder: str | None = None, count: int = 1000) -> None:
    """Float, 8 bits, and 4-bit weights in the 1 x 1 layers: accuracy, size, images per second."""
    if (data := find_data(folder)) is None:
        return
    calibration, test = images(data, count)
    print(f"{len(calibration.x)} images calibrate, {len(test.x)} judge")

    def row(name: str, model: Callable[..., Any], size: int) -> None:
        found = evaluate(model, test)
        speed = f"{found.images_per_second:7.1f} images/s"
        print(f"{name:34} top-1 {found.top1:5.2f}  top-5 {found.top5:5.2f}  {size / 1e6:6.3f} MB  {speed}")

    net = load_weights(QuantMobileNetV1(), data)
    row("float", net, model_size(net))
    q = bs.quantize(net, calibration, "int8")
    row("int8, simulated", q, model_size(q))
    row("int8, onnxruntime", bs.deploy(q), model_size(q))
    narrow = load_weights(QuantMobileNetV1(pointwise=bits_recipe(4, 8)), data)
    q = bs.quantize(narrow, calibration, bits_recipe(8, 8, steps=("fold_batch_norm", "gptq", "bias_correction")))
    row("4-bit pointwise weights, GPTQ", q, model_size(q))


if __name__ == "__main__":
    main(*sys.argv[1:2])
