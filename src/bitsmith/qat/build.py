"""From a placed LayerGraph to the graph that trains: the same values, nothing computed twice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from ..calibrate.auto_range import weight_axis
from ..capture import copy_graph
from ..capture.normalize import set_module
from ..capture.ops import module_of, op_of, quantizer_of
from ..grid import IntFormat, Quantizer, TensorSpec
from ..place.layers import QuantLayer
from ..place.place import ScaleGroup
from ..prepare.fold_batch_norm import Unfolded
from ..targets import Target
from .layers import FreezableNorm, TrainedLayer
from .quantizers import TrainingQuantizer, make_quantizer
from .randomness import Drop

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_FEW_BITS = 8  # below, ranges are learned


class Kinds(NamedTuple):
    """Which TrainingQuantizers weights and activations get.

    ``auto``: learned below 8 bits. Where a kind has no meaning its nearest relative is taken: ``lsq`` for weights and
    symmetric grids instead of ``lsq+`` and ``pact``, ``lsq+`` for affine grids instead of ``pact``.
    """

    weights: str = "auto"
    activations: str = "auto"

    def of(self, spec: TensorSpec, *, of_weight: bool, non_negative: bool, shared: bool = False) -> str:
        """The kind for one tensor; tensors that share a scale learn it, since each sees only its own range."""
        given = self.weights if of_weight else self.activations
        affine = not (of_weight or spec.symmetric or non_negative)
        if given == "auto":
            few = isinstance(spec.format, IntFormat) and spec.format.bits < _FEW_BITS
            given = "lsq+" if few else "moving-average"
        if shared:
            given = "lsq"
        if given == "pact":
            return "lsq+" if affine else "lsq" if of_weight else "pact"
        return "lsq" if given == "lsq+" and not affine else given


def training_graph(
    placed: fx.GraphModule,
    groups: list[ScaleGroup],
    unfolded: Unfolded,
    kinds: Kinds,
    target: Target,
    drops: Sequence[Drop] = (),
) -> fx.GraphModule:
    """A copy of ``placed`` whose Quantizers and layers train.

    Batch norms in ``unfolded`` are apart from their layers again, and ``drops`` act again. What is idempotent is left
    out: the Quantizers that stand again behind what only moves elements, and ReLUs in front of a grid that begins at 0.
    """
    shared = {id(member): group for group in groups for member in group.members}
    paths = {str(n.target): q for n in placed.graph.nodes if (q := quantizer_of(n)) is not None}
    sources = {
        str(n.target): quantizer_of(n.args[0]) for n in placed.graph.nodes if isinstance(module_of(n), QuantLayer)
    }
    graph = copy_graph(placed)
    _insert_drops(graph, drops)
    _drop_repeats(graph)
    made: dict[int, TrainingQuantizer] = {}
    for path, old in paths.items():
        if id(old) not in made:
            group = shared.get(id(old))
            one_grid = group.members if group is not None and group.kind == "cat" else [old]
            made.update(dict.fromkeys(map(id, one_grid), _activation_quantizer(one_grid, group is not None, kinds)))
        set_module(graph, path, made[id(old)])
    _drop_relus(graph)
    for group in groups:
        _tie([made[id(member)] for member in group.members])
    for node in graph.graph.nodes:
        if isinstance(module := module_of(node), QuantLayer):
            layer = _layer(module, unfolded.get(str(node.target)), kinds, target)
            if (source := sources[str(node.target)]) is not None:
                layer.inputs = (made[id(source)],)
            set_module(graph, str(node.target), layer)
        elif isinstance(module, _NORMS) and module.running_mean is not None:
            set_module(graph, str(node.target), FreezableNorm(module))
    graph.graph.set_codegen(fx.graph.CodeGen())  # takes and gives flat lists
    graph.delete_all_unused_submodules()
    graph.recompile()
    return graph


def _insert_drops(graph: fx.GraphModule, drops: Sequence[Drop]) -> None:
    nodes = {node.name: node for node in graph.graph.nodes}
    for drop in drops:
        set_module(graph, drop.path, drop.module)
        source, users = nodes[drop.source.name], [nodes[user.name] for user in drop.users]
        calls: dict[fx.Node, fx.Node] = {}
        for user in users:
            for value in user.all_input_nodes:
                if value is not source and (quantizer_of(value) is None or value.args[0] is not source):
                    continue
                if value not in calls:
                    with graph.graph.inserting_after(value):
                        calls[value] = graph.graph.create_node("call_module", drop.path, (value,))
                    calls[value].meta = dict(value.meta)
                user.replace_input_with(value, calls[value])


def _drop_repeats(graph: fx.GraphModule) -> None:
    for node in list(graph.graph.nodes):
        if quantizer_of(node) is not None and not node.meta.get("observe"):
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)


def _drop_relus(graph: fx.GraphModule) -> None:
    """Without a ReLU in front of a quantizer whose grid begins at 0: that clips as well, forward and backward."""
    for node in list(graph.graph.nodes):
        quantizer, relu = quantizer_of(node), node.args[0] if node.args else None
        if not isinstance(quantizer, TrainingQuantizer) or not isinstance(relu, fx.Node) or op_of(relu).name != "relu":
            continue
        if len(relu.users) == 1 and quantizer.subsumes_relu:
            relu.replace_all_uses_with(relu.args[0])  # type: ignore[arg-type]
            graph.graph.erase_node(relu)


def _activation_quantizer(one_grid: list[Quantizer], shared: bool, kinds: Kinds) -> TrainingQuantizer:
    """The quantizer of tensors on one grid, which is signed as soon as one of them is."""
    old = next((q for q in one_grid if not q.non_negative), one_grid[0])
    kind = kinds.of(old.spec, of_weight=False, non_negative=old.non_negative, shared=shared)
    return make_quantizer(kind, old.spec, axis=None, non_negative=old.non_negative, of_weight=False)


def _tie(members: list[TrainingQuantizer]) -> None:
    """Let all members of a group learn one scale: they hold the same Parameter."""
    first = dict(members[0].named_parameters())
    for member in members[1:]:
        for name in dict(member.named_parameters()):
            if name in first and name != "offset":
                setattr(member, name, first[name])


def _layer(old: QuantLayer, unfolded: tuple[nn.Module, nn.Module] | None, kinds: Kinds, target: Target) -> TrainedLayer:
    layer, norm = unfolded or (old.layer, None)
    bias = getattr(layer, "bias", None)
    if bias is not None and not bias.requires_grad and not bool(bias.any()):  # placement gave the layer one
        bias.requires_grad_(layer.weight.requires_grad)
    quantizer = None
    if old.weight_quantizer is not None:
        spec = old.weight_quantizer.spec
        kind = kinds.of(spec, of_weight=True, non_negative=False)
        axis = None if spec.granularity == "tensor" else weight_axis(old, spec)
        quantizer = make_quantizer(kind, spec, axis=axis, non_negative=False, of_weight=True)
    bits = None if old.bias_quantizer is None else old.bias_quantizer.spec.format.bits
    return TrainedLayer(layer, norm, quantizer, bias_bits=bits, bias_unit=target.bias_unit)


def layers_of(graph: Any) -> dict[str, TrainedLayer]:
    """The layers that train on grids, by path; a layer called twice is there once for each call."""
    return {name: m for name, m in graph.named_modules() if isinstance(m, TrainedLayer)}


def initialize(training: fx.GraphModule, calibrated: fx.GraphModule) -> None:
    """Start every TrainingQuantizer from the grid that a placed graph has in its place, if any."""
    with torch.no_grad():
        for name, module in calibrated.named_modules(remove_duplicate=False):
            path, part = name, module
            if isinstance(module, QuantLayer) and module.weight_quantizer is not None:
                path, part = f"{name}.weight_quantizer", module.weight_quantizer
            elif not isinstance(module, Quantizer) or name.endswith((".weight_quantizer", ".bias_quantizer")):
                continue
            trained = training.get_submodule(path)
            assert isinstance(trained, TrainingQuantizer)
            if part.grid is not None:
                trained.initialize(part.grid)
