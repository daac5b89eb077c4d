"""Changes to the shape of a LayerGraph, written down in its ``meta`` so that a saved model can be rebuilt."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from ..capture.ops import layer_of


def insert_scale(graph: fx.GraphModule, layers: list[str], scale: Tensor) -> None:
    """Multiply what ``layers`` read, all of them the same value, by one factor per channel; each is called once."""
    nodes = [n for n in graph.graph.nodes if n.op == "call_module" and n.target in layers]
    source = nodes[0].args[0]
    shape = [1] * source.meta["val"].ndim
    shape[-1 if isinstance(layer_of(nodes[0]), nn.Linear) else 1] = -1
    name = f"{layers[0].replace('.', '_')}_input_scale"
    graph.register_buffer(name, scale.float().view(shape))
    with graph.graph.inserting_before(nodes[0]):
        constant = graph.graph.get_attr(name)
        constant.meta["val"] = getattr(graph, name)
        scaled = graph.graph.call_function(torch.ops.aten.mul.Tensor, (source, constant))
        scaled.meta["val"] = source.meta["val"]
    for node in nodes:
        node.replace_input_with(source, scaled)
    graph.recompile()
    graph.meta.setdefault("structure", []).append({"insert_scale": layers, "channels": scale.numel()})


def resize(graph: fx.GraphModule, layer: str, weight: Tensor, bias: Tensor | None) -> None:
    """Give a layer parameters of other shapes; call ``propagate_shapes`` when all layers have theirs."""
    module: Any = graph.get_submodule(layer)
    module.weight = nn.Parameter(weight, requires_grad=False)
    module.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    features = ("out_features", "in_features") if isinstance(module, nn.Linear) else ("out_channels", "in_channels")
    for name, size in zip(features, weight.shape):
        setattr(module, name, size)
    shapes = {"weight": list(weight.shape), "bias": None if bias is None else list(bias.shape)}
    graph.meta.setdefault("structure", []).append({"resize": layer, **shapes})


def takes_any_batch(graph: fx.GraphModule) -> bool:
    """Whether all inputs may hold any number of samples."""
    values = [n.meta.get("val") for n in graph.graph.nodes if n.op == "placeholder"]
    tensors = [v for v in values if isinstance(v, Tensor) and v.ndim]
    return bool(tensors) and all(isinstance(v.shape[0], torch.SymInt) for v in tensors)


def propagate_shapes(graph: fx.GraphModule) -> None:
    """Bring the example values of all nodes up to date with the layers."""
    inputs = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
    modes = [value.fake_mode for value in inputs if isinstance(value, FakeTensor)]
    if modes:
        FakeTensorProp(graph, modes[0]).propagate_dont_convert_inputs(*inputs)


def rebuild(graph: fx.GraphModule, changes: list[dict[str, Any]]) -> None:
    """Make the changes of a saved model to a freshly captured graph; their values are loaded afterwards."""
    for change in changes:
        if "insert_scale" in change:
            insert_scale(graph, change["insert_scale"], torch.ones(int(change["channels"])))
        else:
            bias = None if change["bias"] is None else torch.zeros(change["bias"])
            resize(graph, change["resize"], torch.zeros(change["weight"]), bias)
    if any("resize" in change for change in changes):
        propagate_shapes(graph)
