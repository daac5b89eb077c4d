"""Rules that give up some range for resolution: they search a histogram for the ends that lose least."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..grid.formats import FloatFormat, IntFormat
from ..grid.functional import fake_quantize
from ..grid.kernels import inside
from ..grid.spec import TensorSpec
from .solve import solve_grid
from .statistics import Summary

_Array = NDArray[np.float64]
_PATIENCE = 128  # moves of one end without a lower norm


def mse(summary: Summary, spec: TensorSpec, non_negative: bool = False) -> tuple[Tensor, Tensor]:
    """The ends that minimize the mean squared quantization error over the histogram.

    Symmetric grids have one threshold to find; affine grids two, found by turns (both together, then each
    alone, twice). Each search tries ``spec.range.candidates`` fractions of the range, then as many around the
    best. The error is that of the very grid that ``solve_grid`` would make, so power-of-two scales and float
    formats are searched as they will be used. Among equals the wider range wins.

    >>> from bitsmith.grid import IntFormat, TensorSpec
    >>> from bitsmith.ranges import Histogram
    >>> statistic = Histogram()
    >>> statistic.update(torch.cat([torch.linspace(-1, 1, 10_000), torch.tensor([4.0])]))
    >>> lo, hi = mse(statistic.finish(), TensorSpec(format=IntFormat(3)))
    >>> bool(0.8 < hi < 1.5)
    True
    """
    least, greatest = (end.cpu().double() for end in _with_zero(summary))
    lo, hi = torch.zeros_like(least) if non_negative else least, greatest
    one_sided = spec.symmetric or bool(lo == 0) or bool(hi == 0)
    moves = [(True, True)] if one_sided else [(True, True), (False, True), (True, False)] * 2
    count = spec.range.candidates
    coarse = torch.arange(count, 0, -1, dtype=torch.float64) / count
    fine = 1.0 + torch.linspace(1.0, -1.0, count, dtype=torch.float64) / count
    for ratios in (coarse, fine):
        for move_lo, move_hi in moves:
            ends = [torch.cat([end[None], end * (ratios if move else torch.ones_like(ratios))])
                    for end, move in ((lo, move_lo), (hi, move_hi))]  # fmt: skip
            los, his = ends[0].clamp(min=float(least)), ends[1].clamp(max=float(greatest))
            if spec.symmetric:  # the threshold is common: a side within it is not clipped
                threshold = torch.maximum(-ends[0], ends[1])
                los, his = torch.maximum(lo, -threshold), torch.minimum(hi, threshold)
            best = int(squared_error(summary, los, his, spec, non_negative).argmin())
            lo, hi = los[best], his[best]
    return lo, hi


def squared_error(summary: Summary, lo: Tensor, hi: Tensor, spec: TensorSpec, non_negative: bool = False) -> Tensor:
    """The histogram's summed squared quantization error under each range ``lo[i] .. hi[i]``, float64.

    A bin stands for its center. Where an integer grid's step is not wide against the bins, the rounding error
    is taken as uniform instead (``scale**2 / 12``); the clipping error always comes from the centers.

    >>> from bitsmith.grid import IntFormat, TensorSpec
    >>> summary = Summary(torch.tensor(0.0), torch.tensor(1.0), torch.tensor([0.0, 2.0]), 0.5)
    >>> squared_error(summary, torch.zeros(1), torch.ones(1), TensorSpec(format=IntFormat(1, signed=False)))
    tensor([0.1667], dtype=torch.float64)
    """
    assert summary.counts is not None
    used = summary.counts > 0
    counts, centers = summary.counts[used].double(), summary.centers[used].float()
    update = {"granularity": "channel", "group_size": None}
    grid = solve_grid(lo, hi, spec.model_copy(update=update), non_negative=non_negative, axis=0)
    x = centers.expand(lo.numel(), -1)  # (candidates, bins)
    error = (fake_quantize(x, grid) - x).double().square_()
    scale = grid.scale.double()[:, None]
    if isinstance(grid.format, IntFormat) and bool((scale < 4 * summary.width).any()):
        uniform = inside(x, grid) & (scale < 4 * summary.width)
        error = torch.where(uniform, scale.square() / 12.0, error)
    return error @ counts


def histogram_l2(summary: Summary, spec: TensorSpec, non_negative: bool = False) -> tuple[Tensor, Tensor]:
    """The greedy L2 search of PyTorch's HistogramObserver: clip both ends while the norm falls.

    From each end a hundred-thousandth of the values is offered at a time; the end that gives up more bins for
    it moves. The norm takes values as uniform within a bin and the grid's points as the middles of
    ``2**bits`` equal cells. PyTorch stops at the first rise; with fine bins that is often a ripple, so this
    search goes on for some more moves and returns the best ends it met. For a symmetric grid it searches one
    threshold, on ``|x|``.

    Source: PyTorch, ``HistogramObserver._non_linear_param_search``; there after Caffe2's L2 minimization.

    >>> from bitsmith.grid import IntFormat, TensorSpec
    >>> from bitsmith.ranges import Histogram
    >>> statistic = Histogram()
    >>> statistic.update(torch.cat([torch.linspace(-1, 1, 10_000), torch.tensor([4.0])]))
    >>> lo, hi = histogram_l2(statistic.finish(), TensorSpec(format=IntFormat(4)))
    >>> bool(hi < 2.0)
    True
    """
    signed = float(summary.lo) < 0 and not non_negative
    cells = _levels(spec)
    if spec.symmetric and signed:
        counts, cells = _magnitudes(summary), max(cells // 2, 1)
        edges = np.arange(counts.size + 1, dtype=np.float64) * summary.width
    else:
        counts, edges = _used(summary)
    mirrored = float(edges[-1]) <= 0.0  # no positive values: the search moves the end away from 0
    if mirrored:
        counts, edges = counts[::-1], -edges[::-1]
    zero = int(np.searchsorted(edges, 0.0))  # every grid holds 0, so neither end moves past it
    cumulative = np.cumsum(counts)
    steps = np.arange(1, 50_000) * 1e-5 * cumulative[-1]
    firsts = np.minimum(np.searchsorted(cumulative, steps, side="left"), zero)
    lasts = np.maximum(np.searchsorted(cumulative, cumulative[-1] - steps, side="left"), zero - 1)
    start, end, left, right = 0, len(counts) - 1, 0, 0
    best, norm_min, rises = (start, end), np.inf, 0
    while left < len(steps) and right < len(steps) and start < end:
        new_start, new_end = start, end
        if firsts[left] - start > end - lasts[right]:
            new_start, left = int(firsts[left]), left + 1
        else:
            new_end, right = int(lasts[right]), right + 1
        if (new_start, new_end) == (start, end):
            continue
        start, end = new_start, new_end
        norm = _l2_norm(counts, edges, float(edges[start]), float(edges[end + 1]), cells)
        if norm < norm_min:
            best, norm_min, rises = (start, end), norm, 0
        elif (rises := rises + 1) >= _PATIENCE:
            break
    low, high = float(edges[best[0]]), float(edges[best[1] + 1])
    if mirrored:
        low, high = -high, -low
    if spec.symmetric and signed:
        low = -high
    least, greatest = _with_zero(summary)
    return torch.tensor(max(low, float(least))), torch.tensor(min(high, float(greatest)))


def _l2_norm(counts: _Array, edges: _Array, lo: float, hi: float, cells: int) -> float:
    """The L2 error of the histogram, uniform within bins, when each value becomes its cell's middle."""
    width = (hi - lo) / cells
    begin, stop = edges[:-1] - lo, edges[1:] - lo
    first = np.clip(np.floor(begin / width), 0, cells - 1)
    last = np.clip(np.floor(stop / width), 0, cells - 1)
    from_center, to_center = begin - (first + 0.5) * width, stop - (last + 0.5) * width
    half = width / 2
    # integral of e**2 over the first cell's part, the whole cells between and the last cell's part
    integral = (half**3 - from_center**3) + (last - first - 1) * 2 * half**3 + (to_center**3 + half**3)
    return float(np.sum(counts / (edges[1:] - edges[:-1]) * integral / 3.0))


def kl(summary: Summary, spec: TensorSpec, non_negative: bool = False) -> tuple[Tensor, Tensor]:
    """The entropy rule: the threshold at which the quantized ``|x|`` keeps most of its information.

    For every threshold the histogram up to it, with all that lies beyond added to its last bin, is held
    against the same histogram summed into as many cells as the grid has levels and spread evenly over the
    bins that were not empty; the threshold of least Kullback-Leibler divergence clips both ends.

    Source: S. Migacz, 8-bit Inference with TensorRT, GTC 2017.

    >>> from bitsmith.grid import IntFormat, TensorSpec
    >>> from bitsmith.ranges import Histogram
    >>> statistic = Histogram(); statistic.update(torch.cat([torch.randn(100_000), torch.tensor([40.0])]))
    >>> lo, hi = kl(statistic.finish(), TensorSpec(format=IntFormat(8)))
    >>> bool(hi < 20)
    True
    """
    counts = _magnitudes(summary)
    used = counts.size
    per_bin = max(1, used // spec.range.bins)
    bins = -(-used // per_bin)
    counts = np.pad(counts, (0, bins * per_bin - used)).reshape(bins, per_bin).sum(1)
    if bins > 1:  # the zeros of a ReLU are exact under every threshold: they must not outweigh the rest
        counts[0] = counts[1]
    signed = float(summary.lo) < 0 and not non_negative
    levels = max(_levels(spec) // 2 if signed else _levels(spec), 2)
    # Of values far from 0 only those count: a threshold at the first of them would "keep" all there is.
    fewest = int(np.flatnonzero(counts)[0]) + levels
    best, least = bins, np.inf
    for kept in range(min(fewest, bins), bins + 1):
        divergence = _divergence(counts, kept, levels)
        if divergence <= least:
            best, least = kept, divergence
    threshold = torch.tensor(best * per_bin * summary.width)
    low, high = (end.cpu() for end in _with_zero(summary))
    return torch.maximum(low, -threshold), torch.minimum(high, threshold)


def _divergence(counts: _Array, kept: int, levels: int) -> float:
    """KL(P || Q) of the first ``kept`` bins: P with the clipped mass, Q quantized to ``levels`` cells."""
    inner = counts[:kept]
    p = inner.copy()
    p[-1] += counts[kept:].sum()
    starts = (np.arange(min(levels, kept)) * kept) // min(levels, kept)
    sizes = np.diff(np.append(starts, kept))
    filled = inner > 0
    mass = np.add.reduceat(inner, starts)
    occupied = np.add.reduceat(filled.astype(np.float64), starts)
    q = np.repeat(mass / np.maximum(occupied, 1.0), sizes) * filled
    total_p, total_q = p.sum(), q.sum()
    if total_q == 0.0:
        return float("inf")
    there = p > 0
    # a bin that only holds clipped mass is empty in Q: a small floor keeps its cost finite, and high
    ratio = (p[there] / total_p) / np.maximum(q[there] / total_q, 1e-12)
    return float(np.sum(p[there] / total_p * np.log(ratio)))


def _magnitudes(summary: Summary) -> _Array:
    """The histogram of ``|x|``, up to its last filled bin."""
    assert summary.counts is not None
    half = summary.counts.numel() // 2
    counts: _Array = (summary.counts[half:] + summary.counts[:half].flip(0)).double().numpy()
    return counts[: int(np.flatnonzero(counts)[-1]) + 1]


def _with_zero(summary: Summary) -> tuple[Tensor, Tensor]:
    """The ends of the values, widened to include 0 as every grid does: the interval to search in."""
    return summary.lo.clamp(max=0.0), summary.hi.clamp(min=0.0)


def _used(summary: Summary) -> tuple[_Array, _Array]:
    """The histogram's non-empty stretch, widened to include 0, and its edges."""
    assert summary.counts is not None
    counts = summary.counts.numpy()
    half = counts.size // 2
    filled = np.flatnonzero(counts)
    first, last = min(int(filled[0]), half), max(int(filled[-1]), half - 1)
    edges = (np.arange(first, last + 2, dtype=np.float64) - half) * summary.width
    return counts[first : last + 1], edges


def _levels(spec: TensorSpec) -> int:
    """How many levels the format has, as the histogram rules see it (at most 2**16)."""
    if isinstance(spec.format, FloatFormat):
        return 1 << min(spec.format.bits, 16)
    return min(spec.format.qmax - spec.format.qmin + 1, 1 << 16)
