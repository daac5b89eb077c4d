"""No sum leaves the accumulator, for the worst inputs there are; and what cannot be promised is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import bitsmith as bs
from bitsmith.capture.ops import module_of, op_of, quantizer_of
from bitsmith.errors import CalibrationError
from bitsmith.grid import IntFormat, TensorSpec
from bitsmith.integer.accumulate import accumulator_bound, layer_function
from bitsmith.integer.kernels import bias_codes, centred_weight
from bitsmith.integer.laws import code_range, largest_code
from bitsmith.optimize.accumulator import shrinkage
from bitsmith.place.layers import QuantLayer
from bitsmith.recipe import bits_recipe

METHODS = ("gptq", "gpfq", "qronos")


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(),
        nn.ConvTranspose2d(8, 4, 2, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5),
    )  # fmt: skip


def quantized(method: str, bits: int, **options: Any) -> Any:
    recipe = bits_recipe(
        4, 6, steps=("fold_batch_norm", {method: {"accumulator_bits": bits, **options}}, "bias_correction")
    )
    return bs.quantize(net(), [torch.randn(64, 3, 8, 8).cumsum(-1)], recipe, placement="fx")


def layers(q: Any) -> list[tuple[QuantLayer, Any]]:
    nodes = [n for n in q.graph.graph.nodes if op_of(n).role == "compute"]
    return [(module_of(n), quantizer_of(n.args[0]).require_grid()) for n in nodes]


def worst_sums(layer: QuantLayer, low: int, high: int) -> Tensor:
    """Each output channel's greatest and least sum over all inputs in low..high, from the integer product itself."""
    geometry: Any = layer.layer
    codes, bias, sums = centred_weight(layer).long(), bias_codes(layer), []
    transposed = isinstance(geometry, nn.ConvTranspose2d)
    for channel in range(len(bias)):
        per_group = len(bias) // getattr(geometry, "groups", 1)
        group, row = divmod(channel, per_group)
        if transposed:
            inputs = codes.shape[0] // geometry.groups
            weights = codes[group * inputs : (group + 1) * inputs, row]
        else:
            weights = codes[channel]
        for sign in (1, -1):
            x = torch.where(weights * sign > 0, high, low)
            sums.append(int((weights * x).sum()) + int(bias[channel]))
    return torch.tensor(sums)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bits", [12, 14])
def test_no_input_overflows_the_accumulator(method: str, bits: int) -> None:
    q = quantized(method, bits, scales=3)
    limit = 2 ** (bits - 1) - 1
    for layer, grid in layers(q):
        axis = 1 if isinstance(layer.layer, nn.ConvTranspose2d) else 0
        assert accumulator_bound(centred_weight(layer), largest_code(grid), bias_codes(layer), axis) <= limit
        assert int(worst_sums(layer, *code_range(grid)).abs().max()) <= limit


def test_the_bound_binds() -> None:
    """Without it the same net does leave 12 bits, so that the test above is one."""
    recipe = bits_recipe(4, 6, steps=("fold_batch_norm", "gptq", "bias_correction"))
    q = bs.quantize(net(), [torch.randn(64, 3, 8, 8).cumsum(-1)], recipe, placement="fx")
    assert max(int(worst_sums(layer, *code_range(grid)).abs().max()) for layer, grid in layers(q)) > 2**11


def test_the_integer_product_of_the_worst_input_is_the_worst_sum() -> None:
    q = quantized("gptq", 12)
    layer, grid = layers(q)[1]  # the grouped convolution
    codes, (low, high) = centred_weight(layer).long(), code_range(grid)
    for channel, weights in enumerate(codes):
        x = torch.zeros(1, 8, 3, 3, dtype=torch.int64)
        group = channel // 4
        x[0, group * 4 : group * 4 + 4] = torch.where(weights > 0, high, low)
        total = layer_function(layer.layer)(x, codes)[0, channel].item() + int(bias_codes(layer)[channel])
        assert total == worst_sums(layer, low, high)[2 * channel]
        assert abs(total) <= 2**11 - 1


@given(st.lists(st.floats(0.0, 10.0), min_size=1, max_size=8), st.floats(0.1, 40.0))
def test_shrinkage_projects_onto_the_l1_ball(magnitudes: list[float], budget: float) -> None:
    m = torch.tensor(magnitudes, dtype=torch.float64).view(1, -1, 1)
    threshold = shrinkage(m, torch.tensor([[budget]], dtype=torch.float64))
    total = float((m - threshold).clamp_min(0).sum())
    assert total <= budget + 1e-9
    assert threshold == 0 or abs(total - budget) < 1e-9


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (bits_recipe(4, 8, steps=({"gptq": {"accumulator_bits": 8}},)), "leave no room for weights"),
        (
            bs.Recipe(weights=TensorSpec(format=IntFormat(4)), steps=({"gpfq": {"accumulator_bits": 16}},)),
            "its inputs or weights are no integers",
        ),
    ],
)
def test_what_cannot_be_promised_is_refused(recipe: Any, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        bs.quantize(nn.Sequential(nn.Linear(4, 4)), [torch.randn(64, 4)], recipe)


def test_layers_that_no_step_may_change_are_refused() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.shared(torch.relu(self.shared(x)))

    with pytest.raises(CalibrationError, match="its weights are shared by several calls"):
        bs.quantize(Twice(), [torch.randn(64, 4)], bits_recipe(4, 8, steps=({"gptq": {"accumulator_bits": 16}},)))
