"""Quantizers and quantized parameters as QuantizeLinear, Clip and DequantizeLinear."""

from __future__ import annotations

from collections.abc import Callable

import torch
from onnx import TensorProto
from torch import Tensor, fx, nn

from ...errors import ExportError
from ...grid import FP8_E4M3, FP8_E5M2, FloatFormat, Grid, IntFormat, Quantizer, centred_codes, quantize
from ...place.layers import QuantLayer
from .builder import Builder, element_type, tensor_bytes

_INT16_OPSET = 21
_FLOAT8_OPSET = 19
_INT4_OPSET = 21  # and that of block_size
_FLOAT8 = {FP8_E4M3: torch.float8_e4m3fn, FP8_E5M2: torch.float8_e5m2}


def storage_dtype(grid: Grid, where: str, opset: int) -> torch.dtype:
    """The element type that holds an activation's codes in the file."""
    fmt = grid.format
    if isinstance(fmt, FloatFormat):
        if fmt not in _FLOAT8:
            raise ExportError(f"ONNX export of {where}: ONNX has no {fmt}; use FP8 E4M3 (reserved 'nan') or E5M2")
        if opset < _FLOAT8_OPSET:
            raise ExportError(f"ONNX export of {where}: FP8 needs opset {_FLOAT8_OPSET} or later, not {opset}")
        return _FLOAT8[fmt]
    if fmt.bits > 16:
        raise ExportError(f"ONNX export of {where}: QuantizeLinear has at most 16 bits, not {fmt.bits}")
    if fmt.bits <= 8:
        return torch.int8 if fmt.signed else torch.uint8
    if opset < _INT16_OPSET:
        raise ExportError(
            f"ONNX export of {where}: {fmt.bits}-bit codes need opset {_INT16_OPSET} or later, not {opset}"
        )
    return torch.int16 if fmt.signed else torch.uint16


def emit_activation(builder: Builder, node: fx.Node, quantizer: Quantizer, source: fx.Node) -> str:
    """Write one Quantizer call; the name of the dequantized tensor.

    The same Quantizer twice in a row is one pair of nodes: its output is on its own grid already. Anything in
    between (a max pool, a reshape) keeps both pairs: that is how runtimes know that it may run on integers.
    """
    if quantizer.grid is None and quantizer.spec.dynamic:
        raise ExportError(f"ONNX export of {node.name}: a dynamic Quantizer has no fixed grid to write")
    grid = _stored_grid(builder, quantizer.require_grid())
    if source in builder.constants:
        return emit_parameter(builder, node.name, builder.constants[source], grid)
    x = builder.value(source)
    if builder.cache.get(("on_grid", x)) == str(id(quantizer)):
        return x
    where = f"Quantizer {node.target} at node {node.name!r}"
    dtype = storage_dtype(grid, where, builder.opset)
    scale, zero_point = _grid_initializers(builder, node.name, grid, dtype, key=id(quantizer))
    clip = _clip_range(grid, dtype, builder, where)
    axis = grid.axis if grid.scale.ndim else None
    if clip is not None and dtype in (torch.int16, torch.uint16):
        x = _float_clip(builder, node.name, x, grid, clip, where)
    codes = builder.emit("QuantizeLinear", [x, scale, zero_point], name=f"{node.name}_quantized", axis=axis)[0]
    if clip is not None and dtype in (torch.int8, torch.uint8):
        bounds = [
            builder.initializer(f"{node.name}_{end}", torch.tensor(value, dtype=dtype), share=True)
            for end, value in zip(("qmin", "qmax"), clip, strict=True)
        ]
        codes = builder.emit("Clip", [codes, *bounds], name=f"{node.name}_clipped")[0]
    result = builder.emit("DequantizeLinear", [codes, scale, zero_point], name=node.name, axis=axis)[0]
    builder.cache["on_grid", result] = str(id(quantizer))
    return result


def _stored_grid(builder: Builder, grid: Grid) -> Grid:
    """The same real values by codes counted from 0, where signed codes are to be stored as uint8."""
    fmt = grid.format
    if not (builder.uint8_activations and isinstance(fmt, IntFormat) and fmt.signed and fmt.bits <= 8):
        return grid
    unsigned = IntFormat(fmt.bits, signed=False, narrow=fmt.narrow)
    return Grid(unsigned, grid.scale, _zero_points(grid) + (1 << (fmt.bits - 1)), grid.axis, grid.group_size)


def _clip_range(grid: Grid, dtype: torch.dtype, builder: Builder, where: str) -> tuple[int, int] | None:
    """The codes to clip to, or None where the storage type saturates at them already."""
    if not isinstance(grid.format, IntFormat):
        return None
    info, fmt = torch.iinfo(dtype), grid.format
    if (fmt.qmin, fmt.qmax) == (info.min, info.max):
        return None
    if builder.style == "qdq":
        raise ExportError(
            f"ONNX export of {where}: codes {fmt.qmin} .. {fmt.qmax} are narrower than {dtype}, and"
            " QuantizeLinear saturates only at its type's ends; use style='qcdq', which adds a Clip"
        )
    return fmt.qmin, fmt.qmax


def _float_clip(builder: Builder, name: str, x: str, grid: Grid, clip: tuple[int, int], where: str) -> str:
    """Clip before QuantizeLinear: onnxruntime has no integer Clip at 16 bits."""
    if grid.scale.ndim:
        raise ExportError(f"ONNX export of {where}: a clip of 16-bit codes must be per tensor; use 16 bits in full")
    zero = 0 if grid.zero_point is None else int(grid.zero_point)
    bounds = [
        builder.initializer(f"{name}_{end}", (grid.scale * (code - zero)).float(), share=True)
        for end, code in zip(("min", "max"), clip, strict=True)
    ]
    return builder.emit("Clip", [x, *bounds], name=f"{name}_clipped")[0]


def _grid_initializers(
    builder: Builder, name: str, grid: Grid, dtype: torch.dtype, key: int | None = None
) -> tuple[str, str]:
    """Scale and zero point; a Quantizer called at several nodes has them once."""
    scale_key, zero_key = ("scale", key), ("zero_point", key)
    if key is None or scale_key not in builder.cache:
        zero = _zero_points(grid)
        builder.cache[scale_key] = builder.initializer(f"{name}_scale", grid.scale.float())
        builder.cache[zero_key] = builder.initializer(f"{name}_zero_point", zero.to(dtype))
    return builder.cache[scale_key], builder.cache[zero_key]


def parameter_writer(
    builder: Builder, node: fx.Node, module: nn.Module, *, unit_scale: bool = False
) -> Callable[..., str]:
    """A function that writes a layer's parameter, once, and returns the name of its float value.

    With ``unit_scale`` that value is the parameter's codes (less their zero point).
    """
    layer = module.layer if isinstance(module, QuantLayer) else module

    def write(name: str, *, transposed: bool = False, shape: tuple[int, ...] | None = None) -> str:
        grid = parameter_grid(module, name)  # calls of one layer share its weight, but each has its own bias scale
        scale = None if grid is None else grid.scale.cpu().numpy().tobytes()
        key = ("parameter", id(layer), name, transposed, unit_scale, scale)
        if key not in builder.cache:
            tensor = getattr(layer, name).detach()
            builder.cache[key] = emit_parameter(
                builder,
                f"{node.target}.{name}",
                tensor,
                grid,
                transposed=transposed,
                shape=shape,
                unit_scale=unit_scale,
            )
        return builder.cache[key]

    return write


def parameter_grid(module: nn.Module, name: str) -> Grid | None:
    """The grid that a layer's parameter is on, or None where it stays float."""
    quantizer = getattr(module, f"{name}_quantizer", None) if isinstance(module, QuantLayer) else None
    return quantizer.grid if isinstance(quantizer, Quantizer) else None


def emit_parameter(
    builder: Builder,
    name: str,
    tensor: Tensor,
    grid: Grid | None,
    *,
    transposed: bool = False,
    shape: tuple[int, ...] | None = None,
    unit_scale: bool = False,
) -> str:
    """Write a parameter: a float initializer, or integer codes and a DequantizeLinear."""

    def arrange(t: Tensor) -> Tensor:
        if transposed and t.ndim == 2:
            t = t.t()
        return t if shape is None or t.numel() != tensor.numel() else t.reshape(shape)

    if grid is None:
        return builder.initializer(name, arrange(tensor), share=True)
    if grid.group_size is not None and not _blocked(builder, tensor, grid):
        return _emit_rows_of_groups(builder, name, tensor, grid, transposed)
    centred = _is_centred(builder, grid)
    codes = arrange(centred_codes(tensor, grid) if centred else quantize(tensor, grid))
    if centred:
        grid = Grid(IntFormat(grid.format.bits + 1), grid.scale, None, grid.axis)
    axis = grid.axis
    if axis is not None:
        axis = axis % tensor.ndim
        axis = 1 - axis if transposed else axis
    scale, zero = grid.scale.float(), _zero_points(grid)
    if unit_scale:
        scale = torch.ones_like(scale)
    if transposed and scale.ndim == 2:
        scale, zero = scale.t(), zero.t()
    return _dequantize_codes(builder, name, codes, grid, scale, zero, axis if scale.ndim else None, grid.group_size)


def _is_centred(builder: Builder, grid: Grid) -> bool:
    """Whether codes of few bits are stored in a byte, less their zero points.

    They fit, and onnxruntime's convolutions are much slower with a zero point for each channel.
    """
    fmt = grid.format
    return isinstance(fmt, IntFormat) and fmt.bits < 8 and grid.zero_point is not None and not _packed(builder, fmt)


def _packed(builder: Builder, fmt: IntFormat) -> bool:
    """Whether codes are stored two to a byte."""
    return fmt.bits <= 4 and builder.pack_int4 and builder.opset >= _INT4_OPSET


def _blocked(builder: Builder, tensor: Tensor, grid: Grid) -> bool:
    """Whether groups are written with DequantizeLinear's block_size.

    onnxruntime 1.31 takes an 8-bit blocked weight for a per-column one and fails, so only 4-bit codes are; OpenVINO
    2026.4 has no last block that is shorter.
    """
    assert grid.group_size is not None
    whole = tensor.shape[grid.axis or 0] % grid.group_size == 0
    return whole and isinstance(grid.format, IntFormat) and _packed(builder, grid.format)


def _emit_rows_of_groups(builder: Builder, name: str, tensor: Tensor, grid: Grid, transposed: bool) -> str:
    """Groups as the rows of a matrix, a scale each; put back into the weight's shape once dequantized.

    A last group that is shorter is filled up, and cut off again.
    """
    axis = (grid.axis or 0) % tensor.ndim
    size = grid.group_size
    assert size is not None
    length = tensor.shape[axis]
    moved = nn.functional.pad(quantize(tensor, grid).movedim(axis, -1), (0, -length % size))
    scale, zero = (
        grid.scale.float().movedim(axis, -1).flatten(),
        _zero_points(grid).movedim(axis, -1).flatten(),
    )
    rows = _dequantize_codes(builder, name, moved.reshape(-1, size), grid, scale, zero, 0, None)
    shape = builder.constant(torch.tensor(moved.shape), "weight_shape")
    (weight,) = builder.emit("Reshape", [rows, shape], name=f"{name}_grouped")
    if moved.shape[-1] > length:
        ends = [builder.constant(torch.tensor([value]), what) for value, what in
                ((0, "group_start"), (length, "group_end"), (-1, "group_axis"))]  # fmt: skip
        (weight,) = builder.emit("Slice", [weight, *ends], name=f"{name}_cut")
    order = list(range(tensor.ndim))
    order.insert(axis, order.pop())
    if transposed and tensor.ndim == 2:
        order = order[::-1]
    return (
        weight if order == sorted(order) else builder.emit("Transpose", [weight], perm=order, name=f"{name}_moved")[0]
    )


def _zero_points(grid: Grid) -> Tensor:
    zero = torch.zeros_like(grid.scale, dtype=torch.int32) if grid.zero_point is None else grid.zero_point
    return zero.to(torch.int32).expand(grid.scale.shape)


def _dequantize_codes(
    builder: Builder, name: str, codes: Tensor, grid: Grid, scale: Tensor, zero: Tensor, axis: int | None,
    block_size: int | None,
) -> str:  # fmt: skip
    """Codes, scale and zero point as initializers, and the DequantizeLinear that reads them."""
    codes_name, data_type = _code_initializer(builder, name, codes, grid)
    inputs = [codes_name, builder.initializer(f"{name}_scale", scale)]
    if data_type != TensorProto.INT32:  # beside int32 codes ONNX wants none
        inputs.append(_zero_point(builder, f"{name}_zero_point", zero, data_type))
    return builder.emit("DequantizeLinear", inputs, name=f"{name}_dequantized", axis=axis, block_size=block_size)[0]


def _code_initializer(builder: Builder, name: str, codes: Tensor, grid: Grid) -> tuple[str, int]:
    """The codes in the smallest type that the opset has for them."""
    fmt = grid.format
    if isinstance(fmt, FloatFormat):
        dtype = storage_dtype(grid, name, builder.opset)
        return builder.initializer(name, codes.to(dtype), share=True), element_type(dtype)
    if _packed(builder, fmt):
        kind = TensorProto.INT4 if fmt.signed else TensorProto.UINT4
        return builder.raw_initializer(name, kind, list(codes.shape), pack_nibbles(codes), share=True), kind
    dtype = storage_dtype(grid, name, builder.opset) if fmt.bits <= 16 else torch.int32
    return builder.initializer(name, codes.to(dtype), share=True), element_type(dtype)


def _zero_point(builder: Builder, name: str, zero: Tensor, data_type: int) -> str:
    if data_type in (TensorProto.INT4, TensorProto.UINT4):
        return builder.raw_initializer(name, data_type, list(zero.shape), pack_nibbles(zero))
    dtype = next(dtype for dtype in _ZERO_DTYPES if element_type(dtype) == data_type)
    return builder.initializer(name, zero.to(dtype))


_ZERO_DTYPES = (torch.int8, torch.uint8, torch.int16, torch.uint16, torch.float8_e4m3fn, torch.float8_e5m2)


def pack_nibbles(codes: Tensor) -> bytes:
    """4-bit codes two to a byte, the first in the low half (ONNX's INT4 and UINT4 layout).

    >>> pack_nibbles(torch.tensor([1, -1, 7])).hex()
    'f107'
    """
    nibbles = (codes.flatten().to(torch.int32) & 15).to(torch.uint8)
    if nibbles.numel() % 2:
        nibbles = torch.cat([nibbles, nibbles.new_zeros(1)])
    return tensor_bytes(nibbles[0::2] | (nibbles[1::2] << 4))
