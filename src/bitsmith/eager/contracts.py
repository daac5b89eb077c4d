"""Contracts of quantizers and layer mappings; public as ``bitsmith.testing``."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ..calibrate.watching import WatchingQuantizer
from ..errors import CalibrationError, NonFiniteError
from ..grid import IntFormat, TensorSpec
from ..nn import QuantIdentity, QuantModule, calibrate
from ..recipe import load_recipe
from .steps import convert
from .swap import LayerMapping

_LEAST_SQNR = 15.0  # dB, of a layer with weights and outputs in 8 bits


def check_quantizer(kind: type[WatchingQuantizer]) -> None:
    """A quantizer watches without changing values, merges, then maps to its grid, with a gradient, and is saved.

    >>> check_quantizer(WatchingQuantizer)
    """
    data = torch.randn(4_000, generator=torch.Generator().manual_seed(0)) + 0.3
    name = kind.__name__
    for spec in (
        TensorSpec(format=IntFormat(8)),
        TensorSpec(format=IntFormat(8, signed=False), symmetric=False),
        TensorSpec(format=IntFormat(16), scale="po2"),
    ):
        one, parts = kind(spec).eval(), [kind(spec).eval(), kind(spec).eval()]
        for quantizer in (one, *parts):
            assert torch.equal(quantizer(data), data), f"{name} changes values before it watches"
            quantizer.watch()
        assert torch.equal(one(data), data), f"{name} changes values while it watches"
        parts[0](data[:1_500])
        parts[1](data[1_500:])
        parts[0].merge(parts[1])
        one.fix()
        parts[0].fix()
        _check_grid(one, parts[0], data, name)
        _check_gradient(one, data, name)
        _check_state(kind(spec).eval(), one, data, name)
    _check_refusals(kind, name)


def _check_grid(one: WatchingQuantizer, merged: WatchingQuantizer, data: Tensor, name: str) -> None:
    grid, y = one.require_grid(), one(data)
    assert torch.equal(merged.require_grid().scale, grid.scale), f"{name}: merging differs from watching everything"
    assert bool((grid.scale > 0).all() & grid.scale.isfinite().all()), f"{name}: its scale is {grid.scale}"
    assert torch.equal(one(y), y), f"{name}: what is on its grid does not stay where it is"
    assert torch.equal(one.from_int(one.to_int(data)), y), f"{name}: in eval mode forward is not its codes' value"
    assert float(one(torch.zeros(1))) == 0.0, f"{name}: 0 is not on its grid"
    error = float((y - data).square().mean() / data.square().mean())
    assert error < 0.01, f"{name}: relative error {error:.3f} on data that it has watched"


def _check_gradient(quantizer: WatchingQuantizer, data: Tensor, name: str) -> None:
    for mode in (True, False):
        x = data.clone().requires_grad_()
        quantizer.train(mode)(x).sum().backward()
        found = x.grad is not None and bool(x.grad.isfinite().all()) and float(x.grad.abs().mean()) > 0.5
        assert found, f"{name}: no gradient passes straight through"
    quantizer.eval()


def _check_state(fresh: WatchingQuantizer, fixed: WatchingQuantizer, data: Tensor, name: str) -> None:
    assert not fresh.state_dict(), f"{name}: it has state before it has a grid, so float state_dicts do not load"
    fresh.load_state_dict({})
    fresh.load_state_dict(fixed.state_dict())
    assert torch.equal(fresh(data), fixed(data)), f"{name}: its state_dict does not carry its grid"
    assert torch.equal(copy.deepcopy(fixed)(data), fixed(data)), f"{name}: a copy differs"


def _check_refusals(kind: type[WatchingQuantizer], name: str) -> None:
    for bad, error_type in ((torch.tensor([1.0, float("nan")]), NonFiniteError), (None, CalibrationError)):
        quantizer = kind(TensorSpec(format=IntFormat(8)))
        quantizer.watch()
        try:
            if bad is not None:
                quantizer(bad)
            quantizer.fix()
        except error_type:
            continue
        raise AssertionError(f"{name} makes a grid of {'nothing' if bad is None else 'a NaN'}")


def check_layer_mapping(layer: nn.Module, mapping: LayerMapping, example: Tensor) -> None:
    """A mapping keeps the float function and the parameters; on grids the layer is near it, trains, and is captured.

    ``layer`` is a float layer of one input, ``example`` a batch for it.

    >>> from bitsmith.nn import QuantLinear
    >>> layer = nn.Linear(4, 3)
    >>> check_layer_mapping(layer, lambda l, recipe: QuantLinear.from_float(l, outputs=True), torch.randn(32, 4))
    """
    layer, name = layer.eval(), type(layer).__name__
    exact = layer(example).detach()
    made = mapping(layer, load_recipe("int8")).eval()
    inner = [module for module in made.modules() if isinstance(module, QuantModule)]
    assert inner, f"{name}: the mapping makes a {type(made).__name__} without a bitsmith.nn.QuantModule in it"
    assert torch.equal(made(example), exact), f"{name}: before calibration the quantized layer is not the float layer"
    kept = {id(parameter) for parameter in made.parameters()}
    lost = [key for key, parameter in layer.named_parameters() if id(parameter) not in kept]
    assert not lost, f"{name}: the quantized layer does not hold the float layer's {', '.join(lost)}"
    net = nn.Sequential(QuantIdentity(), made)
    calibrate(net, [example])
    simulated = net(example)
    sqnr = _sqnr(exact, simulated.detach())
    assert _LEAST_SQNR < sqnr < float("inf"), f"{name}: on 8-bit grids its output has {sqnr:.1f} dB: not near, or float"
    simulated.square().sum().backward()
    for key, parameter in made.named_parameters():
        trains = not parameter.requires_grad or (parameter.grad is not None and bool(parameter.grad.isfinite().all()))
        assert trains, f"{name}: no gradient reaches {key}"
        parameter.grad = None
    captured = convert(net, example_inputs=example)
    assert _sqnr(simulated.detach(), captured(example)) > _LEAST_SQNR, f"{name}: captured, it computes something else"
    assert any(row.weight_bits for row in captured.report.layers), f"{name}: captured, none of its weights is quantized"


def _sqnr(exact: Tensor, found: Tensor) -> float:
    return float(10 * torch.log10(exact.square().sum() / (exact - found).square().sum()))
