"""Reading a model with ``torch.fx`` where ``torch.export`` cannot follow an operator.

``torch.export`` needs to know the shape of every result without computing it. A custom operator without a
fake kernel, or a function that leaves torch for numpy, stops it. Symbolic tracing does not look inside such
calls. So the model is traced, each call that fake tensors cannot follow is replaced by a stand-in whose shape
was seen in a real run, the rest is exported as ever, and the calls are put back. They stay what they are:
float operators.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from .exported import at_least_two, export_graph
from .inputs import Arguments


@dataclass
class _Opaque:
    """A call that only real tensors can go through, and what it returned in the real run."""

    node: fx.Node
    function: Callable[..., Any]
    arguments: tuple[Any, dict[str, Any]]
    is_tensor_operand: list[bool]
    leading: int  # of its first tensor in the real run
    results: list[Tensor]
    yields_tensor: bool

    def operands(self) -> tuple[list[fx.Node], list[fx.Node]]:
        """The nodes that the call reads now: tensors, and sizes."""
        nodes = _nodes_in((self.node.args, self.node.kwargs))
        pairs = list(zip(nodes, self.is_tensor_operand, strict=True))
        return [n for n, tensor in pairs if tensor], [n for n, tensor in pairs if not tensor]


def _nodes_in(arguments: Any) -> list[fx.Node]:
    return [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, fx.Node)]


# What the stand-ins of the capture in progress stand for; the operator below has no other way to know.
_stand_ins: list[_Opaque] = []


@torch.library.custom_op("bitsmith::opaque", mutates_args=())
def _opaque(tensors: list[Tensor], sizes: list[int], index: int) -> list[Tensor]:
    raise NotImplementedError("stands for another operator while a model is captured; it never runs")


@_opaque.register_fake
def _(tensors: list[Tensor], sizes: list[int], index: int) -> list[Tensor]:
    opaque = _stand_ins[index]
    batch = tensors[0].shape[0] if tensors and tensors[0].ndim else 1

    def shape(result: Tensor) -> list[Any]:
        if not result.ndim or not opaque.leading or result.shape[0] % opaque.leading:
            return list(result.shape)
        return [batch * (result.shape[0] // opaque.leading), *result.shape[1:]]

    return [torch.empty(shape(result), dtype=result.dtype, device=result.device) for result in opaque.results]


class _Finder(fx.Interpreter):
    """Runs a traced model on real tensors and notes the calls that fake tensors cannot follow."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.found: list[_Opaque] = []

    def run_node(self, n: fx.Node) -> Any:
        """Run one call, for real and on fake tensors."""
        if n.op not in ("call_function", "call_method"):
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        operands = [self.env[operand] for operand in _nodes_in((n.args, n.kwargs))]
        result = super().run_node(n)
        if not _can_fake(self, n, args, kwargs):
            function = getattr(Tensor, str(n.target)) if n.op == "call_method" else n.target
            tensors = [value for value in operands if isinstance(value, Tensor)]
            self.found.append(
                _Opaque(
                    n, _overload(function), (n.args, dict(n.kwargs)),
                    [isinstance(value, Tensor) for value in operands],
                    tensors[0].shape[0] if tensors and tensors[0].ndim else 0,
                    [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)],
                    isinstance(result, Tensor),
                )
            )  # fmt: skip
        return result


def _overload(function: Any) -> Any:
    """A custom operator by its full name, as exported graphs have it."""
    return function.default if isinstance(function, torch._ops.OpOverloadPacket) else function


def _can_fake(finder: fx.Interpreter, node: fx.Node, args: Any, kwargs: Any) -> bool:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        args, kwargs = tree_map_only(Tensor, mode.from_tensor, (args, kwargs))
        try:
            getattr(finder, node.op)(node.target, args, kwargs)
        except Exception:  # whatever it is, export would meet it too
            return False
    return True


def trace_graph(model: nn.Module, arguments: Arguments, *, dynamic_batch: bool = True) -> fx.GraphModule:
    """The model as a functional ATen graph; calls that torch.export cannot follow stay in it as they are."""
    traced = fx.symbolic_trace(model)
    finder = _Finder(traced)
    with torch.no_grad():
        finder.run(*_flat(model, at_least_two(arguments)))
    _stand_ins[:] = finder.found
    try:
        for index, opaque in enumerate(finder.found):
            _insert_stand_in(traced.graph, opaque, index)
        traced.recompile()
        graph = export_graph(traced, arguments, dynamic_batch=dynamic_batch)
    finally:
        _stand_ins.clear()
    for node in list(graph.graph.nodes):
        if node.target is torch.ops.bitsmith.opaque.default:
            _put_back(graph.graph, node, finder.found[node.args[2]])
    return graph


def _flat(model: nn.Module, arguments: Arguments) -> list[Any]:
    """All arguments in the order of forward's parameters, as fx's interpreter takes them."""
    bound = inspect.signature(model.forward).bind(*arguments[0], **arguments[1])
    bound.apply_defaults()
    return [*bound.args, *bound.kwargs.values()]


def _insert_stand_in(graph: fx.Graph, opaque: _Opaque, index: int) -> None:
    node = opaque.node
    with graph.inserting_before(node):
        result = graph.call_function(torch.ops.bitsmith.opaque.default, (*opaque.operands(), index))
        if opaque.yields_tensor:
            result = graph.call_function(operator.getitem, (result, 0))
    node.replace_all_uses_with(result)
    graph.erase_node(node)


def _put_back(graph: fx.Graph, stand_in: fx.Node, opaque: _Opaque) -> None:
    """The call itself, in the exported graph, where its stand-in is."""
    tensors, sizes = iter(stand_in.args[0]), iter(stand_in.args[1])  # type: ignore[arg-type]
    kinds = iter(opaque.is_tensor_operand)

    def operand(leaf: Any) -> Any:
        return next(tensors if next(kinds) else sizes) if isinstance(leaf, fx.Node) else leaf

    args, kwargs = tree_map(operand, opaque.arguments)
    with graph.inserting_before(stand_in):
        call = graph.call_function(opaque.function, tuple(args), dict(kwargs))
    call.meta = dict(stand_in.meta)
    if opaque.yields_tensor:
        call.meta["val"] = stand_in.meta["val"][0]
        for user in list(stand_in.users):
            user.replace_all_uses_with(call)
            graph.erase_node(user)
    stand_in.replace_all_uses_with(call)
    graph.erase_node(stand_in)
