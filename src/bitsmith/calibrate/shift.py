"""Weight scales for targets that only shift: ``s_x * s_w / s_y`` is a power of two, so ``s_w`` follows ``s_x, s_y``."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor, fx

from ..capture.ops import quantizer_of
from ..errors import CalibrationError
from ..grid import Grid, IntFormat
from ..grid.kernels import fake_quantize
from ..place.layers import QuantLayer
from ..targets import Target

_TYPICAL_CODE = 32.0  # root mean square of an input's codes, for weighing errors of weights against those of biases
_REACH = 3  # powers of two tried on both sides of what the range rule found


def tie_weight_scale(layer: QuantLayer, node: fx.Node, output: Grid | None, target: Target) -> None:
    """Move a layer's weight scale to where the target's shifter can go from its accumulator to ``output``.

    Of the powers of two about the scale that the range rule found, the one with the least error of weights and bias
    at the output is taken; biases that would not fit into their bits rule a scale out. Without ``output`` the
    accumulator is handed on, and only the bias bounds the scale.
    """
    source, quantizer = quantizer_of(node.args[0]), layer.weight_quantizer
    if source is None or source.grid is None or quantizer is None or quantizer.grid is None or target.shifts is None:
        return
    weights, step = quantizer.grid, float(source.grid.scale)
    if weights.scale.ndim:
        raise CalibrationError(
            f"{node.target!r}: target {target.name} has one shift per layer: give weights granularity 'tensor'"
        )
    anchor = float(weights.scale) if output is None else float(output.scale) / step
    nearest = round(math.log2(float(weights.scale) / anchor))
    low, high = nearest - _REACH, nearest + _REACH
    if bias := _largest(layer.bias):  # the least power that it fits into
        holds = step * target.bias_unit * (2 ** (target.bias_bits - 1) - 0.5)
        high = max(high, math.ceil(math.log2(bias / holds / anchor)))
    if output is not None:
        low, high = max(low, target.shifts[0] - 7), min(high, target.shifts[1] - 7)
    tried = [
        dataclasses.replace(weights, scale=torch.tensor(anchor * 2.0**power, dtype=torch.float32))
        for power in range(low, high + 1)
    ]
    errors = [_error(layer, grid, step, target) for grid in tried]
    if not errors or min(errors) == math.inf:
        scales = f"inputs {step:.3g}, outputs {'none' if output is None else f'{float(output.scale):.3g}'}"
        raise CalibrationError(
            f"{node.target!r}: no shift from {target.shifts[0]} to {target.shifts[1]} serves weights and bias (scales:"
            f" {scales}; largest bias: {_largest(layer.bias):.3g}): its inputs and outputs are of too different size"
        )
    quantizer.set_grid(tried[errors.index(min(errors))])


def _error(layer: QuantLayer, grid: Grid, step: float, target: Target) -> float:
    """Squared error that weights and bias bring into all outputs together; infinite where the bias does not fit."""
    weight = layer.weight.detach()
    total = float((fake_quantize(weight, grid) - weight).double().square().sum()) * (_TYPICAL_CODE * step) ** 2
    bias = layer.bias
    if bias is None:
        return total
    unit = Grid(IntFormat(target.bias_bits), grid.scale * (step * target.bias_unit))
    if _largest(bias) > float(unit.scale) * (2 ** (target.bias_bits - 1) - 0.5):
        return math.inf
    return total + float((fake_quantize(bias.detach(), unit) - bias).double().square().sum())


def _largest(bias: Tensor | None) -> float:
    return 0.0 if bias is None else float(bias.detach().abs().max())
