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
    """Which TrainingQuantizers weights and activations get; ``auto``: learned below 8 bits."""

    weights: str = "auto"
    activations: str = "auto"

    def of(self, spec: TensorSpec, *, of_weight: bool, non_negative: bool, shared: bool = False) -> str:
        """The kind for one tensor; tensors that share a scale learn it, since each sees only its own range."""
        given = self.weights if of_weight else self.activations
        if given == "auto":
            few = isinstance(spec.format, IntFormat) and spec.format.bits < _FEW_BITS
            given = "lsq" if few else "moving-average"
            if few and not (of_weight or spec.symmetric or non_negative):
                given = "lsq+"
        return "lsq" if shared and given == "moving-average" else given


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
    joined = {id(member): group for group in groups for member in group.members}
    paths = {str(n.target): q for n in placed.graph.nodes if (q := quantizer_of(n)) is not None}
    sources = {
        str(n.target): quantizer_of(n.args[0]) for n in placed.graph.nodes if isinstance(module_of(n), QuantLayer)
    }
    graph = copy_graph(placed)
    _insert_drops(graph, drops)
    _drop_repeats(graph)
    _drop_relus(graph)
    made: dict[int, TrainingQuantizer] = {}
    for path, old in paths.items():
        if id(old) not in made:
            made[id(old)] = _activation_quantizer(old, joined.get(id(old)), kinds)
        set_module(graph, path, made[id(old)])
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


def begins_at_zero(quantizer: Quantizer) -> bool:
    """Whether a Quantizer's grid has no code below 0 and none above it that stands for 0."""
    spec = quantizer.spec
    return quantizer.non_negative and isinstance(spec.format, IntFormat) and (
        not spec.format.signed or spec.auto_unsigned
    )  # fmt: skip


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
    for node in list(graph.graph.nodes):
        quantizer, relu = quantizer_of(node), node.args[0] if node.args else None
        if quantizer is None or not isinstance(relu, fx.Node) or op_of(relu).name != "relu":
            continue
        if len(relu.users) == 1 and begins_at_zero(quantizer):
            relu.replace_all_uses_with(relu.args[0])  # type: ignore[arg-type]
            graph.graph.erase_node(relu)


def _activation_quantizer(old: Quantizer, group: ScaleGroup | None, kinds: Kinds) -> TrainingQuantizer:
    kind = kinds.of(old.spec, of_weight=False, non_negative=old.non_negative, shared=group is not None)
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
