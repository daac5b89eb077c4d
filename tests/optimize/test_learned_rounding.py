"""AdaRound by layer: against all 2^n roundings, and its quadratic form against the layers themselves."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bitsmith as bs
from bitsmith.errors import RecipeError
from bitsmith.grid import Grid, IntFormat, Quantizer, TensorSpec, fake_quantize
from bitsmith.optimize.learned_rounding import LearnedRoundingStep, Sums, learn_rounding, output_error
from bitsmith.optimize.visit import LayerVisit
from bitsmith.place.layers import QuantLayer
from bitsmith.ranges import weight_grid
from bitsmith.recipe import bits_recipe
from bitsmith.steps import LearnedRounding


def exhaustive(weight: Tensor, grid: Grid, h: Tensor, t: Tensor, power: Tensor) -> float:
    """The least output error of all ways to round each weight down or up."""
    low = (weight / grid.scale).floor()
    best = float("inf")
    for bits in itertools.product((0.0, 1.0), repeat=weight.numel()):
        codes = (low + torch.tensor(bits).reshape(weight.shape)).clamp(grid.format.qmin, grid.format.qmax)
        best = min(best, output_error((codes * grid.scale).double()[None], h, t, power))
    return best


@pytest.mark.parametrize("form", ["hard_sigmoid", "sigmoid", "linear"])
def test_it_comes_near_the_best_of_all_roundings(form: str) -> None:
    found = {"best": 0.0, "learned": 0.0, "nearest": 0.0}
    for seed in range(6):
        g = torch.Generator().manual_seed(seed)
        layer = nn.Linear(10, 1, bias=False)
        layer.weight.data = torch.randn(1, 10, generator=g)
        x = torch.randn(64, 10, generator=g) @ torch.randn(10, 10, generator=g)
        sums = Sums(layer)
        sums.update(x + 0.1 * torch.randn(64, 10, generator=g), x)
        grid = Grid(IntFormat(3), layer.weight.detach().abs().max() / 3)
        weight = layer.weight.detach()
        h, t, power = sums.finish(centre=False)
        before = output_error(fake_quantize(weight, grid).double()[None], h, t, power)
        options = LearnedRounding(form=form)  # type: ignore[arg-type]
        learned = learn_rounding(layer, grid, h, t, before, options)
        found["nearest"] += before
        found["learned"] += output_error(learned.double()[None], h, t, power)
        found["best"] += exhaustive(weight, grid, h, t, power)
    assert found["best"] <= found["learned"] + 1e-6
    share = 0.1 if form == "hard_sigmoid" else 0.4
    assert found["learned"] - found["best"] < share * (found["nearest"] - found["best"])


LAYERS = {
    "linear": (nn.Linear(5, 4), (7, 5)),
    "conv1d": (nn.Conv1d(4, 6, 3, padding=1, stride=2), (3, 4, 9)),
    "conv2d": (nn.Conv2d(3, 4, (3, 2), padding=(1, 0)), (3, 3, 8, 7)),
    "without a bias": (nn.Conv2d(3, 4, 3, bias=False), (3, 3, 8, 7)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2), (3, 4, 6, 6)),
    "depthwise": (nn.Conv2d(4, 4, 3, groups=4, padding="same"), (3, 4, 6, 6)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (3, 4, 5, 5)),
    "reflected": (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (3, 3, 6, 6)),
    "conv3d": (nn.Conv3d(2, 3, 2), (2, 2, 4, 5, 4)),
}


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("name", LAYERS)
def test_the_errors_it_reports_are_those_of_the_layer(name: str, granularity: Any) -> None:
    module, shape = LAYERS[name]
    torch.manual_seed(0)
    module.reset_parameters()
    exact = torch.randn(shape).cumsum(-1) + 1
    read = exact + 0.1 * torch.randn(shape)
    layer = QuantLayer(module, Quantizer(TensorSpec(format=IntFormat(3), granularity=granularity)))
    assert layer.weight_quantizer is not None
    layer.weight_quantizer.set_grid(
        weight_grid(layer.weight.detach(), layer.weight_quantizer.spec, 1 if name == "transposed" else 0)
    )

    def inputs(stream: str) -> Iterator[Tensor]:
        yield from (read if stream == "quantized" else exact).split(2)

    step = LearnedRoundingStep(LearnedRounding(iterations=200))
    assert step.refusal(layer) == ""
    with torch.no_grad():
        target = module(exact)
        before, after = step.run(LayerVisit(name, layer, inputs))
        error = float((layer(read) - target).square().sum())
    assert error == pytest.approx(after, rel=1e-3)
    assert after < before


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten())


@pytest.mark.parametrize("options", [{}, {"target": "activation", "iterations": 300}, {"inputs": "float"}])
def test_a_recipe_with_it_loses_less_at_three_bits(options: dict[str, Any]) -> None:
    x = torch.randn(64, 3, 8, 8).cumsum(-1)
    plain = bs.quantize(net(), [x], bits_recipe(3, 8))
    steps = ("fold_batch_norm", {"learned_rounding": options})
    better = bs.quantize(net(), [x], bits_recipe(3, 8, steps=steps))
    assert better.report.output_sqnr_db > plain.report.output_sqnr_db + 0.5
    assert [entry.undone for entry in better.report.steps] == [False, False]


@pytest.mark.parametrize("options", [{"batch_size": 8}, {"dtype": "bfloat16"}, {"seed": 1}])
def test_options_of_minibatches_are_refused_where_there_are_none(options: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="activation"):
        bs.Recipe.from_yaml(
            f"weights: {{format: {{bits: 4}}}}\nsteps: [{{learned_rounding: {options}}}]".replace("'", '"')
        )
