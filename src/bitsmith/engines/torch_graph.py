"""Copying a captured graph into one that torch.jit can trace for any batch size."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..capture.ops import aten_name
from ..errors import ExportError
from ..place.layers import QuantLayer

Read = Callable[[fx.Node], fx.Node]
_RESHAPES = {"view", "reshape", "_unsafe_view"}
_CREATED: dict[str, Callable[..., Tensor]] = {
    **{name: getattr(torch, name) for name in ("zeros", "ones", "full", "arange")},
    **{name: getattr(Tensor, name) for name in ("new_zeros", "new_ones", "new_full")},
}
"""As overloads, traces bake their sizes in, and torch's LSTM writes past the end of a state of another batch size."""


class GraphCopy:
    """A new graph beside the captured one, flat tensors in and out. ``values`` maps old nodes to new ones."""

    def __init__(self, source: fx.GraphModule) -> None:
        self.source = source
        self.graph = fx.Graph()
        self.attributes: dict[str, Any] = {}
        self.values: dict[fx.Node, fx.Node] = {}

    def placeholder(self, node: fx.Node) -> None:
        """Copy an input."""
        if not isinstance(node.meta.get("val"), Tensor):
            raise ExportError(f"input {node.name!r} is no tensor; TorchScript files and the torch engine take tensors")
        self.values[node] = self.graph.placeholder(str(node.target))

    def call(self, name: str, module: nn.Module, *args: Any) -> fx.Node:
        """Call ``module``, known as ``name`` (or the like, where that is taken)."""
        unique, count = name, 2
        while unique in self.attributes:
            unique, count = f"{name}_{count}", count + 1
        self.attributes[unique] = module.eval()
        return self.graph.call_module(unique, args)

    def float_operator(self, node: fx.Node, read: Read) -> fx.Node:
        """Copy an operator that computes in float; ``read`` gives its operands in real numbers."""
        if node.op == "get_attr":
            name = str(node.target)
            self.attributes[name] = getattr(self.source, name)
            return self.graph.get_attr(name)
        args, kwargs = fx.map_arg(node.args, read), fx.map_arg(node.kwargs, read)
        if node.op == "call_module":
            return self.call(str(node.target), plain_layer(self.source.get_submodule(str(node.target))), *args)
        name = aten_name(node)
        if name == "sym_size":
            return self.graph.call_method("size", args)
        if name in _RESHAPES:  # what lies channels last has no view of another shape
            return self.graph.call_method("reshape", (args[0], reshaped(args[1])))
        if name == "expand":
            return self.graph.call_method("expand", (args[0], kept(args[1])))
        target = _CREATED.get(name, node.target)
        assert callable(target)
        return self.graph.call_function(target, args, kwargs)

    def finish(self, read: Read) -> fx.GraphModule:
        """The copied model: one tensor or a tuple of tensors out."""
        output = next(n for n in self.source.graph.nodes if n.op == "output")
        leaves = torch.utils._pytree.tree_leaves(output.args[0])
        results = [read(leaf) for leaf in leaves if isinstance(leaf, fx.Node)]
        self.graph.output(results[0] if len(results) == 1 else tuple(results))
        module = fx.GraphModule(self.attributes, self.graph, "QuantizedModel")
        module.graph.eliminate_dead_code()
        module.delete_all_unused_submodules()
        module.recompile()
        for parameter in module.parameters():
            parameter.requires_grad_(False)
        return module.eval()


def reshaped(sizes: Any) -> Any:
    """Sizes with the one that is known at run time only left to torch."""
    dynamic = [size for size in sizes if isinstance(size, fx.Node)]
    return kept(sizes) if len(dynamic) == 1 and -1 not in sizes else list(sizes)


def kept(sizes: Any) -> list[Any]:
    """Sizes with -1 for each that is known at run time only."""
    return [-1 if isinstance(size, fx.Node) else size for size in sizes]


def plain_layer(module: nn.Module) -> nn.Module:
    """A copy of a layer whose parameters lie on their grids already."""
    if not isinstance(module, QuantLayer):
        return copy.deepcopy(module)
    layer = copy.deepcopy(module.layer)
    for name, value in module.quantized_parameters().items():
        setattr(layer, name, nn.Parameter(value.detach().clone(), requires_grad=False))
    return layer
