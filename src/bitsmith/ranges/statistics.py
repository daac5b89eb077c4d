"""What is remembered of a stream of values: one-pass statistics that can be split and merged.

Each is a monoid: ``update`` takes in a tensor, ``merge`` returns the statistic of both streams without
changing either, ``finish`` returns a ``Summary``. So a calibration set can come in chunks, from several
processes or after a restart, and the result is that of one pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor

from ..errors import CalibrationError, NonFiniteError
from ..grid.kernels import flat_view


@dataclass(frozen=True)
class Summary:
    """What a statistic found: the ends of the range, and where there is one, the histogram.

    ``lo`` and ``hi`` are float32, 0-dimensional or one per channel. ``counts`` (float64, on the CPU) has an
    even number of bins of ``width`` each, the middle edge being 0.
    """

    lo: Tensor
    hi: Tensor
    counts: Tensor | None = None
    width: float = 0.0

    @property
    def centers(self) -> Tensor:
        """The bins' centers, float64."""
        bins = 0 if self.counts is None else self.counts.numel()
        return (torch.arange(bins, dtype=torch.float64) - bins // 2 + 0.5) * self.width


class Statistic(Protocol):
    """The contract of a statistic; see the module's docstring."""

    def update(self, x: Tensor) -> None:
        """Take in ``x``; ``NonFiniteError`` if it holds a NaN or an infinity."""

    def merge(self, other: Self) -> Self:
        """The statistic of this stream followed by ``other``'s; neither is changed."""

    def finish(self) -> Summary:
        """What was found; ``CalibrationError`` if nothing was seen."""


class MinMax:
    """The least and the greatest value, of the tensor or of every channel of ``axis``.

    >>> statistic = MinMax()
    >>> statistic.update(torch.tensor([1.0, -2.0])); statistic.update(torch.tensor([3.0]))
    >>> summary = statistic.finish(); summary.lo, summary.hi
    (tensor(-2.), tensor(3.))
    """

    def __init__(self, axis: int | None = None) -> None:
        self.axis = axis
        self.lo: Tensor | None = None
        self.hi: Tensor | None = None

    def update(self, x: Tensor) -> None:
        """Take in ``x``."""
        if x.numel():
            lo, hi = extremes(x, self.axis)
            self.lo = lo if self.lo is None else torch.minimum(self.lo, lo)
            self.hi = hi if self.hi is None else torch.maximum(self.hi, hi)

    def merge(self, other: Self) -> Self:
        """The extremes of both streams."""
        merged = type(self)(self.axis)
        for part in (self, other):
            if part.lo is not None and part.hi is not None:
                merged.lo = part.lo if merged.lo is None else torch.minimum(merged.lo, part.lo)
                merged.hi = part.hi if merged.hi is None else torch.maximum(merged.hi, part.hi)
        return merged

    def finish(self) -> Summary:
        """The extremes."""
        if self.lo is None or self.hi is None:
            raise nothing_seen()
        return Summary(self.lo, self.hi)


class MovingAverage:
    """The moving average of each batch's least and greatest value; an ``update`` is one batch.

    ``v <- (1 - momentum) * v + momentum * batch``, starting from the first batch. Merging is exact: a
    stream's average is ``(1 - momentum)**batches * (v_before - first) + v`` when it follows one that ended at
    ``v_before``. It is associative up to float64 rounding and, as order matters to the average, not
    commutative.

    >>> statistic = MovingAverage(momentum=0.5)
    >>> statistic.update(torch.tensor([0.0, 4.0])); statistic.update(torch.tensor([0.0, 8.0]))
    >>> statistic.finish().hi
    tensor(6.)
    """

    def __init__(self, momentum: float = 0.1, axis: int | None = None) -> None:
        self.momentum = momentum
        self.axis = axis
        self.batches = 0
        self.first: Tensor | None = None  # (2,) or (2, channels) float64: lo and hi of the first batch
        self.value: Tensor | None = None

    def update(self, x: Tensor) -> None:
        """Take in one batch."""
        if not x.numel():
            return
        batch = torch.stack(extremes(x, self.axis)).double()
        if self.value is None:
            self.first = self.value = batch
        else:
            self.value = torch.lerp(self.value, batch, self.momentum)
        self.batches += 1

    def merge(self, other: Self) -> Self:
        """The average over this stream's batches and then ``other``'s."""
        merged = type(self)(self.momentum, self.axis)
        merged.batches = self.batches + other.batches
        if self.value is None or other.value is None or other.first is None:
            full = self if other.value is None else other
            merged.first, merged.value = full.first, full.value
            return merged
        decay = (1.0 - self.momentum) ** other.batches
        merged.first = self.first
        merged.value = other.value + decay * (self.value - other.first)
        return merged

    def finish(self) -> Summary:
        """The averages."""
        if self.value is None:
            raise nothing_seen()
        lo, hi = self.value.float()
        return Summary(lo, hi)


def extremes(x: Tensor, axis: int | None = None) -> tuple[Tensor, Tensor]:
    """Least and greatest value as float32, of the tensor or per channel; ``NonFiniteError`` where not finite.

    >>> extremes(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), axis=0)
    (tensor([1., 3.]), tensor([2., 4.]))
    """
    x = x.detach()
    dims = [] if axis is None else [d for d in range(x.ndim) if d != axis % x.ndim]
    if axis is None:
        lo, hi = torch.aminmax(x)
    else:
        lo, hi = x.amin(dims), x.amax(dims)
    require_finite(lo, hi)
    return lo.float(), hi.float()


def in_memory_order(x: Tensor) -> Tensor:
    """All elements as one axis, without a copy where the memory has no gaps; the order means nothing."""
    flat = flat_view(x)
    return x.reshape(-1) if flat is None else flat


def require_finite(*values: Tensor) -> None:
    """Raise ``NonFiniteError`` unless all is finite; extremes suffice, since NaN propagates through them."""
    if not all(bool(torch.isfinite(value).all()) for value in values):
        raise NonFiniteError(
            "the values hold a NaN or an infinity, so they have no range. Look for an overflow in half "
            "precision, a division by zero or a corrupt checkpoint upstream of this point"
        )


def nothing_seen() -> CalibrationError:
    """The error of a statistic that is finished before it saw a value."""
    return CalibrationError("no value was seen: is the calibration loader empty, or this point never reached?")
