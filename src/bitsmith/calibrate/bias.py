"""The grid of a bias: integers at the scale of the accumulator, s_x * s_w."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, fx

from ..capture.ops import quantizer_of
from ..grid import Grid, IntFormat
from ..place.layers import QuantLayer


def set_bias_grid(layer: QuantLayer, node: fx.Node | None, unit: int = 1) -> None:
    """Give a layer's bias its grid, in steps of ``unit`` accumulator steps; without integer operands it stays float."""
    if layer.bias_quantizer is None or node is None or layer.weight_quantizer is None:
        return
    source, weights = quantizer_of(node.args[0]), layer.weight_quantizer.grid
    inputs = source.grid if source is not None else None
    if inputs is None or weights is None or not _integers(inputs, weights) or weights.group_size is not None:
        layer.bias_quantizer = None
        return
    scale = inputs.scale * _per_output(weights.scale, layer) * unit
    fmt = layer.bias_quantizer.spec.format
    axis = 0 if scale.ndim else None
    layer.bias_quantizer.set_grid(Grid(fmt, scale, None, axis))
    if unit == 1:  # where it is more, the weight's scale was chosen with the bias in mind
        _raise_tiny_scales(layer, inputs)


def _raise_tiny_scales(layer: QuantLayer, inputs: Grid) -> None:
    """Widen the weight scale of channels so small that their bias would not fit its integers."""
    assert layer.weight_quantizer is not None
    assert layer.bias_quantizer is not None
    weights, grid = layer.weight_quantizer.require_grid(), layer.bias_quantizer.require_grid()
    if layer.bias is None or not isinstance(grid.format, IntFormat):
        return
    po2 = layer.weight_quantizer.spec.scale == "po2"
    scale = fitting_scale(weights.scale, layer.bias, inputs.scale, grid.format.bits, power_of_two=po2)
    if scale is not None:
        layer.weight_quantizer.set_grid(dataclasses.replace(weights, scale=scale))
        layer.bias_quantizer.set_grid(dataclasses.replace(grid, scale=inputs.scale * _per_output(scale, layer)))


def fitting_scale(weights: Tensor, bias: Tensor, inputs: Tensor, bits: int, *, power_of_two: bool) -> Tensor | None:
    """Weight scales at which ``bias`` fits integers of ``bits`` bits in steps of ``s_x * s_w``; None where it does.

    Nearly dead channels have weights of 1e-20 and a bias of ordinary size. Their weights vanish on the wider grid,
    which changes their output by less than one step of the accumulator.
    """
    needed = (bias.detach().abs().double() / bias_limit(bits) / inputs.double()).float()
    if not weights.ndim:
        needed = needed.max()
    elif needed.numel() != weights.numel():
        needed = needed.view(-1, weights.numel()).amax(0)
    if not bool((needed > weights).any()):
        return None
    scale = torch.maximum(weights, needed)
    return torch.where(needed > weights, torch.exp2(torch.ceil(torch.log2(scale))), scale) if power_of_two else scale


def bias_limit(bits: int) -> float:
    """The largest code that a bias of ``bits`` bits is given."""
    return float(2 ** (min(bits, 32) - 2))


def _per_output(scale: Tensor, layer: QuantLayer) -> Tensor:
    """One scale per output channel: the groups of a transposed convolution share those of its weight's axis 1."""
    bias = layer.bias
    return scale if bias is None or not scale.ndim else scale.repeat(bias.numel() // scale.numel())


def _integers(*grids: Grid) -> bool:
    return all(isinstance(grid.format, IntFormat) for grid in grids)
