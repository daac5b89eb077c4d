"""Files for TI's TIDL import: quantized ONNX, or float ONNX with the ranges of 8- and 16-bit layers beside it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from torch import Tensor, fx

from ..capture.ops import op_of, quantizer_of
from ..errors import ExportError
from ..files import staged_dir, write_text
from ..grid import Grid, IntFormat, Quantizer
from ..model import QuantizedModel
from ..place.layers import QuantLayer
from ..targets import Target
from ..targets.tidl_contract import NEWEST_OPSET
from .static import with_batch

if TYPE_CHECKING:
    import onnx

OPSET = 16  # the newest in which layer norms are spelled out
MODEL_FILE, RANGES_FILE, OPTIONS_FILE = "model.onnx", "ranges.prototxt", "import.yaml"
_LAYER_TYPES = {
    "conv": "TIDL_ConvolutionLayer", "conv_transpose": "TIDL_Deconv2DLayer", "linear": "TIDL_InnerProductLayer",
    "matmul": "TIDL_InnerProductLayer", "add": "TIDL_EltWiseLayer", "mul": "TIDL_EltWiseLayer",
    "cat": "TIDL_ConcatLayer", "avg_pool": "TIDL_PoolingLayer", "global_avg_pool": "TIDL_PoolingLayer",
    "max_pool": "TIDL_PoolingLayer", "softmax": "TIDL_SoftMaxLayer", "sigmoid": "TIDL_SigmoidLayer",
    "resize_nearest": "TIDL_ResizeLayer", "relu": "TIDL_ReLULayer", "clamp": "TIDL_ClipLayer",
}  # fmt: skip


def build_tidl(q: QuantizedModel, *, style: str, opset: int | None) -> onnx.ModelProto:
    """The quantized model as TIDL imports it: one image, opset 16 unless told, int8 QDQ alone."""
    from .onnx import build_onnx

    if style != "qdq":
        raise ExportError(f"style={style!r}: target {q.target.name} imports style 'qdq' only")
    _check_opset(q.target, opset)
    if wide := [name for name, grid in _grids(q.graph) if grid.format.bits > 8]:
        raise ExportError(
            f"TIDL imports 8 bits from a quantized ONNX file, but {wide[0]!r} has more: write the model with "
            "bitsmith.export_tidl(q, folder), which hands over 16-bit layers by their ranges"
        )
    graph = with_batch(q.graph, 1)
    for node in list(graph.graph.nodes):
        if op_of(node).name == "linear" and node.op == "call_module" and node.meta["val"].ndim > 2:
            _as_rows(graph, node)
    return build_onnx(graph, style="qdq", opset=opset or OPSET)


def _as_rows(graph: fx.GraphModule, node: fx.Node) -> None:
    """A linear of more than two axes over rows, its input quantized where it is read: behind the reshape."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    before, after = source.meta["val"], node.meta["val"]
    reshape = torch.ops.aten.reshape.default

    def call(value: Any, shape: list[int]) -> fx.Node:
        made = graph.graph.call_function(reshape, (value, shape))
        made.meta["val"] = torch.empty(shape, device="meta")
        return made

    with graph.graph.inserting_before(node):
        rows = call(source, [before.shape[:-1].numel(), before.shape[-1]])
        if quantizer_of(source) is not None:
            codes = graph.graph.call_module(str(source.target), (rows,))
            codes.meta["val"], rows = rows.meta["val"], codes
    with graph.graph.inserting_after(node):
        back = call(node, list(after.shape))
    node.replace_all_uses_with(back, delete_user_cb=lambda user: user is not back)
    node.replace_input_with(source, rows)
    node.meta["val"] = torch.empty(after.shape[:-1].numel(), after.shape[-1], device="meta")


def export_tidl(q: QuantizedModel, folder: str | Path) -> Path:
    """Write what TI's compiler takes: ``model.onnx`` and ``import.yaml``, its compile options.

    A model of 8 bits alone is written as int8 QDQ, which TIDL runs as it is. With 16-bit layers, which its import of
    quantized files does not have, ``model.onnx`` is the float model and ``ranges.prototxt`` holds bits, range and
    bias of every layer, in TIDL's text format; that way is symmetric only, so that its recipe must be too
    (``int16``, or ``int8-sym`` with overrides). The folder appears whole or not at all.

    >>> import bitsmith as bs, tempfile, pathlib
    >>> q = bs.quantize(torch.nn.Conv2d(3, 4, 3), [torch.randn(8, 3, 8, 8)], target="tda4vm")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     sorted(file.name for file in export_tidl(q, pathlib.Path(folder, "tidl")).iterdir())
    ['import.yaml', 'model.onnx']
    """
    from .onnx import save_onnx

    device = q.target.tidl
    if device is None:
        raise ExportError(f"the model was quantized for {q.target.name}: use target='tda4vm' or another TIDL device")
    wide = [name for name, grid in _grids(q.graph) if grid.format.bits > 8]
    options: dict[str, Any] = {"tensor_bits": 8, "accuracy_level": 0}
    advanced: dict[str, int | str] = {"quantization_scale_type": device.scale_type}
    if wide and not device.deconv_16bit:
        for node in _wide_layers(q.graph):
            if op_of(node).name == "conv_transpose":
                raise ExportError(f"{q.target.name} has no transposed convolutions of 16 bits: give {node.target!r} 8")
    with staged_dir(folder) as staging:
        if wide:
            write_text(staging / RANGES_FILE, ranges_text(q))
            model = _float_file(q)
            advanced["quant_params_proto_path"] = RANGES_FILE
            layers = sorted({str(n.target) for n in _wide_layers(q.graph)})
            advanced["output_feature_16bit_names_list"] = ", ".join(layers)
        else:
            model = build_tidl(q, style="qdq", opset=None)
            advanced["prequantized_model"] = 1
        save_onnx(model, staging / MODEL_FILE)
        options |= {f"advanced_options:{key}": value for key, value in advanced.items()}
        write_text(staging / OPTIONS_FILE, yaml.safe_dump(options, sort_keys=False))
    return Path(folder)


def _check_opset(target: Target, opset: int | None) -> None:
    if opset is not None and opset > NEWEST_OPSET:
        raise ExportError(f"opset={opset}: target {target.name} imports opsets up to {NEWEST_OPSET}; leave it out")
    if opset is not None and opset > OPSET:
        raise ExportError(f"opset={opset}: layer norms are spelled out, as TIDL asks, up to {OPSET}; leave it out")


def _grids(graph: fx.GraphModule) -> Iterator[tuple[str, Grid]]:
    """The grids of weights and activations by name."""
    for name, module in graph.named_modules():
        if isinstance(module, Quantizer) and not name.endswith("bias_quantizer") and module.grid is not None:
            yield name, module.grid


def _wide_layers(graph: fx.GraphModule) -> Iterator[fx.Node]:
    for node in graph.graph.nodes:
        module = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, QuantLayer) and _bits(node, module) > 8:
            yield node


def _float_file(q: QuantizedModel) -> onnx.ModelProto:
    """The float model in the quantized one, batch norms folded, under the same layer names."""
    from .onnx import build_onnx

    graph = with_batch(q.graph, 1)
    for node in list(graph.graph.nodes):
        if quantizer_of(node) is not None:
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
    for name, module in list(graph.named_modules()):
        if isinstance(module, QuantLayer):
            parent, _, leaf = name.rpartition(".")
            setattr(graph.get_submodule(parent), leaf, module.layer)
    return build_onnx(graph, opset=OPSET)


# The text format, field by field as TIDL's TIDLNetQuantParams declares it.


def ranges_text(q: QuantizedModel) -> str:
    """Bits, ranges and biases of every layer, as TIDL's quantization parameters in text form."""
    if zero := [name for name, grid in _grids(q.graph) if grid.zero_point is not None and bool(grid.zero_point.any())]:
        raise ExportError(
            f"TIDL takes ranges of symmetric models only, but {zero[0]!r} has a zero point: use recipe 'int16', or "
            "'int8-sym' with overrides of 16 bits"
        )
    layers = [_layer(node, q.graph) for node in q.graph.graph.nodes if _has_range(node)]
    per_channel = any(grid.axis is not None for _, grid in _grids(q.graph))
    kind = "PERCHANNEL" if per_channel else "PERTENSOR"
    return f"num_layers: {len(layers)}\nquant_type: SYMMETRIC\ncalib_type: {kind}\n" + "".join(layers)


def _has_range(node: fx.Node) -> bool:
    return quantizer_of(node) is None and _output_grid(node) is not None


def _output_grid(node: fx.Node) -> Grid | None:
    """The grid of what a node gives, behind the activations that fuse into it."""
    while True:
        for user in node.users:
            if (quantizer := quantizer_of(user)) is not None:
                return quantizer.grid
        if len(node.users) != 1 or op_of(user := next(iter(node.users))).role != "activation":
            return None
        node = user


def _bits(node: fx.Node, module: Any) -> int:
    grids = [_output_grid(node)]
    if isinstance(module, QuantLayer) and module.weight_quantizer is not None:
        grids.append(module.weight_quantizer.grid)
    return max((grid.format.bits for grid in grids if grid is not None), default=8)


def _layer(node: fx.Node, graph: fx.GraphModule) -> str:
    module = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
    name = str(node.target) if node.op in ("call_module", "placeholder") else node.name
    kind = "TIDL_DataLayer" if node.op == "placeholder" else _LAYER_TYPES.get(op_of(node).name, "TIDL_CustomLayer")
    parts = [_field("layer_name", f'"{name}"'), _field("layer_type", f'"{kind}"')]
    parts.append(_field("bit_depth", _bits(node, module)))
    grid = _output_grid(node)
    assert grid is not None
    parts.append(_tensor("outputs", *_ends(grid), grid))
    if isinstance(module, QuantLayer) and module.weight_quantizer is not None:
        weights = module.weight_quantizer.require_grid()
        parts.append(_tensor("weights", *_ends(weights), weights))
        if module.bias is not None:
            bias = module.bias.detach()
            parts.append(_tensor("bias", float(bias.min()), float(bias.max()), None, bias))
    return "layers {\n" + "".join(parts) + "}\n"


def _ends(grid: Grid) -> tuple[float, float]:
    """The smallest and the largest number on a symmetric grid, over all channels."""
    assert isinstance(grid.format, IntFormat)
    scale = float(grid.scale.max())
    return grid.format.qmin * scale, grid.format.qmax * scale


def _tensor(name: str, low: float, high: float, grid: Grid | None, values: Tensor | None = None) -> str:
    """One tensor; TIDL's scale is how many codes there are to 1."""
    scales = [1.0] if grid is None else (1.0 / grid.scale.double().flatten()).tolist()
    lines = [_field("min", low), _field("max", high), _field("size", len(scales) if values is None else values.numel())]
    lines.append(_field("element_type", _element_type(grid)))
    lines += [_field("scale", scale) for scale in scales] + [_field("zero_point", 0)] * len(scales)
    lines += [] if values is None else [_field("value", value) for value in values.double().tolist()]
    return f"  {name} {{\n" + "".join(f"  {line}" for line in lines) + "  }\n"


def _element_type(grid: Grid | None) -> int:
    """TIDL's number for uint8, int8, uint16 or int16."""
    if grid is None or not isinstance(grid.format, IntFormat):
        return 0
    return 2 * (grid.format.bits > 8) + grid.format.signed


def _field(name: str, value: Any) -> str:
    return f"  {name}: {value!r}\n" if isinstance(value, float) else f"  {name}: {value}\n"
