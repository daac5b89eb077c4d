"""A histogram of a stream whose range grows by powers of two, so that chunking cannot change it."""

from __future__ import annotations

import math
from typing import Self

import torch
from torch import Tensor

from .statistics import Summary, extremes, nothing_seen

_CHUNK = 1 << 17
_LEAST_EXPONENT = -100  # zeros alone, and numbers too small to tell from them


class Histogram:
    """Counts over bins of equal width around 0, with the exact least and greatest value.

    The bins cover ``-2**e .. 2**e`` for the least ``e`` such that every value lies strictly inside. When a
    value falls outside, ``e`` grows and neighbouring bins are added up in pairs, so that the counts depend on
    the values alone, not on their order or chunking. There are ``bins`` or more (up to twice as many) of them
    between 0 and the value of largest magnitude.

    >>> statistic = Histogram(bins=64)
    >>> statistic.update(torch.tensor([0.1, 0.9])); statistic.update(torch.tensor([-3.0]))
    >>> summary = statistic.finish()
    >>> summary.width * 128, float(summary.counts.sum()), float(summary.lo)
    (4.0, 3.0, -3.0)
    """

    def __init__(self, bins: int = 2048) -> None:
        self.bins = bins
        self.exponent: int | None = None
        self.counts = torch.zeros(4 * bins, dtype=torch.int64)
        self.lo: Tensor | None = None
        self.hi: Tensor | None = None

    @property
    def width(self) -> float:
        """The width of one bin."""
        return 0.0 if self.exponent is None else 2.0**self.exponent / (2 * self.bins)

    def update(self, x: Tensor) -> None:
        """Take in ``x``."""
        if not x.numel():
            return
        lo, hi = extremes(x)
        self.lo = lo if self.lo is None else torch.minimum(self.lo, lo)
        self.hi = hi if self.hi is None else torch.maximum(self.hi, hi)
        largest = max(abs(float(lo)), abs(float(hi)))
        self._grow(math.frexp(largest)[1] if largest else _LEAST_EXPONENT)
        flat = x.detach().reshape(-1)
        for chunk in flat.split(_CHUNK):  # type: ignore[no-untyped-call]
            # dividing by a power of two is exact, so the bin is that of the real number
            index = (chunk.float() / self.width).floor_().to(torch.int32).add_(2 * self.bins)
            self.counts += torch.bincount(index, minlength=4 * self.bins).cpu()

    def merge(self, other: Self) -> Self:
        """The histogram of both streams."""
        merged = type(self)(self.bins)
        for part in (self, other):
            if part.exponent is None or part.lo is None or part.hi is None:
                continue
            merged._grow(part.exponent)
            assert merged.exponent is not None
            merged.counts = merged.counts + _coarser(part.counts, merged.exponent - part.exponent)
            merged.lo = part.lo if merged.lo is None else torch.minimum(merged.lo, part.lo)
            merged.hi = part.hi if merged.hi is None else torch.maximum(merged.hi, part.hi)
        return merged

    def finish(self) -> Summary:
        """The extremes and the histogram."""
        if self.lo is None or self.hi is None:
            raise nothing_seen()
        return Summary(self.lo, self.hi, self.counts.double(), self.width)

    def _grow(self, exponent: int) -> None:
        """Widen the range to ``2**exponent`` if it is not that wide yet."""
        exponent = max(exponent, _LEAST_EXPONENT)
        if self.exponent is None:
            self.exponent = exponent
        elif exponent > self.exponent:
            self.counts = _coarser(self.counts, exponent - self.exponent)
            self.exponent = exponent


def _coarser(counts: Tensor, doublings: int) -> Tensor:
    """``counts`` over a range ``2**doublings`` times as wide: pairs of bins added up."""
    bins = counts.numel()
    for _ in range(min(doublings, bins.bit_length())):
        wider = torch.zeros_like(counts)
        wider[bins // 4 : bins // 4 + bins // 2] = counts.view(-1, 2).sum(1)
        counts = wider
    return counts
