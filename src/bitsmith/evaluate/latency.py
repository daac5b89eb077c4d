"""How long several callables take, measured in turns so that a busy moment strikes all of them alike."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field

from ..errors import VerificationError


class Latency(BaseModel):
    """Times of one callable, in milliseconds."""

    model_config = ConfigDict(extra="forbid")

    median_ms: float
    fastest_ms: float
    rounds: int
    ratio: float = Field(default=1.0, description="median of the first callable over this one's: above 1 is faster")


def interleaved_latency(
    functions: Mapping[str, Callable[[], Any]],
    *,
    seconds: float = 3.0,
    warmup: int = 3,
    most_rounds: int = 300,
) -> dict[str, Latency]:
    """Median time of each function, called in turns for about ``seconds`` in all (five rounds at least).

    The order turns round by round, so that none always follows the same other; ``ratio`` is relative to the
    first.

    >>> slow, fast = (lambda: sum(range(90_000))), (lambda: sum(range(9)))
    >>> times = interleaved_latency({"slow": slow, "fast": fast}, seconds=0.05)
    >>> times["fast"].ratio > 1
    True
    """
    for function in functions.values():
        for _ in range(warmup):
            function()
    names = list(functions)
    times: dict[str, list[float]] = {name: [] for name in names}
    deadline = time.perf_counter() + seconds
    for turn in range(most_rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            functions[name]()
            times[name].append(1000.0 * (time.perf_counter() - start))
        if turn >= 4 and time.perf_counter() > deadline:
            break
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        name: Latency(
            median_ms=medians[name],
            fastest_ms=min(values),
            rounds=len(values),
            ratio=medians[names[0]] / medians[name] if medians[name] else 1.0,
        )
        for name, values in times.items()
    }


def onnxruntime_session(path: str | os.PathLike[str], threads: int | None = None) -> Any:
    """An onnxruntime session of ``path`` on the CPU; ``threads`` None is onnxruntime's own choice."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    if threads is not None:
        options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # its warnings about constant folding say nothing to the user
    try:
        return onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions have no common base but Exception
        raise VerificationError(f"onnxruntime does not take {os.fspath(path)!r}: {error}") from error


def onnxruntime_runner(session: Any, inputs: Mapping[str, Any]) -> Callable[[], Any]:
    """A function without arguments that runs ``session`` once on ``inputs``."""
    feeds = dict(inputs)
    return lambda: session.run(None, feeds)


def latency_of_files(
    files: Mapping[str, Path], inputs: tuple[Any, ...], *, batches: tuple[int, ...], seconds: float
) -> dict[str, dict[str, Latency]]:
    """Times of ONNX files in onnxruntime, or TorchScript files in torch, for each batch size, on torch's threads.

    Where a file fixes its batch, it is timed for that one only.
    """
    open_file = _opened_script if all(file.suffix == ".pt" for file in files.values()) else _opened_onnx
    opened = {name: open_file(file) for name, file in files.items()}
    sizes = next(((size,) for size, _ in opened.values() if size is not None), batches)
    found = {}
    for size in sizes:
        arrays = [np.ascontiguousarray(np.resize(value.numpy(), (size, *value.shape[1:]))) for value in inputs]
        runners = {name: make(arrays) for name, (_, make) in opened.items()}
        found[str(size)] = interleaved_latency(runners, seconds=seconds / len(sizes))
    return found


_Opened = tuple[int | None, Callable[[list[Any]], Callable[[], Any]]]  # its batch, if fixed, and what runs it on arrays


def _opened_onnx(path: Path) -> _Opened:
    session = onnxruntime_session(path, torch.get_num_threads())
    size = session.get_inputs()[0].shape[0]
    names = [entry.name for entry in session.get_inputs()]
    return size if isinstance(size, int) else None, lambda arrays: onnxruntime_runner(session, dict(zip(names, arrays)))


def _opened_script(path: Path) -> _Opened:
    from ..engines import freeze, load_script

    program = freeze(load_script(path))

    def runner(arrays: list[Any]) -> Callable[[], Any]:
        tensors = [torch.from_numpy(array) for array in arrays]

        def run() -> None:
            with torch.no_grad():
                program(*tensors)

        return run

    return None, runner
