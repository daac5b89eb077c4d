"""Bias correction: the mean error is gone, whatever the chunks, and shared layers are left alone."""

from __future__ import annotations

import torch
from torch import nn

import bitsmith as bs
from bitsmith.optimize.bias_correction import ChannelMean
from bitsmith.recipe import bits_recipe
from bitsmith.steps import FoldBatchNorm


def test_channel_mean_is_the_mean_of_all_chunks() -> None:
    x = torch.randn(7, 3, 4, 5)
    mean = ChannelMean(1)
    for chunk in x.split(3):
        mean.update(chunk)
    torch.testing.assert_close(mean.value.float(), x.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)


def test_the_mean_error_of_every_output_channel_is_gone() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 4, bias=False))
    x = torch.rand(100, 3, 8, 8)
    recipe = bits_recipe(3, 8)
    uncorrected = recipe.model_copy(update={"steps": (FoldBatchNorm(),)})

    def shift(r: bs.Recipe) -> float:
        return float((bs.quantize(net, [x], r)(x) - net(x)).mean(0).abs().max())

    assert shift(recipe) < 0.02 * shift(uncorrected)


def test_a_layer_that_is_called_twice_keeps_its_bias() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(torch.relu(self.conv(x)))

    net = Twice()
    q = bs.quantize(net, [torch.randn(16, 3, 4, 4)], bits_recipe(3, 8))
    assert torch.equal(q.graph.conv.bias, net.conv.bias)
