"""How integer results reach their output grid in PyTorch's int8 CPU kernels on x86-64.

Convolutions and layers with float results follow oneDNN; linear layers, transposed convolutions and the depthwise ones
of ``pairs`` FBGEMM; the rest ATen's own vectorized code. Found by holding every order of operations against the
kernels on tensors full of ties, and repeated by ``tests/integer``. Codes are centred, as in ``laws``. ``fma`` is a
multiplication and an addition with one rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..capture.ops import aten_name, module_of, op_of
from ..grid import Grid
from ..place.layers import QuantLayer
from ..place.plan import operands
from . import laws
from .accumulate import (
    Carrier,
    accumulator_bound,
    has_int32_kernel,
    layer_function,
    product_dtype,
    to_float32,
)
from .kernels import Kernel, Run, average_pool_geometry, centred_weight
from .pairs import is_exact_in_pairs


def fma(a: Tensor, b: Tensor, c: Tensor | float) -> Tensor:
    """a * b + c of float32, rounded once (float64 holds the product exactly)."""
    return (a.double() * b.double() + c).float()


def stored_zero(grid: Grid) -> int:
    """The zero point as torch stores it: signed codes are moved up to unsigned bytes."""
    return laws.zero_point(grid) + (128 if grid.format.signed else 0)  # type: ignore[union-attr]


def twice_inverted(scale: Tensor) -> Tensor:
    """float32(1 / float32(1 / s)): torch hands oneDNN the reciprocals of scales."""
    return 1 / (1 / scale)


def quantize_centred(x: Tensor, grid: Grid, carrier: torch.dtype) -> Tensor:
    """quantize_per_tensor: rint(fma(x, 1 / s, z)), as centred codes."""
    zero = stored_zero(grid)
    return laws.round_to(fma(x, 1 / grid.scale, zero).round_().sub_(zero), grid, carrier)


def dequantized(codes: Tensor, grid: Grid) -> Tensor:
    """How vectorized kernels read codes: fma(code, s, -s * z), which is code * s where z is 0."""
    zero = stored_zero(grid)
    return fma(codes.float() + zero, grid.scale, (-grid.scale * zero).double())


def scaled(x: Tensor, grid: Grid, carrier: torch.dtype) -> Tensor:
    """How vectorized kernels write codes: rint(x * (1 / s)) + z."""
    return laws.round_to((x * (1 / grid.scale)).round_(), grid, carrier)


def add(a: Tensor, b: Tensor, grid_a: Grid, grid_b: Grid, output: Grid, carrier: torch.dtype) -> Tensor:
    """quantized::add."""
    return scaled(dequantized(a, grid_a) + dequantized(b, grid_b), output, carrier)


def multiply(a: Tensor, b: Tensor, grid_a: Grid, grid_b: Grid, output: Grid, carrier: torch.dtype) -> Tensor:
    """quantized::mul: rint(float32(a * b) * float32(float32(s_a * s_b) / s_c)) + z_c."""
    product = a.float() * b.float()
    return laws.round_to(product.mul_(laws.multiplier(grid_a.scale * grid_b.scale, output)).round_(), output, carrier)


def cat(parts: list[Tensor], grids: list[Grid], dim: int, output: Grid, carrier: torch.dtype) -> Tensor:
    """quantized::cat: images by the vectorized kernel, which lie channels last; others by way of float."""
    if parts[0].ndim == 4 and dim in (1, -3):
        return scaled(torch.cat([dequantized(p, g) for p, g in zip(parts, grids)], dim), output, carrier)
    real = torch.cat([laws.dequantize_centred(p, g) for p, g in zip(parts, grids)], dim)
    return quantize_centred(real, output, carrier)


def build_kernel(node: fx.Node, inputs: list[Grid], output: Grid | None, carrier: Carrier) -> Kernel:
    """The kernel of ``node`` for operands on ``inputs``; float output where ``output`` is None."""
    name = op_of(node).name
    dtype = torch.float32 if carrier == "float" else torch.int32
    sources = operands(node)
    if module_of(node) is not None:
        return Kernel(name, _layer(node, inputs[0], output, carrier))
    assert output is not None
    first, grid = sources[0], inputs[0]
    if name in ("add", "mul"):
        law, (a, b) = add if name == "add" else multiply, sources
        return Kernel(name, lambda env: law(env[a], env[b], inputs[0], inputs[1], output, dtype))
    if name == "cat":
        dim: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        return Kernel(name, lambda env: cat([env[n] for n in sources], inputs, dim, output, dtype))
    if name in ("avg_pool", "global_avg_pool"):
        return Kernel(name, _mean(node, grid, output, dtype))
    return Kernel(name, _table(node, first, grid, output, dtype))


def _layer(node: fx.Node, source: Grid, output: Grid | None, carrier: Carrier) -> Run:
    layer = module_of(node)
    assert isinstance(layer, QuantLayer)
    assert layer.weight_quantizer is not None
    codes = centred_weight(layer)
    transposed = type(layer.layer).__name__.startswith("ConvTranspose")
    bound = accumulator_bound(codes, laws.largest_code(source), None, 1 if transposed else 0)
    dtype = product_dtype(carrier, bound, codes.device)
    if dtype == torch.int32 and not has_int32_kernel(layer.layer):
        dtype = torch.int64
    weight = codes.to(dtype)
    if weight.ndim == 4 and dtype.is_floating_point:
        weight = weight.contiguous(memory_format=torch.channels_last)
    shape = (-1,) if isinstance(layer.layer, nn.Linear) else (-1, *[1] * (codes.ndim - 2))
    scale = layer.weight_quantizer.require_grid().scale
    bias = layer.quantized_parameters().get("bias")
    code_dtype = torch.float32 if carrier == "float" else torch.int32
    scale, bias = scale.view(shape) if scale.ndim else scale, None if bias is None else bias.detach().view(shape)
    for_fbgemm = transposed or isinstance(layer.layer, nn.Linear) or is_exact_in_pairs(layer.layer, codes)
    if for_fbgemm and output is not None:
        finish = fbgemm(source, scale, bias, output, code_dtype)
    else:
        finish = convolution(source, scale, bias, output, code_dtype)
    function, (source_node,) = layer_function(layer.layer), operands(node)
    return lambda env: finish(to_float32(function(env[source_node].to(dtype), weight)))


Finish = Callable[[Tensor], Tensor]


def convolution(
    source: Grid, weights: Tensor, bias: Tensor | None, output: Grid | None, carrier: torch.dtype
) -> Finish:
    """oneDNN: float32(acc) * s_x * s_w + bias, each step rounded; then rint(that * (1 / s_y) + z_y).

    s_x went through its reciprocal before.
    """
    source_scale = twice_inverted(source.scale)

    def finish(accumulator: Tensor) -> Tensor:
        real = accumulator * source_scale * weights
        if bias is not None:
            real = real + bias
        if output is None:
            return real
        zero = stored_zero(output)
        return laws.round_to((real * (1 / output.scale) + zero).round_().sub_(zero), output, carrier)

    return finish


def fbgemm(source: Grid, weights: Tensor, bias: Tensor | None, output: Grid, carrier: torch.dtype) -> Finish:
    """FBGEMM: rint((float32(acc) + bias / s) * float32(s / s_y)) with s = s_x * s_w."""
    scale = source.scale * weights

    def finish(accumulator: Tensor) -> Tensor:
        total = accumulator if bias is None else accumulator + bias / scale
        return laws.round_to((total * laws.multiplier(scale, output)).round_(), output, carrier)

    return finish


def _mean(node: fx.Node, grid: Grid, output: Grid, dtype: torch.dtype) -> Run:
    """The exact sum of codes / count, * s_x, quantized; on equal grids rint(mean + z)."""
    source, zero = operands(node)[0], stored_zero(grid)
    same = torch.equal(grid.scale, output.scale) and grid.format == output.format and stored_zero(output) == zero

    def quantized(mean: Tensor) -> Tensor:
        if same:
            return laws.round_to((mean + zero).round_().sub_(zero), output, dtype)
        return quantize_centred(mean * grid.scale, output, dtype)

    if op_of(node).name == "avg_pool":
        pool, function = average_pool_geometry(node), getattr(F, f"avg_pool{aten_name(node)[-2]}d")
        options = {"count_include_pad": pool.count_include_pad}
        return lambda env: quantized(function(env[source].float(), pool.kernel, pool.stride, pool.padding, **options))
    rank = source.meta["val"].ndim
    dims = [-1] if aten_name(node).endswith("1d") else list(range(2, rank))
    keep = node.meta["val"].ndim == rank
    return lambda env: quantized(env[source].float().mean(dims, keepdim=keep))


def _table(node: fx.Node, source: fx.Node, grid: Grid, output: Grid, dtype: torch.dtype) -> Run:
    """A function of one element, as a lookup table: computed once in float for every code."""
    low, high = laws.code_range(grid)
    codes = torch.arange(low, high + 1, device=grid.scale.device)
    real = node.target(dequantized(codes, grid), *node.args[1:], **node.kwargs)  # type: ignore[operator]
    table = scaled(real, output, dtype)
    return lambda env: table[env[source].long() - low]
