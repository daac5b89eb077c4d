"""Workers on this machine: processes with one thread each."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from typing import Any, Protocol

Outcome = dict[str, Any]
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class Engine(Protocol):
    """Where configurations are run: at most ``slots`` at a time."""

    slots: int

    def submit(self, key: str, work: dict[str, Any]) -> None:
        """Start one; there must be a free slot."""

    def wait(self, seconds: float) -> list[tuple[str, Outcome]]:
        """What has finished, after ``seconds`` at most."""

    def close(self) -> None:
        """Stop all workers."""


class LocalEngine:
    """``workers`` processes that compute on ``device``.

    One that dies is replaced, and what it did is tried ``retries`` times more.
    """

    def __init__(self, workers: int, retries: int = 2, device: str = "cpu") -> None:
        self.slots = workers
        self._device = device
        self._retries = retries
        self._context = _context()
        self._idle: list[tuple[BaseProcess, Connection]] = []
        self._busy: dict[Connection, tuple[BaseProcess, str, dict[str, Any], int]] = {}

    def submit(self, key: str, work: dict[str, Any], attempt: int = 0) -> None:
        """Hand ``work`` to a worker, the last one that was idle first."""
        process, pipe = self._idle.pop() if self._idle else self._start()
        with suppress(OSError):  # it died meanwhile: wait() notices
            pipe.send({**work, "device": self._device})
        self._busy[pipe] = (process, key, work, attempt)

    def wait(self, seconds: float) -> list[tuple[str, Outcome]]:
        """Collect outcomes; a pipe that ends without one is that of a worker that died."""
        finished: list[tuple[str, Outcome]] = []
        for pipe in wait(list(self._busy), seconds):
            assert isinstance(pipe, Connection)
            process, key, work, attempt = self._busy.pop(pipe)
            try:
                outcome = pipe.recv()
            except (EOFError, OSError):
                process.join()
                if attempt < self._retries:
                    self.submit(key, work, attempt + 1)
                else:
                    finished.append((key, {"error": _death(process.exitcode, attempt + 1)}))
                continue
            self._idle.append((process, pipe))
            finished.append((key, outcome))
        return finished

    def close(self) -> None:
        """End the workers, busy ones at once."""
        processes = [process for process, _ in self._idle] + [entry[0] for entry in self._busy.values()]
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()
        self._idle, self._busy = [], {}

    def _start(self) -> tuple[BaseProcess, Connection]:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(theirs,), daemon=True)
        before = {name: os.environ.get(name) for name in _THREADS}
        os.environ.update(dict.fromkeys(_THREADS, "1"))  # read once, when the process loads its libraries
        try:
            process.start()
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
        theirs.close()  # so that its end is the end of the pipe
        return process, ours


def _context() -> SpawnContext | ForkServerContext:
    """How processes start; on Linux imports are done once, in one without threads that the workers are forked from."""
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    multiprocessing.set_forkserver_preload(["bitsmith.sweep.work"])
    return multiprocessing.get_context("forkserver")


def _serve(pipe: Connection) -> None:
    """Do what arrives until the sweep is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the sweep's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()
    from .work import run_configuration

    with suppress(EOFError, OSError):
        while True:
            pipe.send(run_configuration(pipe.recv()))


def _end_with_parent() -> None:
    """A sweep that was killed leaves nobody to compute for."""
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)


def _death(exitcode: int | None, attempts: int) -> str:
    how = f"signal {-exitcode}" if exitcode is not None and exitcode < 0 else f"exit status {exitcode}"
    return (
        f"the worker died {attempts} times ({how}): it was killed from outside, for want of memory perhaps "
        "(fewer --workers need less), or a library crashed"
    )
