"""Cutting a graph into stages: runs of operators that are executed chunk by chunk while the data is in cache."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from ..capture.ops import op_of, quantizer_of
from ..grid import Quantizer
from ..place.layers import QuantLayer


@dataclass
class Stage:
    """Nodes that run one after the other, at most one of them a layer; only the last one's value is kept.

    ``quantizer`` is the Quantizer at the end, ``observes`` whether this is where its range is watched.
    """

    nodes: list[fx.Node]
    quantizer: Quantizer | None = None
    observes: bool = False
    inputs: list[fx.Node] = field(default_factory=list)

    @property
    def end(self) -> fx.Node:
        """The node whose value is kept."""
        return self.nodes[-1]

    @property
    def compute(self) -> fx.Node | None:
        """The compute node in this stage, if there is one."""
        return next((n for n in self.nodes if op_of(n).role == "compute"), None)

    @property
    def layer(self) -> QuantLayer | None:
        """The QuantLayer in this stage, if there is one."""
        node = self.compute
        if node is None or node.op != "call_module":
            return None
        module = node.graph.owning_module
        assert module is not None
        found = module.get_submodule(str(node.target))
        return found if isinstance(found, QuantLayer) else None


def cut_into_stages(graph: fx.GraphModule) -> list[Stage]:
    """Every node but placeholders and the output, in stages in topological order."""
    stages: list[Stage] = []
    taken: set[fx.Node] = set()
    for node in graph.graph.nodes:
        if node.op in ("placeholder", "output") or node in taken:
            continue
        stage = Stage([node])
        while quantizer_of(stage.end) is None and (follower := _only_follower(stage.end)) is not None:
            if op_of(follower).role == "compute" and stage.compute is not None:
                break  # without a Quantizer between them, as where only weights are quantized
            stage.nodes.append(follower)
        taken.update(stage.nodes)
        stage.quantizer = quantizer_of(stage.end)
        stage.observes = bool(stage.end.meta.get("observe"))
        inside = set(stage.nodes)
        stage.inputs = list(dict.fromkeys(i for n in stage.nodes for i in n.all_input_nodes if i not in inside))
        stages.append(stage)
    return stages


def _only_follower(node: fx.Node) -> fx.Node | None:
    """The single consumer of a value, if that value is all it reads."""
    if len(node.users) != 1:
        return None
    user = next(iter(node.users))
    return user if user.op != "output" and user.all_input_nodes == [node] else None


def stage_name(stage: Stage) -> str:
    """The layer or operator that makes a stage's value."""
    node = stage.nodes[-2] if stage.quantizer is not None and len(stage.nodes) > 1 else stage.nodes[0]
    if stage.quantizer is not None and len(stage.nodes) == 1:
        node = stage.inputs[0]
    named = stage.compute or node
    return repr(str(named.target)) if named.op in ("call_module", "placeholder") else repr(named.name)
