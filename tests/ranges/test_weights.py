"""weight_grid: granularities, rules and the objectives they promise."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from bitsmith.errors import NonFiniteError, RecipeError
from bitsmith.grid import FP8_E4M3, Format, Grid, IntFormat, TensorSpec, fake_quantize
from bitsmith.ranges import weight_grid
from bitsmith.ranges.hqo import objective

RULES = ["minmax", "percentile", "mse", "hqo"]


def weights() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(8, 6, 3, 3, generator=generator) * torch.logspace(-2, 1, 8).view(-1, 1, 1, 1)
    w[0, 0, 0, 0] = 0.3  # an outlier of its channel
    return w


def spec_of(name: str, fmt: Format | None = None, **options: Any) -> TensorSpec:
    return TensorSpec.model_validate(
        {"format": fmt or IntFormat(4), "granularity": "channel", "range": {"name": name}, **options}
    )


def squared(w: Tensor, grid: Grid) -> Tensor:
    return (fake_quantize(w, grid) - w).square().flatten(1).sum(1)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_channel_scales_are_those_of_each_slice(axis: int) -> None:
    w = weights()
    grid = weight_grid(w, spec_of("minmax"), axis)
    expected = [float(part.abs().max()) / 7 for part in w.unbind(axis)]
    assert grid.scale.tolist() == pytest.approx(expected, rel=1e-6)
    assert grid.axis == axis % 4
    assert weight_grid(w, spec_of("minmax", axis=axis), 2).scale.tolist() == grid.scale.tolist()


@pytest.mark.parametrize("rule", RULES)
def test_group_scales_are_those_of_each_block(rule: str) -> None:
    w = torch.randn(4, 10, 3)
    grid = weight_grid(w, spec_of(rule, granularity="group", group_size=4))
    assert (grid.axis, grid.group_size, tuple(grid.scale.shape)) == (1, 4, (4, 3, 3))
    fake_quantize(w, grid)
    if rule == "minmax":
        for start, group in ((0, 0), (4, 1), (8, 2)):
            expected = w[:, start : start + 4].abs().amax(1) / 7
            assert torch.allclose(grid.scale[:, group], expected)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("fmt", [IntFormat(2), IntFormat(8), IntFormat(8, narrow=True), FP8_E4M3], ids=str)
@pytest.mark.parametrize("scale", ["float32", "po2"])
def test_every_rule_makes_usable_grids(rule: str, fmt: Format, scale: str) -> None:
    w = weights()
    for symmetric in (True, False) if isinstance(fmt, IntFormat) else (True,):
        for granularity in ("tensor", "channel"):
            spec = spec_of(rule, fmt, scale=scale, symmetric=symmetric, granularity=granularity)
            grid = weight_grid(w, spec)
            assert bool((grid.scale > 0).all())
            assert fake_quantize(w, grid).shape == w.shape
            assert (grid.zero_point is None) == symmetric
            if scale == "po2":
                assert bool((torch.frexp(grid.scale).mantissa == 0.5).all())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("options", [{}, {"symmetric": False}, {"scale": "po2"}], ids=str)
def test_mse_is_never_worse_than_minmax_nor_than_brute_force(bits: int, options: dict[str, Any]) -> None:
    w, fmt = weights(), IntFormat(bits)
    found = squared(w, weight_grid(w, spec_of("mse", fmt, **options)))
    widest = weight_grid(w, spec_of("minmax", fmt, **options))
    assert bool((found <= squared(w, widest) * (1 + 1e-6)).all())
    if not options:
        best = torch.stack([squared(w, Grid(fmt, widest.scale * i / 80, axis=0)) for i in range(1, 81)]).amin(0)
        assert bool((found <= best * (1 + 1e-6)).all())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("options", [{}, {"symmetric": False}, {"scale": "po2"}], ids=str)
def test_hqo_is_never_worse_than_minmax_in_its_objective(bits: int, options: dict[str, Any]) -> None:
    w, fmt = weights(), IntFormat(bits)

    def loss(grid: Grid) -> Tensor:
        return objective(w.flatten(1), fake_quantize(w, grid).flatten(1))

    found = loss(weight_grid(w, spec_of("hqo", fmt, **options)))
    widest = weight_grid(w, spec_of("minmax", fmt, **options))
    assert bool((found <= loss(widest) * (1 + 1e-6)).all())
    if not options:
        best = torch.stack([loss(Grid(fmt, widest.scale * i / 200, axis=0)) for i in range(1, 201)]).amin(0)
        assert float(found.sum()) <= 1.08 * float(best.sum())


def test_percentile_is_an_order_statistic_of_each_channel() -> None:
    w = torch.randn(3, 1000)
    grid = weight_grid(w, spec_of("percentile", range={"name": "percentile", "percentile": 99.0}))
    ordered = w.sort(dim=1).values
    expected = torch.maximum(-ordered[:, 10], ordered[:, 989]) / 7
    assert torch.allclose(grid.scale, expected)


@pytest.mark.parametrize("rule", RULES)
def test_a_channel_of_zeros_is_legal_and_stays_zero(rule: str) -> None:
    w = weights()
    w[3] = 0.0
    grid = weight_grid(w, spec_of(rule))
    assert grid.scale[3] == grid.scale.max()
    assert not fake_quantize(w, grid)[3].any()


@pytest.mark.parametrize("rule", RULES)
def test_pieces_and_dead_channels_do_not_change_a_large_weight(rule: str) -> None:
    """The search goes through the rows in pieces; every row gets what it gets alone."""
    w = torch.randn(12, 20_000)
    w[2:6] = 0.0
    grid = weight_grid(w, spec_of(rule))
    assert torch.equal(grid.scale[2:6], grid.scale.max().expand(4))
    assert torch.equal(grid.scale[9:10], weight_grid(w[9:10], spec_of(rule)).scale)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("options", [{}, {"granularity": "tensor"}, {"granularity": "group", "group_size": 2}])
def test_a_weight_of_zeros_is_legal(rule: str, options: dict[str, Any]) -> None:
    w = torch.zeros(4, 6)
    grid = weight_grid(w, spec_of(rule, **options))
    assert torch.allclose(grid.scale, torch.tensor(1 / 7))
    assert not fake_quantize(w, grid).any()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_an_error(bad: float) -> None:
    w = weights()
    w[0, 0, 0, 1] = bad
    with pytest.raises(NonFiniteError, match="1 of 432 weights"):
        weight_grid(w, spec_of("minmax"))


def test_unknown_rules_and_axes_are_refused_in_words() -> None:
    with pytest.raises(RecipeError, match="'kl' is no range rule for weights"):
        weight_grid(weights(), spec_of("kl"))
    with pytest.raises(RecipeError, match="no axis 4"):
        weight_grid(weights(), spec_of("minmax"), axis=4)
