"""Move monotone activation functions in front of max pooling: the same function, and one that layers can fuse."""

from __future__ import annotations

from torch import fx

from ..capture.ops import op_of


def activation_before_pool(graph: fx.GraphModule) -> None:
    """Turn ``relu(max_pool(x))`` into ``max_pool(relu(x))``, in place; likewise for every clamp.

    The maximum of a non-decreasing function is the function of the maximum.
    """
    for node in list(graph.graph.nodes):
        if op_of(node).role != "activation":
            continue
        pool = node.args[0]
        while isinstance(pool, fx.Node) and op_of(pool).name == "max_pool" and len(pool.users) == 1:
            source = pool.args[0]
            assert isinstance(source, fx.Node)
            node.replace_all_uses_with(pool)
            pool.prepend(node)
            node.args = (source, *node.args[1:])
            pool.args = (node, *pool.args[1:])
            node.meta["val"] = source.meta["val"]
            pool = source
    graph.recompile()
