"""Workers on a Ray cluster. They read models and data by path: these must be there on every machine."""

from __future__ import annotations

import os
from typing import Any

from ..errors import BitsmithError, MissingExtraError
from .local import Outcome


class RayEngine:
    """``workers`` tasks at a time, each with one thread and ``gpus`` of a GPU, on which it then computes.

    A task whose worker dies is tried ``retries`` times more.
    """

    def __init__(self, workers: int, address: str | None = None, gpus: float = 0.0, retries: int = 2) -> None:
        try:
            import ray
        except ImportError as error:
            raise MissingExtraError("--engine ray needs Ray: pip install 'bitsmith[sweep]'") from error
        self._ray = ray
        self.slots = workers
        self._running: dict[Any, str] = {}
        self._device = "cuda" if gpus else "cpu"
        self._ours = not ray.is_initialized()
        if self._ours:
            where: dict[str, Any] = {"address": address} if address else {"num_cpus": workers, "address": "local"}
            try:
                ray.init(include_dashboard=None if address else False, log_to_driver=False, **where)
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise BitsmithError(f"no Ray cluster answers at {address!r}: {error}") from error
        variables = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        if (path := os.environ.get("PYTHONPATH")) is not None and address is None:
            variables["PYTHONPATH"] = path
        self._task = ray.remote(_run).options(
            num_cpus=1, num_gpus=gpus, max_retries=retries, runtime_env={"env_vars": variables}
        )

    def submit(self, key: str, work: dict[str, Any]) -> None:
        """Start a task; paths in ``work`` are relative to this folder."""
        self._running[self._task.remote({**work, "device": self._device}, os.getcwd())] = key

    def wait(self, seconds: float) -> list[tuple[str, Outcome]]:
        """What has finished; a task whose workers all died is a failure."""
        if not self._running:
            return []
        done, _ = self._ray.wait(list(self._running), num_returns=1, timeout=seconds)
        finished = []
        for reference in done:
            try:
                outcome = self._ray.get(reference)
            except self._ray.exceptions.RayError as error:
                outcome = {"error": f"Ray: {str(error).strip().splitlines()[0]}"}
            finished.append((self._running.pop(reference), outcome))
        return finished

    def close(self) -> None:
        """Cancel what runs, and leave the cluster."""
        for reference in self._running:
            self._ray.cancel(reference, force=True)
        self._running = {}
        if self._ours:
            self._ray.shutdown()


def _run(work: dict[str, Any], folder: str) -> Outcome:
    os.chdir(folder)
    from bitsmith.sweep.work import run_configuration

    return run_configuration(work)
