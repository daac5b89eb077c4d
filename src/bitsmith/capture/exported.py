"""Reading a model with ``torch.export``. The only file that touches it for capture."""

from __future__ import annotations

import contextlib
import inspect
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from .inputs import Arguments

_VIEWS = {"slice", "select", "view", "reshape", "flatten", "transpose", "permute", "t", "squeeze", "unsqueeze",
          "expand", "split", "split_with_sizes", "chunk", "unbind", "narrow", "unflatten", "diagonal", "alias",
          "detach", "as_strided", "contiguous"}  # fmt: skip


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch's own warnings and its graph dumps from the user; no fused attention, so that all is visible."""
    fastpath = torch.backends.mha.get_fastpath_enabled()
    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    level = logger.level
    torch.backends.mha.set_fastpath_enabled(False)
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        logger.setLevel(level)


def _at_least_two(arguments: Arguments) -> Arguments:
    """Repeat a batch of one, since export takes a dimension of size 1 for a constant."""

    def repeat(value: Any) -> Any:
        if isinstance(value, Tensor) and value.ndim and value.shape[0] == 1:
            return torch.cat([value, value])
        return value

    args, kwargs = arguments
    return torch.utils._pytree.tree_map(repeat, args), torch.utils._pytree.tree_map(repeat, kwargs)


def export_graph(model: nn.Module, arguments: Arguments, *, dynamic_batch: bool = True) -> fx.GraphModule:
    """The model as a functional ATen graph with its parameters as attributes.

    The leading dimension of every input tensor is dynamic where the model's own code allows it.
    """
    args, kwargs = _at_least_two(arguments) if dynamic_batch else arguments

    def dims(value: Any) -> Any:
        if isinstance(value, Tensor) and value.ndim and dynamic_batch:
            return {0: torch.export.Dim.AUTO}
        return None

    shapes = torch.utils._pytree.tree_map(dims, args)
    keyword_shapes = torch.utils._pytree.tree_map(dims, kwargs)
    with _quiet(), torch.no_grad():
        dynamic = _dynamic_shapes(model, shapes, keyword_shapes)
        program = torch.export.export(model, args, kwargs, dynamic_shapes=dynamic, strict=False)
        if _needs_functionalization(program.graph):
            program = program.run_decompositions({})
        graph = program.module(check_guards=False)
    assert isinstance(graph, fx.GraphModule)
    _mutations_to_functions(graph)
    return graph


def _dynamic_shapes(model: nn.Module, positional: Any, keyword: dict[str, Any]) -> Any:
    """Dynamic shapes by parameter name, as torch.export wants them when there are keyword arguments."""
    if not keyword:
        return positional
    signature = inspect.signature(model.forward)
    bound = signature.bind(*positional, **keyword).arguments
    return dict(bound)


def _base_name(node: fx.Node) -> str:
    target = node.target
    return target._schema.name.split("::")[-1] if isinstance(target, torch._ops.OpOverload) else ""


def _is_mutation(node: fx.Node) -> bool:
    target = node.target
    return (
        node.op == "call_function" and isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable
    )


def _needs_functionalization(graph: fx.Graph) -> bool:
    """Whether an in-place call writes through a view, which renaming it would not respect."""
    for node in graph.nodes:
        if not _is_mutation(node):
            continue
        target = node.args[0]
        if not isinstance(target, fx.Node) or _base_name(node).rstrip("_") == _base_name(node):
            return True
        aliases = [target, *target.users]
        if any(_base_name(alias) in _VIEWS for alias in aliases) or not hasattr(
            torch.ops.aten, _base_name(node).rstrip("_")
        ):
            return True
    return False


def _mutations_to_functions(graph: fx.GraphModule) -> None:
    """``add_(x, y)`` becomes ``add(x, y)``, and what reads ``x`` afterwards reads the result."""
    nodes = list(graph.graph.nodes)
    order = {node: index for index, node in enumerate(nodes)}
    for node in nodes:
        if not _is_mutation(node):
            continue
        overload = node.target._overloadname
        node.target = getattr(getattr(torch.ops.aten, _base_name(node).rstrip("_")), overload)
        source = node.args[0]
        source.replace_all_uses_with(node, delete_user_cb=lambda user, node=node: order[user] > order[node])
