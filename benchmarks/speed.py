"""Time, memory and file size of quantizing, beside Brevitas and beside a float forward pass.

    python -m benchmarks.speed [--rivals PYTHON] [--rounds 5] [--csv FILE]      # ResNet-20, 1,000 images
    python -m benchmarks.speed --files DIR                                      # write our files beside the rivals'
    python -m benchmarks.speed --memory 2GB                                     # peak memory, ResNet-18, 256 images

``--rivals`` names the Python of an environment with Brevitas (benchmarks/README.md); its rounds alternate with ours.
"""

from __future__ import annotations

import argparse
import csv
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

import bitsmith as bs
from benchmarks import nets
from benchmarks.accuracy import commit


def timed(function: Any, *args: Any) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    function(*args)
    return time.perf_counter() - start


def forward_all(model: Any, batches: Any) -> None:
    """One float forward pass over all batches."""
    with torch.no_grad():
        for x, _ in batches:
            model(x)


def side_by_side(rivals: str | None, rounds: int, recipe: str = "int8") -> dict[str, Any]:
    """Alternate a float forward pass, our quantize and, if there, Brevitas' default flow."""
    model, calibration, _, _ = nets.load("resnet20")
    process = None
    if rivals:
        command = [rivals, "-m", "benchmarks.rivals.brevitas_cifar", "--on-demand"]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        while "ready" not in process.stdout.readline():
            pass
    times: dict[str, list[float]] = {
        "forward": [],
        "quantize": [],
        "calibrate": [],
        "capture": [],
        "brevitas": [],
    }
    for index in range(rounds + 1):
        forward = timed(forward_all, model, calibration)
        start = time.perf_counter()
        q = bs.quantize(model, calibration, recipe)
        whole = time.perf_counter() - start
        brevitas = _ask(process) if process else float("nan")
        if index:  # the first round warms all of them up
            for name, value in (("forward", forward), ("quantize", whole), ("brevitas", brevitas),
                                ("calibrate", q.report.seconds["calibrate"]),
                                ("capture", q.report.seconds["capture"])):  # fmt: skip
                times[name].append(value)
    if process:
        process.stdin.close()
        process.wait()
    row: dict[str, Any] = {f"{name}_s": round(median(values), 3) for name, values in times.items()}
    row["calibrate_per_forward"] = round(median(c / f for c, f in zip(times["calibrate"], times["forward"])), 2)
    row["times_faster_than_brevitas"] = round(median(b / q for b, q in zip(times["brevitas"], times["quantize"])), 2)
    return {"net": "resnet20", "recipe": recipe, "samples": 1000, "rounds": rounds, **row, "commit": commit()}


def _ask(process: Any) -> float:
    process.stdin.write("\n")
    process.stdin.flush()
    return float(json.loads(process.stdout.readline())["total"])


def write_files(folder: Path) -> None:
    """Our int8 files of ResNet-18 and MobileNetV2, from the weights that the rivals' files come from."""
    for name in ("resnet18", "mobilenet_v2"):
        model, calibration, _, _ = nets.load(name)
        q = bs.quantize(model, calibration)
        path = bs.export_onnx(q, folder / f"{name}-bitsmith.onnx")
        certificate = bs.verify(q, path, [x for x, _ in calibration[:1]])
        float_file = folder / f"{name}-float.onnx"
        ratio = path.stat().st_size / float_file.stat().st_size if float_file.is_file() else float("nan")
        print(f"{path.name}: {path.stat().st_size / 1e6:.2f} MB, {ratio:.3f} of the float file; {certificate.verdict}")


def peak_memory(memory: str) -> None:
    """Peak resident memory of quantizing ResNet-18 with 256 images of 224 x 224."""
    model, _, _, _ = nets.load("resnet18")
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(32, 3, 224, 224, generator=generator) for _ in range(8)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    seconds = timed(lambda: bs.quantize(model, images, memory=memory))
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    size = sum(p.numel() * 4 for p in model.parameters()) / 1e9
    print(f"--memory {memory}: peak {after:.2f} GB resident in all ({before:.2f} before, images included; "
          f"model {size:.2f}), {seconds:.1f} s")  # fmt: skip


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rivals")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--files", type=Path)
    parser.add_argument("--memory")
    options = parser.parse_args()
    if options.memory:
        return peak_memory(options.memory)
    if options.files:
        return write_files(options.files)
    row = side_by_side(options.rivals, options.rounds)
    for name, value in row.items():
        print(f"{name:28} {value}")
    if options.csv:
        options.csv.parent.mkdir(parents=True, exist_ok=True)
        with options.csv.open("w", newline="") as handle:
            writer = csv.DictWriter(handle, list(row))
            writer.writeheader()
            writer.writerow(row)
    return None


if __name__ == "__main__":
    sys.exit(main())
