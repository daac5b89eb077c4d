"""Biases that would not fit their integers: what trains, what is judged and what is written agree on them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import bitsmith as bs
from bitsmith.recipe import bits_recipe


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(8, 4))  # fmt: skip


X = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("scale", ["float32", "po2"])
def test_sixteen_bits_keep_their_biases(scale: str) -> None:
    """Steps of s_x * s_w are so small that ordinary biases need more than 31 bits."""
    model = net()
    with torch.no_grad():
        model[5].bias.add_(3.0)
    recipe = bits_recipe(16, 16, scale=scale, symmetric=True)
    p = bs.prepare_qat(model, recipe, calibration=[X], target="generic", kind="moving-average")
    exact = model.eval()(X)
    with torch.no_grad():
        assert torch.allclose(p.eval()(X), exact, atol=0.01)
        assert torch.allclose(bs.convert(p)(X), p(X), atol=1e-4)
        p.train()
        p.freeze_norms()
        assert torch.allclose(p(X), exact, atol=0.01)


def test_a_nearly_dead_channel_keeps_its_bias() -> None:
    model = net().eval()
    with torch.no_grad():
        model[0].weight[2] *= 1e-12
        model[0].bias[2] = 0.0
        model[1].running_var[2] = 1e-20
        model[1].bias[2] = 2.0
    p = bs.prepare_qat(model, "int8", calibration=[X], kind="moving-average").eval()
    with torch.no_grad():
        assert torch.allclose(p(X), model(X), atol=0.05)
        assert torch.allclose(bs.convert(p)(X), p(X), atol=1e-4)
