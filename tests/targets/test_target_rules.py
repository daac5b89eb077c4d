"""What a target's data says is what placement and checks do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import bitsmith as bs
from bitsmith.errors import RecipeError
from bitsmith.grid import IntFormat, TensorSpec
from bitsmith.recipe import Override, bits_recipe
from bitsmith.targets import get_target


class Add(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.a(x) + self.b(x).relu())


@pytest.mark.parametrize("rescales", [True, False])
def test_a_target_that_cannot_rescale_gets_one_scale_at_an_add(rescales: bool) -> None:
    torch.manual_seed(0)

    target = get_target("generic").model_copy(update={"rescales": rescales})
    q = bs.quantize(Add(), [torch.randn(64, 3, 4, 4)], target=target)
    scales = {name: float(m.scale) for name, m in q.graph.quantizers.named_children()}
    assert (scales["a"] == scales["relu"]) is not rescales


def test_widths_are_checked_in_overrides_and_biases_too() -> None:
    target = get_target("generic").model_copy(update={"weight_bits": (8,), "bias_bits": 16})
    four_bits = Override(match="*", weights=TensorSpec(format=IntFormat(4)))
    int16_bias = TensorSpec(format=IntFormat(16))
    with pytest.raises(RecipeError, match="weights of 8 bits, but the recipe has 4"):
        target.check(bits_recipe(8, 8, bias=int16_bias, overrides=(four_bits,)))
    with pytest.raises(RecipeError, match="biases of 16 bits at most"):
        target.check(bits_recipe(8, 8))
    target.check(bits_recipe(8, 8, bias=int16_bias))
