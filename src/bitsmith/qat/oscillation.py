"""Weights that jump to and fro between two codes: damped by a penalty, or frozen where they do it too often.

Source: Nagel et al., Overcoming Oscillations in Quantization-Aware Training (arXiv 2203.11086), sections 4.2 and 4.3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import DataError
from ..grid import Grid, fake_quantize
from ..grid.kernels import broadcast
from .kernels import code_ends


@dataclass(frozen=True)
class Oscillation:
    """What is done about oscillating weights.

    ``damping``: lambda of the penalty ``sum (w_hat - clip(w))^2`` over all quantized weights, which draws weights to
    the middle of their codes (equation 6); it is part of ``penalty()``, and grows from 0 as a half cosine over the
    training that a QATSchedule governs. ``threshold``: a weight is held at its average code once the frequency of its
    oscillations, a moving average with ``momentum``, exceeds it (algorithm 1).
    """

    damping: float = 0.0
    threshold: float | None = None
    momentum: float = 0.01

    def __post_init__(self) -> None:
        if self.damping < 0 or not 0 < self.momentum <= 1 or (self.threshold is not None and self.threshold <= 0):
            raise DataError(f"{self}: damping must not be negative, threshold above 0, momentum above 0 and at most 1")


class OscillationTracker(nn.Module):
    """The history of one weight's codes, in the symbols of algorithm 1: ``f``, ``w_ema``, what is frozen.

    >>> tracker = OscillationTracker(torch.Size([1]), threshold=0.5, momentum=0.5)
    >>> for code in (0.0, 1.0, 0.0, 1.0):  # the third and fourth go back on the change before
    ...     tracker.observe(torch.tensor([code]))
    >>> tracker.f, tracker.frozen
    (tensor([0.7500]), tensor([True]))
    """

    w_int: Tensor
    sign: Tensor
    f: Tensor
    w_ema: Tensor
    frozen: Tensor
    seen: Tensor

    def __init__(self, shape: torch.Size, *, threshold: float, momentum: float) -> None:
        super().__init__()
        self.threshold, self.momentum = threshold, momentum
        for name in ("w_int", "sign", "f", "w_ema"):
            self.register_buffer(name, torch.zeros(shape))
        self.register_buffer("frozen", torch.zeros(shape, dtype=torch.bool))
        self.register_buffer("seen", torch.tensor(False))

    @torch.no_grad()
    def observe(self, w_int: Tensor) -> None:
        """Take in the codes after an optimizer step."""
        if not self.seen:
            self.w_int.copy_(w_int)
            self.w_ema.copy_(w_int)
            self.seen.fill_(True)
            return
        m, change = self.momentum, torch.sign(w_int - self.w_int)
        oscillates = (change != 0) & (self.sign != 0) & (change != self.sign)
        self.f.lerp_(oscillates.to(self.f.dtype), m)
        self.w_ema.copy_(torch.where(self.frozen, self.w_ema, self.w_ema.lerp(w_int, m)))
        self.frozen |= self.f > self.threshold
        self.sign.copy_(torch.where(change != 0, change, self.sign))
        self.w_int.copy_(w_int)

    def hold(self, weight: Tensor, grid: Grid) -> Tensor:
        """The weight with what is frozen at its code; nothing flows back there."""
        blocks, scale, _ = broadcast(weight, grid)
        held = (self.w_ema.round().view(blocks.shape) * scale).view(weight.shape)
        return torch.where(self.frozen, held, weight)


def codes(weight: Tensor, grid: Grid) -> Tensor:
    """Codes of a weight, counted from the zero point, as floats."""
    blocks, scale, _ = broadcast(fake_quantize(weight.detach(), grid), grid)
    return (blocks / scale).round().view(weight.shape)


def damping_loss(weight: Tensor, grid: Grid) -> Tensor:
    """``sum (w_hat - clip(w))^2``, with a gradient for ``w`` alone."""
    low, high = code_ends(grid)
    blocks, _, _ = broadcast(weight, grid)
    ends = [Grid(grid.format, end * grid.scale, None, grid.axis, grid.group_size) for end in (low, high)]
    least, greatest = (broadcast(weight, end)[1] for end in ends)
    clipped = torch.minimum(torch.maximum(blocks, least), greatest)
    w_hat = fake_quantize(weight.detach(), grid).view(blocks.shape)
    return (w_hat - clipped).square().sum()
