"""Weights between rounding down and rounding up, and what drives them to one of the two.

Source: Nagel et al., Up or Down? Adaptive Rounding for Post-Training Quantization (arXiv 2004.10568), equations
(22) to (24); symbols as there. All weights of a block lie in one flat tensor, so that an iteration is a handful of
kernels however many layers there are.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..grid import Grid, IntFormat
from ..grid.kernels import broadcast
from ..steps import Form

_ZETA, _GAMMA = 1.1, -0.1
_BEGIN = 0.05  # how far towards the original a weight that is on the grid begins


class SoftRounding:
    """``weight = scale * (low + span * h(v))`` with ``low`` the code below, ``span`` 1 (0 where the code is clipped).

    ``v`` (flat, over all weights) is what is learned; ``weights`` are leaves in the layers' shapes whose gradients
    ``pull_back`` turns into that of ``v``.

    Weights that an earlier step has put on the grid already come with their ``originals``: then the two ends are
    where they are, and one step from there towards the original.

    >>> soft = SoftRounding([(torch.tensor([0.2, 0.8, 9.0]), Grid(IntFormat(3), torch.tensor(1.0)))])
    >>> soft.refresh()
    >>> [round(w, 3) for w in soft.weights[0].tolist()]  # as the float weight, but for clipping
    [0.2, 0.8, 3.0]
    >>> soft.harden()[0].tolist()
    [0.0, 1.0, 3.0]
    """

    def __init__(
        self, weights: list[tuple[Tensor, Grid]], form: Form = "hard_sigmoid",
        originals: list[Tensor] | None = None,
    ) -> None:  # fmt: skip
        self.form = form
        known = [weight for weight, _ in weights] if originals is None else originals
        parts = [_codes(weight.detach(), grid, original) for (weight, grid), original in zip(weights, known)]
        scale, low, span, fraction = (torch.cat([_flat(part[i]) for part in parts]) for i in range(4))
        self.step, self.base = scale * span, scale * low
        self.fraction = fraction
        self.v = _inverse(fraction, form).requires_grad_()
        self.v.grad = torch.zeros_like(self.v)
        self._flat = torch.empty_like(scale)
        self._gradient = torch.zeros_like(scale)
        self.weights: list[Tensor] = []
        start = 0
        for weight, _ in parts_of(weights):
            shape, stride = weight.shape, weight.stride()
            leaf = self._flat.as_strided(shape, stride, start).requires_grad_()
            leaf.grad = self._gradient.as_strided(shape, stride, start)
            self.weights.append(leaf)
            start += weight.numel()

    @torch.no_grad()
    def refresh(self) -> None:
        """Bring ``weights`` up to ``v``, and set their gradients to 0."""
        self._flat.copy_(torch.addcmul(self.base, self.step, self._up()))
        self._gradient.zero_()

    @torch.no_grad()
    def pull_back(self, regulariser: float, beta: float) -> None:
        """``v.grad`` from the gradients of ``weights``, with that of ``regulariser * mean(1 - |2h - 1| ** beta)``."""
        gradient = self._gradient * self.step
        if self.form == "linear":
            self.v.grad.copy_(gradient)  # type: ignore[union-attr]
            return
        sigmoid = torch.sigmoid(self.v)
        stretch = _ZETA - _GAMMA if self.form == "hard_sigmoid" else 1.0
        slope = sigmoid * (1 - sigmoid) * stretch
        if self.form == "hard_sigmoid":
            sigmoid = sigmoid.mul_(stretch).add_(_GAMMA)
            slope *= (sigmoid > 0) & (sigmoid < 1)
            sigmoid.clamp_(0, 1)
        if regulariser:
            away = sigmoid.mul_(2).sub_(1)  # -1 down, 1 up
            pull = away.abs().pow_(beta - 1).mul_(away.sign_())
            gradient.add_(pull, alpha=-2 * beta * regulariser / self.v.numel())
        torch.mul(gradient, slope, out=self.v.grad)

    @torch.no_grad()
    def project(self) -> None:
        """Keep ``v`` where its form is defined; after each step of the optimizer."""
        if self.form == "linear":
            self.v.clamp_(0, 1)

    @torch.no_grad()
    def harden(self) -> list[Tensor]:
        """The weights with every number rounded to the nearer end."""
        flat = torch.addcmul(self.base, self.step, (self._up() > 0.5).float())
        start, hard = 0, []
        for leaf in self.weights:
            hard.append(flat.as_strided(leaf.shape, leaf.stride(), start))
            start += leaf.numel()
        return hard

    def _up(self) -> Tensor:
        """h(v), between 0 (down) and 1 (up)."""
        if self.form == "linear":
            return (self.v > 0.5).float()
        h = torch.sigmoid(self.v)
        return h.mul_(_ZETA - _GAMMA).add_(_GAMMA).clamp_(0, 1) if self.form == "hard_sigmoid" else h


def beta_at(progress: float, warmup: float, start: float, end: float) -> float | None:
    """The regulariser's exponent; None during the warm-up. Falls along half a cosine.

    >>> beta_at(0.1, 0.2, 20.0, 2.0), beta_at(0.2, 0.2, 20.0, 2.0), beta_at(1.0, 0.2, 20.0, 2.0)
    (None, 20.0, 2.0)
    """
    if progress < warmup:
        return None
    done = (progress - warmup) / (1 - warmup)
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * done))


def parts_of(weights: list[tuple[Tensor, Grid]]) -> list[tuple[Tensor, Grid]]:
    """The weights, each dense in memory in its own format."""
    return [(torch.empty_like(w, memory_format=torch.preserve_format), g) for w, g in weights]


def _codes(weight: Tensor, grid: Grid, original: Tensor) -> tuple[Tensor, ...]:
    """Scale, centred code below, span and fraction above, each in the weight's shape."""
    assert isinstance(grid.format, IntFormat)
    blocks, scale, zero = broadcast(weight, grid)
    ends = (float(grid.format.qmin), float(grid.format.qmax))
    least, most = (
        torch.as_tensor(e if zero is None else e - zero, dtype=torch.float32).to(weight.device) for e in ends
    )
    ratio = torch.maximum(torch.minimum(blocks / scale, most), least)
    if torch.equal(weight, original):
        low = ratio.floor()
        span, fraction = (low < most).float(), ratio - low
    else:
        here = ratio.round()
        up = broadcast(original, grid)[0] / scale >= here
        low = torch.where(up, here, here - 1)
        inside = (low >= least) & (low < most)
        low, span = torch.where(inside, low, here), inside.float()
        fraction = torch.where(up, _BEGIN, 1 - _BEGIN) * span
    like = torch.empty_like(weight)
    parts = (scale.expand_as(blocks), low, span, fraction)
    return tuple(like.clone().copy_(part.reshape(weight.shape)) for part in parts)


def _flat(x: Tensor) -> Tensor:
    """The elements of a dense tensor in the order they have in memory."""
    return x.as_strided((x.numel(),), (1,))


def _inverse(fraction: Tensor, form: Form) -> Tensor:
    """The ``v`` whose ``h`` is ``fraction``."""
    if form == "linear":
        return fraction.clone()
    if form == "sigmoid":
        return torch.logit(fraction.clamp(0.01, 0.99))
    return torch.logit((fraction - _GAMMA) / (_ZETA - _GAMMA))
