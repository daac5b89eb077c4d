"""Float accuracy against the table of the data's README: `python -m benchmarks.nets [NAME ...]`."""

from __future__ import annotations

import sys
import time

from benchmarks.nets import load, names, top1


def main(wanted: list[str]) -> None:
    """Print one line per network; networks with random weights are left out unless named."""
    print(f"{'network':20s} {'float top-1':>11s} {'reference':>10s} {'judged':>8s} {'seconds':>8s}")
    for name in wanted or [name for name in names() if name not in ("resnet18", "mobilenet_v2")]:
        start = time.perf_counter()
        model, calibration, test, info = load(name)
        judged = top1(model, test)
        over = top1(model, calibration + test) if info.reference_over == "all" else judged
        reference = "-" if info.reference_top1 is None else f"{info.reference_top1:.2f}"
        seconds = time.perf_counter() - start
        print(f"{name:20s} {over:11.2f} {reference:>10s} {judged:8.2f} {seconds:8.1f}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
