"""The numbers behind the plots, against direct computation."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import bitsmith as bs
from bitsmith.recipe import bits_recipe, load_recipe
from bitsmith.report.pictures import take_pictures
from bitsmith.report.write import look_at


@pytest.fixture
def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).eval()


def test_histograms_and_ranges_are_those_of_the_tensors(net: nn.Sequential) -> None:
    q = bs.quantize(net, [torch.randn(64, 6)], bits_recipe(4, 8, steps=()))
    pictures = take_pictures(q)
    first = pictures.weights[0]
    weight = net[0].weight.detach()
    assert sum(first.counts) == weight.numel()
    assert (first.least, first.greatest) == (weight.min().item(), weight.max().item())
    channels = pictures.channels[0]
    assert channels.channels == 5
    assert channels.least == weight.amin(1).tolist()
    scale = q.graph.get_submodule("0").weight_quantizer.grid.scale  # type: ignore[union-attr]
    assert channels.high == (7 * scale).tolist()


def test_clipping_counts_what_lies_beyond_half_a_step(net: nn.Sequential) -> None:
    q = bs.quantize(net, [torch.rand(64, 6)], bits_recipe(8, 8, steps=()))
    x = torch.rand(50, 6)
    x[:5] = 100.0
    seen = take_pictures(q, ((x,), {})).activations[0]
    assert seen.layers == ["0"]
    assert seen.clipped == pytest.approx(0.1, abs=0.01)
    assert seen.greatest == 100.0


def test_local_noise_is_the_layer_s_own(net: nn.Sequential) -> None:
    q = bs.quantize(net, [torch.randn(64, 6)], bits_recipe(4, 8, steps=()))
    x = torch.randn(32, 6)
    layer = q.graph.get_submodule("2")
    reads = next(n for n in q.graph.graph.nodes if n.target == "2").args[0]
    with torch.no_grad():
        hidden, exact = net[1](net[0](x)), net(x)
        noisy = layer(q.graph.get_submodule(str(reads.target))(hidden))  # type: ignore[operator]
    error = (noisy - exact).square().sum() / exact.square().sum()
    found = take_pictures(q, ((x,), {})).local_sqnr_db["2"]
    assert found == pytest.approx(-10 * math.log10(float(error)), abs=1e-3)


def test_where_steps_rounded_the_weights_local_noise_needs_the_float_model(net: nn.Sequential) -> None:
    data = [torch.randn(64, 6)]
    q = bs.quantize(net, data, load_recipe("w4a8-fast").model_copy(update={"overrides": ()}))
    assert look_at(q, data).local_sqnr_db == {}
    found = look_at(q, data, net)
    assert set(found.local_sqnr_db) == {"0", "2"}
    assert all(5 < db < 40 for db in found.local_sqnr_db.values())
    assert found.weights[0].greatest == net[0].weight.max().item()
