"""Time of a sweep of 200 configurations beside as many runs of ``bitsmith evaluate``, on ResNet-20.

    python -m benchmarks.sweep [--evaluations 6] [--part 24] [--first 0] [--whole] [--folder DIR] [--csv FILE]

1,000 CIFAR-10 training images calibrate, 2,000 test images judge. ``bitsmith evaluate`` runs on all cores, one process
after the other, for configurations drawn evenly from the 200; ``bitsmith sweep run`` takes every n-th of them with one
worker for each core. Both are what a user types, start to end. ``--whole`` runs all 200 in the sweep instead of a
part. The evaluations are spread around the sweep, so that both meet the same load. With ``--folder`` everything is
kept there, and a run that was stopped goes on: what it had measured counts, and so does the sweep's second start.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml

import bitsmith
from benchmarks import data
from benchmarks.accuracy import commit
from benchmarks.rows import append
from bitsmith.files import write_text
from bitsmith.sweep import Store, Sweep

COMMAND = [sys.executable, "-W", "ignore", "-c", "from bitsmith.cli import main; main()"]
MODEL = "benchmarks.nets.resnet_cifar:resnet20"
WIDTHS = {"weight-bit-width": [8, 6, 5, 4, 3], "act-bit-width": [8, 6]}
PLACES = {"target-backend": ["runtime", "layerwise"], "act-quant-type": ["asym", "sym"]}
FIELDS = ("configurations", "evaluations", "evaluate_s", "sweep_runs", "sweep_s", "evaluate_200_s",
          "sweep_200_s", "ratio", "cores", "commit", "bitsmith")  # fmt: skip


def configurations() -> list[dict[str, Any]]:
    """200 of them: bits, granularity, placement and symmetry with and without GPTQ, and equalized ones."""
    axes = WIDTHS | PLACES
    every = [dict(zip(axes, values)) for values in itertools.product(*axes.values())]
    channels = [{**one, "weight-quant-granularity": g} for one in every for g in ("per_channel", "per_tensor")]
    equalized = [{**one, "weight-quant-granularity": "per_tensor", "graph-eq-iterations": 20} for one in every]
    return [*channels, *equalized, *({**one, "gptq": True} for one in channels)]


def write_data(folder: Path) -> dict[str, str]:
    """The images as arrays, as a user has them."""
    paths = {}
    for split, count in (("train", 1000), ("test", 2000)):
        images, labels = data.cifar10(split)
        paths[split] = str(folder / f"{split}.npz")
        np.savez(paths[split], x=images[:count], y=labels[:count])
    weights = str(data.data_file("cifar10_resnet20_akamaster.safetensors"))
    return {"weights": weights, "calibration": paths["train"], "validation": paths["test"]}


class Measured:
    """Seconds by what took them, on the disk while it runs: a command that is stopped leaves what it took."""

    def __init__(self, file: Path, plan: dict[str, Any]) -> None:
        self._file = file
        self._kept = json.loads(file.read_text()) if file.exists() else {"plan": plan, "seconds": {}, "done": []}
        if self._kept["plan"] != plan:
            raise SystemExit(f"{file} holds another measurement, {self._kept['plan']}: give another --folder")

    def timed(self, name: str, arguments: list[str]) -> float:
        """Seconds that a command takes, or took, over all its starts."""
        before = self._kept["seconds"].get(name, 0.0)
        if name in self._kept["done"]:
            return float(before)
        start = time.perf_counter()
        with (
            tempfile.TemporaryFile("w+") as said,
            subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.DEVNULL, stderr=said) as running,
        ):
            while running.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    running.wait(2.0)
                self._keep(name, before + time.perf_counter() - start)
            said.seek(0)
            if running.returncode:
                raise SystemExit(said.read())
        self._kept["done"].append(name)
        self._keep(name, self._kept["seconds"][name])
        print(f"{name}: {self._kept['seconds'][name]:.1f} s", file=sys.stderr, flush=True)
        return float(self._kept["seconds"][name])

    def _keep(self, name: str, seconds: float) -> None:
        self._kept["seconds"][name] = seconds
        write_text(self._file, json.dumps(self._kept, indent=1))


def evaluate(measured: Measured, paths: dict[str, str], options: dict[str, Any]) -> float:
    """One ``bitsmith evaluate``."""
    named = {name: value for name, value in options.items() if value is not True}
    flags = [f"--{name}" for name, value in options.items() if value is True]
    given = itertools.chain.from_iterable((f"--{name}", str(value)) for name, value in (paths | named).items())
    return measured.timed(f"evaluate {options}", ["evaluate", MODEL, *given, *flags, "--quiet"])


def sweep(measured: Measured, paths: dict[str, str], runs: list[dict[str, Any]], folder: Path) -> float:
    """One ``bitsmith sweep run`` with a worker for each core."""
    described = Sweep.model_validate({"models": [{"model": MODEL, **paths}], "runs": runs})
    file = folder / "grid.yaml"
    file.write_text(yaml.safe_dump(described.model_dump(mode="json", exclude_defaults=True)))
    found = measured.timed("sweep", ["sweep", "run", str(file), "--output", str(folder / "sweep"), "--quiet"])
    rows = Store(folder / "sweep").rows()
    assert [row["status"] for row in rows] == ["done"] * len(runs), [row["reason"] for row in rows]
    return found


def main() -> None:
    """Measure, print, and write CSV where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--evaluations", type=int, default=6)
    parser.add_argument("--part", type=int, default=24)
    parser.add_argument("--first", type=int, default=0, help="which configuration to begin with")
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--folder", type=Path, help="keep the store and the times here, and go on from them")
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    all_of_them = configurations()
    count = len(all_of_them)
    evenly = lambda n: [all_of_them[(args.first + i * count // n) % count] for i in range(n)]  # noqa: E731
    runs, alone = all_of_them if args.whole else evenly(args.part), evenly(args.evaluations)
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        paths = write_data(folder)
        measured = Measured(folder / "seconds.json", {"runs": len(runs), "alone": len(alone), "first": args.first})
        half = len(alone) // 2
        each = [evaluate(measured, paths, options) for options in alone[:half]]
        swept = sweep(measured, paths, runs, folder)
        each += [evaluate(measured, paths, options) for options in alone[half:]]
    one = sum(each) / len(each)
    row = {
        "configurations": count, "evaluations": len(each), "evaluate_s": round(one, 2), "sweep_runs": len(runs),
        "sweep_s": round(swept, 1), "evaluate_200_s": round(one * count),
        # of a part, the start is counted as often as the part goes into the whole
        "sweep_200_s": round(swept * count / len(runs)), "ratio": round(swept / len(runs) / one, 3),
        "cores": os.cpu_count(), "commit": commit(), "bitsmith": bitsmith.__version__,
    }  # fmt: skip
    print(", ".join(f"{name} {value}" for name, value in row.items()))
    if args.csv:
        append(args.csv, FIELDS, row)


if __name__ == "__main__":
    main()
