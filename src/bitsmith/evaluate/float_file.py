"""The float model as a file: what the quantized file's size and speed are held against."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import ExportError
from ..files import atomic_write


def export_float_onnx(model: nn.Module, inputs: tuple[Any, ...], path: str | Path) -> Path:
    """Write ``model`` in float with a free batch dimension where it allows one; by PyTorch's own exporter."""
    last: Exception | None = None
    for dynamic in (True, False):
        shapes = tuple({0: torch.export.Dim.DYNAMIC} for _ in inputs) if dynamic else None
        try:
            with _quiet(), torch.no_grad():
                program = torch.onnx.export(
                    model, inputs, dynamo=True, dynamic_shapes=shapes, verbose=False, external_data=False
                )
            assert program is not None
            with atomic_write(path) as temporary:
                program.save(temporary, external_data=False)
            return Path(path)
        # The exporter's own errors, and those of the model's code that it traces, have no common base.
        except Exception as error:
            last = error
    raise ExportError(
        f"the float model cannot be written as ONNX, so there is nothing to compare speed and size with: {last}"
    ) from last


def export_float_script(model: nn.Module, inputs: tuple[Any, ...], path: str | Path) -> Path:
    """Write ``model`` in float as TorchScript, traced."""
    from ..engines import freeze, save_script

    try:
        with _quiet(), torch.no_grad():
            return save_script(freeze(torch.jit.trace(model, inputs, check_trace=False)), path)  # type: ignore[no-untyped-call]
    except Exception as error:  # torch.jit's errors, and those of the model's code, have no common base
        raise ExportError(
            f"torch.jit cannot trace the float model, so there is nothing to compare speed and size with: {error}"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints its steps and logs advice for its developers."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "torch.export", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
