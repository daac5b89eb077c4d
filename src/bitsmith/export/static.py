"""A captured graph for one batch size, for runtimes that have no free dimensions."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map_only


class _Shapes(fx.Interpreter):
    """Runs a graph once and keeps the shape of every value beside its node."""

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        n.meta["val"] = tree_map_only(Tensor, lambda t: t.to("meta"), value)
        return value


def with_batch(graph: fx.GraphModule, size: int) -> fx.GraphModule:
    """The graph with ``size`` for each free leading dimension of its inputs.

    Its layers are the original's, in containers of its own: replacing one there leaves the original as it is.
    """
    fixed = fx.GraphModule(graph, copy.deepcopy(graph.graph), graph.__class__.__name__)
    examples = []
    for node in fixed.graph.nodes:
        if node.op == "placeholder":
            value = node.meta.get("val")
            examples.append(_example(value, size) if isinstance(value, Tensor) else value)
    with torch.no_grad():
        _Shapes(fixed).run(*examples, enable_io_processing=False)
    return fixed


def _example(value: Tensor, size: int) -> Tensor:
    shape = [size if isinstance(d, torch.SymInt) and axis == 0 else int(d) for axis, d in enumerate(value.shape)]
    return torch.zeros(shape, dtype=value.dtype)
