"""Steps: how they are written, what orders are refused, and that a step which does harm is undone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import bitsmith as bs
from bitsmith.errors import RecipeError
from bitsmith.optimize.gptq import GptqStep
from bitsmith.optimize.visit import LayerVisit
from bitsmith.recipe import Recipe, bits_recipe
from bitsmith.steps import BiasCorrection, FoldBatchNorm, Gptq

WEIGHTS = "weights: {format: {bits: 4}}\n"


@pytest.mark.parametrize("written", ["[gptq]", "[{gptq: {}}]", "[{name: gptq}]", "[{gptq: }]"])
def test_a_step_is_a_name_or_a_name_with_options(written: str) -> None:
    assert Recipe.from_yaml(f"{WEIGHTS}steps: {written}").steps == (Gptq(),)


def test_steps_survive_yaml() -> None:
    recipe = bits_recipe(4, 8, steps=("fold_batch_norm", "gptq", "bias_correction"))
    assert recipe.steps == (FoldBatchNorm(), Gptq(), BiasCorrection())
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ("[gptq, gptq]", "listed twice: gptq"),
        ("[bias_correction, gptq]", "list them so: gptq, bias_correction"),
        ("[{gptq: {polish: 1}}]", "polish"),
        ("[polish]", "polish"),
    ],
)
def test_what_cannot_be_followed_is_refused(steps: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.from_yaml(f"{WEIGHTS}steps: {steps}")


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))


def test_the_report_says_what_a_step_did() -> None:
    q = bs.quantize(_net(), [torch.randn(64, 3, 8, 8)], bits_recipe(3, 8, steps=("gptq",)))
    assert [entry.layer for entry in q.report.steps] == ["0", "2"]
    assert all(entry.error_after < entry.error_before for entry in q.report.steps)
    assert any(note.startswith("gptq: 2 of 2 layers") for note in q.report.notes)


def test_a_step_that_does_harm_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    def harmful(self: GptqStep, visit: LayerVisit) -> tuple[float, float]:
        visit.layer.weight.data.zero_()
        return 1.0, 2.0

    x = torch.randn(16, 3, 8, 8)
    untouched = bs.quantize(_net(), [x], bits_recipe(4, 8, steps=()))
    monkeypatch.setattr(GptqStep, "run", harmful)
    q = bs.quantize(_net(), [x], bits_recipe(4, 8, steps=("gptq",)))
    assert all(entry.undone for entry in q.report.steps)
    assert any("undone, since the error grew: 0, 2" in note for note in q.report.notes)
    torch.testing.assert_close(q(x), untouched(x), rtol=0, atol=0)


def test_layers_that_a_step_does_not_take_are_named() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared = nn.Linear(4, 4)
            self.embed = nn.Embedding(5, 4)

        def forward(self, ids: torch.Tensor) -> Any:
            return self.shared(torch.relu(self.shared(self.embed(ids))))

    q = bs.quantize(Twice(), [torch.randint(0, 5, (8, 3))], bits_recipe(4, 8, steps=("gptq",)))
    reasons = {entry.layer: entry.skipped for entry in q.report.steps}
    assert reasons["shared"] == "its weights are shared by several calls"


def test_tied_weights_change_in_the_layer_alone() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.out = nn.Embedding(16, 8), nn.Linear(8, 16, bias=False)
            self.out.weight = self.embed.weight

        def forward(self, ids: torch.Tensor) -> Any:
            return self.out(torch.tanh(self.embed(ids)))

    net = Tied()
    q = bs.quantize(net, [torch.randint(0, 16, (32, 4))], Recipe.from_yaml(f"{WEIGHTS}steps: [gptq]"))
    modules = dict(q.graph.named_modules())
    assert torch.equal(modules["embed"].weight, net.embed.weight)
    assert not torch.equal(modules["out"].weight, net.embed.weight)
