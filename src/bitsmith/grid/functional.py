"""The three maps between real values and a grid: quantize, dequantize, fake-quantize.

The definition that everything else is held against (rounding is half to even, the division is a true float32
division, all arithmetic is float32):

    q  = clamp(round(x / scale) + zero_point, qmin, qmax)
    x' = (q - zero_point) * scale

For a ``FloatFormat`` the code is the value of ``x / scale`` rounded to the format (to the even multiple of
the step at a tie), saturating, and ``x' = code * scale``. The sign of a zero is not part of the definition.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import kernels
from .formats import IntFormat
from .grid import Grid


def quantize(x: Tensor, grid: Grid) -> Tensor:
    """The codes of ``x`` on ``grid``: same shape, dtype ``grid.code_dtype``.

    Infinities saturate; the code of NaN is unspecified.

    >>> from bitsmith.grid import Grid, IntFormat
    >>> quantize(torch.tensor([0.25, 0.75, -9.0]), Grid(IntFormat(4), torch.tensor(0.5)))
    tensor([ 0,  2, -8], dtype=torch.int8)
    """
    return kernels.quantize(x.detach(), grid)


def centred_codes(x: Tensor, grid: Grid) -> Tensor:
    """The codes of ``x`` on an integer grid less their zero points: same shape, int32.

    >>> from bitsmith.grid import Grid, IntFormat
    >>> centred_codes(torch.tensor([0.5, -1.0]), Grid(IntFormat(4), torch.tensor(0.5), torch.tensor(3)))
    tensor([ 1, -2], dtype=torch.int32)
    """
    codes = quantize(x, grid).to(torch.int32)
    blocks, _, zero_point = kernels.broadcast(codes, grid)
    return codes if zero_point is None else (blocks - zero_point).reshape(codes.shape)


def dequantize(codes: Tensor, grid: Grid) -> Tensor:
    """The real values of ``codes``: float32, same shape.

    ``code - zero_point`` is formed exactly and rounded once to float32 (which matters above 24 bits only).

    >>> from bitsmith.grid import Grid, IntFormat
    >>> grid = Grid(IntFormat(8, signed=False), torch.tensor(0.5), torch.tensor(10, dtype=torch.int32))
    >>> dequantize(torch.tensor([10, 12, 0], dtype=torch.uint8), grid)
    tensor([ 0.,  1., -5.])
    """
    blocks, scale, zero_point = kernels.broadcast(codes, grid)
    wide = isinstance(grid.format, IntFormat) and grid.format.bits > kernels.FLOAT32_BITS
    real = blocks.to(torch.float64 if wide else torch.float32)
    if zero_point is not None:
        real = real - zero_point
    return (real.to(torch.float32) * scale).reshape(codes.shape)


def fake_quantize(x: Tensor, grid: Grid) -> Tensor:
    """``dequantize(quantize(x))`` in one pass, in ``x``'s own dtype, differentiable straight through.

    The gradient with respect to ``x`` is 1 where the value was only rounded and 0 where it was clipped.

    Source: Bengio et al., Estimating or Propagating Gradients Through Stochastic Neurons, 2013.

    >>> from bitsmith.grid import Grid, IntFormat
    >>> x = torch.tensor([0.6, -1.3, 100.0], requires_grad=True)
    >>> y = fake_quantize(x, Grid(IntFormat(8), torch.tensor(0.5)))
    >>> y.sum().backward()
    >>> y.tolist(), x.grad.tolist()
    ([0.5, -1.5, 63.5], [1.0, 1.0, 0.0])
    """
    if x.requires_grad and torch.is_grad_enabled():
        return _StraightThrough.apply(x, grid)  # type: ignore[no-any-return,no-untyped-call]
    return kernels.fake_quantize(x, grid)


class _StraightThrough(torch.autograd.Function):
    """Fake-quantize forward, the clipping mask backward; keeps ``x`` and recomputes the mask from it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, grid: Grid) -> Tensor:
        ctx.save_for_backward(x)
        ctx.grid = grid
        return kernels.fake_quantize(x, grid)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return grads[0] * kernels.inside(x, ctx.grid), None
