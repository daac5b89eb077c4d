"""The kernels in C: compiled at first use where a C compiler is at hand (a tenth of a second), else left out.

``BITSMITH_COMPILE=0`` or ``bitsmith.grid.kernels.use_compiled(False)`` leave them out too; ``1`` and True warn where
there is no compiler. They run on the threads of torch's own OpenMP, whose library is in the process already.
"""

from __future__ import annotations

import ctypes
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
import warnings
from functools import cache
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor

from ..grid import Grid, IntFormat, kernels
from ..grid.kernels import flat_view

_FLAGS = "-O3 -march=native -fopenmp -fno-math-errno -fno-trapping-math -ffp-contract=off -shared -fPIC"
_SERIAL = 32_768  # elements from which on another thread is worth waking
_POINTER, _COUNT, _FLOAT, _THREADS = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
_SIGNATURES = {
    "fake_quantize": (_POINTER, _POINTER, _COUNT, _FLOAT, _FLOAT, _FLOAT, _THREADS),
    "fake_quantize_watched": (_POINTER, _POINTER, _COUNT, _FLOAT, _FLOAT, _FLOAT, _POINTER, _THREADS),
    "fake_quantize_rows": (_POINTER, _POINTER, _COUNT, _COUNT, _POINTER, _POINTER, _POINTER, _THREADS),
    "learned_backward": (*(_POINTER,) * 4, _COUNT, _FLOAT, _FLOAT, _FLOAT, _POINTER, _THREADS),
    "learned_backward_rows": (*(_POINTER,) * 4, _COUNT, _COUNT, _POINTER, _POINTER, _FLOAT, _POINTER, _THREADS),
}
_log = logging.getLogger(__name__)
Number = Tensor | float


def as_number(value: Tensor) -> Number:
    """A single value on the CPU as a Python number, which costs less than a tensor; others in float32.

    >>> as_number(torch.tensor(3, dtype=torch.int32))
    3.0
    """
    return float(value) if value.numel() == 1 and value.device.type == "cpu" else value.float()


def _array(value: Number, scale: Tensor) -> Tensor:
    """One number for each scale."""
    return value.contiguous() if isinstance(value, Tensor) else torch.full_like(scale, value)


def fake_quantize(x: Tensor, grid: Grid, low: Number, high: Number) -> Tensor | None:
    """``grid.fake_quantize`` of a dense ``x``; None where it is not for these kernels. ``low`` and ``high``: codes."""
    library = _library_for(x, grid)
    if library is None or (shape := _rows(x, grid)) is None:
        return None
    out = torch.empty_like(x)
    ends = x.data_ptr(), out.data_ptr()
    if grid.scale.numel() == 1:
        numbers = float(grid.scale), float(low), float(high)
        library.fake_quantize(*ends, x.numel(), *numbers, _threads(x))
    else:
        arrays = [_array(v, grid.scale) for v in (grid.scale, low, high)]
        library.fake_quantize_rows(*ends, *shape, *(v.data_ptr() for v in arrays), _threads(x))
    return out


def fake_quantize_watched(x: Tensor, grid: Grid, low: float, high: float) -> tuple[Tensor, float, float] | None:
    """The same per tensor, with the least and the greatest ``x``, both NaN where some ``x`` is not finite."""
    library = _library_for(x, grid)
    if library is None or grid.scale.numel() != 1:
        return None
    out, seen = torch.empty_like(x), (ctypes.c_float * 3)()
    numbers = float(grid.scale), low, high
    library.fake_quantize_watched(x.data_ptr(), out.data_ptr(), x.numel(), *numbers, seen, _threads(x))
    return out, seen[0] + seen[2], seen[1] + seen[2]


def learned_backward(
    grad: Tensor, x: Tensor, out: Tensor, grid: Grid, low: Number, high: Number, rounding_counts: bool
) -> tuple[Tensor, Tensor, Tensor] | None:
    """The gradient of ``x``, and for each scale the sums of what moves it and of ``grad`` where values are clipped.

    ``low`` and ``high`` are real numbers. None where it is not for these kernels.
    """
    library = _library_for(x, grid)
    if library is None or (shape := _rows(x, grid)) is None or grad.dtype != torch.float32:
        return None
    alike = grad if grad.stride() == x.stride() else torch.empty_like(x).copy_(grad)
    passed, sums = torch.empty_like(x), torch.empty(grid.scale.numel(), 2, dtype=torch.float64)
    tensors = [v.data_ptr() for v in (alike, x, out, passed)]
    rounding = float(rounding_counts)
    if grid.scale.numel() == 1:
        bounds = float(low), float(high)
        library.learned_backward(*tensors, x.numel(), *bounds, rounding, sums.data_ptr(), _threads(x))
    else:
        arrays = [_array(v, grid.scale) for v in (low, high)]
        ends = [v.data_ptr() for v in arrays]
        library.learned_backward_rows(*tensors, *shape, *ends, rounding, sums.data_ptr(), _threads(x))
    moved, clipped = sums.float().unbind(1)
    return passed, moved.reshape(grid.scale.shape), clipped.reshape(grid.scale.shape)


def _library_for(x: Tensor, grid: Grid) -> ctypes.CDLL | None:
    plain = x.device.type == "cpu" and x.dtype == torch.float32 and type(x) in (Tensor, torch.nn.Parameter)
    if not plain or not isinstance(grid.format, IntFormat) or flat_view(x) is None or torch.compiler.is_compiling():
        return None
    wanted = kernels.compilation()
    return None if wanted is False else _library(bool(wanted))


def _rows(x: Tensor, grid: Grid) -> tuple[int, int] | None:
    """How many stretches of memory have a scale each, and their length; None where these are not stretches."""
    count = grid.scale.numel()
    if count == 1:
        return 1, x.numel()
    if not x.numel() or grid.axis is None:
        return None
    axis = grid.axis % x.ndim
    if grid.group_size is None:
        return (count, x.numel() // count) if axis == 0 and x.shape[0] == count else None
    whole = axis == x.ndim - 1 and x.shape[axis] % grid.group_size == 0 and x.is_contiguous()
    return (count, grid.group_size) if whole and count * grid.group_size == x.numel() else None


def _threads(x: Tensor) -> int:
    return max(1, min(torch.get_num_threads(), x.numel() // _SERIAL))


@cache
def _library(warn: bool) -> ctypes.CDLL | None:
    """Compile, load and try the kernels; None, with a warning where they were asked for, if that fails."""
    try:
        library = _compiled()
        if _is_right(library):
            return library
        reason = "they compute something else"
    except (OSError, subprocess.SubprocessError) as error:
        _log.debug("no C kernels", exc_info=True)
        reason = str(getattr(error, "stderr", None) or error).strip().splitlines()[0]
    if warn:
        warnings.warn(f"the C kernels of quantization-aware training are not used here ({reason})", stacklevel=5)
    return None


def _compiled() -> ctypes.CDLL:
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise OSError("no C compiler: install one, or set CC")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        built = str(Path(folder) / "kernels.so")
        source = str(files(__package__) / "kernels.c")
        command = [*shlex.split(compiler), *_FLAGS.split(), source, "-o", built, "-lm"]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
        library = ctypes.CDLL(built)
    for name, arguments in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, None
    return library


def _is_right(library: ctypes.CDLL) -> bool:
    """Whether ties, infinities and NaN come out as they do in eager mode."""
    x = torch.cat([torch.arange(-600, 600) * 0.025, torch.tensor([torch.inf, -torch.inf, torch.nan, 3e38])])
    out = torch.empty_like(x)
    library.fake_quantize(x.data_ptr(), out.data_ptr(), x.numel(), 0.05, -128.0, 127.0, 1)
    expected = torch.clamp(torch.round(x / 0.05), -128, 127) * 0.05
    return bool(((out == expected) | (out.isnan() & expected.isnan())).all())
