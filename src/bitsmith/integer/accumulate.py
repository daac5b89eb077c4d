"""Exact sums of products of codes.

Codes are centred here: ``c = code - zero_point``, so that the real value is ``c * scale`` and padding is 0.
Two carriers hold them. ``integer`` computes with int32 or int64 tensors alone. ``float`` holds the same integers in
float32 or float64, of a width that represents every partial sum exactly, which runs at the speed of a float layer:
the bound is sum(|w|) * max(|c|) + |bias| of the worst output channel, against 2**24 and 2**53. A runtime's float
kernels sum codes exactly under the first of these, in whatever order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Carrier = Literal["float", "integer"]
_FLOAT32_EXACT = 2**24
_CONV = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}
_CONV_TRANSPOSE = {
    nn.ConvTranspose1d: F.conv_transpose1d,
    nn.ConvTranspose2d: F.conv_transpose2d,
    nn.ConvTranspose3d: F.conv_transpose3d,
}


def accumulator_bound(weight: Tensor, largest: int, bias: Tensor | None, axis: int) -> int:
    """The largest magnitude that any partial sum of a layer can reach."""
    other = [a for a in range(weight.ndim) if a != axis]
    sums = weight.double().abs().sum(other) * largest
    if bias is not None:  # the groups of a transposed convolution have the channels of axis 1 in common
        largest_bias = bias.double().abs()
        sums = sums + (largest_bias if largest_bias.shape == sums.shape else largest_bias.max())
    return int(sums.max())


def product_dtype(carrier: Carrier, bound: int, device: torch.device | str = "cpu") -> torch.dtype:
    """The narrowest dtype of a carrier that holds every partial sum exactly."""
    if carrier == "integer":
        return torch.int32 if bound < 2**31 else torch.int64
    return torch.float32 if sums_in_float32(bound) and torch.device(device).type == "cpu" else torch.float64


def sums_in_float32(bound: int) -> bool:
    """Whether float32 holds every partial sum exactly."""
    return bound < _FLOAT32_EXACT


def has_int32_kernel(layer: nn.Module) -> bool:
    """Whether torch sums this layer's products in int32; transposed and dilated convolutions only in int64."""
    dilated = any(step > 1 for step in getattr(layer, "dilation", ()))
    return type(layer) not in _CONV_TRANSPOSE and not dilated


def layer_function(layer: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """The layer's own sum of products as a function of (centred input, centred weight), without bias."""
    kind: Any = type(layer)
    options: Any = layer
    if kind in _CONV:
        return lambda x, w: _CONV[kind](x, w, None, options.stride, options.padding, options.dilation, options.groups)
    if kind in _CONV_TRANSPOSE:
        return lambda x, w: _CONV_TRANSPOSE[kind](
            x,
            w,
            None,
            options.stride,
            options.padding,
            options.output_padding,
            options.groups,
            options.dilation,
        )
    return lambda x, w: F.linear(x, w)


def to_float32(accumulator: Tensor) -> Tensor:
    """An accumulator as float32, rounded once to nearest even, as processors convert int32."""
    if accumulator.is_cuda and accumulator.dtype == torch.float64:
        accumulator = accumulator.round()  # whatever algorithm summed it: the sum is an integer
    return accumulator if accumulator.dtype == torch.float32 else accumulator.to(torch.float32)
