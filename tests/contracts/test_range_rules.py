"""What every range rule must satisfy; a new row in a rule table is checked without a new test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from bitsmith.errors import CalibrationError, NonFiniteError, RecipeError
from bitsmith.grid import FP8_E4M3, Format, Grid, IntFormat, TensorSpec, fake_quantize
from bitsmith.ranges import activation_grid, activation_statistic, weight_grid
from bitsmith.ranges.rules import RULES as ACTIVATION_RULES
from bitsmith.ranges.weights import RULES as WEIGHT_RULES


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The tensors here are small: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


FORMATS: list[Format] = [IntFormat(4), IntFormat(8), IntFormat(16), FP8_E4M3]


def spec_of(rule: str, fmt: Format, symmetric: bool = True) -> TensorSpec:
    return TensorSpec(format=fmt, symmetric=symmetric, range={"name": rule})


def data() -> Tensor:
    return torch.randn(20_000, generator=torch.Generator().manual_seed(0)) + 0.5


def check_grid(grid: Grid, x: Tensor) -> None:
    """Scales positive, finite and normal; 0 exact; nearly all values within a step of where they were."""
    assert grid.scale.dtype == torch.float32
    assert bool((grid.scale >= torch.finfo(torch.float32).tiny).all())
    assert bool(torch.isfinite(grid.scale).all())
    assert fake_quantize(torch.zeros_like(x), grid).abs().max() == 0
    error = (fake_quantize(x, grid) - x).square().mean() / x.square().mean()
    assert error < (0.05 if grid.format.bits <= 4 else 0.01)


def watched(spec: TensorSpec, *batches: Tensor) -> Grid:
    statistic = activation_statistic(spec)
    for batch in batches:
        statistic.update(batch)
    return activation_grid(statistic, spec)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("rule", ACTIVATION_RULES)
def test_activation_rules_make_good_grids(rule: str, fmt: Format) -> None:
    for symmetric in (True, False) if isinstance(fmt, IntFormat) else (True,):
        check_grid(watched(spec_of(rule, fmt, symmetric), data()), data())


@pytest.mark.parametrize("rule", ACTIVATION_RULES)
def test_activation_rules_follow_the_scale_of_the_data(rule: str) -> None:
    """Eight times the values: eight times the scale, exactly, as a power of two changes no rounding."""
    spec = spec_of(rule, IntFormat(8))
    assert watched(spec, data() * 8).scale.item() == pytest.approx(8 * watched(spec, data()).scale.item(), rel=1e-6)


@pytest.mark.parametrize("rule", ACTIVATION_RULES)
def test_activation_rules_merge(rule: str) -> None:
    spec = spec_of(rule, IntFormat(8))
    one, two = activation_statistic(spec), activation_statistic(spec)
    one.update(data())
    two.update(data() * 2)
    merged = activation_grid(one.merge(two), spec)
    assert merged.scale.item() == pytest.approx(watched(spec, data(), data() * 2).scale.item(), rel=1e-6)


@pytest.mark.parametrize("rule", ACTIVATION_RULES)
def test_activation_rules_refuse_what_has_no_range(rule: str) -> None:
    spec = spec_of(rule, IntFormat(8))
    with pytest.raises(CalibrationError, match="range is zero"):
        watched(spec, torch.zeros(100))
    with pytest.raises(CalibrationError, match="no value was seen"):
        watched(spec)
    with pytest.raises(NonFiniteError):
        watched(spec, torch.tensor([1.0, float("nan")]))


@pytest.mark.parametrize("rule", ACTIVATION_RULES)
def test_activation_rules_do_a_single_value_and_tiny_batches(rule: str) -> None:
    for value in (3.0, -3.0, 1e-20, 1e20):
        grid = watched(spec_of(rule, IntFormat(8)), torch.tensor([value]), torch.tensor([value]))
        assert fake_quantize(torch.tensor([value]), grid).item() == pytest.approx(value, rel=0.02)


@pytest.mark.parametrize(("least", "greatest"), [(5.0, 5.3), (0.09, 0.12), (-3.1, -3.0), (-5.0, -0.1)])
@pytest.mark.parametrize("rule", ACTIVATION_RULES)
def test_activation_rules_do_values_on_one_side_of_zero(rule: str, least: float, greatest: float) -> None:
    """Nothing straddles 0, yet the grid holds it: the range is from 0 to the far end."""
    x = torch.linspace(least, greatest, 4000)
    for fmt in (IntFormat(4), IntFormat(8)):
        for symmetric in (True, False):
            check_grid(watched(spec_of(rule, fmt, symmetric), x), x)


@pytest.mark.parametrize("rule", ACTIVATION_RULES)
def test_activation_rules_say_whether_they_have_channels(rule: str) -> None:
    spec = TensorSpec(format=IntFormat(8), granularity="channel", range={"name": rule})
    if not ACTIVATION_RULES[rule].channels:
        with pytest.raises(RecipeError, match=f"'{rule}' per channel"):
            activation_statistic(spec)
        return
    x = data().view(10, 20, 100)
    grid = watched(spec, x)
    assert (grid.axis, tuple(grid.scale.shape)) == (1, (20,))


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("rule", WEIGHT_RULES)
def test_weight_rules_make_good_grids(rule: str, fmt: Format) -> None:
    w = data().view(20, 1000)
    for granularity in ("tensor", "channel"):
        spec = TensorSpec(format=fmt, granularity=granularity, range={"name": rule})
        check_grid(weight_grid(w, spec), w)


@pytest.mark.parametrize("rule", WEIGHT_RULES)
def test_weight_rules_do_each_channel_by_itself(rule: str) -> None:
    w = data().view(20, 1000)
    spec = TensorSpec(format=IntFormat(4), granularity="channel", range={"name": rule})
    together = weight_grid(w, spec).scale
    alone = torch.cat([weight_grid(row[None], spec).scale for row in w[:3]])
    assert torch.allclose(together[:3], alone, rtol=1e-5)
