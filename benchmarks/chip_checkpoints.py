"""Published MAX78000 checkpoints: the float forward of quantization-aware training against the simulated chip.

    python -m benchmarks.chip_checkpoints [--csv benchmarks/results/chip_checkpoints.csv]

For each checkpoint the float model, as quantization-aware training computes it, runs beside the chip's integers on
random inputs, mnist also on the 10,000 test images; all outputs are compared, and accuracy is reported for both.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.data import data_dir, data_file
from bitsmith.ai8x.devices import MAX78000
from bitsmith.ai8x.network import Network, NetworkLayer, parse_network
from bitsmith.ai8x.simulate import ChipProgram, chip_program, execution_order

FIELDS = ("net", "inputs", "samples", "outputs", "differing", "float_top1", "chip_top1")


def _layer(op: str, **keys: Any) -> dict[str, Any]:
    return {"processors": 1, "out_offset": 0, "op": op, "activate": "none", **keys}


def _conv(kernel: int = 3, pad: int | None = None, **keys: Any) -> dict[str, Any]:
    pad = kernel // 2 if pad is None else pad
    return _layer("conv2d", kernel_size=f"{kernel}x{kernel}", pad=pad, activate="relu", **keys)


_FC = _layer("mlp", flatten=True, output_width=32)
_RELU_FC = _layer("mlp", activate="relu")
_MAX2 = {"max_pool": 2, "pool_stride": 2}
# The published architectures: name -> (input shape, layers)
NETS: dict[str, tuple[tuple[int, ...], list[dict[str, Any]]]] = {
    "mnist": ((1, 28, 28), [_conv(), _conv(pad=2, **_MAX2), _conv(**_MAX2), _conv(avg_pool=2, pool_stride=2), _FC]),
    "mnist-extrasmall": ((1, 28, 28), [_conv(), _conv(pad=2, **_MAX2), _conv(max_pool=4, pool_stride=4), _FC]),
    "cifar10": (
        (3, 32, 32),
        [
            _conv(), _conv(1), _conv(), _conv(**_MAX2), _conv(1), _conv(**_MAX2), _conv(1), _conv(**_MAX2), _conv(),
            _conv(1, **_MAX2), _FC,
        ],
    ),
    "autoencoder": (
        (256, 3),
        [
            _layer("conv1d", kernel_size=1, pad=0, activate="relu"),
            _layer("conv1d", kernel_size=3, pad=0, activate="relu"),
            _RELU_FC, _layer("mlp"), _RELU_FC, _RELU_FC, _layer("mlp"),
        ],
    ),
}  # fmt: skip


def network(name: str) -> Network:
    """The network description of a published checkpoint."""
    return parse_network({"arch": name, "dataset": "published", "layers": NETS[name][1]}, MAX78000)


def state_dict(folder: Path, stem: str) -> dict[str, Tensor]:
    """A recorded state_dict in its own key order."""
    tensors = load_file(folder / f"{stem}.safetensors")
    order = json.loads((folder / f"{stem}.json").read_text(encoding="utf-8"))["state_dict"]
    return {entry["key"]: tensors[entry["key"]] for entry in order if entry["key"] in tensors}


def chip(name: str) -> ChipProgram:
    """The quantized checkpoint on the simulated chip."""
    return chip_program(state_dict(data_dir() / "ai8x" / "expected", f"{name}-qat"), network(name))


class QatModel:
    """The forward of quantization-aware training with 8-bit weights (ai8x.py), in float32, layer by layer."""

    def __init__(self, state: dict[str, Tensor], described: Network) -> None:
        self.state, self.layers = state, execution_order(described)
        self.prefixes = [key.removesuffix(".weight") for key in state if key.endswith(".op.weight")]

    def __call__(self, x: Tensor) -> Tensor:
        """Outputs for inputs of -1 to 127/128."""
        for layer, prefix in zip(self.layers, self.prefixes, strict=True):
            x = self._forward(layer, prefix, x)
        return x

    def _forward(self, layer: NetworkLayer, prefix: str, x: Tensor) -> Tensor:
        if layer.pooling == "max":
            x = F.max_pool2d(x, layer.pool, layer.pool_stride)
        elif layer.pooling == "avg":
            x = (torch.trunc(F.avg_pool2d(x * 128, layer.pool, layer.pool_stride)) / 128).clamp(-1, 127 / 128)
        weight, bias, shift = self._parameters(prefix)
        if layer.op == "linear":
            y = F.linear(x.flatten(1), weight, bias)
        elif layer.op == "conv1d":
            y = F.conv1d(x, weight, bias, padding=layer.padding[0])
        else:
            y = F.conv2d(x, weight, bias, padding=layer.padding)
        wide = layer.output_width == 32
        y = y if wide else y * 2.0**shift
        y = y.relu() if layer.activation == "relu" else y
        if wide:
            return (torch.floor(y * 2**14 + 0.5) / 2**14).clamp(-(2.0**15), 2.0**15)
        return (torch.floor(y * 128 + 0.5) / 128).clamp(-1, 127 / 128)

    def _parameters(self, prefix: str) -> tuple[Tensor, Tensor | None, int]:
        weight, bias = self.state[f"{prefix}.weight"], self.state.get(f"{prefix}.bias")
        values = weight.flatten() if bias is None else torch.cat([weight.flatten(), bias])
        quantile = self.state.get(f"{prefix.rpartition('.')[0]}.shift_quantile", torch.ones(1)).float()
        largest = torch.quantile(values.abs(), quantile)
        shift = -int(torch.clamp(torch.floor(torch.log2(1 / largest)), -15, 15))

        def quantized(x: Tensor) -> Tensor:
            return (torch.floor(x * 2.0**-shift * 128 + 0.5) / 128).clamp(-1, 127 / 128)

        return quantized(weight), None if bias is None else quantized(bias), shift


def compare(name: str, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs of the float forward, in the chip's units, and of the chip."""
    qat = QatModel(state_dict(data_dir() / "ai8x" / "inputs", name), network(name))
    run = chip(name)
    wide = run.widths[max(run.widths)] == 32
    pairs = [(qat(part / 128) * (2**14 if wide else 128), run(part)) for part in codes.float().split(500)]
    return torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs])


def mnist_test() -> tuple[Tensor, Tensor]:
    """The 10,000 test images as the chip takes them, and their labels."""
    with gzip.open(data_file("mnist-t10k-images-idx3-ubyte.gz")) as file:
        images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 1, 28, 28)
    with gzip.open(data_file("mnist-t10k-labels-idx1-ubyte.gz")) as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8)
    pixels = torch.from_numpy(images.copy()).float() / 255
    return ((pixels - 0.5) * 256).round().clamp(-128, 127), torch.from_numpy(labels.copy()).long()


def rows() -> list[dict[str, Any]]:
    """All measurements."""
    found = []
    for name, (shape, _) in NETS.items():
        codes = torch.randint(-128, 128, (64, *shape), generator=torch.Generator().manual_seed(0)).float()
        found.append(_row(name, "random", codes, None))
    images, labels = mnist_test()
    found += [_row(name, "mnist t10k", images, labels) for name in ("mnist", "mnist-extrasmall")]
    return found


def _row(name: str, inputs: str, codes: Tensor, labels: Tensor | None) -> dict[str, Any]:
    floats, integers = compare(name, codes)
    row = {"net": name, "inputs": inputs, "samples": len(codes), "outputs": floats.numel()}
    row["differing"] = int((floats.double() != integers.double()).sum())
    for key, outputs in (("float_top1", floats), ("chip_top1", integers)):
        top1 = math.nan if labels is None else float((outputs.argmax(1) == labels).double().mean()) * 100
        row[key] = "" if labels is None else f"{top1:.2f}"
    return row


def main() -> None:
    """Measure, print, and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, default=Path("benchmarks/results/chip_checkpoints.csv"))
    options = parser.parse_args()
    with torch.no_grad():
        measured = rows()
    for row in measured:
        print("  ".join(f"{key} {row[key]}" for key in FIELDS))
    with options.csv.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(measured)


if __name__ == "__main__":
    main()
