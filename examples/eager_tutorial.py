"""Static quantization by hand: prepare, calibrate, convert; simple numbers first, then the recommended ones.

python examples/eager_tutorial.py [FOLDER WITH WEIGHTS AND IMAGES]
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bitsmith as bs
from bitsmith.evaluate import ArrayData, evaluate, model_size
from bitsmith.grid import RangeRule
from bitsmith.recipe import bits_recipe

sys.path.insert(0, str(Path(__file__).parent))
from imagenet_sample import find_data, images, load_weights
from mobilenet_v1 import STRIDED, WIDTHS


class MobileNetV1(nn.Module):
    """A float MobileNetV1 of width 0.25 with stubs at its ends."""

    def __init__(self, alpha: float = 0.25) -> None:
        super().__init__()
        channels = int(32 * alpha)
        self.quant, self.dequant = bs.QuantStub(), bs.DeQuantStub()
        self.conv1, self.conv1_bn = nn.Conv2d(3, channels, 3, 2, bias=False), nn.BatchNorm2d(channels, eps=1e-3)
        self.act = nn.ReLU6(inplace=True)
        for k, width in enumerate(WIDTHS, 1):
            out, stride = int(width * alpha), 2 if k in STRIDED else 1
            depthwise = nn.Conv2d(channels, channels, 3, stride, 2 - stride, groups=channels, bias=False)
            for name, layer, size in (
                ("dw", depthwise, channels),
                ("pw", nn.Conv2d(channels, out, 1, bias=False), out),
            ):
                self.add_module(f"conv_{name}_{k}", layer)
                self.add_module(f"conv_{name}_{k}_bn", nn.BatchNorm2d(size, eps=1e-3))
                self.add_module(f"act_{name}_{k}", nn.ReLU6(inplace=True))
            channels = out
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(channels, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.conv1_bn(self.conv1(F.pad(self.quant(x), (0, 1, 0, 1)))))
        for k in range(1, len(WIDTHS) + 1):
            x = F.pad(x, (0, 1, 0, 1)) if k in STRIDED else x
            for name in (f"dw_{k}", f"pw_{k}"):
                x = getattr(self, f"act_{name}")(getattr(self, f"conv_{name}_bn")(getattr(self, f"conv_{name}")(x)))
        return self.dequant(self.fc(self.pool(x).flatten(1)))


def print_model(name: str, model: nn.Module, data: ArrayData, file: str | None = None) -> None:
    """Size (of the file, if there is one) and accuracy."""
    found = evaluate(model, data)
    print(f"Size (MB): {model_size(file or model) / 1e6:.6f}")
    print(f"{name}: accuracy on {found.samples} images, top-1 {found.top1:.2f}, top-5 {found.top5:.2f}\n")


def main(folder: str | None = None, count: int = 1000, output: str = "mobilenet_v1_int8.pt") -> None:
    """The tutorial's flow, twice."""
    if (data := find_data(folder)) is None:
        return
    calibration, test = images(data, count)
    net = load_weights(MobileNetV1(), data)
    print_model("float", net, test)

    # Start with simple ranges (least and greatest value) and one scale per tensor of weights. In this network the
    # weights of some depthwise channels are 170 times those of others: one scale for all of them loses the answer.
    simple = bits_recipe(8, 8, name="simple", granularity="tensor")
    simple = simple.model_copy(update={"activations": simple.activations.model_copy(update={"range": RangeRule()})})
    prepared = bs.prepare(net, simple, next(iter(calibration)))  # layers, batch norms and activations are fused here
    print("the first pair of layers, watching:", prepared.module.conv_dw_1, prepared.module.conv_pw_1, sep="\n")
    for batch, _ in calibration:
        prepared(batch)
    print_model("per tensor, least and greatest value", bs.convert(prepared), test)

    # Then one scale per output channel, and ranges from a histogram by least squared error.
    better = bits_recipe(8, 8, name="per-channel-histogram")
    ranges = better.activations.model_copy(update={"range": RangeRule(name="histogram_l2")})
    prepared = bs.prepare(net, better.model_copy(update={"activations": ranges}), next(iter(calibration)))
    for batch, _ in calibration:
        prepared(batch)
    q = bs.convert(prepared)
    print_model("per channel, histogram", q, test)
    bs.export_torchscript(q, output, style="int8")  # it loads and runs with PyTorch alone
    print_model("the TorchScript file, in PyTorch alone", torch.jit.load(output), test, output)


if __name__ == "__main__":
    main(*sys.argv[1:2])
