"""One integer kernel per operator: how codes of the operands become codes of the output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..capture.ops import aten_name, module_of, op_of
from ..grid import Grid, centred_codes, quantize
from ..place.layers import QuantLayer
from ..place.plan import operands
from . import laws
from .accumulate import (
    Carrier,
    accumulator_bound,
    has_int32_kernel,
    layer_function,
    product_dtype,
    sums_in_float32,
    to_float32,
)

Run = Callable[[dict[fx.Node, Any]], Tensor]
_DEEPEST = 1 << 20  # products per output of a matmul whose depth is known at run time only


@dataclass(frozen=True)
class Kernel:
    """``run(env)`` computes an operator; ``name`` says by which law."""

    name: str
    run: Run


def multiplies_on_codes(node: fx.Node, source: Grid) -> bool:
    """Whether a runtime's float kernel, fed with the codes of a layer's input and weight, sums them exactly."""
    layer = module_of(node)
    assert isinstance(layer, QuantLayer)
    return sums_in_float32(largest_sum(layer, source, None))


def largest_sum(layer: QuantLayer, source: Grid, bias: Tensor | None) -> int:
    """The largest magnitude of any partial sum of a layer's products and its bias, in codes."""
    axis = 1 if _is_transposed(layer) else 0
    return accumulator_bound(centred_weight(layer), laws.largest_code(source), bias, axis)


def build_kernel(
    node: fx.Node, inputs: list[Grid], output: Grid | None, carrier: Carrier, *, on_codes: bool = False
) -> Kernel:
    """The kernel of ``node`` for operands on ``inputs``; float output where ``output`` is None.

    ``on_codes``: a float kernel of the runtime multiplies the codes, as ``multiplies_on_codes`` says that it can.
    """
    name = op_of(node).name
    dtype = torch.float32 if carrier == "float" else torch.int32
    if module_of(node) is not None:
        return Kernel(name, _layer(node, inputs[0], output, carrier, on_codes))
    if name == "matmul":
        return Kernel(name, _matmul(node, inputs, output, carrier))
    assert output is not None
    sources = operands(node)
    first, grid = sources[0], inputs[0]
    if name in ("add", "mul"):
        law = partial(laws.add, channels_last=_lies_channels_last(node)) if name == "add" else laws.multiply
        a, b = sources
        return Kernel(name, lambda env: law(env[a], env[b], inputs[0], inputs[1], output, dtype))
    if name == "cat":
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        return Kernel(
            name,
            lambda env: torch.cat(
                [laws.rescale(env[n], g, output, dtype) for n, g in zip(sources, inputs)],
                dim,  # type: ignore[arg-type]
            ),
        )
    if name == "global_avg_pool":
        return Kernel(name, _global_mean(node, grid, output, dtype))
    if name == "avg_pool":
        return Kernel(name, _average_pool(node, grid, output, dtype))
    return Kernel(name, _table(node, first, grid, output, dtype))


def _lies_channels_last(node: fx.Node) -> bool:
    """Whether onnxruntime keeps a value channels last: beside convolutions of the same rank it does."""
    rank = node.meta["val"].ndim
    return any(op_of(n).name == "conv" and n.meta["val"].ndim == rank for n in node.graph.nodes)


def centred_weight(layer: QuantLayer) -> Tensor:
    """The weight's codes less their zero point, as int32."""
    assert layer.weight_quantizer is not None
    return centred_codes(layer.weight.detach(), layer.weight_quantizer.require_grid())


def fits_signed_bytes(layer: QuantLayer) -> bool:
    """Whether the weight's codes less their zero points are signed bytes, as torch's kernels want them."""
    codes = centred_weight(layer)
    return int(codes.min()) >= -128 and int(codes.max()) <= 127


def bias_codes(layer: QuantLayer) -> Tensor | None:
    """The bias' codes, int32, or None where there is no bias."""
    if layer.bias is None:
        return None
    assert layer.bias_quantizer is not None
    return quantize(layer.bias.detach(), layer.bias_quantizer.require_grid())


def per_channel(layer: QuantLayer, values: Tensor) -> Tensor:
    """One value per output channel, (channels,), in the shape that meets the layer's output."""
    return values.view(-1) if isinstance(layer.layer, nn.Linear) else values.view(-1, *[1] * (layer.weight.ndim - 2))


def accumulator_scale(layer: QuantLayer, source: Grid) -> Tensor:
    """float32(s_x * s_w): one number, or per output channel in the shape that meets the layer's output."""
    assert layer.weight_quantizer is not None
    weights = layer.weight_quantizer.require_grid()
    scale = source.scale * weights.scale
    if not scale.ndim:
        return scale
    geometry: Any = layer.layer
    if _is_transposed(layer) and scale.numel() != geometry.out_channels:
        scale = scale.repeat(geometry.groups)
    return per_channel(layer, scale)


def _is_transposed(layer: QuantLayer) -> bool:
    return isinstance(layer.layer, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d)


def _layer(node: fx.Node, source: Grid, output: Grid | None, carrier: Carrier, on_codes: bool) -> Run:
    layer = module_of(node)
    assert isinstance(layer, QuantLayer)
    codes, bias = centred_weight(layer), bias_codes(layer)
    bound = largest_sum(layer, source, None if on_codes else bias)
    dtype = product_dtype(carrier, bound, codes.device)
    if dtype == torch.int32 and not has_int32_kernel(layer.layer):
        dtype = torch.int64
    weight = codes.to(dtype)
    if weight.ndim == 4 and dtype.is_floating_point:
        weight = weight.contiguous(memory_format=torch.channels_last)
    scale = accumulator_scale(layer, source)
    addend = None if bias is None else per_channel(layer, bias.to(torch.float32 if on_codes else dtype))
    function, (source_node,) = layer_function(layer.layer), operands(node)
    code_dtype = torch.float32 if carrier == "float" else torch.int32
    ratio = scale if output is None else laws.multiplier(scale, output)

    def run(env: dict[fx.Node, Any]) -> Tensor:
        accumulator = function(env[source_node].to(dtype), weight)
        if on_codes:
            accumulator = to_float32(accumulator)
        if addend is not None:
            accumulator = accumulator.add_(addend)
        if output is None:
            return to_float32(accumulator) * ratio
        return laws.requantize(accumulator, ratio, output, code_dtype)

    return run


def _matmul(node: fx.Node, inputs: list[Grid], output: Grid | None, carrier: Carrier) -> Run:
    a, b = operands(node)
    depth = int(a.meta["val"].shape[-1]) if isinstance(a.meta["val"].shape[-1], int) else _DEEPEST
    bound = depth * laws.largest_code(inputs[0]) * laws.largest_code(inputs[1])
    dtype = product_dtype(carrier, bound)
    scale = inputs[0].scale * inputs[1].scale
    ratio = scale if output is None else laws.multiplier(scale, output)
    code_dtype = torch.float32 if carrier == "float" else torch.int32

    def run(env: dict[fx.Node, Any]) -> Tensor:
        accumulator = torch.matmul(env[a].to(dtype), env[b].to(dtype))
        if output is None:
            return to_float32(accumulator) * ratio
        return laws.requantize(accumulator, ratio, output, code_dtype)

    return run


def sums_in_known_order(node: fx.Node) -> bool:
    """Whether ``float_pool`` is the runtime's law for an average pool: over batches of one or two spatial axes.

    Not straight behind an input or a max pool, where onnxruntime puts channels into blocks first.
    """
    source, name = operands(node)[0], aten_name(node)
    batched = source.meta["val"].ndim == {"1d": 3, "2d": 4}.get("2d" if name == "mean" else name[-2:])
    return batched and source.op != "placeholder" and op_of(source).name != "max_pool"


def float_pool(node: fx.Node) -> Callable[[Tensor], Tensor]:
    """An average pool of real numbers, summed in the runtime's order."""
    if op_of(node).name == "avg_pool":
        return partial(laws.float_window_mean, pool=average_pool_geometry(node))
    dims, keeps_rank = _pooled(node)
    return lambda x: laws.float_mean(x, dims) if keeps_rank else laws.float_mean(x, dims).flatten(1)


def _pooled(node: fx.Node) -> tuple[list[int], bool]:
    """The axes that a global average pool takes the mean over, and whether it keeps them."""
    rank = operands(node)[0].meta["val"].ndim
    dims = [-1] if aten_name(node).endswith("1d") else list(range(2, rank))
    return dims, bool(node.meta["val"].ndim == rank)


def _global_mean(node: fx.Node, grid: Grid, output: Grid, dtype: torch.dtype) -> Run:
    source = operands(node)[0]
    dims, keeps_rank = _pooled(node)

    def run(env: dict[fx.Node, Any]) -> Tensor:
        result = laws.mean(env[source], dims, grid, output, dtype)
        return result if keeps_rank else result.flatten(1)

    return run


def _average_pool(node: fx.Node, grid: Grid, output: Grid, dtype: torch.dtype) -> Run:
    source = operands(node)[0]
    pool = average_pool_geometry(node)
    return lambda env: laws.window_mean(env[source], pool, grid, output, dtype)


def average_pool_geometry(node: fx.Node) -> laws.AveragePool:
    """Kernel, stride and padding of an average pooling node (``capture.ops`` lets only plain windows through)."""
    name, rank = aten_name(node), int(aten_name(node)[-2])
    shape = operands(node)[0].meta["val"].shape[-rank:]

    def per_axis(value: Any) -> tuple[int, ...]:
        values = [value] if isinstance(value, int) else list(value)
        return tuple(values * rank if len(values) == 1 else values)

    if name.startswith("adaptive"):
        sizes = per_axis(node.args[1])
        kernel = tuple(int(s) // o for s, o in zip(shape, sizes))
        return laws.AveragePool(kernel, kernel, (0,) * rank)
    values = dict(zip(("kernel", "stride", "padding", "ceil_mode", "count_include_pad", "divisor"), node.args[1:]))
    kernel = per_axis(values["kernel"])
    return laws.AveragePool(
        kernel, per_axis(values.get("stride") or kernel), per_axis(values.get("padding", 0)),
        bool(values.get("count_include_pad", True)),
    )  # fmt: skip


def _table(node: fx.Node, source: fx.Node, grid: Grid, output: Grid, dtype: torch.dtype) -> Run:
    """A function of one element, as a lookup table: computed once in float for every code."""
    low, high = laws.code_range(grid)
    codes = torch.arange(low, high + 1, device=grid.scale.device)
    real = laws.dequantize_centred(codes, grid)
    args = (real, *node.args[1:])
    table = laws.quantize_centred(node.target(*args, **node.kwargs), output, dtype)  # type: ignore[operator]
    return lambda env: table[env[source].long() - low]
