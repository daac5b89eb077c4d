"""Layers that train with their batch norm folded: against closed forms and torch's own fused modules."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitsmith.grid import Grid, IntFormat, TensorSpec
from bitsmith.qat.layers import TrainedLayer
from bitsmith.qat.quantizers import make_quantizer

SPEC = TensorSpec(format=IntFormat(8), granularity="channel")
LAYERS = {
    "conv": (nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), (8, 4, 5, 5), 0),
    "conv with bias and groups": (nn.Conv2d(4, 6, 3, stride=2, groups=2), nn.BatchNorm2d(6), (8, 4, 5, 5), 0),
    "conv 1d": (nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), (8, 4, 5), 0),
    "transposed": (nn.ConvTranspose2d(4, 6, 2, stride=2), nn.BatchNorm2d(6), (8, 4, 3, 3), 1),
    "transposed in groups": (nn.ConvTranspose2d(4, 6, 2, groups=2), nn.BatchNorm2d(6, affine=False), (8, 4, 3, 3), 1),
    "linear": (nn.Linear(4, 6), nn.BatchNorm1d(6), (8, 4), 0),
}


def pair(name: str, bits: int = 8) -> tuple[TrainedLayer, nn.Module, nn.Module, Tensor]:
    torch.manual_seed(0)
    layer, norm, shape, axis = copy.deepcopy(LAYERS[name])
    with torch.no_grad():
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2.0)
        if norm.affine:
            norm.weight.uniform_(-1.5, 1.5)
            norm.bias.normal_()
    spec = SPEC.model_copy(update={"format": IntFormat(bits)})
    quantizer = make_quantizer("moving-average", spec, axis=axis, of_weight=True)
    trained = TrainedLayer(copy.deepcopy(layer), copy.deepcopy(norm), quantizer)
    return trained, layer, norm, torch.randn(shape)


@pytest.mark.parametrize("name", LAYERS)
def test_without_quantization_it_is_the_layer_and_its_norm(name: str) -> None:
    trained, layer, norm, x = pair(name)
    trained.weight_quantizer = None
    for mode in (True, False):
        both = nn.Sequential(layer, norm).train(mode)
        assert torch.allclose(trained.train(mode)(x), both(x), atol=1e-5)
    assert torch.allclose(trained.norm.running_var, norm.running_var)
    trained.train().norm_frozen = True
    assert torch.allclose(trained(x), nn.Sequential(layer, norm).eval()(x), atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_are_those_of_the_closed_form(name: str) -> None:
    """With 16 bits the quantizer is nearly the identity, so every gradient is that of layer and norm."""
    trained, layer, norm, x = pair(name, bits=16)
    both, weights = nn.Sequential(layer, norm).train(), torch.randn(())
    for module in (trained.train(), both):
        (module(x) * weights).square().mean().backward()
    for own, other in ((trained.layer, layer), (trained.norm, norm)):
        for key, parameter in other.named_parameters():
            assert torch.allclose(own.get_parameter(key).grad, parameter.grad, atol=1e-4), key


def test_the_convolution_sees_the_error_of_the_folded_weight() -> None:
    trained, layer, norm, x = pair("conv", bits=4)
    trained.train()
    factor = norm.weight / (norm.running_var + norm.eps).sqrt()
    folded = layer.weight * factor.view(-1, 1, 1, 1)
    scale = folded.abs().amax((1, 2, 3), keepdim=True) / 7
    quantized = (folded / scale).round().clamp(-8, 7) * scale
    z = F.conv2d(x, quantized, padding=1) / factor.view(1, -1, 1, 1)
    mean, var = z.mean((0, 2, 3), keepdim=True), z.var((0, 2, 3), keepdim=True, correction=0)
    y = (z - mean) / (var + norm.eps).sqrt() * norm.weight.view(1, -1, 1, 1) + norm.bias.view(1, -1, 1, 1)
    assert torch.allclose(trained(x), y, atol=1e-4)


def test_it_trains_as_torchs_fused_module_does() -> None:
    """Outputs, running statistics and gradients of torch's ConvBn2d, with the same fake-quantized weight."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        intrinsic = pytest.importorskip("torch.ao.nn.intrinsic.qat")
    trained, layer, norm, x = pair("conv", bits=4)
    scale = torch.rand(6) * 0.1 + 0.05

    class Fixed(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return torch.fake_quantize_per_channel_affine(w, scale, torch.zeros(6, dtype=torch.int32), 0, -8, 7)

    class Config:
        weight = Fixed

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs: Any = intrinsic.ConvBn2d(4, 6, 3, padding=1, bias=False, qconfig=Config)
    theirs.weight.data.copy_(layer.weight)
    theirs.bn.load_state_dict(norm.state_dict())
    trained.weight_quantizer = make_quantizer(
        "moving-average", SPEC.model_copy(update={"format": IntFormat(4)}), axis=0, of_weight=True
    )
    trained.weight_quantizer.initialize(Grid(IntFormat(4), scale, None, 0))
    trained.weight_quantizer.freeze()
    for module in (trained.train(), theirs.train()):
        module(x).square().sin().sum().backward()
    assert torch.allclose(trained.layer.weight.grad, theirs.weight.grad, rtol=1e-3, atol=1e-3)
    assert torch.allclose(trained.norm.weight.grad, theirs.bn.weight.grad, rtol=1e-3, atol=1e-3)
    assert torch.allclose(trained.norm.bias.grad, theirs.bn.bias.grad, rtol=1e-3, atol=1e-3)
    assert torch.allclose(trained.norm.running_mean, theirs.bn.running_mean, atol=1e-5)
    assert torch.allclose(trained.norm.running_var, theirs.bn.running_var, atol=1e-5)
    assert torch.allclose(trained.eval()(x), theirs.eval()(x), atol=1e-4)


def test_a_channel_whose_norm_has_weight_zero_is_constant() -> None:
    trained, _, _, x = pair("conv")
    with torch.no_grad():
        trained.norm.weight[2] = 0.0
    y = trained.train()(x)
    y.sum().backward()
    assert torch.equal(y[:, 2], trained.norm.bias[2].expand_as(y[:, 2]))
    assert all(bool(p.grad.isfinite().all()) for p in trained.parameters() if p.grad is not None)
