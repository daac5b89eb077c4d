"""Fake-quantize with a scale that learns.

Source: Esser et al., Learned Step Size Quantization (arXiv 1902.08153), equation (3); with the random dropping of
quantization of QDrop (arXiv 2203.05740), equation (8).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..grid import Grid, IntFormat
from ..grid.kernels import flat_view

_PIECE = 1 << 16  # elements


def code_range(grid: Grid) -> tuple[float, float]:
    """The least and greatest code of an integer grid, counted from its zero point.

    >>> code_range(Grid(IntFormat(4), torch.tensor(1.0)))
    (-8.0, 7.0)
    """
    assert isinstance(grid.format, IntFormat)
    zero = 0 if grid.zero_point is None else int(grid.zero_point)
    return float(grid.format.qmin - zero), float(grid.format.qmax - zero)


class LearnedScale(torch.autograd.Function):
    """``clamp(round(x / scale), low, high) * scale`` where ``kept`` is 1 (or None), ``x`` itself where it is 0.

    The gradient of the scale is ``round(x / scale) - x / scale`` where a value is rounded and the bound where it is
    clipped; that of ``x`` passes where it is rounded, and where it was dropped. ``kept`` is laid out as ``x`` is.

    >>> x, scale = torch.tensor([0.6, 9.0], requires_grad=True), torch.tensor(1.0, requires_grad=True)
    >>> LearnedScale.apply(x, scale, -8.0, 7.0, None).sum().backward()
    >>> x.grad.tolist(), round(scale.grad.item(), 3)  # 1 - 0.6 + 7
    ([1.0, 0.0], 7.4)
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: float, high: float, kept: Tensor | None) -> Tensor:
        x = dense(x)
        ctx.save_for_backward(x, scale, kept)
        ctx.bounds = low, high
        out = torch.empty_like(x)
        step = scale.item() if x.device.type == "cpu" else scale
        for piece, target, keep in _pieces(x, out, kept):
            code = torch.mul(piece, 1 / step, out=target).clamp_(low, high).round_().mul_(step)
            if keep is not None:
                torch.lerp(piece, code, keep, out=target)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        x, scale, kept = ctx.saved_tensors
        grad, step = torch.empty_like(x).copy_(grads[0]), scale.item() if x.device.type == "cpu" else scale
        grad_scale = torch.zeros_like(scale)
        for piece, g, keep in _pieces(x, grad, kept):
            ratio = piece * (1 / step)
            clamped = ratio.clamp(*ctx.bounds)
            clipped = torch.ne(clamped, ratio, out=ratio)  # as 0 and 1: mixed types are slow
            code = clamped.round()
            quantized = g if keep is None else g * keep
            grad_scale += torch.dot(quantized, torch.sub(code, clamped, out=clamped))
            stopped = torch.mul(quantized, clipped, out=clipped)
            grad_scale += torch.dot(stopped, code)
            g -= stopped
        return grad, grad_scale, None, None, None


def dense(x: Tensor) -> Tensor:
    """``x``, or a copy without gaps or overlaps in memory."""
    return x if flat_view(x) is not None else x.contiguous()


def _pieces(*tensors: Tensor | None) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Matching stretches of tensors that lie alike in memory; on a CPU as long as fits its cache."""
    flat = [None if t is None else t.as_strided((t.numel(),), (1,)) for t in tensors]
    first = flat[0]
    assert first is not None
    size = _PIECE if first.device.type == "cpu" else first.numel()
    for start in range(0, first.numel(), size):
        yield tuple(None if t is None else t[start : start + size] for t in flat)  # type: ignore[misc]
