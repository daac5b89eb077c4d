"""Exact percentiles of a stream, at memory speed: only the tails are kept; nothing is sorted whole."""

from __future__ import annotations

import math
from typing import Self

import torch
from torch import Tensor

from ..errors import CalibrationError
from .statistics import Summary, extremes, in_memory_order, nothing_seen, require_finite

_LEAST_CAPACITY = 4096
_SLACK = 4  # capacity over what is needed so far, where the final count is unknown
_WIDEST_BLOCK, _NARROWEST_BLOCK = 1024, 16
_SEARCHED = 32  # at most one in so many values is looked at twice


def tail_rank(percentile: float, count: int) -> int:
    """How many values from the outer end the percentile of ``count`` values is: 1 is the extreme itself.

    The percentile is the order statistic of ascending rank ``ceil(percentile / 100 * count)``.

    >>> tail_rank(99.0, 1000), tail_rank(100.0, 1000)
    (11, 1)
    """
    rank = min(max(math.ceil(percentile / 100.0 * count), 1), count)
    return count - rank + 1


class Tails:
    """The exact ``percentile`` of everything seen and, mirrored, the same for the lower tail.

    The upper end is the order statistic of rank ``ceil(percentile / 100 * count)``, counted from below; the
    lower end has the same rank counted from above. Only the ``capacity`` outermost values of each side are
    kept, and the greatest value let go. ``expected_count`` (of values over the whole stream) sets a capacity
    that suffices; without it the capacity is four times what the count so far needs, and grows. The result
    equals that of one pass over all values, whatever the chunking and merging, as long as the capacity
    suffices; where it did not (the largest values came first, and far more followed than could be foreseen)
    ``finish`` raises ``CalibrationError`` rather than return something near.

    >>> statistic = Tails(percentile=99.0)
    >>> statistic.update(torch.arange(1.0, 101.0)); statistic.update(torch.arange(101.0, 201.0))
    >>> summary = statistic.finish(); summary.lo, summary.hi
    (tensor(3.), tensor(198.))
    """

    def __init__(self, percentile: float = 99.999, expected_count: int | None = None) -> None:
        self.percentile = percentile
        self.expected_count = expected_count
        self.count = 0
        self.upper = _Tail()
        self.lower = _Tail()  # of the negated values

    def update(self, x: Tensor) -> None:
        """Take in ``x``."""
        if not x.numel():
            return
        flat = in_memory_order(x.detach().float())
        self.count += flat.numel()
        capacity = self._capacity()
        width = self._block_width(flat.numel(), capacity)
        if not width:
            extremes(flat)
            k = min(capacity, flat.numel())
            self.upper.take(flat.topk(k, sorted=False).values, flat.numel(), capacity)
            self.lower.take(-flat.topk(k, largest=False, sorted=False).values, flat.numel(), capacity)
            return
        blocks = flat[: flat.numel() // width * width].view(-1, width)
        rest = flat[blocks.numel() :]
        tops, bottoms = blocks.amax(1), -blocks.amin(1)
        require_finite(tops, bottoms, rest)
        self.upper.take_blocks(blocks, tops, rest, capacity)
        self.lower.take_blocks(blocks, bottoms, -rest, capacity, negate=True)

    def merge(self, other: Self) -> Self:
        """The tails of both streams."""
        merged = type(self)(self.percentile, self.expected_count or other.expected_count)
        merged.count = self.count + other.count
        capacity = max(merged._capacity(), self._capacity(), other._capacity())
        merged.upper = self.upper.merged(other.upper, capacity)
        merged.lower = self.lower.merged(other.lower, capacity)
        return merged

    def finish(self) -> Summary:
        """The two percentiles."""
        if not self.count:
            raise nothing_seen()
        rank = tail_rank(self.percentile, self.count)
        return Summary(-self.lower.value_at(rank), self.upper.value_at(rank))

    def _capacity(self) -> int:
        if self.expected_count is not None:
            expected = tail_rank(self.percentile, self.expected_count)
            return max(expected, tail_rank(self.percentile, max(self.count, 1)))
        needed = _SLACK * tail_rank(self.percentile, max(self.count, 1))
        return max(_LEAST_CAPACITY, 1 << (needed - 1).bit_length())

    def _block_width(self, count: int, capacity: int) -> int:
        """Wide blocks scan fastest; but up to ``capacity`` of them are searched, and as many must exist.

        0 where ``count`` is too small for blocks. Full tails already have a bound, and need few blocks.
        """
        if min(self.upper.kept.numel(), self.lower.kept.numel()) >= capacity:
            return min(_WIDEST_BLOCK, count)
        width = min(max(count // (_SEARCHED * capacity), _NARROWEST_BLOCK), _WIDEST_BLOCK)
        return width if count // width >= capacity else 0


class _Tail:
    """The largest values seen (``kept``, unordered) and the largest that was let go (``dropped``)."""

    def __init__(self, kept: Tensor | None = None, dropped: float = -math.inf) -> None:
        self.kept = torch.empty(0) if kept is None else kept
        self.least = float(self.kept.min()) if self.kept.numel() else -math.inf
        self.dropped = dropped

    def take_blocks(self, blocks: Tensor, tops: Tensor, rest: Tensor, capacity: int, *, negate: bool = False) -> None:
        """Take in ``blocks`` (blocks, width) whose maxima are ``tops``, and ``rest``.

        ``floor``, the ``capacity``-th largest block maximum, is a lower bound of what can matter, as there
        are ``capacity`` values that reach it. Values above it lie in fewer than ``capacity`` blocks; the
        values equal to it need no search (zeros after a ReLU are half of all values): copies of it fill up
        the rest.
        """
        if self.kept.numel() >= capacity:
            top = max(float(tops.max()), float(rest.max()) if rest.numel() else -math.inf)
            if top <= self.least:  # nothing new: zeros below a ReLU, over and over
                self.dropped = max(self.dropped, top)
                return
        floor = -math.inf
        if tops.numel() >= capacity:
            floor = float(tops.topk(capacity, sorted=False).values.min())
        fill = True
        if self.kept.numel() >= capacity and self.least >= floor:
            floor, fill = self.least, False
        chosen = blocks[tops > floor].view(-1)
        chosen = torch.cat([-chosen if negate else chosen, rest])
        above = chosen[chosen > floor]
        if fill and above.numel() < capacity and math.isfinite(floor):
            above = torch.cat([above, above.new_full((capacity - above.numel(),), floor)])
        self.take(above, blocks.numel() + rest.numel(), capacity, floor)

    def take(self, values: Tensor, seen: int, capacity: int, floor: float = -math.inf) -> None:
        """Keep the ``capacity`` largest of ``kept`` and ``values``, the outermost of ``seen`` new values."""
        if seen > values.numel():  # what was left out is at most ``floor``, or the least of a full selection
            left_out = floor if math.isfinite(floor) else float(values.min())
            self.dropped = max(self.dropped, left_out)
        self.kept = self.kept.to(values.device) if self.kept.device != values.device else self.kept
        kept = torch.cat([self.kept, values])
        if kept.numel() > capacity:
            kept = kept.topk(capacity, sorted=False).values
            self.dropped = max(self.dropped, float(kept.min()))
        self.kept = kept
        self.least = float(kept.min()) if kept.numel() else -math.inf

    def merged(self, other: _Tail, capacity: int) -> _Tail:
        """The tail of both; nothing that either keeps and that fits is let go."""
        merged = _Tail(self.kept, max(self.dropped, other.dropped))
        merged.take(other.kept, other.kept.numel(), capacity)
        return merged

    def value_at(self, rank: int) -> Tensor:
        """The ``rank``-th largest value seen."""
        if rank <= self.kept.numel():
            value = self.kept.kthvalue(self.kept.numel() - rank + 1).values
            if float(value) >= self.dropped:
                return value
        raise CalibrationError(
            f"the percentile needs the {rank} outermost values, more than were kept "
            f"({self.kept.numel()} of them surely): give the statistic the expected_count of values"
        )
