"""mse, histogram_l2 and kl against searches written another way."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bitsmith.grid import FP8_E4M3, IntFormat, TensorSpec, fake_quantize
from bitsmith.ranges import Histogram, activation_grid, activation_statistic, solve_grid
from bitsmith.ranges.clipping import histogram_l2, kl, mse


def laplace(count: int = 100_000) -> Tensor:
    x = np.random.default_rng(0).laplace(size=count).astype(np.float32)
    return torch.from_numpy(x)


def error(x: Tensor, lo: float, hi: float, spec: TensorSpec) -> float:
    return float((fake_quantize(x, solve_grid(lo, hi, spec)) - x).square().double().mean())


@pytest.mark.parametrize("bits", [3, 4, 6, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_mse_is_as_good_as_a_brute_force_search_over_the_data(bits: int, symmetric: bool) -> None:
    x = laplace() if symmetric else torch.where((skew := laplace()) < 0, skew * 0.3, skew)
    fmt = IntFormat(bits, signed=symmetric)
    spec = TensorSpec(format=fmt, symmetric=symmetric, range={"name": "mse"})
    statistic = Histogram()
    statistic.update(x)
    lo, hi = mse(statistic.finish(), spec)
    low, high = float(x.min()), float(x.max())
    fractions = np.arange(1, 41) / 40
    pairs = [(f, f) for f in fractions] if symmetric else [(f, g) for f in fractions[::2] for g in fractions[::2]]
    best = min(error(x, low * f, high * g, spec) for f, g in pairs)
    assert error(x, float(lo), float(hi), spec) <= best * 1.02
    assert error(x, float(lo), float(hi), spec) <= error(x, low, high, spec)


@pytest.mark.parametrize("fmt", [IntFormat(4), FP8_E4M3], ids=str)
def test_mse_searches_the_power_of_two_scales_it_will_get(fmt: IntFormat) -> None:
    x = laplace()
    spec = TensorSpec(format=fmt, scale="po2", range={"name": "mse"})
    statistic = activation_statistic(spec)
    statistic.update(x)
    grid = activation_grid(statistic, spec)
    found = float((fake_quantize(x, grid) - x).square().double().mean())
    for factor in (0.25, 0.5, 2.0):
        other = solve_grid(0.0, 1.0, spec)
        other = type(grid)(grid.format, grid.scale * factor)
        assert found <= float((fake_quantize(x, other) - x).square().double().mean()) * 1.01


def test_mse_of_a_wide_format_clips_next_to_nothing() -> None:
    """16 bits: rounding costs less than clipping, though a bin is wider than a step."""
    x = torch.randn(100_000)
    spec = TensorSpec(format=IntFormat(16), range={"name": "mse"})
    statistic = activation_statistic(spec)
    statistic.update(x)
    threshold = float(activation_grid(statistic, spec).scale) * 32767
    assert threshold >= 0.97 * float(x.abs().max())


@pytest.mark.parametrize("name", ["mse", "histogram_l2", "kl"])
def test_an_outlier_is_given_up(name: str) -> None:
    x = torch.cat([torch.randn(200_000, generator=torch.Generator().manual_seed(0)), torch.tensor([100.0])])
    spec = TensorSpec(format=IntFormat(4), range={"name": name})
    statistic = activation_statistic(spec)
    statistic.update(x)
    grid = activation_grid(statistic, spec)
    minmax = solve_grid(float(x.min()), float(x.max()), spec)
    assert float(grid.scale) * 7 < 20
    loss = (fake_quantize(x[:-1], grid) - x[:-1]).square().mean()
    assert loss < 0.2 * (fake_quantize(x[:-1], minmax) - x[:-1]).square().mean()


def test_non_negative_data_keeps_zero_as_its_lower_end() -> None:
    x = torch.randn(50_000).relu()
    for name in ("mse", "histogram_l2", "kl", "percentile", "minmax"):
        spec = TensorSpec(format=IntFormat(8), range={"name": name})
        statistic = activation_statistic(spec)
        statistic.update(x)
        grid = activation_grid(statistic, spec, non_negative=True)
        assert grid.format == IntFormat(8, signed=False)
        assert 2.0 < float(grid.scale) * 255 <= float(x.max()) * 1.001


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("name", ["mse", "histogram_l2"])
def test_values_far_from_zero_are_searched_on_the_grid_they_get(name: str, sign: float) -> None:
    """An affine grid holds 0: giving up the upper end for a finer step must count the levels below the values."""
    x = sign * (torch.rand(16, 8, generator=torch.Generator().manual_seed(0)) * 0.3 + 5)
    spec = TensorSpec(format=IntFormat(8, signed=False), symmetric=False, range={"name": name})
    statistic = activation_statistic(spec)
    statistic.update(x)
    loss = (fake_quantize(x, activation_grid(statistic, spec)) - x).square().mean()
    minmax = solve_grid(float(x.min()), float(x.max()), spec)
    assert loss <= 1.1 * (fake_quantize(x, minmax) - x).square().mean()


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("name", ["mse", "histogram_l2", "kl"])
def test_an_outlier_on_one_side_of_zero_is_given_up(name: str, sign: float) -> None:
    values = torch.rand(100_000, generator=torch.Generator().manual_seed(0)) * 3 + 1
    x = sign * torch.cat([values, torch.tensor([100.0])])
    spec = TensorSpec(format=IntFormat(4, signed=False), symmetric=False, range={"name": name})
    statistic = activation_statistic(spec)
    statistic.update(x)
    assert float(activation_grid(statistic, spec).scale) * 15 < 20


def test_kl_keeps_zero_in_the_range_when_it_clips() -> None:
    """A threshold below all values, as a coarse grid may choose, is no range that is upside down."""
    x = torch.cat([torch.full((100_000,), 5.0), torch.full((1,), 5.3)])
    spec = TensorSpec(format=IntFormat(4), symmetric=False, range={"name": "kl"})
    statistic = activation_statistic(spec)
    statistic.update(x)
    lo, hi = kl(statistic.finish(), spec)
    assert float(lo) <= 0.0 < float(hi)


@pytest.mark.parametrize("search", [mse, histogram_l2, kl])
def test_the_range_that_is_found_includes_zero(search: Any) -> None:
    spec = TensorSpec(format=IntFormat(8, signed=False), symmetric=False, range={"name": search.__name__})
    for sign in (1.0, -1.0):
        statistic = Histogram()
        statistic.update(sign * torch.linspace(5.0, 5.3, 1000))
        lo, hi = search(statistic.finish(), spec)
        assert float(lo if sign > 0 else hi) == 0.0
        assert 5.0 < float(hi if sign > 0 else -lo) <= 5.3001
