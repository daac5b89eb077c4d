"""The arithmetic of the MAX78000 and MAX78002 accelerators: integers from end to end.

A layer's sum of products ``acc`` of 8-bit codes and b-bit weights, with the bias ``128 * q_b`` in it, becomes

    y = clamp(floor(acc * 2**total / 128 + 1/2), -128, 127),     total = output_shift + 8 - b,     -15 <= total <= 15

then ReLU. On the grids of this package ``2**total / 128`` is ``s_x * s_w / s_y``, which therefore has to be a power of
two; the scales themselves are free. Everything without weights keeps its input's scale: sums of elements saturate,
average pooling divides toward zero, ``Abs`` takes the magnitude of the rounded code. A wide output is ``acc`` itself.

Source: the behaviour of Analog Devices' ai8x-training (ai8x.py with simulate=True) and of the network loader's
simulation (ai8x-synthesis, izer/simulate.py) where the two differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..capture.ops import aten_name, module_of, op_of
from ..errors import CalibrationError
from ..grid import Grid, quantize
from ..place.layers import QuantLayer
from ..place.plan import clamp_bounds, operands
from ..targets import Target
from .accumulate import Carrier, accumulator_bound, has_int32_kernel, layer_function, product_dtype, to_float32
from .kernels import Kernel, Run, average_pool_geometry, centred_weight

CODES = (-128, 127)
WIDE_BITS = 30  # an accumulator handed on as it is saturates at 30 bits
BIAS_UNIT = 128  # a bias of 1 is this many units of the accumulator
SHIFTS = (-15, 15)
_TOLERANCE = 1e-3  # of log2: scales are float32


def total_shift(scale_product: float, output_scale: float) -> int:
    """``total`` of ``2**total / 128 = s_x * s_w / s_y``.

    Raises CalibrationError where the ratio is no power of two, or one that the shifter cannot make.

    >>> total_shift(2.0**-16, 2.0**-7)
    -2
    """
    exact = math.log2(scale_product / output_scale) + 7
    total = round(exact)
    if abs(exact - total) > _TOLERANCE:
        raise CalibrationError(f"s_x * s_w / s_y = 2**{exact - 7:.4f} is no power of two: the chip only shifts")
    if not SHIFTS[0] <= total <= SHIFTS[1]:
        raise CalibrationError(f"a shift by {total} is needed, and the chip shifts by {SHIFTS[0]} to {SHIFTS[1]}")
    return total


def half_step(total: int) -> int:
    """What is added to an accumulator so that shifting it down rounds half up."""
    return 1 << (6 - total) if total < 7 else 0


def shift(accumulator: Tensor, total: int, codes: tuple[int, int], carrier: torch.dtype) -> Tensor:
    """``floor(accumulator * 2**total / 128)`` as codes; the accumulator holds ``half_step`` already."""
    low, high = codes
    down = 7 - total
    if accumulator.is_floating_point():
        return torch.floor(accumulator * 2.0**-down).clamp_(low, high).to(carrier)
    if down >= 0:
        return (accumulator >> down).clamp_(low, high).to(carrier)
    return (accumulator.clamp(*CODES) << -down).clamp_(low, high).to(carrier)  # clamped first: nothing overflows


def clamp_codes(activations: list[fx.Node], grid: Grid) -> tuple[int, int] | None:
    """The codes that the activation functions behind an operator let through; None where the chip cannot do that.

    There is ReLU, and saturation at the ends of the codes, which takes care of a bound within half a step of them.
    """
    low, high = CODES
    for node in activations:
        least, greatest = (bound / float(grid.scale) for bound in clamp_bounds(node))
        if least == 0.0:
            low = 0
        elif least > low + 1.5:  # clamping at -1 is saturating at -128/127
            return None
        if greatest < high - 0.5:
            return None
    return low, high


def build_kernel(
    node: fx.Node, activations: list[fx.Node], inputs: list[Grid], output: Grid | None, carrier: Carrier, target: Target
) -> Kernel:
    """The kernel of ``node`` by the chip's law; the accumulator in float where ``output`` is None."""
    name = op_of(node).name
    dtype = torch.float32 if carrier == "float" else torch.int32
    if module_of(node) is not None:
        return Kernel(name, _layer(node, activations, inputs[0], output, carrier))
    assert output is not None
    codes = clamp_codes(activations, output) or CODES
    sources = operands(node)
    if name == "abs":
        return Kernel(name, lambda env: env[sources[0]].abs().clamp_(max=CODES[1]))
    if name in ELEMENTWISE:
        combine = ELEMENTWISE[name]
        return Kernel(name, lambda env: reduce(combine, (env[s] for s in sources)).clamp_(*codes).to(dtype))
    average = _average(node, codes, dtype, rounding=target.average_rounding)
    return Kernel(name, lambda env: average(env[sources[0]]))


def _bitwise(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda a, b: function(a.to(torch.int32), b.to(torch.int32))


ELEMENTWISE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "or": _bitwise(torch.bitwise_or),
    "xor": _bitwise(torch.bitwise_xor),
}


def _layer(node: fx.Node, activations: list[fx.Node], source: Grid, output: Grid | None, carrier: Carrier) -> Run:
    layer = module_of(node)
    assert isinstance(layer, QuantLayer)
    assert layer.weight_quantizer is not None
    weights = layer.weight_quantizer.require_grid()
    scale = float(source.scale) * float(weights.scale)
    wide = output is None or output.format.bits == WIDE_BITS
    total = 7 if wide else total_shift(scale, float(output.scale))  # type: ignore[union-attr]
    codes, addend = centred_weight(layer), half_step(total)
    channels = (-1,) if isinstance(layer.layer, nn.Linear) else (-1, *[1] * (codes.ndim - 2))
    offset: Tensor | int = addend
    if layer.bias is not None:
        assert layer.bias_quantizer is not None
        bias = quantize(layer.bias.detach(), layer.bias_quantizer.require_grid()).to(torch.int64)
        offset = bias.view(channels) * BIAS_UNIT + addend
    transposed = isinstance(layer.layer, nn.ConvTranspose2d | nn.ConvTranspose1d)
    largest = torch.as_tensor(offset).abs().max().reshape(1)
    dtype = product_dtype(carrier, accumulator_bound(codes, -CODES[0], largest, int(transposed)), codes.device)
    if dtype == torch.int32 and not has_int32_kernel(layer.layer):
        dtype = torch.int64
    weight, offset = codes.to(dtype), torch.as_tensor(offset, device=codes.device).to(dtype)
    function, (operand,) = layer_function(layer.layer), operands(node)
    code_dtype = torch.float32 if carrier == "float" else torch.int32
    limits = CODES if wide else clamp_codes(activations, output) or CODES  # type: ignore[arg-type]

    def run(env: dict[fx.Node, Any]) -> Tensor:
        accumulator = function(env[operand].to(dtype), weight).add_(offset)
        if not wide:
            return shift(accumulator, total, limits, code_dtype)
        accumulator = accumulator.clamp_(-(1 << (WIDE_BITS - 1)), (1 << (WIDE_BITS - 1)) - 1)
        return accumulator if output is not None else to_float32(accumulator) * (source.scale * weights.scale)

    return run


def _average(
    node: fx.Node, codes: tuple[int, int], dtype: torch.dtype, *, rounding: bool
) -> Callable[[Tensor], Tensor]:
    """Mean over windows, cut toward zero; with ``rounding`` (2-D only) to nearest, halves away from zero."""
    if op_of(node).name == "global_avg_pool":
        rank = operands(node)[0].meta["val"].ndim
        flat = node.meta["val"].ndim < rank
        dims = [-1] if aten_name(node).endswith("1d") else list(range(2, rank))
        kernel, stride = None, None
    else:
        pool = average_pool_geometry(node)
        kernel, stride, flat, dims = pool.kernel, pool.stride, False, list(range(2, 2 + len(pool.kernel)))
    rounds = rounding and len(dims) == 2

    def run(x: Tensor) -> Tensor:
        windows, over = x, list(dims)
        if kernel is not None and stride is not None:
            for dim, size, step in zip(dims, kernel, stride):
                windows = windows.unfold(dim, size, step)
            over = list(range(-len(dims), 0))
        count = math.prod(windows.shape[d] for d in over)
        total = windows.sum(over, keepdim=kernel is None, dtype=None if x.is_floating_point() else torch.int64)
        if rounds:  # floor(|sum| / count + 1/2), with the sign put back
            mean = torch.div(2 * total.abs() + count, 2 * count, rounding_mode="floor") * total.sign()
        else:
            mean = torch.div(total, count, rounding_mode="trunc")
        return (mean.flatten(1) if flat else mean).clamp_(*codes).to(dtype)

    return run
