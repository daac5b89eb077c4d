"""The statistics are monoids, and each is exactly what its name says."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitsmith.errors import CalibrationError, NonFiniteError
from bitsmith.ranges import Histogram, MinMax, MovingAverage, Tails

MAKERS: dict[str, Callable[[], Any]] = {
    "minmax": MinMax,
    "moving_average": lambda: MovingAverage(0.25),
    "tails": lambda: Tails(90.0),
    "histogram": lambda: Histogram(64),
}
floats = st.floats(-(2.0**20), 2.0**20, width=32).map(lambda v: 0.0 if abs(v) < 2.0**-20 else v)
streams = st.lists(st.lists(floats, min_size=1, max_size=6), min_size=3, max_size=9)


def seen(make: Callable[[], Any], stream: list[list[float]]) -> Any:
    statistic = make()
    for batch in stream:
        statistic.update(torch.tensor(batch))
    return statistic


def same(a: Any, b: Any, *, exact: bool = True) -> None:
    a, b = a.finish(), b.finish()
    rtol, atol = (0.0, 0.0) if exact else (1e-6, 1e-3)
    torch.testing.assert_close(a.lo, b.lo, rtol=rtol, atol=atol)
    torch.testing.assert_close(a.hi, b.hi, rtol=rtol, atol=atol)
    assert a.width == b.width
    assert (a.counts is None) == (b.counts is None)
    if a.counts is not None:
        assert torch.equal(a.counts, b.counts)


@pytest.mark.parametrize("name", MAKERS)
@settings(max_examples=60, deadline=None)
@given(stream=streams, cuts=st.tuples(st.integers(0, 9), st.integers(0, 9)))
def test_merging_is_associative_and_the_same_as_one_stream(
    name: str, stream: list[list[float]], cuts: tuple[int, int]
) -> None:
    make, exact = MAKERS[name], name != "moving_average"
    first, second = sorted(cuts)
    a, b, c = (seen(make, part) for part in (stream[:first], stream[first:second], stream[second:]))
    whole = seen(make, stream)
    same(a.merge(b).merge(c), whole, exact=exact)
    same(a.merge(b.merge(c)), whole, exact=exact)
    same(whole.merge(make()), whole)
    same(make().merge(whole), whole)


@pytest.mark.parametrize("name", ["minmax", "tails", "histogram"])
@settings(max_examples=60, deadline=None)
@given(stream=streams)
def test_chunking_and_order_do_not_matter(name: str, stream: list[list[float]]) -> None:
    make = MAKERS[name]
    values = [v for batch in stream for v in batch]
    same(seen(make, stream), seen(make, [values]))
    same(seen(make, stream), seen(make, [values[::-1]]))


@pytest.mark.parametrize("name", MAKERS)
def test_values_that_are_not_finite_are_an_error(name: str) -> None:
    for bad in (math.nan, math.inf, -math.inf):
        statistic = MAKERS[name]()
        with pytest.raises(NonFiniteError):
            statistic.update(torch.tensor([1.0, bad, 2.0]))


def test_a_single_nan_among_many_is_found() -> None:
    x = torch.randn(300_000)
    x[123_456] = math.nan
    with pytest.raises(NonFiniteError):
        Tails().update(x)


@pytest.mark.parametrize("name", MAKERS)
def test_nothing_seen_is_an_error(name: str) -> None:
    statistic = MAKERS[name]()
    statistic.update(torch.zeros(0, 3))
    with pytest.raises(CalibrationError, match="no value was seen"):
        statistic.finish()


def test_minmax_and_moving_average_per_channel() -> None:
    x = torch.randn(5, 3, 4)
    flat = x.transpose(0, 1).flatten(1).numpy()
    for statistic in (MinMax(axis=1), MovingAverage(axis=-2)):
        statistic.update(x)
        assert statistic.finish().lo.numpy().tolist() == flat.min(1).tolist()
        assert statistic.finish().hi.numpy().tolist() == flat.max(1).tolist()


def test_moving_average_is_the_recurrence() -> None:
    batches = np.random.default_rng(0).normal(size=(6, 10)).astype(np.float32)
    statistic = MovingAverage(momentum=0.1)
    value = float(batches[0].max())
    for i, batch in enumerate(batches):
        statistic.update(torch.from_numpy(batch))
        value = value if i == 0 else 0.9 * value + 0.1 * float(batch.max())
    assert float(statistic.finish().hi) == pytest.approx(value, rel=1e-6)


def percentile_by_sorting(x: Tensor, percentile: float) -> tuple[float, float]:
    ordered = x.flatten().sort().values
    rank = max(math.ceil(percentile / 100 * ordered.numel()), 1)
    return float(ordered[ordered.numel() - rank]), float(ordered[rank - 1])


@pytest.mark.parametrize("percentile", [50.1, 90.0, 99.0, 99.9, 99.99, 99.999, 100.0])
@pytest.mark.parametrize("kind", ["normal", "relu", "constant", "ties", "small", "heavy"])
@pytest.mark.parametrize("expected", [False, True])
def test_percentiles_are_those_of_a_full_sort(percentile: float, kind: str, expected: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(400_003, generator=generator)
    x = {
        "normal": x,
        "relu": x.relu(),
        "constant": torch.full_like(x, -2.5),
        "ties": (x * 2).round(),
        "small": x[:17],
        "heavy": x / torch.rand(x.shape, generator=generator),
    }[kind]
    lo, hi = percentile_by_sorting(x, percentile)
    for chunks in (1, 7):
        statistic = Tails(percentile, expected_count=x.numel() if expected else None)
        for chunk in x.chunk(chunks):
            statistic.update(chunk)
        summary = statistic.finish()
        assert (float(summary.lo), float(summary.hi)) == (lo, hi)


def test_percentiles_merge_exactly() -> None:
    x = torch.randn(300_000)
    lo, hi = percentile_by_sorting(x, 99.9)
    parts = []
    for chunk in torch.split(x, [100_000, 50_000, 150_000]):
        parts.append(Tails(99.9))
        parts[-1].update(chunk)
    for merged in (parts[0].merge(parts[1]).merge(parts[2]), parts[2].merge(parts[0].merge(parts[1]))):
        summary = merged.finish()
        assert (float(summary.lo), float(summary.hi)) == (lo, hi)


def test_a_percentile_that_was_let_go_is_an_error_not_a_guess() -> None:
    """Descending data is the worst case: what the end needs came first and did not fit."""
    x = torch.arange(400_000.0).flip(0)
    statistic = Tails(60.0, expected_count=1000)
    statistic.update(x[:100_000])
    statistic.update(x[100_000:])
    with pytest.raises(CalibrationError, match="expected_count"):
        statistic.finish()


def test_the_histogram_counts_what_numpy_counts() -> None:
    x = torch.cat([torch.randn(50_000), torch.tensor([5.3, 0.0, -0.0, 1.0, -1.0])])
    statistic = Histogram(bins=128)
    for chunk in x.sort().values.chunk(5):
        statistic.update(chunk)
    summary = statistic.finish()
    assert summary.counts is not None
    bins = summary.counts.numel()
    edges = (np.arange(bins + 1) - bins // 2) * summary.width
    counts, _ = np.histogram(x.double().numpy(), bins=edges)
    assert summary.counts.tolist() == counts.tolist()
    assert (float(summary.lo), float(summary.hi)) == (float(x.min()), float(x.max()))
    assert summary.width * 128 <= 5.3
