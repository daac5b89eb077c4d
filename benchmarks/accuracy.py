"""Accuracy of the recipes on real checkpoints: float, simulated, deployed; the file against simulation and executor.

    python -m benchmarks.accuracy [--quick] [--nets resnet20 ...] [--rows int8/fx ...] [--csv FILE]

Each row is quantized from the net's calibration samples, judged on all of its test samples in the simulation and in
onnxruntime. ``--quick`` judges 1,000 samples.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import bitsmith as bs
from benchmarks import nets

DEFAULT_ROWS = ("int8/runtime", "int8/fx", "int8-tensor/runtime", "int8-tensor/fx", "int8-po2/runtime", "int8-po2/fx",
                "int8-sym/runtime", "int8/layerwise", "int8/flexml", "fp8/fx", "fp8/layerwise", "w8a16/runtime",
                "int16/runtime")  # fmt: skip
OTHER_ROWS = ("int8/runtime", "int8/fx", "int8-tensor/runtime")
NETS = {
    "resnet20": DEFAULT_ROWS,
    "resnet32": DEFAULT_ROWS,
    "shufflenetv2_x0_5": OTHER_ROWS,
    "dscnn_kws": OTHER_ROWS,
    "mcunet_in4": OTHER_ROWS,
    "mobilenet_v1_025": OTHER_ROWS,
}
FIELDS = ("net", "recipe", "placement", "calibration_samples", "judged_samples", "float_top1", "simulated_top1",
          "agreement", "deployed_top1", "file_class_agreement", "max_lsb", "differing_outputs", "output_sqnr_db",
          "integer_macs", "file_kb", "quantize_s", "seed", "commit", "bitsmith")  # fmt: skip


def commit() -> str:
    """The commit that is measured, with a + where files differ from it."""

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], capture_output=True, text=True, check=False).stdout.strip()

    return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "--", "src") else "")


def answers(model: Any, batches: list[tuple[Tensor, Tensor]]) -> Tensor:
    """All outputs of a model over its test batches."""
    with torch.no_grad():
        return torch.cat([model(x) for x, _ in batches])


def measure(name: str, recipe: str, placement: str, quick: bool, cache: dict[str, Any]) -> dict[str, Any]:
    """One row."""
    if name not in cache:
        model, calibration, test, _ = nets.load(name)
        test = test[: max(1, 1000 // len(test[0][0]))] if quick else test
        cache[name] = model, calibration, test, answers(model, test)
    model, calibration, test, exact = cache[name]
    labels = torch.cat([y for _, y in test])
    start = time.perf_counter()
    q = bs.quantize(model, calibration, recipe, placement=placement)
    seconds = time.perf_counter() - start
    simulated = answers(q, test)
    with tempfile.TemporaryDirectory() as folder:
        path = bs.export_onnx(q, Path(folder, "m.onnx"))
        deployed = answers(bs.deploy(path), test)
        certificate = bs.verify(q, path, [x for x, _ in test[:4]])
        kilobytes = path.stat().st_size / 1000
    top1 = lambda scores: round(100 * float((scores.argmax(1) == labels).double().mean()), 2)  # noqa: E731
    same = lambda a, b: round(100 * float((a.argmax(1) == b.argmax(1)).double().mean()), 3)  # noqa: E731
    difference = (deployed - simulated).abs()
    return {
        "net": name, "recipe": recipe, "placement": placement, "calibration_samples": q.report.samples,
        "judged_samples": len(labels), "float_top1": top1(exact), "simulated_top1": top1(simulated),
        "agreement": same(simulated, exact), "deployed_top1": top1(deployed),
        "file_class_agreement": same(deployed, simulated),
        "max_lsb": round(max(certificate.max_lsb, float(difference.max()) / certificate.outputs[0].lsb), 3),
        "differing_outputs": int((difference > 0).sum()), "output_sqnr_db": round(q.report.output_sqnr_db or 0, 2),
        "integer_macs": round(q.report.coverage.fraction, 4), "file_kb": round(kilobytes, 1),
        "quantize_s": round(seconds, 2), "seed": 0, "commit": commit(), "bitsmith": bs.__version__,
    }  # fmt: skip


def main() -> None:
    """Measure and print, and write CSV where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--nets", nargs="+", default=list(NETS), choices=list(NETS))
    parser.add_argument("--rows", nargs="+")
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    cache: dict[str, Any] = {}
    rows = []
    print(f"{'net':18}{'recipe':13}{'placement':11}{'float':>7}{'sim':>7}{'agree':>8}{'file':>7}{'file=sim':>9}"
          f"{'LSB':>6}{'differ':>8}{'dB':>6}{'int':>6}{'s':>7}")  # fmt: skip
    for name in options.nets:
        for row in options.rows or NETS[name]:
            recipe, placement = row.split("/")
            r = measure(name, recipe, placement, options.quick, cache)
            rows.append(r)
            print(f"{name:18}{recipe:13}{placement:11}{r['float_top1']:7.2f}{r['simulated_top1']:7.2f}"
                  f"{r['agreement']:8.2f}{r['deployed_top1']:7.2f}{r['file_class_agreement']:9.3f}{r['max_lsb']:6.2f}"
                  f"{r['differing_outputs']:8d}{r['output_sqnr_db']:6.1f}{r['integer_macs']:6.2f}"
                  f"{r['quantize_s']:7.2f}", flush=True)  # fmt: skip
        cache.pop(name, None)
    if options.csv:
        options.csv.parent.mkdir(parents=True, exist_ok=True)
        with options.csv.open("w", newline="") as handle:
            writer = csv.DictWriter(handle, FIELDS)
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
