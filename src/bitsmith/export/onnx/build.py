"""The LayerGraph as an ONNX model: one pass over its nodes, each written by its row in the registry."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import onnx
import torch
from onnx import helper, shape_inference
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from ...errors import ExportError
from ...grid import Quantizer
from ...place.layers import QuantLayer
from . import (
    ops_activation,
    ops_attention,
    ops_create,
    ops_dynamic,
    ops_layers,
    ops_math,
    ops_matmul,
    ops_pool,
    ops_recurrent,
    ops_resize,
    ops_shape,
)
from .builder import Builder, Style
from .on_codes import write_on_codes
from .quantize_nodes import emit_activation, parameter_grid, parameter_writer
from .registry import FUNCTIONS, LAYERS, Call, LayerCall, operator_name, unsupported

# Importing these modules fills the registry.
_OPERATORS = (
    ops_activation, ops_attention, ops_create, ops_dynamic, ops_layers, ops_math, ops_matmul, ops_pool, ops_recurrent,
    ops_resize, ops_shape,
)  # fmt: skip

OLDEST_OPSET = 13
# onnxruntime 1.31 and OpenVINO 2026.4 run all that is written here at each of 13 .. 26, onnxruntime with
# the same fusions; it refuses 27.
NEWEST_OPSET = min(26, onnx.defs.onnx_opset_version())
DEFAULT_OPSET = NEWEST_OPSET
_LARGE_TENSOR = 1 << 16


def build_onnx(
    graph: fx.GraphModule,
    *,
    style: Style = "qdq",
    opset: int | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    pack_int4: bool = True,
    uint8_activations: bool = False,
    on_codes: Collection[fx.Node] = (),
    for_onnxruntime: bool = False,
) -> onnx.ModelProto:
    """A LayerGraph, quantized or not, as a checked ONNX model with the shape of every tensor.

    ``style`` ``"qdq"`` writes QuantizeLinear and DequantizeLinear; ``"qcdq"`` adds the Clip that codes
    narrower than their storage type need. ``opset`` is 13 to 26.

    ``pack_int4`` stores weights of 4 bits or less as INT4 from opset 21 on; onnxruntime's CPU kernels then
    compute in float, where with False (int8 storage) they compute on integers.

    ``uint8_activations`` stores signed activation codes as uint8 with the zero point moved along: the same
    numbers. onnxruntime on x86 fuses these everywhere, but leaves an int8 tensor with two readers unfused.

    ``on_codes`` are layers written so that a float kernel multiplies their codes: input and weight dequantized with
    scale 1, and the scale ``s_x * s_w`` in a Mul behind. float32 holds such sums exactly, in whatever order.

    ``for_onnxruntime`` allows onnxruntime's own operators (``com.microsoft``), which other runtimes do not know, and
    prefers what its kernels run fastest.

    Inputs are named after the parameters of ``forward`` and outputs after their nodes, unless named here. The
    leading dimension is free (``batch``) where it is in the graph.
    """
    opset = DEFAULT_OPSET if opset is None else opset
    if style not in ("qdq", "qcdq"):
        raise ExportError(f"style={style!r}: ONNX export knows 'qdq' and 'qcdq'")
    if not OLDEST_OPSET <= opset <= NEWEST_OPSET:
        raise ExportError(f"opset={opset}: ONNX export writes opsets {OLDEST_OPSET} to {NEWEST_OPSET}")
    builder = Builder(opset, style, pack_int4, uint8_activations, frozenset(on_codes), for_onnxruntime)
    inputs = _write_inputs(builder, graph, input_names)
    with torch.no_grad():
        for node in graph.graph.nodes:
            if node.op in _WRITERS:
                _WRITERS[node.op](builder, graph, node)
        outputs = _write_outputs(builder, graph, output_names)
    _prune(builder, outputs)
    return _finish(builder, graph, inputs, outputs)


def _write_inputs(builder: Builder, graph: fx.GraphModule, names: Sequence[str] | None) -> list[str]:
    nodes = [n for n in graph.graph.nodes if n.op == "placeholder" and isinstance(n.meta.get("val"), Tensor)]
    names = [str(node.target) for node in nodes] if names is None else list(names)
    if len(names) != len(nodes):
        raise ExportError(f"input_names has {len(names)} names for {len(nodes)} inputs {[n.name for n in nodes]}")
    for node, name in zip(nodes, names, strict=True):
        builder.values[node] = builder.unique(name)
        builder.add_symbols(name, node.meta["val"])
    for node in nodes:
        builder.describe(str(builder.values[node]), node.meta["val"])
    return names


def _write_attribute(builder: Builder, graph: fx.GraphModule, node: fx.Node) -> None:
    value: Any = graph
    for atom in str(node.target).split("."):
        value = getattr(value, atom)
    if isinstance(value, Tensor):
        builder.constants[node] = value.detach().contiguous()


def _write_function(builder: Builder, graph: fx.GraphModule, node: fx.Node) -> None:
    value = node.meta.get("val")
    if not isinstance(value, Tensor | tuple | list):
        return  # sizes are read off the inputs where they are needed; assertions have no value
    if fold(builder, node):
        return
    write = FUNCTIONS.get(operator_name(node))
    if write is None:
        raise unsupported(
            node,
            "there is no ONNX form for this operator yet",
            "rewrite that line with supported operators, or add a row to bitsmith/export/onnx",
        )
    builder.scope = node.name
    first = len(builder.nodes)
    result = write(Call(builder, node))
    if isinstance(result, tuple):
        named = [builder.finish_node(first, r, f"{node.name}_{i}", rename_node=False) for i, r in enumerate(result)]
        builder.values[node] = tuple(named)
        for name, part in zip(named, value, strict=False):
            _describe_new(builder, first, name, part)
    else:
        builder.values[node] = builder.finish_node(first, result, node.name)
        _describe_new(builder, first, str(builder.values[node]), value)


def fold(builder: Builder, node: fx.Node) -> bool:
    """Evaluate what depends on constants alone; whether it did."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded in target.tags:
        return False
    value = node.meta["val"]
    if not isinstance(value, Tensor) or any(isinstance(dim, torch.SymInt) for dim in value.shape):
        return False
    if (fill := ops_create.fill_value(node)) is not None:
        builder.constants[node] = torch.full(tuple(value.shape), fill, dtype=value.dtype)
        return True
    if not all(n in builder.constants for n in node.all_input_nodes):
        return False
    arguments = torch.fx.map_arg((node.args, node.kwargs), lambda n: builder.constants[n])
    # Contiguous, because capture drops the clones that make a later view possible.
    builder.constants[node] = target(*arguments[0], **arguments[1]).detach().contiguous()
    return True


def _write_module(builder: Builder, graph: fx.GraphModule, node: fx.Node) -> None:
    module = graph.get_submodule(str(node.target))
    first = len(builder.nodes)
    if isinstance(module, Quantizer):
        builder.scope = node.name
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if module.grid is None and not module.spec.dynamic:
            module.require_grid()
        result = emit_activation(builder, node, module, source)
    else:
        builder.scope = str(node.target)
        layer = module.layer if isinstance(module, QuantLayer) else module
        write = _layer_writer(node, layer)
        write_parameter, grid = parameter_writer(builder, node, module), partial(parameter_grid, module)
        call = LayerCall(builder, node, layer, write_parameter, grid)
        result = write_on_codes(call, module, write) if node in builder.on_codes else write(call)
        result = builder.finish_node(first, result, str(node.target))
    builder.values[node] = result
    _describe_new(builder, first, result, node.meta["val"])


def _layer_writer(node: fx.Node, layer: nn.Module) -> Callable[[LayerCall], str]:
    for base in type(layer).__mro__:
        if base in LAYERS:
            return LAYERS[base]
    raise unsupported(
        node, f"there is no ONNX form for {type(layer).__name__} yet", "leave it out of the quantized model"
    )


def _describe_new(builder: Builder, first: int, name: str, value: Any) -> None:
    """Record the shape of a value that was just written (an alias keeps what is known about its source)."""
    if isinstance(value, Tensor) and any(name in node.output for node in builder.nodes[first:]):
        builder.describe(name, value)


_WRITERS: dict[str, Callable[[Builder, fx.GraphModule, fx.Node], None]] = {
    "get_attr": _write_attribute,
    "call_function": _write_function,
    "call_module": _write_module,
}


def _write_outputs(builder: Builder, graph: fx.GraphModule, names: Sequence[str] | None) -> list[str]:
    """The outputs' names; one that is an input, a constant or another output too needs an Identity."""
    output = next(node for node in graph.graph.nodes if node.op == "output")
    nodes = [leaf for leaf in tree_leaves(output.args[0]) if isinstance(leaf, fx.Node)]
    nodes = [node for node in nodes if isinstance(node.meta.get("val"), Tensor) or node.op == "get_attr"]
    if names is not None and len(names) != len(nodes):
        raise ExportError(f"output_names has {len(names)} names for {len(nodes)} outputs {[n.name for n in nodes]}")
    made = {name for node in builder.nodes for name in node.output}
    results: list[str] = []
    for i, node in enumerate(nodes):
        source = builder.value(node)
        name = source
        if source not in made or source in results:
            builder.scope = node.name
            (name,) = builder.emit("Identity", [source], name=f"output_{i}" if names is None else None)
        if names is not None:
            name = _rename(builder, name, names[i])
        builder.describe(name, node.meta["val"])
        results.append(name)
    return results


def _rename(builder: Builder, old: str, new: str) -> str:
    if old == new:
        return old
    if new in builder.taken:
        raise ExportError(f"output_names: {new!r} is the name of another tensor in the file; choose another")
    builder.taken.add(new)
    for node in builder.nodes:
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                if name == old:
                    names[i] = new
    builder.infos.pop(old, None)
    for key, value in builder.values.items():
        if value == old:
            builder.values[key] = new
    return new


def _prune(builder: Builder, outputs: list[str]) -> None:
    """Drop nodes and constants that no output depends on."""
    needed, kept = set(outputs), []
    for node in reversed(builder.nodes):
        if needed.intersection(node.output):
            needed.update(name for name in node.input if name)
            kept.append(node)
    builder.nodes = kept[::-1]
    builder.initializers = {name: t for name, t in builder.initializers.items() if name in needed}


def _finish(builder: Builder, graph: fx.GraphModule, inputs: list[str], outputs: list[str]) -> onnx.ModelProto:
    opset = [helper.make_opsetid("", builder.opset)]
    others = sorted({node.domain for node in builder.nodes if node.domain})
    made = {name for node in builder.nodes for name in node.output} - set(outputs)
    proto = helper.make_graph(
        builder.nodes,
        graph.__class__.__name__,
        [builder.infos[name] for name in inputs],
        [builder.infos[name] for name in outputs],
        value_info=[info for name, info in builder.infos.items() if name in made],
    )
    model = helper.make_model(
        proto,
        opset_imports=[*opset, *(helper.make_opsetid(domain, 1) for domain in others)],
        ir_version=helper.find_min_ir_version_for(opset),
        producer_name="bitsmith",
    )
    _infer_and_check(model, builder)
    model.graph.initializer.extend(builder.initializers.values())
    return model


def _infer_and_check(model: onnx.ModelProto, builder: Builder) -> None:
    """Complete the shapes and run onnx's checker on a copy in which large weights are inputs.

    Neither reads their values, and a model of more than 2 GB cannot be handed to them whole.
    """
    light = onnx.ModelProto()
    light.CopyFrom(model)
    for name, tensor in builder.initializers.items():
        if len(tensor.raw_data) <= _LARGE_TENSOR:
            light.graph.initializer.append(tensor)
        else:
            light.graph.input.append(helper.make_tensor_value_info(name, tensor.data_type, list(tensor.dims)))
    try:
        onnx.checker.check_model(light, full_check=False)
        inferred = shape_inference.infer_shapes(light, check_type=True, strict_mode=True, data_prop=True)
    except (onnx.checker.ValidationError, shape_inference.InferenceError) as error:
        raise ExportError(f"ONNX export wrote a model that onnx refuses: {error}") from error
    known = {info.name for info in model.graph.value_info}
    made = {name for node in model.graph.node for name in node.output} - {o.name for o in model.graph.output}
    model.graph.value_info.extend(i for i in inferred.graph.value_info if i.name in made and i.name not in known)
