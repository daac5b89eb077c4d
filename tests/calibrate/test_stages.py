"""Cutting a graph into stages."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import bitsmith as bs
from bitsmith.recipe import Recipe, bits_recipe
from bitsmith.steps import Gptq


def weights_only(bits: int) -> Recipe:
    recipe = bits_recipe(bits, 8, steps=("fold_batch_norm", Gptq()))
    return recipe.model_copy(update={"activations": None, "bias": None})


@pytest.mark.parametrize("activations", [True, False])
def test_every_layer_of_a_chain_is_rounded_and_measured(activations: bool) -> None:
    """Also where no Quantizer stands between the layers, as where only weights are quantized."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 8), nn.GELU(), nn.Linear(8, 4))
    recipe = bits_recipe(4, 8, steps=("fold_batch_norm", Gptq())) if activations else weights_only(4)
    q = bs.quantize(model, [torch.randn(64, 8)], recipe)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert [step.layer for step in q.report.steps] == linear
    assert all(step.error_after < step.error_before for step in q.report.steps)
    assert [layer.name for layer in q.report.layers if layer.sqnr_db is not None] == linear
