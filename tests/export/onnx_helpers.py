"""Small models on grids, placed by hand, and ways to look at what a runtime makes of their files."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from torch import Tensor, fx, nn

from bitsmith.capture import capture
from bitsmith.capture.capture import evaluation_mode
from bitsmith.grid import Grid, IntFormat, Quantizer, TensorSpec
from bitsmith.place.layers import QuantLayer

WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear, nn.Embedding)
MOVES = ("max_pool", "reshape", "view", "flatten", "permute", "transpose", "slice", "split", "chunk",
         "unsqueeze",
         "squeeze", "select", "getitem", "upsample_nearest", "pad")  # fmt: skip
FUSED = ("relu", "hardtanh", "relu6", "clamp")


def float_graph(model: nn.Module, *inputs: Tensor) -> fx.GraphModule:
    return capture(model.eval(), inputs)


def run_onnx(model: onnx.ModelProto | Path, *inputs: Tensor) -> list[Tensor]:
    """The file's outputs from onnxruntime."""
    session = ort.InferenceSession(
        str(model) if isinstance(model, Path) else model.SerializeToString(), _options(),
        providers=["CPUExecutionProvider"],
    )  # fmt: skip
    feed = {i.name: x.numpy() for i, x in zip(session.get_inputs(), inputs, strict=True)}
    return [torch.from_numpy(np.asarray(y)) for y in session.run(None, feed)]


def _options() -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return options


def optimized_ops(model: onnx.ModelProto, folder: Path) -> list[str]:
    """The operators that onnxruntime runs after its own rewriting."""
    options = _options()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(folder / "optimized.onnx", load_external_data=False).graph.node]


def symmetric_grid(tensor: Tensor, bits: int = 8, axis: int | None = 0, group: int | None = None) -> Grid:
    """A signed grid without offset that covers a weight."""
    fmt = IntFormat(bits, narrow=bits > 1)
    if group is not None:
        assert axis is not None
        top = tensor.unflatten(axis, (-1, group)).abs().amax(axis + 1)
    elif axis is None:
        top = tensor.abs().amax()
    else:
        top = tensor.abs().amax([d for d in range(tensor.ndim) if d != axis])
    return Grid(fmt, (top / fmt.qmax).clamp_min(1e-8), None, axis, group)


def range_grid(low: float, high: float, bits: int = 8, signed: bool = False) -> Grid:
    """An affine grid that covers low .. high and 0; unsigned without offset where nothing is negative."""
    low, high = min(low, 0.0), max(high, 1e-6)
    fmt = IntFormat(bits, signed=signed)
    scale = torch.tensor((high - low) / (fmt.qmax - fmt.qmin), dtype=torch.float32)
    zero = round(fmt.qmin - low / float(scale))
    return Grid(fmt, scale, torch.tensor(max(fmt.qmin, min(fmt.qmax, zero)), dtype=torch.int32))


def quantizer(grid: Grid) -> Quantizer:
    made = Quantizer(TensorSpec(format=grid.format, group_size=grid.group_size,
                                granularity="group" if grid.group_size else "tensor"))  # fmt: skip
    made.set_grid(grid)
    return made


class _Ranges(fx.Interpreter):
    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.ranges: dict[str, tuple[float, float]] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor) and value.is_floating_point():
            self.ranges[n.name] = float(value.min()), float(value.max())
        return value


def quantized_graph(
    model: nn.Module,
    *inputs: Tensor,
    weight_bits: int = 8,
    bits: int = 8,
    signed: bool = False,
    weight_axis: Callable[[nn.Module], int | None] = lambda layer: 0,
    group: int | None = None,
    float_ops: Sequence[str] = (),
) -> fx.GraphModule:
    """A captured model with a Quantizer on every edge; moves share their input's Quantizer."""
    graph = capture(model.eval(), inputs)
    recorder = _Ranges(graph)
    with torch.no_grad(), evaluation_mode(graph):
        recorder.run(*inputs)
    known: dict[fx.Node, str] = {}
    for node in list(graph.graph.nodes):
        if node.name not in recorder.ranges or node.op in ("output", "get_attr"):
            continue
        reader = next(iter(node.users), None)
        name = str(node.target)
        if len(node.users) == 1 and reader is not None and any(f"aten.{f}." in str(reader.target) for f in FUSED):
            continue
        if any(f in name for f in float_ops):
            continue
        source = next(iter(node.all_input_nodes), None)
        moves = node.op == "call_function" and (
            node.target is operator.getitem or any(f"aten.{m}" in name for m in MOVES)
        )
        if moves and source in known:
            path = known[source]
        else:
            path = f"{node.name}_quantizer"
            graph.add_submodule(path, quantizer(range_grid(*recorder.ranges[node.name], bits=bits, signed=signed)))
        with graph.graph.inserting_after(node):
            call = graph.graph.call_module(path, (node,))
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call, delete_user_cb=lambda user, call=call: user is not call)
        known[node], known[call] = path, path
    _wrap_layers(graph, weight_bits, weight_axis, group)
    graph.recompile()
    return graph


def _wrap_layers(
    graph: fx.GraphModule, bits: int, axis_of: Callable[[nn.Module], int | None], group: int | None
) -> None:
    for node in graph.graph.nodes:
        layer = graph.get_submodule(node.target) if node.op == "call_module" else None
        if not isinstance(layer, WEIGHTED):
            continue
        axis = 1 if group else axis_of(layer)
        grid = symmetric_grid(layer.weight.detach(), bits, axis, group)
        bias = None
        source = node.args[0]
        feeder = graph.get_submodule(source.target) if source.op == "call_module" else None
        if getattr(layer, "bias", None) is not None and isinstance(feeder, Quantizer) and group is None:
            scale = (feeder.require_grid().scale * grid.scale).float()
            bias = quantizer(Grid(IntFormat(32), scale, None, None if scale.ndim == 0 else 0))
        parent, _, leaf = str(node.target).rpartition(".")
        setattr(graph.get_submodule(parent), leaf, QuantLayer(layer, quantizer(grid), bias))


def simulate(graph: fx.GraphModule, *inputs: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return [y for y in torch.utils._pytree.tree_leaves(graph(*inputs)) if isinstance(y, Tensor)]


def op_types(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]
