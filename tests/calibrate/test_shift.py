"""Weight scales follow the activations, so that a shift is enough; the shift with the least error is taken."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import bitsmith as bs
from bitsmith.capture.ops import module_of, op_of, quantizer_of
from bitsmith.errors import CalibrationError, RecipeError
from bitsmith.grid import IntFormat, TensorSpec
from bitsmith.place.layers import QuantLayer
from bitsmith.place.plan import fused_end
from bitsmith.recipe import bits_recipe


@settings(max_examples=10)
@given(st.integers(0, 1000), st.sampled_from([2, 4, 8]), st.floats(0.05, 8.0))
def test_every_layer_needs_only_a_shift(seed: int, bits: int, size: float) -> None:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))
    override = bs.Override(match="2", weights=TensorSpec(format=IntFormat(bits)))
    q = bs.quantize(net, [torch.randn(16, 3, 8, 8) * size], target="max78000", overrides=[override])
    for node in q.graph.graph.nodes:
        layer = module_of(node)
        if op_of(node).role != "compute" or not isinstance(layer, QuantLayer):
            continue
        source, weights = quantizer_of(node.args[0]), layer.weight_quantizer
        assert source is not None
        assert weights is not None
        ends = [quantizer for user in fused_end(node).users if (quantizer := quantizer_of(user)) is not None]
        product = float(source.require_grid().scale) * float(weights.require_grid().scale)
        if ends:
            exponent = math.log2(product / float(ends[0].require_grid().scale))
            assert abs(exponent - round(exponent)) < 1e-3
            assert -22 <= round(exponent) <= 8
        assert layer.bias_quantizer is not None
        unit = layer.bias_quantizer.require_grid()
        assert float(unit.scale) == pytest.approx(128 * product)
        assert layer.bias is not None


def test_biases_too_large_for_their_bits_take_a_coarser_scale() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3))
    nn.init.constant_(net[0].bias, 300.0)  # type: ignore[arg-type]
    q = bs.quantize(net, [torch.randn(64, 4)], target="max78000")
    assert (q(torch.zeros(1, 4)) - 300).abs().max() < 3.0


def test_layers_that_no_shift_serves_are_named() -> None:
    """A bias of -300 and results of a thousandth: no grid has both."""
    net = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 2))
    with torch.no_grad():
        net[0].weight.fill_(300.001)  # type: ignore[operator]
        net[0].bias.fill_(-300.0)  # type: ignore[operator, union-attr]
    with pytest.raises(CalibrationError, match="'0': no shift from -15 to 15 serves"):
        bs.quantize(net, [torch.ones(64, 1)], target="max78000")


def test_scales_per_channel_and_gains_are_refused() -> None:
    net, x = nn.Sequential(nn.Linear(4, 3)), [torch.randn(16, 4)]
    small = TensorSpec(format=IntFormat(8))
    channels = bits_recipe(8, 8, symmetric=True, bias=small)
    with pytest.raises(RecipeError, match="weight scales per tensor"):
        bs.quantize(net, x, channels, target="max78000")
    with pytest.raises(RecipeError, match="biases of 8 bits"):
        bs.quantize(net, x, bits_recipe(8, 8, symmetric=True, granularity="tensor"), target="max78000")
    steps = bits_recipe(8, 8, symmetric=True, bias=small, granularity="tensor", steps=("reestimate_batch_norm",))
    with pytest.raises(RecipeError, match="only shifts"):
        bs.quantize(net, x, steps, target="max78000")
