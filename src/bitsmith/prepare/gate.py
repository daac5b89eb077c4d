"""Whether a rewrite is kept: quantized outputs with and without it, on samples that neither was calibrated with.

Any change draws all rounding errors anew, and of two models that are equally good either may come out ahead. So a gain
must be clear over the samples, pair by pair, and large enough to be seen in what the outputs are used for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_SURE = 3.0  # standard errors of the mean gain, in decibels, over samples
_WORTH = 0.005  # of the signal's power: what noise must fall by, or by a third where that is less
_NOTHING = 0.001  # of the signal's power: noise that nothing is to be gained from
_LEAST = 0.1  # of the noise: what it must fall by where it is large


@dataclass(frozen=True)
class Trial:
    """Squared error of a quantized graph's outputs against the float model's, and square of these, by sample."""

    errors: Tensor
    signals: Tensor

    @property
    def share(self) -> float:
        """Noise as a share of the signal's power."""
        signal = float(self.signals.sum())
        return float(self.errors.sum()) / signal if signal else math.inf

    @property
    def db(self) -> float:
        """Signal to noise in decibels."""
        return -10.0 * math.log10(self.share) if self.share else math.inf


def objection(before: Trial, after: Trial) -> str:
    """Why ``after`` is not to be preferred to ``before``; empty where it is.

    >>> quiet, noisy = Trial(torch.full((9,), 0.02), torch.ones(9)), Trial(torch.full((9,), 0.04), torch.ones(9))
    >>> objection(noisy, quiet), objection(quiet, noisy)
    ('', 'no gain')
    """
    gain = before.share - after.share
    if not gain > 0:
        return "no gain"
    if before.share < _NOTHING or gain < max(_LEAST * before.share, min(_WORTH, before.share / 3)):
        return "too little to matter"
    least = torch.finfo(torch.float64).tiny
    decibels = 10 * (before.errors.clamp_min(least).log10() - after.errors.clamp_min(least).log10())
    count = len(decibels)
    if count > 1 and not decibels.mean() > _SURE * decibels.std() / math.sqrt(count):
        return f"not clear from {count} samples"
    return ""
