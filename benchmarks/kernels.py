"""Times of the fake-quantize kernels and the range statistics against a copy and against PyTorch's own.

    python -m benchmarks.kernels [--elements 8388608] [--rounds 15] [--threads 2] [--no-compiled] [--csv FILE]

The contenders are timed by turns, round after round, so that a busy moment of the machine falls on all of
them; the median of each is printed, in milliseconds, with its ratio to a clone (or to min-max).
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from bitsmith.grid import FP8_E4M3, Grid, IntFormat, kernels
from bitsmith.ranges import Histogram, MinMax, Tails

SCALE = 0.05


def interleaved(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The median time of each contender in milliseconds, after one call of each to warm up."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for contender in contenders.values():
        contender()
    for _ in range(rounds):
        for name, contender in contenders.items():
            start = time.perf_counter()
            contender()
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def elementwise(x: Tensor) -> Tensor:
    """The formula as one writes it: a new tensor for every operation."""
    return torch.clamp(torch.round(x / SCALE), -128, 127) * SCALE


def compiled(x: Tensor, grid: Grid) -> Tensor:
    """The compiled kernel, whatever the environment says."""
    kernels.use_compiled(True)
    try:
        return kernels.fake_quantize(x, grid)
    finally:
        kernels.use_compiled(False)


def kernel_times(elements: int, rounds: int, with_compiled: bool) -> dict[str, float]:
    """Fake-quantize and quantize on ``elements`` floats."""
    x = torch.randn(elements) * 3
    own = x.clone()
    grid, fp8 = Grid(IntFormat(8), torch.tensor(SCALE)), Grid(FP8_E4M3, torch.tensor(SCALE))
    contenders: dict[str, Callable[[], object]] = {
        "clone": x.clone,
        "torch.fake_quantize_per_tensor_affine": lambda: torch.fake_quantize_per_tensor_affine(x, SCALE, 0, -128, 127),
        "elementwise formula": lambda: elementwise(x),
        "bitsmith eager": lambda: kernels.fake_quantize(x, grid),
        "bitsmith eager, in place": lambda: kernels.fake_quantize_(own, grid),
        "bitsmith quantize to int8": lambda: kernels.quantize(x, grid),
        "bitsmith eager, E4M3": lambda: kernels.fake_quantize(x, fp8),
    }
    if with_compiled:
        contenders["bitsmith compiled"] = lambda: compiled(x, grid)
    kernels.use_compiled(False)
    return interleaved(contenders, rounds)


def statistic_times(elements: int, rounds: int) -> dict[str, float]:
    """One update and finish of each statistic on ``elements`` floats."""
    x = torch.randn(elements)

    def run(make: Callable[[], MinMax | Tails | Histogram]) -> Callable[[], object]:
        def call() -> object:
            statistic = make()
            statistic.update(x)
            return statistic.finish()

        return call

    contenders = {
        "min-max": run(MinMax),
        "percentile 99.999, count unknown": run(Tails),
        "percentile 99.999, count given": run(lambda: Tails(expected_count=elements)),
        "percentile 99.9, count given": run(lambda: Tails(99.9, expected_count=elements)),
        "histogram, 2048 bins": run(Histogram),
    }
    return interleaved(contenders, rounds)


def main() -> None:
    """Measure, print two tables, and write them as CSV where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=1 << 23)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-compiled", action="store_true")
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    rows = []
    kernel = kernel_times(arguments.elements, arguments.rounds, not arguments.no_compiled)
    statistic = statistic_times(2 * arguments.elements, arguments.rounds)
    for title, times, elements in (
        ("fake-quantize, 8 bit", kernel, arguments.elements),
        ("statistics", statistic, 2 * arguments.elements),
    ):
        unit = next(iter(times.values()))
        print(f"\n{title}: {elements:,} floats, {arguments.threads} threads, median of {arguments.rounds}")
        for name, milliseconds in times.items():
            print(f"  {name:40s} {milliseconds:8.2f} ms {milliseconds / unit:6.2f} x")
            rows.append((title, name, elements, arguments.threads, f"{milliseconds:.3f}", torch.__version__))
    if arguments.csv is not None:
        with arguments.csv.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("table", "contender", "elements", "threads", "milliseconds", "torch"))
            writer.writerows(rows)


if __name__ == "__main__":
    main()
