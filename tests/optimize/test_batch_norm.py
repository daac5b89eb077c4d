"""Batch-norm re-estimation: channels have the mean and variance of the float model, and the integers are the same."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import bitsmith as bs
from bitsmith.capture.ops import layer_of
from bitsmith.errors import RecipeError
from bitsmith.optimize.batch_norm import ChannelMoments
from bitsmith.place.layers import QuantLayer
from bitsmith.recipe import Recipe, bits_recipe


def test_moments_of_chunks_are_those_of_the_whole() -> None:
    x = torch.randn(20, 3, 4, 5) * 3 + 2
    moments = ChannelMoments(1)
    for chunk in x.split(7):
        moments.update(chunk)
    variance, mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(moments.value, mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(moments.variance, variance, rtol=1e-5, atol=0)


def _weight_codes(q: bs.QuantizedModel) -> torch.Tensor:
    layer = q.graph.get_submodule("0")
    assert isinstance(layer, QuantLayer)
    assert layer.weight_quantizer is not None
    return layer.weight_quantizer.to_int(layer.weight)


def test_outputs_have_their_float_mean_and_variance_back() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Conv2d(3, 8, 3)).eval(), torch.randn(64, 3, 8, 8)
    weights_only = {"activations": None, "bias": None}
    plain, matched = (
        bs.quantize(net, [x], bits_recipe(2, 8, steps=steps).model_copy(update=weights_only), noise_samples=64)
        for steps in ((), ("reestimate_batch_norm",))
    )
    with torch.no_grad():
        exact, before, after = net(x), plain(x), matched(x)
    assert float((before.std((0, 2, 3)) - exact.std((0, 2, 3))).abs().max()) > 0.02
    torch.testing.assert_close(after.std((0, 2, 3)), exact.std((0, 2, 3)), rtol=1e-4, atol=0)
    torch.testing.assert_close(after.mean((0, 2, 3)), exact.mean((0, 2, 3)), rtol=0, atol=1e-4)
    assert torch.equal(_weight_codes(plain), _weight_codes(matched))


def test_in_integers_it_lowers_the_noise() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 3)).eval()
    x = torch.randn(64, 3, 10, 10)
    corrected, matched = (
        bs.quantize(net, [x], bits_recipe(3, 8, steps=(step,))) for step in ("bias_correction", "reestimate_batch_norm")
    )
    assert (matched.report.output_sqnr_db or 0) > (corrected.report.output_sqnr_db or 0)
    assert torch.equal(matched.integer_executor()(x), matched(x))
    assert isinstance(layer_of(next(n for n in matched.graph.graph.nodes if n.target == "0")), nn.Conv2d)


def test_layers_without_a_scale_per_channel_get_their_mean_only() -> None:
    net, x = nn.Sequential(nn.Linear(4, 3)).eval(), torch.randn(64, 4)
    q = bs.quantize(net, [x], bits_recipe(3, 8, granularity="tensor", steps=("reestimate_batch_norm",)))
    assert q.report.steps[0].skipped == "its weight has no scale per output channel"
    assert any("not 0: its weight has no scale per output channel" in note for note in q.report.notes)
    torch.testing.assert_close(q(x).mean(0), net(x).mean(0), rtol=0, atol=0.05)


def test_it_takes_the_place_of_bias_correction() -> None:
    with pytest.raises(RecipeError, match="each correct the mean"):
        Recipe.from_yaml("weights: {format: {bits: 4}}\nsteps: [bias_correction, reestimate_batch_norm]")
