"""How long the doctor takes on whole networks, static rules and all: `python -m benchmarks.doctor [--csv rows.csv]`.

Each network, with random weights, is examined in turn for some rounds, for onnxruntime and for a TIDL device; the time
is the median of the rounds, capture included. The models are built before the clock starts.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import nn

import bitsmith as bs
from benchmarks.nets.torchvision_nets import import_torchvision_models

ROUNDS = 3


def encoder() -> nn.Module:
    """A transformer encoder of BERT-base's size."""
    layer = nn.TransformerEncoderLayer(768, 12, 3072, batch_first=True, activation="gelu")
    return nn.TransformerEncoder(layer, 12)


def nets() -> dict[str, tuple[nn.Module, torch.Tensor]]:
    """Networks with one example batch each."""
    models = import_torchvision_models()
    names = ("resnet18", "mobilenet_v2", "mobilenet_v3_large", "vit_b_16")
    builders: dict[str, Callable[[], nn.Module]] = {name: getattr(models, name) for name in names}
    found = {name: (build().eval(), torch.randn(2, 3, 224, 224)) for name, build in builders.items()}
    return {**found, "transformer_encoder": (encoder().eval(), torch.randn(2, 128, 768))}


def main() -> None:
    """Time every network for every target, and keep the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    torch.manual_seed(0)
    seconds: dict[tuple[str, str], list[float]] = {}
    findings: dict[tuple[str, str], int] = {}
    built = nets()
    for _ in range(options.rounds):
        for name, (model, example) in built.items():
            for target in ("onnxruntime", "tda4vm"):
                diagnosis = bs.doctor(model, example, target=target)
                seconds.setdefault((name, target), []).append(diagnosis.seconds)
                findings[name, target] = len(diagnosis.findings)
                print(name, target, f"{diagnosis.seconds:.2f} s", flush=True)
    header = ("net", "target", "median_s", "max_s", "findings", "threads")
    rows = [
        (*key, round(median(taken), 2), round(max(taken), 2), findings[key], torch.get_num_threads())
        for key, taken in seconds.items()
    ]
    for row in rows:
        print(*row)
    if options.csv is not None:
        with options.csv.open("w", newline="", encoding="utf-8") as handle:
            csv.writer(handle, lineterminator="\n").writerows([header, *rows])


if __name__ == "__main__":
    main()
