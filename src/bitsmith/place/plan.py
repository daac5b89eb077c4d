"""Where Quantizers stand: the four placement policies as one walk over the graph with different rules."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, fx

from ..capture.marks import Handwritten, Marks
from ..capture.ops import Op, layer_of, op_of
from ..targets import Target


@dataclass(frozen=True)
class Policy:
    """The rules that tell the placements apart.

    ``rescaling``: adds, concats and pools between quantized tensors are quantized too; ``shared``: operands of an
    add or concat share their scale; ``own_inputs``: every compute layer quantizes its own inputs and nothing else
    is; ``everything``: float outputs and float activations are quantized as well, for devices without float units;
    ``float_outputs``: layers hand on floats, also where the target's integer kernels would not.
    """

    rescaling: bool = True
    shared: bool = False
    own_inputs: bool = False
    everything: bool = False
    float_outputs: bool = False


POLICIES: dict[str, Policy] = {
    "runtime": Policy(),
    "fx": Policy(shared=True),
    "layerwise": Policy(rescaling=False, own_inputs=True),
    "flexml": Policy(shared=True, everything=True),
}


@dataclass
class Plan:
    """What to insert: quantizers on values, quantizers on single edges, layers to wrap, and who shares a scale."""

    layers: list[fx.Node] = field(default_factory=list)
    values: dict[fx.Node, None] = field(default_factory=dict)
    edges: list[tuple[fx.Node, fx.Node]] = field(default_factory=list)  # (source, consumer)
    groups: list[tuple[str, list[fx.Node]]] = field(default_factory=list)  # ("add" | "cat", sources)
    unplaceable: list[fx.Node] = field(default_factory=list)


def layer_name(node: fx.Node) -> str:
    """The name that users know a compute node by: its module path, or the node's name."""
    return str(node.target) if node.op == "call_module" else node.name


def operands(node: fx.Node) -> list[fx.Node]:
    """The activations that an operator reads as numbers: not its sizes, weights or masks."""
    name = op_of(node).name
    if name == "cat":
        parts = node.args[0]
        assert isinstance(parts, list | tuple)
        return [part for part in parts if isinstance(part, fx.Node)]
    if name in ("add", "sub", "or", "xor"):
        return [argument for argument in node.args if isinstance(argument, fx.Node)]
    count = 2 if name in ("mul", "matmul") else 1
    return [argument for argument in node.args[:count] if isinstance(argument, fx.Node)]


def origin(node: fx.Node) -> fx.Node:
    """The value whose codes a moved value carries: reshapes, slices, max pools and the like are looked through."""
    while op_of(node).role == "move":
        source = operands(node)[0]
        if op_of(node).name == "getitem" and op_of(source).role != "move":
            break  # one of several outputs of something that is no mere split
        node = source
    return node


def fused_end(node: fx.Node) -> fx.Node:
    """The last of the activation functions that fuse into an operator, or the operator itself."""
    while len(node.users) == 1:
        user = next(iter(node.users))
        if op_of(user).role != "activation":
            break
        node = user
    return node


class Planner:
    """Decides where Quantizers stand in one graph, under one policy, for one target."""

    def __init__(self, graph: fx.GraphModule, policy: Policy, target: Target, excluded: set[fx.Node]) -> None:
        self.graph, self.policy, self.target, self.excluded = graph, policy, target, excluded
        self._demands: dict[fx.Node, bool] = {}

    def plan(self) -> Plan:
        """The whole plan."""
        plan = Plan()
        for node in self.graph.graph.nodes:
            op = op_of(node)
            if op.role == "compute" and node not in self.excluded:
                self._plan_compute(plan, node, op)
            elif op.role == "rescale" and self._is_quantized_rescale(node, op):
                for source in map(origin, operands(node)):
                    plan.values.setdefault(source)
                keeps = op.name in self.target.keeps_scale
                if keeps or (self.policy.shared and op.name in ("add", "cat")):
                    result = [node] if op.name == "cat" else []  # what a concat puts together keeps its codes
                    result = [fused_end(node)] if keeps else result
                    kind = "cat" if keeps else op.name
                    plan.groups.append((kind, [*map(origin, operands(node)), *result]))
        if self.policy.everything:
            self._plan_outputs(plan)
        if self.target.all_ranges:
            self._plan_floats(plan)
        return plan

    def _plan_compute(self, plan: Plan, node: fx.Node, op: Op) -> None:
        if op.name == "matmul" and not self._both_vary(node):
            return
        if op.name != "matmul" and node.op == "call_function":
            plan.unplaceable.append(node)  # its weights are computed at run time
            return
        plan.layers.append(node)
        for source in operands(node):
            if self.policy.own_inputs:
                plan.edges.append((source, node))
            else:
                plan.values.setdefault(origin(source))
        hands_on_floats = self.policy.own_inputs or self.policy.float_outputs or op.name in self.target.float_output
        if not hands_on_floats:
            plan.values.setdefault(fused_end(node))

    @staticmethod
    def _both_vary(node: fx.Node) -> bool:
        return all(source.op != "get_attr" for source in operands(node)) and len(operands(node)) == 2

    def _is_quantized_rescale(self, node: fx.Node, op: Op) -> bool:
        if not self.policy.rescaling or node in self.excluded:
            return False
        if any(origin(source).op == "get_attr" for source in operands(node)):
            return False
        return op.name in self.target.integer_operators and (self.policy.everything or self.demanded(node))

    def demanded(self, node: fx.Node) -> bool:
        """Whether something downstream wants this value as codes; what only floats read stays float."""
        if node not in self._demands:
            self._demands[node] = False
            self._demands[node] = any(self._demands_input(user, node) for user in node.users)
        return self._demands[node]

    def _demands_input(self, user: fx.Node, value: fx.Node) -> bool:
        op = op_of(user)
        if user in self.excluded or (op.role != "float" and value not in operands(user)):
            return False
        if op.role == "compute":
            return op.name != "matmul" or self._both_vary(user)
        if op.role == "rescale":
            return op.name in self.target.integer_operators and self.demanded(user)
        return op.role in ("move", "activation") and self.demanded(user)

    def _hands_on_accumulator(self, node: fx.Node) -> bool:
        """Whether an output is a layer's wide accumulator; one with a stride has to be read again, in 8 bits."""
        op, strides = op_of(node), getattr(layer_of(node), "stride", (1,))
        wide = self.target.wide_bits is not None and op.role == "compute" and op.name in self.target.float_output
        return wide and all(step == 1 for step in strides)

    def _plan_floats(self, plan: Plan) -> None:
        """What float operators read and give, for devices that take the range of every tensor from the file."""
        for node in self.graph.graph.nodes:
            op = op_of(node)
            if op.role != "float" or node.op not in ("call_function", "call_module") or op.name == "embedding":
                continue
            for value in (*map(origin, node.all_input_nodes), fused_end(node)):
                held = value.meta.get("val")
                if value.op != "get_attr" and isinstance(held, Tensor) and held.is_floating_point():
                    plan.values.setdefault(value)

    def _plan_outputs(self, plan: Plan) -> None:
        output = next(node for node in self.graph.graph.nodes if node.op == "output")
        for source in output.all_input_nodes:
            if self._hands_on_accumulator(source):
                continue
            if source.op != "get_attr" and op_of(origin(source)).name != "embedding":
                plan.values.setdefault(origin(source))


def plan_marks(graph: fx.GraphModule, hand: Handwritten, marks: Marks) -> Plan:
    """Quantizers where the model's author put them, and nowhere else.

    A ReLU or a pooling between them keeps the grid of what it reads.
    """
    for node in graph.graph.nodes:
        op = op_of(node)
        if op.name not in ("relu", "avg_pool", "global_avg_pool") or node in marks.values:
            continue
        source = _marked_origin(operands(node)[0], marks)
        if (name := marks.values.get(source)) is not None:
            marks.values[node] = name
            if op.name == "relu" and len(source.users) == 1:
                del marks.values[source]  # the clipping is that of the grid
    plan = Plan(values=dict.fromkeys(marks.values))
    plan.edges = [edge for edge in marks.edges if _marked_origin(edge[0], marks) not in plan.values]
    for node in graph.graph.nodes:
        if op_of(node).name == "matmul" and all(
            _marked_origin(source, marks) in plan.values for source in operands(node)
        ):
            plan.layers.append(node)
    plan.layers += carrying(graph, hand, {"conv", "conv_transpose", "linear", "embedding"})
    return plan


def _marked_origin(node: fx.Node, marks: Marks) -> fx.Node:
    """The marked value whose codes a moved value carries; else where it comes from."""
    while node not in marks.values and op_of(node).role == "move":
        node = operands(node)[0]
    return node


def carrying(graph: fx.GraphModule, hand: Handwritten, operators: set[str]) -> list[fx.Node]:
    """Layers that carry a spec of their own."""
    layers = [node for node in graph.graph.nodes if node.op == "call_module" and op_of(node).name in operators]
    specs = {node: hand.of_layer(str(node.target)) for node in layers}
    return [node for node, found in specs.items() if found is not None and found.weights is not None]


def is_non_negative(node: fx.Node, memo: dict[fx.Node, bool] | None = None) -> bool:
    """Whether a value can be proven to have no negative elements, from the operators that make it."""
    memo = {} if memo is None else memo
    if node not in memo:
        memo[node] = False
        op = op_of(node)
        if op.sign == "non_negative":
            memo[node] = True
        elif op.name == "clamp":
            memo[node] = clamp_bounds(node)[0] >= 0 or is_non_negative(operands(node)[0], memo)
        elif op.sign == "keeps":
            memo[node] = all(is_non_negative(source, memo) for source in operands(node))
    return memo[node]


def clamp_bounds(node: fx.Node) -> tuple[float, float]:
    """Lower and upper bound of a ReLU, ReLU6, Hardtanh or clamp."""
    name = op_of(node).name
    if name == "relu":
        return 0.0, float("inf")
    target_name = str(node.target)
    if "relu6" in target_name:
        return 0.0, 6.0
    defaults = (-1.0, 1.0) if "hardtanh" in target_name else (None, None)
    low, high = (list(node.args[1:3]) + list(defaults)[len(node.args[1:3]) :])[:2]
    low, high = (
        node.kwargs.get("min", node.kwargs.get("min_val", low)),
        node.kwargs.get("max", node.kwargs.get("max_val", high)),
    )
    numeric = (int, float)
    return (
        float(low) if isinstance(low, numeric) else float("-inf"),
        float(high) if isinstance(high, numeric) else float("inf"),
    )
