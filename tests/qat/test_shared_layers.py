"""Layers that a model calls several times train as one, each call with the norm behind it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import bitsmith as bs
from bitsmith.recipe import bits_recipe


class Levels(nn.Module):
    """One convolution called three times, with a norm of its own for each call, or one for all."""

    def __init__(self, own: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        shared = nn.BatchNorm2d(4)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) if own else shared for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for norm in self.norms:
            x = torch.relu(norm(self.conv(x)))
        return x


@pytest.mark.parametrize("own", [True, False])
def test_calls_share_their_weight_and_train_as_in_float(own: bool) -> None:
    torch.manual_seed(0)
    net, x = Levels(own).eval(), torch.randn(16, 4, 8, 8)
    p = bs.prepare_qat(net, bits_recipe(16, 16), calibration=[x], target="generic", kind="moving-average")
    exact = copy.deepcopy(net).train()
    with torch.no_grad():
        for _ in range(150):  # ranges of train mode, where norms are those of the batch
            p(x)
    outputs, expected = p(x), exact(x)
    assert torch.allclose(outputs, expected, atol=0.005)
    outputs.square().mean().backward()
    expected.square().mean().backward()
    ours = sorted(float(t.grad.norm()) for t in p.parameters() if t.grad is not None)
    theirs = sorted(float(t.grad.norm()) for t in exact.parameters() if t.grad is not None)
    assert len(list(p.parameters())) == len(list(exact.parameters()))
    assert ours == pytest.approx(theirs, rel=0.05, abs=1e-4)
    with torch.no_grad():
        assert torch.allclose(bs.convert(p)(x), p.eval()(x), atol=1e-3)
