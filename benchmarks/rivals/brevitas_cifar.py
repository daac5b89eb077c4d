"""Brevitas' post-training flow on the CIFAR-10 ResNets: accuracy and seconds per stage.

    python -m benchmarks.rivals.brevitas_cifar --repeat 3              # timings, medians, then accuracy
    python -m benchmarks.rivals.brevitas_cifar --on-demand             # one round for each line on stdin

With `--on-demand` another program can alternate its own rounds with Brevitas' ones, so that both meet the
same load on the machine; every round prints one line of JSON. The stages are those of Brevitas'
`ptq_evaluate.py` with its defaults (20 equalization sweeps, merged bias, 32-bit bias, percentile 99.999, bias
correction, batches of 64), but weights per channel unless `--granularity per_tensor` (its default) is given,
on images already in memory. Needs `brevitas==0.13.4 dependencies==2.0.1 "setuptools<81" tqdm`.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import statistics
import sys
import time
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import data, nets
from benchmarks.nets.resnet_cifar import LambdaLayer, ResNet

warnings.filterwarnings("ignore")  # Brevitas warns about its own imports and about named tensors

SEED = 123456
STAGES = ("preprocess", "quantize", "first_forward", "calibrate", "bias_correction")


class PoolPad(nn.Module):
    """`F.pad(x[:, :, ::2, ::2], ...)` with a one-pixel max-pool for the slicing that Brevitas refuses."""

    def __init__(self, channels: int):
        super().__init__()
        self.every_second = nn.MaxPool2d(1, stride=2)
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(self.every_second(x), (0, 0, 0, 0, self.channels, self.channels), "constant", 0.0)


class TraceableResNet(nn.Module):
    """The same function, rewritten for Brevitas: adaptive pooling, `torch.flatten`, `PoolPad` shortcuts."""

    def __init__(self, net: ResNet):
        super().__init__()
        self.conv1, self.bn1, self.linear = net.conv1, net.bn1, net.linear
        self.layer1, self.layer2, self.layer3 = net.layer1, net.layer2, net.layer3
        self.pool = nn.AdaptiveAvgPool2d(1)
        for block in [*net.layer1, *net.layer2, *net.layer3]:
            if isinstance(block.shortcut, LambdaLayer):
                block.shortcut = PoolPad(block.conv2.out_channels // 4)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        return self.linear(torch.flatten(self.pool(out), 1))


def quantize(model: nn.Module, loader: data.Batches, args: argparse.Namespace) -> tuple[nn.Module, dict]:
    """Run the flow once on a copy of `model`; return the quantized model and the seconds of each stage."""
    from brevitas.graph.quantize import preprocess_for_quantize
    from brevitas_examples.imagenet_classification.ptq import ptq_common as ptq

    model = copy.deepcopy(model)
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    marks = [time.perf_counter()]

    model = preprocess_for_quantize(model, equalize_iters=20, equalize_merge_bias=True, merge_bn=True)
    marks.append(time.perf_counter())
    net = ptq.quantize_model(
        model,
        backend=args.backend,
        weight_bit_width=8,
        act_bit_width=8,
        bias_bit_width=32 if args.format == "int" else None,
        weight_quant_granularity=args.granularity,
        act_quant_percentile=99.999,
        act_quant_type="sym",
        scale_factor_type=args.scale,
        quant_format=args.format,
        weight_mantissa_bit_width=3,  # the float formats are E4M3
        weight_exponent_bit_width=4,
        act_mantissa_bit_width=3,
        act_exponent_bit_width=4,
        layerwise_first_last_mantissa_bit_width=3,
        layerwise_first_last_exponent_bit_width=4,
    )
    marks.append(time.perf_counter())
    with torch.no_grad():
        net.eval()(loader[0][0])
    marks.append(time.perf_counter())
    ptq.calibrate(loader, net)
    marks.append(time.perf_counter())
    ptq.apply_bias_correction(loader, net)
    marks.append(time.perf_counter())

    seconds = {stage: end - start for stage, start, end in zip(STAGES, marks, marks[1:])}
    return net, seconds | {"total": marks[-1] - marks[0]}


def judge(net: nn.Module, model: nn.Module, test: data.Batches) -> dict[str, float]:
    """Return top-1 of the quantized net and how often it gives the float model's class, both in percent."""
    from brevitas.export.inference import quant_inference_mode

    hits = same = count = 0
    with torch.no_grad(), quant_inference_mode(net):
        net(test[0][0][:1])  # Brevitas caches its constants in a first pass
        for x, y in test:
            scores = net(x)
            answer = getattr(scores, "value", scores).argmax(1)
            hits += int((answer == y).sum())
            same += int((answer == model(x).argmax(1)).sum())
            count += len(y)
    return {"top1": 100 * hits / count, "agreement": 100 * same / count}


def silence_progress() -> None:
    """Brevitas' loops draw progress bars; replace them by plain iteration."""
    from brevitas_examples.imagenet_classification.ptq import ptq_common as ptq

    ptq.tqdm = iter


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--net", default="resnet20", choices=("resnet20", "resnet32"))
    parser.add_argument("--backend", default="fx", choices=("fx", "layerwise"))
    parser.add_argument("--granularity", default="per_channel", choices=("per_channel", "per_tensor"))
    parser.add_argument("--scale", default="float_scale", choices=("float_scale", "po2_scale"))
    parser.add_argument("--format", default="int", choices=("int", "float_ocp"))
    parser.add_argument("--repeat", type=int, default=3, help="timed rounds after one warm-up (default 3)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-accuracy", action="store_true")
    parser.add_argument("--on-demand", action="store_true", help="one round for each line read; JSON out")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Time the flow and print medians per stage, then judge a quantized net on the 10,000 test images."""
    args = parse(argv)
    torch.set_num_threads(args.threads)
    silence_progress()
    float_model, calibration, test, _ = nets.load(args.net)
    model = TraceableResNet(copy.deepcopy(float_model)).eval()
    images = torch.cat([x for x, _ in calibration])
    loader = data.batches(images, torch.zeros(len(images)), 64)

    net, _ = quantize(model, loader, args)  # warm-up
    if args.on_demand:
        print("ready", flush=True)
        for _ in sys.stdin:
            print(json.dumps(quantize(model, loader, args)[1]), flush=True)
        return
    rounds = [quantize(model, loader, args)[1] for _ in range(args.repeat)]
    for stage in (*STAGES, "total") if rounds else ():
        seconds = [r[stage] for r in rounds]
        middle, spread = statistics.median(seconds), f"{min(seconds):.3f} to {max(seconds):.3f}"
        print(f"{stage:16s} {middle:8.3f} s   (of {len(seconds)}: {spread})")
    if not args.no_accuracy:
        result = judge(net, float_model, test)
        print(f"top-1 {result['top1']:.2f} %, same class as float {result['agreement']:.2f} %")


if __name__ == "__main__":
    main()
