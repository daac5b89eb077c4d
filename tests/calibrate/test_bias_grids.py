"""Biases are integers at the scale of the accumulator; dead channels do not saturate them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bitsmith as bs
from bitsmith.place.layers import QuantLayer


def quant_layers(q: Any) -> list[QuantLayer]:
    return [m for m in q.graph.modules() if isinstance(m, QuantLayer)]


def samples(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def seeded(net: nn.Module) -> nn.Module:
    for index, parameter in enumerate(net.parameters()):
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)) * 0.3)
    return net


LAYERS = {
    "conv": nn.Conv2d(4, 6, 3),
    "depthwise": nn.Conv2d(4, 4, 3, groups=4),
    "transposed": nn.ConvTranspose2d(4, 6, 3),
    "grouped transposed": nn.ConvTranspose2d(4, 6, 3, groups=2),
}


@pytest.mark.parametrize("recipe", ["int8", "int8-tensor", "int8-po2", "int16"])
@pytest.mark.parametrize("name", LAYERS)
def test_the_scale_of_a_bias_is_that_of_its_products(name: str, recipe: str) -> None:
    q = bs.quantize(seeded(nn.Sequential(LAYERS[name])), [samples(16, 4, 6, 6)], recipe=recipe, target="generic")
    (layer,) = quant_layers(q)
    s_x = next(m.scale for n, m in q.graph.named_modules() if n.startswith("quantizers."))
    weights, bias = layer.weight_quantizer.scale, layer.bias_quantizer.scale  # type: ignore[union-attr]
    if weights.ndim and name == "grouped transposed":  # output channel c uses scale c % (out / groups)
        weights = torch.cat([weights, weights])
    assert torch.equal(bias, s_x * weights)
    error = (layer.quantized_parameters()["bias"] - layer.bias).abs().double()  # type: ignore[operator]
    assert bool((error <= bias / 2 + layer.bias.abs() * 2.0**-23).all())  # type: ignore[union-attr]


@pytest.mark.parametrize("recipe", ["int8", "int8-po2", "int8-tensor"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_nearly_dead_channel_keeps_its_bias(name: str, recipe: str) -> None:
    """Weights of 1e-20 would make bias codes of 1e20: the scale is widened, the output hardly changes."""
    net = seeded(nn.Sequential(LAYERS[name], nn.ReLU(), nn.Conv2d(LAYERS[name].out_channels, 3, 1)))  # type: ignore[arg-type]
    with torch.no_grad():
        dead: Any = net[0].weight[:, 1] if "transposed" in name else net[0].weight[1]
        dead.mul_(1e-20)
        net[0].bias.fill_(0.75)  # type: ignore[union-attr]
    x = samples(16, 4, 6, 6)
    q = bs.quantize(net, [x], recipe=recipe)
    codes = quant_layers(q)[0]
    fmt_limit = 2**31 - 1
    grid = codes.bias_quantizer.require_grid()  # type: ignore[union-attr]
    assert float((codes.bias.double() / grid.scale.double()).abs().max()) < fmt_limit  # type: ignore[union-attr]
    first = nn.Sequential(*list(net)[:2]).eval()
    lsb = float(next(m.scale for n, m in q.graph.named_modules() if n == "quantizers.relu"))
    with torch.no_grad():
        exact = first(x)
    env = q.program.run(x, keep=True)
    node = next(n for n in q.program.grids if n.name == "relu_quantized")
    error = (q.program.real(node, env) - exact)[:, 1].abs().max()
    assert float(error) < lsb


def test_a_bias_stays_float_where_the_input_does() -> None:
    recipe = bs.Recipe(weights=bs.load_recipe("int8").weights)
    q = bs.quantize(seeded(nn.Sequential(nn.Linear(4, 3))), [samples(16, 4)], recipe=recipe)
    assert quant_layers(q)[0].bias_quantizer is None


def test_a_bias_stays_float_beside_small_floats() -> None:
    q = bs.quantize(seeded(nn.Sequential(nn.Linear(4, 3))), [samples(16, 4)], recipe="fp8")
    assert quant_layers(q)[0].bias_quantizer is None
