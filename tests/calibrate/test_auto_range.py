"""``range: auto``: the rule that costs the layers' outputs least wins, as trying them one by one shows."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import bitsmith as bs
from bitsmith.errors import RecipeError
from bitsmith.grid import IntFormat, RangeRule, TensorSpec
from bitsmith.ranges import activation_statistic
from bitsmith.recipe import Recipe


def _recipe(weights: RangeRule, activations: RangeRule, bits: int = 4) -> Recipe:
    return Recipe(
        weights=TensorSpec(format=IntFormat(bits), range=weights),
        activations=TensorSpec(format=IntFormat(bits), symmetric=False, range=activations),
        steps=(),
    )


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    with torch.no_grad():
        net[2].weight[0, 0] = 1.0  # an outlier that min-max spends its codes on ...
        net[0].weight[0], net[0].bias[0] = 0.01, -5.0  # ... for an input that is always 0
    return net


def _heavy_tailed() -> torch.Tensor:
    x = torch.randn(512, 16)
    x[0, 0] = 40.0
    return x


def test_the_winner_is_the_best_of_the_rules_tried_alone() -> None:
    net, x = _net(), _heavy_tailed()
    auto = RangeRule(name="auto")
    q = bs.quantize(net, [x], _recipe(auto, auto), noise_samples=512)
    chosen = {entry.tensor: entry for entry in q.report.ranges}
    assert {"0", "2"} <= set(chosen)
    assert chosen["2"].rule != "minmax"
    weight, exact = net[2].weight.detach(), torch.relu(net[0](x)) @ net[2].weight.T
    for rule, error in chosen["2"].errors.items():
        name, _, percentile = rule.partition(" ")
        spec = RangeRule(name=name, percentile=float(percentile)) if percentile else RangeRule(name=name)
        alone = bs.quantize(net, [x], _recipe(spec, RangeRule(name="minmax")))
        grid = alone.graph.get_submodule("2").weight_quantizer.require_grid()  # type: ignore[union-attr, operator]
        found = torch.relu(net[0](x)) @ (bs.grid.fake_quantize(weight, grid) - weight).T
        assert error == pytest.approx(float(found.square().sum() / exact.square().sum()), rel=1e-3)
    assert chosen["2"].errors[chosen["2"].rule] == min(chosen["2"].errors.values())


def test_the_outputs_are_better_and_the_report_says_by_how_much() -> None:
    net, x = _net(), _heavy_tailed()
    auto, minmax = RangeRule(name="auto"), RangeRule(name="minmax")
    q, plain = bs.quantize(net, [x], _recipe(auto, auto)), bs.quantize(net, [x], _recipe(minmax, minmax))
    assert (q.report.output_sqnr_db or 0) > (plain.report.output_sqnr_db or 0)
    assert any(note.startswith("range auto: ") and "less error than minmax" in note for note in q.report.notes)


def test_it_needs_the_walk() -> None:
    spec = TensorSpec(format=IntFormat(8), range=RangeRule(name="auto"))
    with pytest.raises(RecipeError, match="'auto' compares the outputs of layers"):
        activation_statistic(spec)


def test_it_is_written_in_yaml() -> None:
    recipe = _recipe(RangeRule(name="auto"), RangeRule(name="auto"))
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
