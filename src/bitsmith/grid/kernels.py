"""The memory-speed path under ``grid.functional``: one in-place eager kernel and one compiled kernel.

Both compute the definition in ``functional`` bit for bit. The eager path allocates the output once and runs
every operation in place over pieces that stay in cache, which on a CPU costs about one copy; it needs no
compiler and is the default. The compiled path (``torch.compile``) is used on CPU tensors once asked for, by
``use_compiled(True)`` or ``BITSMITH_COMPILE=1``; where no working compiler is found the eager path stays.

Since ``code - zero_point`` is all that dequantization needs, fake-quantize clamps ``round(x / scale)`` to
``qmin - zero_point .. qmax - zero_point`` and never adds the zero point: the same numbers, two passes fewer.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..errors import RecipeError
from .formats import FloatFormat, IntFormat
from .grid import Grid

FLOAT32_BITS = 24
"""Integers of up to this many bits are exact in float32, and so is their clamped sum with a zero point."""

_CHUNK_PER_THREAD = 1 << 17
# Adding this and taking it away rounds |x| <= 2**22 half to even. Small tensors are rounded so: torch splits
# round_ among its threads from 2,048 elements on, and on a busy machine waiting for them costs milliseconds.
_MAGIC = 1.5 * 2.0**23
_SERIAL = 32_768  # from here on torch splits every operation
_log = logging.getLogger(__name__)
_compiled_override: bool | None = None
_Scalar = Tensor | float


class _Law(NamedTuple):
    """A grid's numbers in the shape the kernel wants: Python floats for a per-tensor grid on the CPU."""

    scale: _Scalar
    low: _Scalar
    high: _Scalar
    zero_point: _Scalar
    dtype: torch.dtype
    format: FloatFormat | None = None
    short: bool = False  # all of low .. high is within 2**22 of 0

    def rows(self, start: int, stop: int, total: int) -> _Law:
        """The law of rows ``start:stop`` of dimension 0."""

        def cut(value: _Scalar) -> _Scalar:
            per_row = isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == total > 1
            return value[start:stop] if isinstance(value, Tensor) and per_row else value

        return self._replace(
            scale=cut(self.scale), low=cut(self.low), high=cut(self.high), zero_point=cut(self.zero_point)
        )


def use_compiled(on: bool | None) -> None:
    """Choose the compiled path (True), the eager path (False), or what ``BITSMITH_COMPILE`` says (None).

    >>> use_compiled(False)
    >>> use_compiled(None)
    """
    global _compiled_override
    _compiled_override = on


def compilation() -> bool | None:
    """What ``use_compiled``, else ``BITSMITH_COMPILE``, asks for; None: neither.

    >>> use_compiled(True)
    >>> compilation()
    True
    >>> use_compiled(None)
    """
    if _compiled_override is not None:
        return _compiled_override
    return {"0": False, "1": True, "auto": None}[_environment()]


def fake_quantize(x: Tensor, grid: Grid, watch: Callable[[Tensor], None] | None = None) -> Tensor:
    """Fake-quantize into a new tensor of ``x``'s shape, dtype and memory layout, without a gradient.

    ``watch`` is shown ``x`` in float32, piece by piece while a piece is in the cache.

    >>> fake_quantize(torch.tensor([0.6, 100.0]), Grid(IntFormat(8), torch.tensor(0.5)))
    tensor([ 0.5000, 63.5000])
    """
    if x.dtype != torch.float32:
        return fake_quantize(x.float(), grid, watch).to(x.dtype)
    if torch.compiler.is_compiling():
        if watch is not None:
            watch(x)
        return _formula(x, grid)
    with torch.no_grad():
        if watch is None and (kernel := _compiled_kernel(x, grid)) is not None:
            blocks, law = _law(x.contiguous(), grid, scalars=False)
            return kernel(*_compiled_arguments(blocks, law)).reshape(x.shape)
        out = torch.empty_like(x)
        _eager(x, out, grid, watch)
        return out


def fake_quantize_(x: Tensor, grid: Grid) -> Tensor:
    """Fake-quantize in place: for a caller that owns ``x``, which is overwritten and returned.

    ``x`` is a float32 tensor that needs no gradient.

    >>> x = torch.tensor([0.6, 100.0])
    >>> fake_quantize_(x, Grid(IntFormat(8), torch.tensor(0.5))) is x
    True
    """
    if x.dtype != torch.float32:
        return x.copy_(fake_quantize(x.float(), grid))
    with torch.no_grad():
        _eager(x, x, grid)
    return x


def quantize(x: Tensor, grid: Grid) -> Tensor:
    """The codes of ``x`` in one pass: ``grid.code_dtype``, ``x``'s shape and memory layout.

    >>> quantize(torch.tensor([0.6, 100.0]), Grid(IntFormat(8), torch.tensor(0.5)))
    tensor([  1, 127], dtype=torch.int8)
    """
    x = x.float()
    if torch.compiler.is_compiling():
        blocks, law = _law(x, grid, scalars=False)
        code = _round(blocks / law.scale, law) + law.zero_point
        return code.to(grid.code_dtype).reshape(x.shape)
    with torch.no_grad():
        out = torch.empty_like(x, dtype=grid.code_dtype)
        for piece, target, law in _pieces(x, out, grid):
            code = _round(torch.div(piece, law.scale), law)
            if isinstance(law.zero_point, Tensor) or law.zero_point != 0:
                code.add_(law.zero_point)
            target.copy_(code)
    return out


def inside(x: Tensor, grid: Grid) -> Tensor:
    """Where ``x`` is rounded but not clipped: a bool tensor of ``x``'s shape.

    >>> inside(torch.tensor([0.6, 100.0]), Grid(IntFormat(8), torch.tensor(0.5)))
    tensor([ True, False])
    """
    blocks, law = _law(x.detach().float(), grid, scalars=False)
    unclipped = law._replace(low=-math.inf, high=math.inf, short=False)
    code = _round(blocks / law.scale, unclipped)
    return ((code >= law.low) & (code <= law.high)).reshape(x.shape)


def broadcast(x: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor | None]:
    """``x`` (as a view, split into groups if the grid has groups), scale and zero point, ready to broadcast.

    Per channel, scale gets the shape ``(1, .., channels, .., 1)``; per group, ``x`` becomes
    ``(.., groups, group_size, ..)`` and scale ``(.., groups, 1, ..)``. A last group may be shorter than the
    others; then scale is repeated to ``x``'s shape instead. Raises ``RecipeError`` when the shapes disagree.

    >>> grid = Grid(IntFormat(4), torch.ones(2, 3), axis=1, group_size=2)
    >>> blocks, scale, _ = broadcast(torch.zeros(2, 6), grid)
    >>> tuple(blocks.shape), tuple(scale.shape)
    ((2, 3, 2), (2, 3, 1))
    """
    scale = grid.scale.to(x.device)
    zero_point = None if grid.zero_point is None else grid.zero_point.to(x.device)
    if scale.ndim == 0:
        return x, scale, zero_point
    axis = _axis(x, grid)
    if grid.group_size is None:
        shape = [1] * x.ndim
        shape[axis] = -1
        return x, scale.reshape(shape), None if zero_point is None else zero_point.reshape(shape)
    length, size = x.shape[axis], grid.group_size
    if length % size == 0:
        blocks = x.unflatten(axis, (length // size, size))  # type: ignore[no-untyped-call]
        per_group = None if zero_point is None else zero_point.unsqueeze(axis + 1)
        return blocks, scale.unsqueeze(axis + 1), per_group

    def repeat(value: Tensor) -> Tensor:
        return value.repeat_interleave(size, dim=axis).narrow(axis, 0, length)

    return x, repeat(scale), None if zero_point is None else repeat(zero_point)


def _axis(x: Tensor, grid: Grid) -> int:
    """The grid's axis as a non-negative index, after checking that the scale fits ``x``."""
    scale = grid.scale
    if grid.axis is not None and -x.ndim <= grid.axis < x.ndim:
        axis = grid.axis % x.ndim
        expected = [x.shape[axis]]
        if grid.group_size is not None:
            expected = list(x.shape)
            expected[axis] = -(-x.shape[axis] // grid.group_size)
        if list(scale.shape) == expected or (grid.group_size is None and scale.numel() == 1):
            return axis
    raise RecipeError(
        f"a scale of shape {tuple(scale.shape)} along axis {grid.axis} (group size {grid.group_size}) does "
        f"not fit a tensor of shape {tuple(x.shape)}: a channel grid needs one scale per index of its axis, "
        "a group grid the tensor's shape with that axis divided by the group size"
    )


def _law(x: Tensor, grid: Grid, *, scalars: bool) -> tuple[Tensor, _Law]:
    """``x`` ready to broadcast, and the law; with ``scalars`` per-tensor numbers become Python floats.

    On CUDA they stay tensors: reading them would synchronise, and torch divides by a Python number there
    through its reciprocal, which rounds twice.
    """
    blocks, scale, zero_point = broadcast(x, grid)
    if isinstance(grid.format, FloatFormat):
        limit = _largest_value(grid.format)
        law = _Law(scale, -limit, limit, 0.0, torch.float32, grid.format)
    else:
        dtype = torch.float32 if grid.format.bits <= FLOAT32_BITS else torch.float64
        qmin, qmax = float(grid.format.qmin), float(grid.format.qmax)
        short = grid.format.bits <= 22
        if zero_point is None:
            law = _Law(scale, qmin, qmax, 0.0, dtype, short=short)
        else:
            zero_point = zero_point.to(dtype)
            law = _Law(scale, qmin - zero_point, qmax - zero_point, zero_point, dtype, short=short)
    if scalars and scale.ndim == 0:
        law = law._replace(
            scale=float(scale), low=float(law.low), high=float(law.high), zero_point=float(law.zero_point)
        )
    return blocks, law


def _round(ratio: Tensor, law: _Law) -> Tensor:
    """``code - zero_point`` from ``x / scale``, overwriting ``ratio`` where its dtype allows."""
    if law.format is not None:
        return _round_to_float(ratio, law.format, law.low, law.high)
    code = _clamp_(ratio.to(law.dtype), law.low, law.high)  # the bounds are integers: rounding may follow
    if law.short and code.numel() < _SERIAL:
        return code.add_(_MAGIC).sub_(_MAGIC)
    return code.round_()


def _clamp_(x: Tensor, low: _Scalar, high: _Scalar) -> Tensor:
    """``clamp_``; bounds that are tensors go one after the other, since torch's kernel for both is slow."""
    if isinstance(low, Tensor) and isinstance(high, Tensor) and not torch.compiler.is_compiling():
        return torch.maximum(torch.minimum(x, high, out=x), low, out=x)
    return x.clamp_(low, high)  # type: ignore[arg-type]


def _largest_value(fmt: FloatFormat) -> float:
    """The greatest number of the format that float32 holds too."""
    return min(fmt.max_value, (2.0 - 2.0**-fmt.mantissa_bits) * 2.0**127)


def _round_to_float(ratio: Tensor, fmt: FloatFormat, low: _Scalar, high: _Scalar) -> Tensor:
    """Round to the minifloat ``fmt``, half to even, saturating; overwrites a float32 ``ratio``.

    Adding and subtracting ``1.5 * 2**p * step`` (p: the mantissa bits of the arithmetic) rounds to a multiple
    of ``step`` in hardware. The step is the power of two of the value's own exponent, read from its bits and
    not below the format's smallest exponent, over ``2**mantissa_bits``. float32 has room for that unless the
    format is nearly float32 itself; then float64 does it.
    """
    narrow = fmt.exponent_bits < 8 and fmt.mantissa_bits <= 16
    value = ratio if narrow else ratio.double()
    bits, mask, p = (torch.int32, 0x7F80_0000, 23) if narrow else (torch.int64, 0x7FF0_0000_0000_0000, 52)
    value = _clamp_(value, low, high)
    magic = (value.view(bits) & mask).view(value.dtype)
    magic = magic.clamp_(min=2.0**fmt.min_exponent).mul_(1.5 * 2.0 ** (p - fmt.mantissa_bits))
    return value.add_(magic).sub_(magic).to(ratio.dtype)


def _eager(x: Tensor, out: Tensor, grid: Grid, watch: Callable[[Tensor], None] | None = None) -> None:
    """Fake-quantize ``x`` into ``out`` (which may be ``x``) piece by piece, in place."""
    for piece, target, law in _pieces(x, out, grid):
        if watch is not None:
            watch(piece)
        torch.div(piece, law.scale, out=target)
        code = _round(target, law)
        if code is not target:
            target.copy_(code)
        target.mul_(law.scale)


def _pieces(x: Tensor, out: Tensor, grid: Grid) -> Iterator[tuple[Tensor, Tensor, _Law]]:
    """Matching views of ``x`` and ``out`` that fit the cache, with the law for each."""
    size = _CHUNK_PER_THREAD * torch.get_num_threads()
    on_cpu = x.device.type == "cpu"
    blocks, law = _law(x, grid, scalars=on_cpu)
    targets = out if blocks.ndim == x.ndim else out.view(blocks.shape)
    if not on_cpu or x.numel() <= size:
        yield blocks, targets, law
        return
    flat, flat_out = flat_view(x), flat_view(out)
    if grid.scale.ndim == 0 and flat is not None and flat_out is not None and x.stride() == out.stride():
        for start in range(0, flat.numel(), size):
            yield flat[start : start + size], flat_out[start : start + size], law
        return
    total = blocks.shape[0]
    rows = max(1, size * total // x.numel())
    for start in range(0, total, rows):
        stop = min(start + rows, total)
        yield blocks[start:stop], targets[start:stop], law.rows(start, stop, total)


def flat_view(x: Tensor) -> Tensor | None:
    """A 1-dimensional view of all elements in memory order, or None where there are gaps."""
    if x.is_contiguous():
        return x.view(-1)
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return x.permute(0, 2, 3, 1).reshape(-1)
    return None


def _formula(x: Tensor, grid: Grid) -> Tensor:
    """The definition out of place, for tracers."""
    blocks, law = _law(x, grid, scalars=False)
    law = law._replace(short=False)  # how to round may not depend on the size: a tracer would fix the batch by it
    return (_round(blocks / law.scale, law).to(torch.float32) * law.scale).reshape(x.shape)


def _compiled_integer(x: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return torch.clamp(torch.round(x / scale), low, high) * scale


def _compiled_float(x: Tensor, scale: Tensor, low: Tensor, high: Tensor, smallest: Tensor, factor: Tensor) -> Tensor:
    value = torch.clamp(x / scale, low, high)
    magic = (value.view(torch.int32) & 0x7F80_0000).view(torch.float32)
    magic = torch.maximum(magic, smallest) * factor
    return (value + magic - magic) * scale


def _compiled_arguments(x: Tensor, law: _Law) -> list[Tensor]:
    """The kernel's operands, all tensors, so that other numbers do not mean another compilation."""
    low, high = (torch.as_tensor(v, dtype=torch.float32) for v in (law.low, law.high))
    scale = torch.as_tensor(law.scale)
    arguments = [x.view(-1) if scale.ndim == 0 else x, scale, low, high]
    if law.format is not None:
        factor = 1.5 * 2.0 ** (23 - law.format.mantissa_bits)
        arguments += [torch.tensor(2.0**law.format.min_exponent), torch.tensor(factor)]
    return arguments


def _compiled_kernel(x: Tensor, grid: Grid) -> Callable[..., Tensor] | None:
    """The compiled kernel for this call, or None where the eager path is to be taken."""
    if not compilation() or x.device.type != "cpu" or x.numel() == 0:
        return None
    if isinstance(grid.format, IntFormat):
        return _compile("integer") if grid.format.bits <= FLOAT32_BITS else None
    small = grid.format.exponent_bits < 8 and grid.format.mantissa_bits <= 16
    return _compile("float") if small else None


def _environment() -> str:
    value = os.environ.get("BITSMITH_COMPILE", "auto").strip().lower() or "auto"
    if value not in ("0", "1", "auto"):
        raise RecipeError(f"BITSMITH_COMPILE={value!r}: use 0, 1 or auto")
    return value


@cache
def _compile(kind: Literal["integer", "float"]) -> Callable[..., Tensor] | None:
    """Compile one kernel and try it once; None, with a warning, where that fails for whatever reason."""
    function: Callable[..., Tensor] = _compiled_integer if kind == "integer" else _compiled_float
    extra = [torch.tensor(0.5), torch.tensor(1.5 * 2.0**20)] if kind == "float" else []
    x = torch.linspace(-9.0, 9.0, 64)
    arguments = [x, torch.tensor(0.5), torch.tensor(-8.0), torch.tensor(7.0), *extra]
    try:
        compiled: Callable[..., Tensor] = torch.compile(function, dynamic=True)
        if torch.equal(compiled(*arguments), function(*arguments)):
            return compiled
        reason = "it computes something else"
    except Exception as error:
        _log.debug("torch.compile failed", exc_info=True)
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    warnings.warn(f"the compiled fake-quantize kernel is not used here ({reason})", stacklevel=4)
    return None
