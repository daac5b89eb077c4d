"""Layers that a float kernel computes on the codes themselves, whose sums of products float32 holds exactly."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import nn

from ...capture.ops import quantizer_of
from ...integer.accumulate import sums_in_float32
from ...integer.kernels import accumulator_scale, bias_codes, largest_sum, per_channel
from ...place.layers import QuantLayer
from .builder import Builder
from .quantize_nodes import parameter_writer
from .registry import LayerCall


def write_on_codes(call: LayerCall, module: nn.Module, write: Callable[[LayerCall], str]) -> str:
    """A layer between DequantizeLinear with scale 1 and a Mul by ``s_x * s_w``.

    A bias past float32's 24 bits is added behind the sum of products, which stays exact that way.
    """
    assert isinstance(module, QuantLayer)
    quantizer = quantizer_of(call.input)
    assert quantizer is not None
    builder, grid = call.builder, quantizer.require_grid()
    bias = bias_codes(module)
    apart = bias is not None and not sums_in_float32(largest_sum(module, grid, bias))
    parameter = parameter_writer(builder, call.node, module, unit_scale=True)
    omitted = ("bias",) if apart else ()
    result = write(dataclasses.replace(call, parameter=parameter, source=_codes_of(builder, call.x), omitted=omitted))
    if bias is not None and apart:
        result = call.emit("Add", result, parameter("bias", shape=tuple(per_channel(module, bias).shape)))
    scale = builder.initializer(f"{call.node.target}.scale", accumulator_scale(module, grid))
    return call.emit("Mul", result, scale)


def _codes_of(builder: Builder, dequantized: str) -> str:
    """What a DequantizeLinear reads, less its zero point: dequantized with scale 1."""
    source = next(node for node in reversed(builder.nodes) if dequantized in node.output)
    assert source.op_type == "DequantizeLinear"
    key = ("codes", dequantized)
    if key not in builder.cache:
        one = builder.constant(torch.tensor(1.0), "one")
        codes, _, *zero_point = source.input
        name = f"{dequantized}_codes"
        builder.cache[key] = builder.emit("DequantizeLinear", [codes, one, *zero_point], name=name)[0]
    return builder.cache[key]
