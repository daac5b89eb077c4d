"""In-place operators in an exported graph: renamed to functions where that is exact."""

from __future__ import annotations

import torch
from torch import fx

from .ops import aten_name

# Operators whose result may share memory with their first argument.
_VIEWS = {"slice", "select", "view", "reshape", "flatten", "transpose", "permute", "t", "squeeze",
          "unsqueeze", "expand", "split", "split_with_sizes", "chunk", "unbind", "narrow", "unflatten",
          "diagonal", "alias", "detach", "as_strided", "contiguous", "getitem", "view_as",
          "expand_as", "movedim", "swapaxes", "dropout", "dropout_", "to"}  # fmt: skip


def _base_name(node: fx.Node) -> str:
    return aten_name(node) if node.op == "call_function" else ""


def is_mutation(node: fx.Node) -> bool:
    """Whether a node writes into one of its arguments; ``dropout_`` in eval mode does not."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    return node.target._schema.is_mutable and "dropout" not in node.target._schema.name


def _source(node: fx.Node) -> fx.Node | None:
    """The node whose memory this one may share."""
    if (_base_name(node) in _VIEWS or is_mutation(node)) and node.args and isinstance(node.args[0], fx.Node):
        return node.args[0]
    return None


def _aliases(node: fx.Node) -> set[fx.Node]:
    """All nodes that may share memory with ``node``."""
    while (source := _source(node)) is not None:
        node = source
    found, pending = {node}, [node]
    while pending:
        current = pending.pop()
        views = [user for user in current.users if _source(user) is current and user not in found]
        found.update(views)
        pending += views
    return found


def needs_functionalization(graph: fx.Graph) -> bool:
    """Whether an in-place call changes what some other alias of its memory reads afterwards.

    Renaming it would lose that write; then torch's own functionalization has to do the work. An in-place
    activation whose input nobody else reads again, as nearly all are, needs no such thing.
    """
    order = {node: index for index, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if not is_mutation(node):
            continue
        name = _base_name(node)
        target = node.args[0]
        if not isinstance(target, fx.Node) or not name.endswith("_") or not _functional(node):
            return True
        for alias in _aliases(target) - {target, node}:
            if order[alias] < order[node] and any(order[user] > order[node] for user in alias.users):
                return True
    return False


def _note_state(graph: fx.GraphModule) -> None:
    written: dict[str, None] = {}
    for node in graph.graph.nodes:
        target = node.args[0] if is_mutation(node) else None
        while isinstance(target, fx.Node) and (source := _source(target)) is not None:
            target = source
        if isinstance(target, fx.Node) and target.op == "get_attr":
            written[str(target.target)] = None
    if written:
        graph.meta.setdefault("notes", []).append(
            f"forward() writes to its own buffers ({', '.join(written)}): the quantized model keeps them as they were"
        )


def _functional(node: fx.Node) -> torch._ops.OpOverload | None:
    """The function behind an in-place operator."""
    packet = getattr(torch.ops.aten, _base_name(node).rstrip("_"), None)
    return getattr(packet, node.target._overloadname, None) if packet is not None else None  # type: ignore[union-attr]


def mutations_to_functions(graph: fx.GraphModule) -> None:
    """``add_(x, y)`` becomes ``add(x, y)``, and what reads ``x`` afterwards reads the result.

    What the model writes into its own buffers from call to call is lost; ``graph.meta["notes"]`` says so.
    """
    _note_state(graph)
    nodes = list(graph.graph.nodes)
    order = {node: index for index, node in enumerate(nodes)}
    for node in nodes:
        function = _functional(node) if is_mutation(node) else None
        if function is None:
            continue
        node.target = function
        source = node.args[0]
        source.replace_all_uses_with(node, delete_user_cb=lambda user, node=node: order[user] > order[node])
