"""A sweep from its first row to its last."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from .grid import Sweep
from .local import Engine, LocalEngine
from .store import Store, export_rows

CSV_FILE = "sweep.csv"
_BEAT = 2.0  # seconds between signs of life
Watch = Callable[[dict[str, int]], None]


def run_sweep(
    sweep: Sweep, folder: str | Path, engine: Engine | None = None, *, retry_failed: bool = False,
    watch: Watch = lambda _: None,
) -> dict[str, int]:  # fmt: skip
    """Run what is not finished yet; returns how many rows have which status.

    ``engine`` is a ``LocalEngine`` with a worker for each core, if None is given. Scripts that call this need
    ``if __name__ == "__main__":``, since workers import them.

    Killed at any moment, it goes on when it is run again. On an exception, Ctrl-C included, running rows are given
    back and what is finished stays. ``watch`` is told the counts whenever they change.
    """
    store = Store(folder)
    engine = engine or LocalEngine(os.cpu_count() or 1)
    running = 0
    try:
        store.register(sweep.configurations(), retry_failed=retry_failed)
        store.alive()
        while True:
            while running < engine.slots and (claimed := store.claim()) is not None:
                engine.submit(*claimed)
                running += 1
            watch(counts := store.counts())
            # Rows that another sweep runs may come back, should it be killed: stay until none is left.
            if not running and not counts.get("pending") and not counts.get("running"):
                break
            for key, outcome in _wait(engine, running):
                store.finish(key, outcome)
                running -= 1
            store.alive()
        export_rows(store.rows(), Path(folder) / CSV_FILE)
        return counts
    finally:
        engine.close()
        store.give_back()
        store.close()


def _wait(engine: Engine, running: int) -> list[tuple[str, dict[str, object]]]:
    if running:
        return engine.wait(_BEAT)
    time.sleep(_BEAT)
    return []
