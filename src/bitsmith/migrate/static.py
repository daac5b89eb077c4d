"""A converted model as a graph, with the grids that it brings."""

from __future__ import annotations

import inspect
from functools import partial
from operator import is_not

import torch
from torch import fx, nn

from ..calibrate.bias import set_bias_grid
from ..calibrate.watching import WatchingQuantizer, WeightQuantizer
from ..capture import capture
from ..capture.inputs import Arguments
from ..capture.ops import module_of, op_of
from ..eager import keep_to_marks
from ..eager.modules import stored_grid
from ..errors import MigrationError
from ..flow import channels_last, finish
from ..grid import IntFormat, TensorSpec
from ..model import QuantizedModel
from ..place.layers import QuantLayer
from ..place.place import Placed, place
from ..place.plan import layer_name, operands
from ..recipe import Recipe
from ..targets import Target
from .layers import converted
from .pieces import ACTIVATIONS, BARRIER, grid_of, quantize_to

MIGRATED = "as torch.ao placed it"  # the placement in the report
_KEEP = (
    "relu",
    "clamp",
    "avg_pool",
    "global_avg_pool",
    "cat",
)  # torch's kernels write to the grid of their first operand
# Functions whose range is known: their kernels write these scales and zero points.
_FIXED = {"sigmoid": (1 / 256, 0), "hardsigmoid": (1 / 256, 0), "tanh": (2 / 256, 128)}


def migrate_static(model: nn.Module, example: Arguments, target: Target) -> QuantizedModel:
    """The QuantizedModel of an eager or FX int8 model."""
    module = converted(model)
    # PyTorch's kernels add float biases; others want integers at the scale of the accumulator.
    bias = None if target.engine == "torch" else TensorSpec(format=IntFormat(32))
    weights = TensorSpec(format=IntFormat(8), granularity="channel")
    recipe = Recipe(name="torch-ao", weights=weights, activations=ACTIVATIONS, bias=bias, steps=())
    graph, placed = place_migrated(module, example, recipe, target)
    for name, quantizers in placed.marks.items():
        watcher = module.get_submodule(name)
        assert isinstance(watcher, WatchingQuantizer)
        for quantizer in quantizers:
            quantizer.set_grid(stored_grid(watcher.require_grid(), unsigned=target.unsigned_codes))
    notes = [note for node in placed.layers if (note := _set_weights(node, module))]
    q = finish(graph, recipe, target, placed, None, notes, {}, inspect.signature(model.forward))
    q.report.placement = MIGRATED
    return q


def place_migrated(
    module: nn.Module, example: Arguments, recipe: Recipe, target: Target
) -> tuple[fx.GraphModule, Placed]:  # fmt: skip
    """The graph of converted modules, with Quantizers where torch.ao's model had codes."""
    graph = capture(module, example)
    keep_to_marks(graph)
    barriers = _complete_marks(graph, module)
    placed = place(graph, recipe, target)
    for barrier in barriers:
        barrier.replace_all_uses_with(barrier.args[0])  # type: ignore[arg-type]
        graph.graph.erase_node(barrier)
    graph.recompile()
    channels_last(graph)
    return graph, placed


def _set_weights(node: fx.Node, module: nn.Module) -> str | None:
    """Give a placed layer the weight's grid that it was converted with; a note where its bias has to stay float."""
    layer, name = module_of(node), layer_name(node)
    if not isinstance(layer, QuantLayer) or layer.weight_quantizer is None:
        return None
    grid = _weight_quantizer(module, name).require_grid()
    layer.weight_quantizer.set_grid(grid)
    if layer.bias_quantizer is None or layer.bias is None:
        return None
    set_bias_grid(layer, node)
    changed = layer.weight_quantizer.require_grid()
    if changed.scale is grid.scale:
        return None
    layer.weight_quantizer.set_grid(grid)
    layer.bias_quantizer = None
    return f"{name}: its bias does not fit 32 bits at the scale of its integers, and stays float"


def _weight_quantizer(module: nn.Module, name: str) -> WeightQuantizer:
    path = name.partition("__")[0] if "__" in name else name
    for candidate in (name, path):
        try:
            found = module.get_submodule(candidate)
        except AttributeError:
            continue
        if isinstance(quantizer := getattr(found, "weight_quantizer", None), WeightQuantizer):
            return quantizer
    raise MigrationError(f"{name}: this layer was not found among the converted modules; the model renames its modules")


def _complete_marks(graph: fx.GraphModule, module: nn.Module) -> list[fx.Node]:
    """Mark what PyTorch's kernels put on a grid without being told; returns where codes became floats."""
    marks: dict[fx.Node, str] = {}
    marked = [node for node in graph.graph.nodes if node.target is torch.ops.bitsmith.mark.default]
    barriers = [node for node in marked if node.args[1] == BARRIER]
    for node in barriers:
        node.target, node.args = torch.ops.aten.alias.default, (node.args[0],)
    for node in list(graph.graph.nodes):
        if node.target is torch.ops.bitsmith.mark.default:
            marks[node] = str(node.args[1])
            continue
        op = op_of(node)
        sources = operands(node) if op.name in (*_KEEP, *_FIXED) or op.role == "move" else []
        if not sources or not all(source in marks for source in sources):
            continue
        marks[node] = marks[sources[0]]
        if op.role == "move" or any(user.target is torch.ops.bitsmith.mark.default for user in node.users):
            continue
        if op.name in _FIXED:
            marks[node] = f"torch_{op.name}.output_quantizer"
            module.add_module(f"torch_{op.name}", quantize_to(grid_of(*_FIXED[op.name])))
            graph.meta["handwritten"].values[marks[node]] = ACTIVATIONS
        with graph.graph.inserting_after(node):
            mark = graph.graph.call_function(torch.ops.bitsmith.mark.default, (node, marks[node]))
        mark.meta = dict(node.meta)
        node.replace_all_uses_with(mark, delete_user_cb=partial(is_not, mark))
        marks[mark] = marks[node]
    graph.recompile()
    return barriers
