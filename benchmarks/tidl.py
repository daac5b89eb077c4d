"""What each rung of docs/when-accuracy-drops.md gives on TI's devices, and whether files keep the rules of TI's import.

    python -m benchmarks.tidl [--nets mobilenet_v1_025 ...] [--target tda4vm] [--csv rows.csv]

Every row is one recipe on one network: top-1 in float and simulated; for models of 8 bits alone the exported file too:
rules of the import that it breaks (by the independent checker), and its largest difference from the integer executor
in steps of the output, over `--verified` images.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import bitsmith as bs
from benchmarks.nets import load, top1
from bitsmith.doctor.triage import widened

NETS = ("resnet20", "shufflenetv2_x0_5", "mobilenet_v1_025")
WIDE_LAYERS = 4


@dataclass(frozen=True)
class Row:
    """One recipe on one network."""

    net: str
    target: str
    rung: str
    calibration_samples: int
    judged_samples: int
    float_top1: float
    simulated_top1: float
    violations: int | None
    max_lsb: float | None
    passed: bool | None


def rungs(target: bs.Target) -> Iterator[tuple[str, bs.Recipe]]:
    """The ladder's recipes but for mixed precision, which follows from what the second one measures."""
    base = bs.load_recipe("int8-tensor-po2" if target.default_recipe == "tidl" else target.default_recipe)
    yield "ptq", base
    yield "better ptq", base.model_copy(update={"steps": bs.load_recipe("tidl").steps, "name": f"{base.name}-better"})
    yield "16 bits", widened(base)


def mixed(better: bs.QuantizedModel) -> bs.Recipe:
    """The better recipe with 16 bits for the layers with the most noise."""
    wide = widened(better.recipe)
    layers = [layer for layer in better.report.layers if layer.sqnr_db is not None]
    weakest = sorted(layers, key=lambda layer: layer.sqnr_db or 0.0)[:WIDE_LAYERS]
    overrides = tuple(
        bs.Override(match=layer.name, weights=wide.weights, activations=wide.activations) for layer in weakest
    )
    return better.recipe.model_copy(update={"overrides": overrides, "name": f"{better.recipe.name}-mixed"})


def measure(net: str, target: bs.Target, judged: int | None, verified: int) -> Iterator[Row]:
    """All rungs of one network."""
    model, calibration, test, _ = load(net)
    if judged is not None:
        test = [batch for start, batch in zip(range(0, judged, len(test[0][1])), test, strict=False)]
    counts = sum(len(y) for _, y in calibration), sum(len(y) for _, y in test)
    float_top1 = top1(model, test)
    recipes = dict(rungs(target))

    def row(rung: str, q: bs.QuantizedModel) -> Row:
        certificate = None
        if all(bits == 8 for layer in q.report.layers for bits in (layer.weight_bits, layer.input_bits)):
            with tempfile.TemporaryDirectory() as folder:
                path = bs.export_onnx(q, Path(folder, "m.onnx"))
                certificate = bs.verify(q, path, test[0][0][:verified])
        proof = (None,) * 3 if certificate is None else (
            len(certificate.contract), round(certificate.max_lsb, 4), certificate.passed
        )  # fmt: skip
        return Row(net, target.name, rung, *counts, round(float_top1, 2), round(top1(q, test), 2), *proof)

    for rung, recipe in recipes.items():
        q = bs.quantize(model, calibration, recipe, target=target)
        yield row(rung, q)
        if rung == "better ptq":
            yield row(f"16 bits in {WIDE_LAYERS} layers", bs.quantize(model, calibration, mixed(q), target=target))


def main() -> None:
    """Measure, print and keep the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", default=NETS)
    parser.add_argument("--target", default="tda4vm")
    parser.add_argument("--judged", type=int, help="about how many test images [default: all]")
    parser.add_argument("--verified", type=int, default=16)
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    rows = []
    for net in options.nets:
        for row in measure(net, bs.get_target(options.target), options.judged, options.verified):
            print(row, flush=True)
            rows.append(row)
    if options.csv is not None:
        with options.csv.open("w", newline="", encoding="utf-8") as handle:
            writer = csv.DictWriter(handle, [field.name for field in fields(Row)], lineterminator="\n")
            writer.writeheader()
            writer.writerows(map(asdict, rows))


if __name__ == "__main__":
    main()
