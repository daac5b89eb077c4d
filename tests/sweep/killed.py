"""A real sweep of the demo network, killed 20 times at random moments: ``python killed.py FOLDER``, for test_sweep.py.

A process of its own, because it forks: one that has threads must not. What it forks has the imports and the captured
model already, so that a start costs next to nothing and the kills fall all over the work.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

from bitsmith.sweep import Store, Sweep, run_sweep
from bitsmith.sweep.local import LocalEngine
from bitsmith.sweep.work import run_configuration

KILLS = 20
DIGITS = {
    "model": "bitsmith.demo:digits_net",
    "calibration": "bitsmith.demo.data:calibration",
    "validation": "bitsmith.demo.data:validation",
    "calibration_samples": 50,
    "validation_samples": 50,
}
GRID = {
    "weight-bit-width": [8, 6, 4, 3],
    "act-bit-width": [8, 6, 4],
    "act-quant-type": ["sym", "asym"],
    "target-backend": ["runtime", "layerwise"],
}
SWEEP = Sweep.model_validate({"models": [DIGITS], "grid": GRID})


def run(folder: Path) -> None:
    """The sweep, with two workers that are forked from here."""
    engine = LocalEngine(2)
    engine._context = multiprocessing.get_context("fork")
    run_sweep(SWEEP, folder, engine)


def start(folder: Path) -> int:
    """Begin the sweep as a process group of its own; returns its id."""
    child = os.fork()
    if not child:
        os.setsid()
        run(folder)
        os._exit(0)
    return child


def finished(folder: Path) -> dict[str, Any]:
    """The rows that are done, whole."""
    store = Store(folder)
    rows = {row["key"]: row for row in store.rows() if row["status"] == "done"}
    store.close()
    return rows


def main(folder: Path) -> None:
    """Kill, look, and go on, with a new store whenever one is finished; print the stores and the kills in each."""
    moments = random.Random(0)
    run_configuration(next(SWEEP.configurations()).work)
    run(folder / "whole")
    kills = [0]
    before: dict[str, Any] = {}
    while sum(kills) < KILLS:
        store = folder / str(len(kills))
        child = start(store)
        time.sleep(moments.uniform(0.0, 0.6))
        over = os.waitpid(child, os.WNOHANG)[0] == child
        if not over:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            kills[-1] += 1
        now = finished(store)
        assert all(now.get(key) == row for key, row in before.items()), "a finished row was lost or run again"
        before = {} if over else now
        kills += [0] if over else []
    run(folder / str(len(kills)))
    print(json.dumps(kills))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
