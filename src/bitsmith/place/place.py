"""Put Quantizers and QuantLayers into a LayerGraph as a recipe, its placement and a target ask."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from operator import is_not
from typing import Literal, NoReturn

import torch
from torch import fx, nn

from ..capture.marks import Handwritten, Marks, take_marks
from ..capture.ops import layer_of, op_of, quantizer_of
from ..errors import DataError, PlacementError, UnsupportedOperatorError
from ..grid import FloatFormat, Quantizer, TensorSpec
from ..prepare.activation_before_pool import activation_before_pool
from ..recipe import Override, Recipe
from ..targets import Target
from .chip_limits import plan_chip, weights_note
from .chip_memory import ChipPlan
from .layers import QuantLayer
from .macs import macs_of
from .plan import (
    POLICIES,
    Plan,
    Planner,
    Policy,
    carrying,
    fused_end,
    is_non_negative,
    layer_name,
    operands,
    origin,
    plan_marks,
)

Position = Literal["first", "middle", "last", "only"]


@dataclass
class ScaleGroup:
    """Quantizers that share a scale (``add``) or their whole grid (``cat``)."""

    kind: str
    members: list[Quantizer]


@dataclass
class Placed:
    """What ``place`` did: the nodes of quantized layers, the groups of shared scales, by the name of each mark that
    the model's author left the Quantizers that stand for it, and the layers and memory of a chip."""

    layers: list[fx.Node] = field(default_factory=list)
    groups: list[ScaleGroup] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    marks: dict[str, list[Quantizer]] = field(default_factory=dict)
    chip: ChipPlan | None = None

    def __reduce__(self) -> NoReturn:
        raise DataError(
            "a model that is being calibrated or trained cannot be pickled whole, since pickles forget what a graph's "
            "nodes are: torch.save(model.state_dict(), ...), prepare the float model again, and load_state_dict"
        )


def moved(placed: Placed, source: fx.GraphModule, copy: fx.GraphModule) -> Placed:
    """What ``place`` did to ``source``, told of a copy of it."""
    nodes = {node.name: node for node in copy.graph.nodes}
    paths = {id(module): name for name, module in source.named_modules()}

    def twins(quantizers: list[Quantizer]) -> list[Quantizer]:
        return [copy.get_submodule(paths[id(quantizer)]) for quantizer in quantizers]  # type: ignore[misc]

    return replace(
        placed,
        layers=[nodes[node.name] for node in placed.layers],
        groups=[replace(group, members=twins(group.members)) for group in placed.groups],
        notes=[*placed.notes],
        marks={name: twins([q for q in quantizers if id(q) in paths]) for name, quantizers in placed.marks.items()},
    )


def place(graph: fx.GraphModule, recipe: Recipe, target: Target) -> Placed:
    """Insert Quantizers and wrap layers, in place.

    Raises UnsupportedOperatorError for a compute operator that cannot be quantized and is not excluded, and
    PlacementError where nothing would be quantized or an override matches nothing.
    """
    target.check(recipe)
    if target.limits is not None:
        activation_before_pool(graph)
    compute = [node for node in graph.graph.nodes if op_of(node).role == "compute"]
    overrides = _match_overrides(compute, recipe)
    excluded = {node for node, matched in overrides.items() if any(o.exclude for o in matched)}
    hand, marks = graph.meta.get("handwritten", Handwritten()), take_marks(graph)
    if hand.alone:
        plan = plan_marks(graph, hand, marks)
    else:
        plan = Planner(graph, _policy(recipe, target), target, excluded).plan()
        plan.values.update(dict.fromkeys(map(origin, marks.values)))
        plan.layers += carrying(graph, hand, {"embedding"})  # without a spec they are left in float
    overrides = {node: [*matched, *_carried(node, hand, marks)] for node, matched in overrides.items()}
    _check_plan(graph, plan, compute, recipe)
    specs = _activation_specs(plan, overrides, recipe, hand, marks)
    if target.same_signs:
        _sign_products(plan, specs)
    values = _insert_values(graph, plan, specs) if recipe.activations else {}
    if recipe.activations:
        _insert_edges(graph, plan, specs)
        _repeat_after_moves(graph)
    for node in plan.layers:
        if node.op == "call_module":
            _wrap_layer(graph, node, overrides.get(node) or _carried(node, hand, marks), recipe, target)
    graph.recompile()
    placed = Placed(layers=plan.layers, groups=_merge_groups(plan, values), marks=_marked(marks, values))
    if target.limits is not None:
        placed.chip = plan_chip(graph, target)
        placed.notes.append(weights_note(placed.chip, target.limits))
    floats = sorted({str(n.target) for n in graph.graph.nodes if op_of(n).name == "recurrent"})
    if floats:
        placed.notes.append(f"runs in float (no static integer form): {', '.join(floats)}")
    return placed


def _policy(recipe: Recipe, target: Target) -> Policy:
    """The placement's rules; operands share a scale where the target's kernels do not rescale, and small floats are
    quantized only where they are multiplied.

    An add of floats aligns exponents anyway, so nothing is gained by quantizing its operands.
    """
    policy = POLICIES[recipe.placement]
    if target.keeps_scale or target.all_ranges:  # a device without float units
        policy = replace(policy, everything=True)
    if not target.rescales and not policy.own_inputs:
        policy = replace(policy, shared=True)
    if recipe.activations is not None and isinstance(recipe.activations.format, FloatFormat):
        return replace(policy, rescaling=False, shared=False, float_outputs=True)
    return policy


def _match_overrides(compute: list[fx.Node], recipe: Recipe) -> dict[fx.Node, list[Override]]:
    matched: dict[fx.Node, list[Override]] = {}
    used: set[int] = set()
    last = len(compute) - 1
    for index, node in enumerate(compute):
        position: Position = "middle"
        if index in (0, last):
            position = "only" if last == 0 else "first" if index == 0 else "last"
        kind = type(layer_of(node)).__name__ if node.op == "call_module" else op_of(node).name
        hits = [i for i, o in enumerate(recipe.overrides) if o.applies(layer_name(node), kind, position)]
        used.update(hits)
        matched[node] = [recipe.overrides[i] for i in hits]
    for index, override in enumerate(recipe.overrides):
        if index not in used:
            names = ", ".join(layer_name(node) for node in compute[:8])
            raise PlacementError(
                f"override {override.match!r} matches no layer; layers are {names}{' ...' if len(compute) > 8 else ''}"
            )
    return matched


def _check_plan(graph: fx.GraphModule, plan: Plan, compute: list[fx.Node], recipe: Recipe) -> None:
    if plan.unplaceable:
        names = ", ".join(f"{node.name} ({op_of(node).name})" for node in plan.unplaceable)
        raise UnsupportedOperatorError(
            f"placement {recipe.placement!r} cannot quantize {names}: the weights are computed at run time. Make them "
            "parameters, or leave the layers in float with an override {match: NAME, exclude: true}"
        )
    if not plan.layers:
        kinds = sorted({op_of(n).name for n in graph.graph.nodes if n.op.startswith("call")})
        why = "every compute layer is excluded" if compute else f"it holds only {', '.join(kinds) or 'nothing'}"
        raise PlacementError(
            f"nothing would be quantized: the model has no convolution, linear or matmul to place ({why}); zero of "
            "its multiply-accumulates would run in integers"
        )
    total = sum(map(macs_of, compute))
    covered = sum(map(macs_of, plan.layers))
    if total and covered / total < recipe.min_coverage:
        left = ", ".join(layer_name(n) for n in compute if n not in plan.layers)
        raise PlacementError(
            f"only {covered / total:.1%} of the multiply-accumulates would be quantized, less than min_coverage "
            f"{recipe.min_coverage:.1%}; in float stay {left}"
        )


def _carried(node: fx.Node, hand: Handwritten, marks: Marks) -> list[Override]:
    """What the layer's author wrote about it, as an override."""
    weights, bias = hand.of_layer(layer_name(node)) or (None, None)
    inputs = [hand.values[name] for (_, consumer), name in marks.edges.items() if consumer is node]
    activations = next((spec for spec in inputs if spec is not None), None)
    if not (weights or bias or activations):
        return []
    return [Override(match=layer_name(node), weights=weights, bias=bias, activations=activations)]


def _marked(marks: Marks, values: dict[fx.Node, Quantizer]) -> dict[str, list[Quantizer]]:
    """The Quantizers that stand for each mark."""
    found: dict[str, list[Quantizer]] = {}
    for node, name in marks.values.items():
        found.setdefault(name, []).extend([values[node]] if node in values else [])
    for (_, consumer), name in marks.edges.items():
        quantizer = quantizer_of(operands(consumer)[0])
        found.setdefault(name, []).extend([quantizer] if quantizer is not None else [])
    return found


def _activation_specs(
    plan: Plan, overrides: dict[fx.Node, list[Override]], recipe: Recipe, hand: Handwritten, marks: Marks
) -> dict[tuple[fx.Node, fx.Node | None], TensorSpec]:
    """The spec of each quantized value or edge; a layer's override holds for what it reads."""
    assert recipe.activations or recipe.weights
    specs: dict[tuple[fx.Node, fx.Node | None], TensorSpec] = {}
    if recipe.activations is None:
        return specs
    specs.update({(node, None): recipe.activations for node in plan.values})
    specs.update(dict.fromkeys(plan.edges, recipe.activations))
    for node, name in marks.values.items():
        if (spec := hand.values[name]) is not None:
            specs[node if hand.alone else origin(node), None] = spec
    for node in plan.layers:
        for override in overrides.get(node, ()):
            if override.activations is None:
                continue
            for source in operands(node):
                key = (source, node) if (source, node) in specs else (origin(source), None)
                specs[key] = override.activations
    return specs


def _sign_products(plan: Plan, specs: dict[tuple[fx.Node, fx.Node | None], TensorSpec]) -> None:
    """Signed codes for what a product of two activations reads and gives, also where nothing is negative."""
    for node in plan.layers:
        if op_of(node).name == "matmul":
            for value in (*map(origin, operands(node)), fused_end(node)):
                if (value, None) in specs:
                    specs[value, None] = specs[value, None].model_copy(update={"auto_unsigned": False})


def _add_quantizer(graph: fx.GraphModule, name: str, quantizer: Quantizer) -> str:
    if not hasattr(graph, "quantizers"):
        graph.add_module("quantizers", nn.Module())
    path = f"quantizers.{name}_" if hasattr(nn.Module, name) else f"quantizers.{name}"  # "to", "float" ...
    graph.add_submodule(path, quantizer)
    return path


def _call(graph: fx.GraphModule, path: str, source: fx.Node, *, observe: bool) -> fx.Node:
    call = graph.graph.create_node("call_module", path, (source,), name=f"{source.name}_quantized")
    call.meta = {"val": source.meta.get("val"), "observe": observe}
    return call


def _insert_values(
    graph: fx.GraphModule, plan: Plan, specs: dict[tuple[fx.Node, fx.Node | None], TensorSpec]
) -> dict[fx.Node, Quantizer]:
    memo: dict[fx.Node, bool] = {}
    signs = {node: is_non_negative(node, memo) for node in plan.values}
    created = {}
    for node in plan.values:
        quantizer = Quantizer(specs[node, None], non_negative=signs[node])
        path = _add_quantizer(graph, node.name, quantizer)
        after = node
        if node.op == "placeholder":  # all placeholders stay in front
            after = [n for n in graph.graph.nodes if n.op == "placeholder"][-1]
        with graph.graph.inserting_after(after):
            call = _call(graph, path, node, observe=True)
        node.replace_all_uses_with(call, delete_user_cb=partial(is_not, call))
        created[node] = quantizer
    return created


def _insert_edges(graph: fx.GraphModule, plan: Plan, specs: dict[tuple[fx.Node, fx.Node | None], TensorSpec]) -> None:
    for source, consumer in plan.edges:
        quantizer = Quantizer(specs[source, consumer], non_negative=is_non_negative(source))
        position = operands(consumer).index(source)
        path = _add_quantizer(graph, f"{consumer.name}_input{position or ''}", quantizer)
        with graph.graph.inserting_before(consumer):
            call = _call(graph, path, source, observe=True)
        consumer.replace_input_with(source, call)


def _repeat_after_moves(graph: fx.GraphModule) -> None:
    """What only moves elements keeps its codes: the same Quantizer stands behind it again, so that runtimes see it."""
    grids: dict[fx.Node, str] = {}
    for node in list(graph.graph.nodes):
        if quantizer_of(node) is not None:
            grids[node] = str(node.target)
        elif op_of(node).role == "move" and operands(node)[0] in grids:
            path = grids[operands(node)[0]]
            if not isinstance(node.meta.get("val"), torch.Tensor):
                grids[node] = path  # a split: its parts follow
            elif not any(quantizer_of(user) is not None for user in node.users):
                with graph.graph.inserting_after(node):
                    call = _call(graph, path, node, observe=False)
                node.replace_all_uses_with(call, delete_user_cb=partial(is_not, call))
                grids[call] = path


def _wrap_layer(
    graph: fx.GraphModule, node: fx.Node, overrides: list[Override], recipe: Recipe, target: Target
) -> None:  # fmt: skip
    """A QuantLayer around the layer; each call of a shared layer gets its own, around the same weights."""
    weights, bias = recipe.weights, recipe.bias
    for override in overrides:
        weights, bias = override.weights or weights, override.bias or bias
    if weights is not None and op_of(node).name in target.tensor_weights:
        weights = weights.model_copy(update={"granularity": "tensor", "group_size": None})
    module = graph.get_submodule(str(node.target))
    layer = module.layer if isinstance(module, QuantLayer) else module
    changes_bias = any(step.changes_bias for step in recipe.steps)
    if changes_bias and op_of(node).role == "compute" and getattr(layer, "bias", None) is None:
        layer.bias = nn.Parameter(torch.zeros(_channels(layer)), requires_grad=False)
    weight_quantizer = Quantizer(weights) if weights else None
    quantized_input = quantizer_of(node.args[0]) is not None and weights is not None
    has_bias = getattr(layer, "bias", None) is not None
    bias_quantizer = Quantizer(bias) if bias and quantized_input and has_bias else None
    wrapped = QuantLayer(layer, weight_quantizer, bias_quantizer)
    if isinstance(module, QuantLayer):
        calls = [n for n in graph.graph.nodes if n.op == "call_module" and str(n.target).startswith(str(node.target))]
        name = f"{node.target}__{calls.index(node)}"
        graph.add_submodule(name, wrapped)
        node.target = name
    else:
        parent, _, leaf = str(node.target).rpartition(".")
        setattr(graph.get_submodule(parent), leaf, wrapped)


def _channels(layer: nn.Module) -> int:
    channels = getattr(layer, "out_channels", None) or layer.out_features
    assert isinstance(channels, int)
    return channels


def _merge_groups(plan: Plan, values: dict[fx.Node, Quantizer]) -> list[ScaleGroup]:
    """Union of the groups that have a member in common; a concat among them makes the whole group share its grid."""
    merged: list[tuple[str, dict[fx.Node, None]]] = []
    for kind, nodes in plan.groups:
        members = dict.fromkeys(node for node in nodes if node in values)
        for group in [g for g in merged if g[1].keys() & members.keys()]:
            merged.remove(group)
            kind = "cat" if "cat" in (kind, group[0]) else "add"
            members = {**group[1], **members}
        if len(members) > 1:
            merged.append((kind, members))
    return [ScaleGroup(kind, [values[node] for node in members]) for kind, members in merged]
