"""Changes to the shape of a LayerGraph, written down in its ``meta`` so that a saved model can be rebuilt."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from ..capture.ops import layer_of


def insert_scale(graph: fx.GraphModule, layer: str, scale: Tensor) -> None:
    """Multiply what ``layer`` reads by ``scale``, one factor per channel; ``layer`` is called once."""
    node = next(n for n in graph.graph.nodes if n.op == "call_module" and n.target == layer)
    source = node.args[0]
    axis = -1 if isinstance(layer_of(node), torch.nn.Linear) else 1
    rank = source.meta["val"].ndim
    shape = [1] * rank
    shape[axis] = -1
    name = f"{layer.replace('.', '_')}_input_scale"
    graph.register_buffer(name, scale.float().view(shape))
    with graph.graph.inserting_before(node):
        constant = graph.graph.get_attr(name)
        constant.meta["val"] = getattr(graph, name)
        scaled = graph.graph.call_function(torch.ops.aten.mul.Tensor, (source, constant))
        scaled.meta["val"] = source.meta["val"]
    node.replace_input_with(source, scaled)
    graph.recompile()
    graph.meta.setdefault("structure", []).append({"insert_scale": layer, "channels": scale.numel()})


def rebuild(graph: fx.GraphModule, changes: list[dict[str, Any]]) -> None:
    """Make the changes of a saved model to a freshly captured graph; their values are loaded afterwards."""
    for change in changes:
        insert_scale(graph, change["insert_scale"], torch.ones(int(change["channels"])))
