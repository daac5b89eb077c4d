"""How integer results reach their output grid, as onnxruntime's kernels do it on x86-64.

All functions take and return centred codes (``code - zero_point``); see ``accumulate``. Every law here was held
against onnxruntime's kernels (QLinearConv, QLinearMatMul, QGemm, QLinearAdd, QLinearMul, QLinearConcat,
QLinearGlobalAveragePool, QLinearAveragePool and its lookup tables) on all outputs of random tensors, ties included;
``tests/integer`` repeats that.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..grid import Grid, IntFormat
from .accumulate import to_float32


@dataclass(frozen=True)
class AveragePool:
    """Geometry of an average pooling, one number per spatial axis."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    count_include_pad: bool = True


def zero_point(grid: Grid) -> int:
    """The zero point of a per-tensor grid."""
    return 0 if grid.zero_point is None else int(grid.zero_point)


def code_range(grid: Grid) -> tuple[int, int]:
    """Least and greatest centred code."""
    assert isinstance(grid.format, IntFormat)
    zero = zero_point(grid)
    return grid.format.qmin - zero, grid.format.qmax - zero


def largest_code(grid: Grid) -> int:
    """The largest magnitude of a centred code."""
    low, high = code_range(grid)
    return max(-low, high)


def round_to(values: Tensor, grid: Grid, carrier: torch.dtype) -> Tensor:
    """Clamp to the grid's codes and round half to even; ``values`` (float32) is used up."""
    low, high = code_range(grid)
    return values.clamp_(low, high).round_().to(carrier)


def quantize_centred(x: Tensor, grid: Grid, carrier: torch.dtype) -> Tensor:
    """QuantizeLinear: rint(x / scale), as centred codes."""
    return round_to(torch.div(x, grid.scale), grid, carrier)


def dequantize_centred(codes: Tensor, grid: Grid) -> Tensor:
    """DequantizeLinear: code * scale."""
    return codes.to(torch.float32) * grid.scale


def multiplier(scale_product: Tensor, output: Grid) -> Tensor:
    """float32(float32(s_x * s_w) / s_y)."""
    return scale_product / output.scale


def requantize(accumulator: Tensor, scale: Tensor, output: Grid, carrier: torch.dtype) -> Tensor:
    """QLinearConv, QLinearMatMul, QGemm: rint(float32(accumulator) * multiplier)."""
    return round_to(to_float32(accumulator) * scale, output, carrier)


def add(
    a: Tensor, b: Tensor, grid_a: Grid, grid_b: Grid, output: Grid, carrier: torch.dtype, channels_last: bool = False
) -> Tensor:  # fmt: skip
    """QLinearAdd: two fused multiply-adds in float32, on stored codes.

    t = fma(b, s_b / s_c, z_c - fma(s_a / s_c, z_a, s_b / s_c * z_b)), then rint(fma(a, s_a / s_c, t)). Where
    ``a`` is one number along the innermost axis in memory (channels, with ``channels_last``), the kernel takes
    ``b`` first.
    """
    if _is_scalar_inside(a.shape, b.shape, channels_last):
        a, b, grid_a, grid_b = b, a, grid_b, grid_a
    ratio_a, ratio_b = (grid_a.scale / output.scale).double(), (grid_b.scale / output.scale).double()
    z_a, z_b, z_c = zero_point(grid_a), zero_point(grid_b), zero_point(output)
    offset = (ratio_a * z_a + (ratio_b * z_b).float().double()).float()
    constant = (z_c - offset).double()
    inner = torch.add(b.double(), z_b).mul_(ratio_b).add_(constant).float()
    total = (torch.add(a.double(), z_a).mul_(ratio_a) + inner.double()).float()
    return round_to(total.round_().sub_(z_c), output, carrier)


def _is_scalar_inside(a: torch.Size, b: torch.Size, channels_last: bool) -> bool:
    """Whether the innermost axis that is not 1 in both shapes is 1 in ``a``."""
    rank = max(len(a), len(b))
    order = [0, *range(2, rank), 1] if channels_last else range(rank)
    of_a, of_b = ([1] * (rank - len(shape)) + list(shape) for shape in (a, b))
    for axis in reversed(order):
        if of_a[axis] != 1 or of_b[axis] != 1:
            return of_a[axis] == 1
    return False


def multiply(a: Tensor, b: Tensor, grid_a: Grid, grid_b: Grid, output: Grid, carrier: torch.dtype) -> Tensor:
    """QLinearMul: rint(float32(a * b) * float32(float32(s_a * s_b) / s_c) + z_c), each step rounded to float32."""
    ratio, z_c = multiplier(grid_a.scale * grid_b.scale, output), zero_point(output)
    total = (a.float() * b.float()).mul_(ratio).add_(z_c)
    return round_to(total.round_().sub_(z_c), output, carrier)


def rescale(codes: Tensor, source: Grid, output: Grid, carrier: torch.dtype) -> Tensor:
    """QLinearConcat's table for one operand: rint((code * s_x) / s_y); the codes themselves on equal grids."""
    if source.scale == output.scale and source.format == output.format and zero_point(source) == zero_point(output):
        return codes
    return quantize_centred(dequantize_centred(codes, source), output, carrier)


def mean(codes: Tensor, dims: list[int], source: Grid, output: Grid, carrier: torch.dtype) -> Tensor:
    """QLinearGlobalAveragePool: rint(float32(sum) * float32(s_x / (s_y * count))), dims kept."""
    count = 1
    for dim in dims:
        count *= codes.shape[dim]
    exact = torch.float64 if codes.is_floating_point() else torch.int64
    total = codes.sum(dims, keepdim=True, dtype=exact)
    return requantize(total, source.scale / (output.scale * count), output, carrier)


def float_mean(x: Tensor, dims: list[int]) -> Tensor:
    """GlobalAveragePool of float32: the sum in onnxruntime's order, / count; dims kept.

    Every fourth element goes to one of four lanes; these are added crosswise, then the elements left over.
    """
    values = x.flatten(dims[0]).movedim(-1, 0).contiguous()  # (elements, batch, channels)
    count, whole = len(values), len(values) // 4 * 4
    lanes = values.new_zeros(4, *values.shape[1:])
    for four in values[:whole].view(-1, *lanes.shape):
        lanes += four
    total = (lanes[0] + lanes[2]) + (lanes[1] + lanes[3])
    for value in values[whole:]:
        total += value
    return (total / count).view(*total.shape, *[1] * len(dims))


def window_mean(codes: Tensor, pool: AveragePool, source: Grid, output: Grid, carrier: torch.dtype) -> Tensor:
    """QLinearAveragePool: the float mean of the dequantized window, / s_y, rint after + z_y."""
    z_y = zero_point(output)
    mean_of_window = float_window_mean(dequantize_centred(codes, source), pool)
    return round_to((mean_of_window / output.scale).add_(z_y).round_().sub_(z_y), output, carrier)


def float_window_mean(real: Tensor, pool: AveragePool) -> Tensor:
    """AveragePool of float32: the sum over the window in order, / count."""
    rank = len(pool.kernel)
    edges = [edge for p in reversed(pool.padding) for edge in (p, p)]
    padded, inside = F.pad(real, edges), F.pad(torch.ones_like(real[:1, :1]), edges)
    sizes = [(padded.shape[2 + i] - pool.kernel[i]) // pool.stride[i] + 1 for i in range(rank)]
    total, count = None, None
    for offsets in itertools.product(*map(range, pool.kernel)):
        slices = [slice(o, o + s * (n - 1) + 1, s) for o, s, n in zip(offsets, pool.stride, sizes)]
        window: tuple[Any, ...] = (..., *slices)
        total = padded[window] if total is None else total + padded[window]
        count = inside[window] if count is None else count + inside[window]
    assert total is not None
    assert count is not None
    if pool.count_include_pad:
        count = torch.full_like(count, float(math.prod(pool.kernel)))
    return total / count
