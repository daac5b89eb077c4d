"""Fake-quantize forward and backward for training: as few passes over memory as can be, none of them extra.

The forward pass is that of ``grid.kernels`` to the bit, and may show its input to a statistic while it is in the cache.
The backward passes need the input alone, and the output where a scale learns: the output is kept by the next layer
anyway. Where there is a C compiler each is one pass (``native.py``); else they run, per tensor on a CPU, over pieces
that stay in the cache; other tensors (weights, mostly) are small.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..grid import FloatFormat, Grid, IntFormat, kernels
from ..grid.kernels import flat_view
from ..optimize.learned_scale import dense
from . import native
from .native import Number

_PIECE = 1 << 16  # elements per thread: pieces of four tensors fit the second-level cache
# Up to this many bits the difference of two float32 sums tells rounding errors from the values themselves.
_COARSE_BITS = 8


@dataclass(frozen=True)
class Clipping:
    """Where values are clipped: outside ``low .. high``, real numbers for each scale of ``grid`` or for all alike.

    The gradient of ``x`` is 0 there and at the ends themselves. ``relu`` moves the lower end to 0, so that the gradient
    is that of a ReLU in front.
    """

    grid: Grid
    low: Number
    high: Number

    @classmethod
    def of(cls, grid: Grid, *, margin: float, relu: bool) -> Clipping:
        """The ends of ``grid``, ``margin`` steps beyond its first and last code.

        A margin of 0.5 keeps the gradient wherever a value is only rounded; learned step sizes take 0, as LSQ does.

        >>> grid = Grid(IntFormat(8, signed=False), torch.tensor(0.5))
        >>> Clipping.of(grid, margin=0.5, relu=False).high
        127.75
        """
        low, high = code_ends(grid)
        fmt, scale = grid.format, native.as_number(grid.scale)
        if isinstance(fmt, FloatFormat):  # whose last step is this wide
            margin *= 2.0 ** (math.frexp(fmt.max_value)[1] - 1 - fmt.mantissa_bits)
        return cls(grid, 0.0 if relu else (low - margin) * scale, (high + margin) * scale)

    def mask(self, x: Tensor) -> Tensor:
        """1 where ``x`` is inside, 0 elsewhere, in ``x``'s dtype."""
        return (x > self._spread(x, self.low)).logical_and_(x < self._spread(x, self.high)).to(x.dtype)

    def _spread(self, x: Tensor, value: Number) -> Number:
        """``value`` ready to broadcast to ``x``."""
        if not isinstance(value, Tensor) or value.numel() == 1:
            return value
        grid = Grid(self.grid.format, value, None, self.grid.axis, self.grid.group_size)
        blocks, spread, _ = kernels.broadcast(x, grid)
        return spread if blocks.ndim == x.ndim else spread.expand(blocks.shape).reshape(x.shape)

    def sum_like_scale(self, value: Tensor) -> Tensor:
        """``value`` (shaped like ``x``) summed over all elements that share a scale."""
        scale, axis = self.grid.scale, self.grid.axis
        if scale.ndim == 0 or axis is None:
            return value.sum()
        if self.grid.group_size is None:
            return value.sum([d for d in range(value.ndim) if d != axis % value.ndim])
        axis, size = axis % value.ndim, self.grid.group_size
        last = value.movedim(axis, -1)
        last = torch.nn.functional.pad(last, (0, -last.shape[-1] % size))
        groups: Tensor = last.unflatten(-1, (-1, size))  # type: ignore[no-untyped-call]
        return groups.sum(-1).movedim(-1, axis)


def code_ends(grid: Grid) -> tuple[Number, Number]:
    """The least and the greatest code counted from the zero point: numbers, or tensors shaped like the zero points.

    >>> code_ends(Grid(IntFormat(4), torch.tensor(1.0)))
    (-8.0, 7.0)
    """
    fmt = grid.format
    zero = 0.0 if grid.zero_point is None else native.as_number(grid.zero_point)
    least, greatest = (fmt.qmin, fmt.qmax) if isinstance(fmt, IntFormat) else (-fmt.max_value, fmt.max_value)
    return least - zero, greatest - zero


class StraightThrough(torch.autograd.Function):
    """Fake-quantize to a grid; the gradient passes where a value is not clipped, without ``clipping`` everywhere.

    ``watch`` is shown ``x``; ``idle`` are parameters that this pass does not depend on, whose gradient is 0.

    Source: Bengio et al., Estimating or Propagating Gradients Through Stochastic Neurons (arXiv 1308.3432).

    >>> x, grid = torch.tensor([0.6, 100.0], requires_grad=True), Grid(IntFormat(8), torch.tensor(0.5))
    >>> StraightThrough.apply(x, grid, Clipping.of(grid, margin=0.5, relu=False), None).sum().backward()
    >>> x.grad
    tensor([1., 0.])
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, grid: Grid, clipping: Clipping | None, watch: Extremes | None,
        *idle: Tensor,
    ) -> Tensor:  # fmt: skip
        x = dense(x)
        ctx.save_for_backward(None if clipping is None else x, *idle)
        ctx.clipping = clipping
        return _on_grid(x, grid, watch)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *idle = ctx.saved_tensors
        grad = grads[0] if x is None or not ctx.needs_input_grad[0] else inside_only(grads[0], x, ctx.clipping)
        return grad, None, None, None, *(torch.zeros_like(p) for p in idle)


class LearnedClipping(torch.autograd.Function):
    """Fake-quantize to ``clipping.grid``, whose numbers come from ``size`` (and ``offset``), which learn.

    ``size`` gets ``per_size`` times the gradient of the logarithm of the scale: the sum of ``g * (out - x)`` over
    values inside and of ``g * out`` over clipped ones. With an ``offset`` the latter is ``g * (out - beta)``, ``beta``
    being the real value of code 0, and ``offset`` gets ``per_offset`` times the sum of ``g`` over clipped values.
    Both are kept within -1 .. 1. Without ``rounding_counts`` only clipped values count, without bounds, as in PACT.
    ``per_size``, ``per_offset`` and ``beta`` are shaped like the scale.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, size: Tensor, offset: Tensor | None, clipping: Clipping, per_size: Tensor,
        per_offset: Tensor | None, beta: Tensor | None, rounding_counts: bool,
    ) -> Tensor:  # fmt: skip
        x = dense(x)
        out = _on_grid(x, clipping.grid, None)
        ctx.save_for_backward(x, out)
        ctx.clipping, ctx.rounding_counts = clipping, rounding_counts
        ctx.factors = per_size, per_offset, beta
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, out = ctx.saved_tensors
        per_size, per_offset, beta = ctx.factors
        grad, moved, clipped = _with_sums(grads[0], x, out, ctx.clipping, ctx.rounding_counts, beta is not None)
        bound = 1.0 if ctx.rounding_counts else math.inf
        grad_offset = None
        if beta is not None and clipped is not None:
            moved = moved - beta * clipped
            grad_offset = (clipped * per_offset).clamp_(-bound, bound)
        grad_size = (moved * per_size).clamp_(-bound, bound)
        return grad if ctx.needs_input_grad[0] else None, grad_size, grad_offset, *(None,) * 5


def _on_grid(x: Tensor, grid: Grid, watch: Extremes | None) -> Tensor:
    """``grid.fake_quantize``, compiled where that can be."""
    low, high = code_ends(grid)
    if watch is not None:
        if (seen := native.fake_quantize_watched(x, grid, float(low), float(high))) is None:
            return kernels.fake_quantize(x, grid, watch)
        watch.pieces.append(seen[1:])
        return seen[0]
    out = native.fake_quantize(x, grid, low, high)
    return kernels.fake_quantize(x, grid) if out is None else out


def inside_only(grad: Tensor, x: Tensor, clipping: Clipping) -> Tensor:
    """``grad`` where ``x`` is inside, 0 elsewhere: one pass, on a CPU per tensor.

    >>> clipping = Clipping.of(Grid(IntFormat(2), torch.tensor(1.0)), margin=0.0, relu=False)
    >>> inside_only(torch.ones(3), torch.tensor([-3.0, 0.5, 1.5]), clipping)
    tensor([0., 1., 0.])
    """
    if clipping.grid.scale.numel() == 1 and x.device.type == "cpu":
        passed = torch.empty_like(x)  # in the layout of x, whatever that of grad is: batch norms are slow otherwise
        torch.ops.aten.hardtanh_backward.grad_input(
            grad, x, float(clipping.low), float(clipping.high), grad_input=passed
        )
        return passed
    if found := native.learned_backward(grad, x, x, clipping.grid, clipping.low, clipping.high, False):
        return found[0]
    return grad * clipping.mask(x)


def _with_sums(
    grad: Tensor, x: Tensor, out: Tensor, clipping: Clipping, rounding_counts: bool, with_clipped: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradient of ``x``, and what ``LearnedClipping`` sums."""
    if found := native.learned_backward(grad, x, out, clipping.grid, clipping.low, clipping.high, rounding_counts):
        return found
    if clipping.grid.scale.numel() > 1 or x.device.type != "cpu":
        passed = grad * clipping.mask(x)
        stopped = grad - passed
        terms = stopped * out
        if rounding_counts:
            terms = terms.addcmul_(passed, out - x)
        return passed, clipping.sum_like_scale(terms), clipping.sum_like_scale(stopped) if with_clipped else None
    passed = torch.empty_like(x)
    low, high = float(clipping.low), float(clipping.high)
    fine = isinstance(clipping.grid.format, IntFormat) and clipping.grid.format.bits > _COARSE_BITS
    sums: list[Tensor] = []
    clipped: list[Tensor] = []
    for g, value, quantized, target in _pieces(grad, x, out, passed):
        torch.ops.aten.hardtanh_backward.grad_input(g, value, low, high, grad_input=target)
        if not rounding_counts:
            sums.append(torch.dot(g - target, quantized))
        elif fine:
            sums += [torch.dot(target, quantized - value), torch.dot(g - target, quantized)]
        else:  # the same in two passes instead of five
            sums += [torch.dot(g, quantized), -torch.dot(target, value)]
        if with_clipped:
            clipped += [g.sum(), -target.sum()]
    shape = clipping.grid.scale.shape
    total = torch.stack(sums).sum(dtype=torch.float64).float().reshape(shape)
    return passed, total, torch.stack(clipped).sum().reshape(shape) if with_clipped else None


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Matching stretches, as long as fits the cache, in the memory order of the last tensor, which is dense."""
    last = tensors[-1]
    flat = []
    for tensor in tensors:
        alike = tensor.stride() == last.stride() and flat_view(tensor) is not None
        view = flat_view(tensor if alike else torch.empty_like(last).copy_(tensor))
        assert view is not None
        flat.append(view)
    size = _PIECE * torch.get_num_threads()
    for start in range(0, last.numel(), size):
        yield tuple(view[start : start + size] for view in flat)


class Extremes:
    """The least (0 with ``greatest_only``) and the greatest value of the pieces that it is shown."""

    def __init__(self, greatest_only: bool = False) -> None:
        self.greatest_only = greatest_only
        self.pieces: list[tuple[Number, Number]] = []

    def __call__(self, piece: Tensor) -> None:
        """Take in a piece."""
        if self.greatest_only:
            self.pieces.append((0.0, piece.max()))
        elif piece.numel():
            self.pieces.append(torch.aminmax(piece))

    def ends(self) -> tuple[float, float]:
        """Least and greatest of all pieces, NaN where a value was not a number."""
        lows, highs = ([float(v) for v in side] for side in zip(*self.pieces))
        if any(map(math.isnan, [*lows, *highs])):
            return math.nan, math.nan
        return 0.0 if self.greatest_only else min(lows), max(highs)
