"""Seconds against layers, and what sharing one walk saves: CIFAR ResNets of depth 20 to 56 with random weights.

    python -m benchmarks.scaling [--rounds 3] [--csv FILE] [--plot docs/images/scaling.svg]

Each depth is quantized at W4A8 with GPTQ alone, its noise not even measured; with the noise of every layer measured
for the report, as every walk does; and with bias correction besides. Rounds alternate, medians are kept; ``ratio`` is
to GPTQ alone. Processor seconds, so that other work on the machine does not count: run it with one thread
(OMP_NUM_THREADS=1).
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import time
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch
from torch import Tensor

import bitsmith as bs
from benchmarks import data
from benchmarks.accuracy import commit
from benchmarks.nets.resnet_cifar import ResNet
from bitsmith.calibrate.noise import Noise, OutputNoise
from bitsmith.recipe import bits_recipe
from bitsmith.steps import Gptq

DEPTHS = (20, 32, 44, 56)
STEPS = {"gptq": (), "gptq + report": (), "gptq + report + bias correction": ("bias_correction",)}
FIELDS = ("depth", "layers", "steps", "samples", "cpu_s", "ratio", "ms_per_layer", "threads", "commit", "bitsmith")
SAMPLES = 128
COLOURS = ("#1f77b4", "#2ca02c", "#d62728")


def seconds(model: torch.nn.Module, images: list[Tensor], name: str) -> tuple[float, int]:
    """Processor seconds of ``quantize``, and the number of layers."""
    recipe = bits_recipe(4, 8, steps=("fold_batch_norm", Gptq(), *STEPS[name]))
    with contextlib.ExitStack() as stack:
        if "report" not in name:
            for kind in (Noise, OutputNoise):
                stack.enter_context(patch.object(kind, "update", lambda *_: None))
        start = time.process_time()
        q = bs.quantize(model, images, recipe, placement="fx")
        return time.process_time() - start, len(q.report.layers)


def measure(rounds: int) -> list[dict[str, object]]:
    """One row a depth and list of steps."""
    images = list(data.random_images(SAMPLES, side=32, seed=1).split(64))
    torch.manual_seed(0)
    models = {depth: ResNet(((depth - 2) // 6,) * 3).eval() for depth in DEPTHS}
    seconds(models[DEPTHS[0]], images, "gptq")  # what the first call alone does
    found: dict[tuple[int, str], list[tuple[float, int]]] = {}
    for _ in range(rounds):
        for depth, model in models.items():
            for name in STEPS:
                found.setdefault((depth, name), []).append(seconds(model, images, name))
    times = {key: median(run[0] for run in runs) for key, runs in found.items()}
    return [
        {
            "depth": depth, "layers": runs[0][1], "steps": name, "samples": SAMPLES,
            "cpu_s": round(times[depth, name], 3), "ratio": round(times[depth, name] / times[depth, "gptq"], 3),
            "ms_per_layer": round(1000 * times[depth, name] / runs[0][1], 1),
            "threads": torch.get_num_threads(), "commit": commit(), "bitsmith": bs.__version__,
        }
        for (depth, name), runs in found.items()
    ]  # fmt: skip


def plot(rows: list[dict[str, object]], path: Path) -> None:
    """Seconds over layers as SVG: one line a list of steps, and points."""
    width, height, left, bottom = 560, 340, 60, 50
    most_x = max(float(str(r["layers"])) for r in rows) * 1.1
    most_y = max(float(str(r["cpu_s"])) for r in rows) * 1.1

    def at(x: float, y: float) -> tuple[float, float]:
        return left + x / most_x * (width - left - 20), height - bottom - y / most_y * (height - bottom - 20)

    parts = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            'font-family="sans-serif" font-size="12">'
        ),
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<path d="M{left} 20V{height - bottom}H{width - 20}" fill="none" stroke="black"/>',
        f'<text x="{width / 2}" y="{height - 12}" text-anchor="middle">layers</text>',
        f'<text x="{left}" y="14">processor seconds</text>',
    ]
    for layers in sorted({int(str(r["layers"])) for r in rows}):
        x, _ = at(layers, 0)
        parts.append(f'<text x="{x:.0f}" y="{height - bottom + 16}" text-anchor="middle">{layers}</text>')
    for value in range(int(most_y) + 1):
        _, y = at(0, value)
        parts.append(f'<path d="M{left} {y:.1f}H{width - 20}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.0f}" text-anchor="end">{value}</text>')
    for index, (name, colour) in enumerate(zip(STEPS, COLOURS)):
        points = [at(float(str(r["layers"])), float(str(r["cpu_s"]))) for r in rows if r["steps"] == name]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>' for x, y in points]
        parts.append(f'<text x="{left + 16}" y="{44 + 18 * index}" fill="{colour}">{name}</text>')
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*parts, "</svg>", ""]), encoding="utf-8")


def main() -> None:
    """Measure, print, and write where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    rows = measure(options.rounds)
    for r in rows:
        print(f"ResNet-{r['depth']:<4}{r['layers']:4} layers  {r['steps']:32}{r['cpu_s']:6.2f} s, "
              f"{r['ms_per_layer']:5.1f} ms a layer, {r['ratio']:.2f} times GPTQ alone")  # fmt: skip
    if options.csv:
        with options.csv.open("w", newline="") as handle:
            writer = csv.DictWriter(handle, FIELDS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
