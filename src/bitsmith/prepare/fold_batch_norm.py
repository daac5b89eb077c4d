"""Fold batch norms into the layer before them, or after them where that is exact."""

from __future__ import annotations

import copy
from itertools import count
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..capture.ops import aten_name, module_of, op_of

_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CONV_TRANSPOSE = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


Unfolded = dict[str, tuple[nn.Module, nn.Module] | None]  # layer and norm by the layer's path; None: two norms


def fold_batch_norm(graph: fx.GraphModule, unfolded: Unfolded | None = None) -> list[str]:
    """Fold every batch norm that has a layer to go into, in place; returns a line for each.

    With y = (x - mean) / sqrt(var + eps) * gamma + beta a norm after a layer scales its output channels; a
    norm before a layer scales its input channels, which is exact unless the layer pads with zeros (the zeros
    would have been normalized too). A layer that is called elsewhere as well is copied first.
    ``unfolded`` receives layers and the norms behind them as they were.
    """
    log = []
    for node in list(graph.graph.nodes):
        norm = module_of(node)
        if not isinstance(norm, _NORM) or norm.running_mean is None:
            continue
        name = str(node.target)
        if (folded := _fold_after(graph, node, norm, unfolded) or _fold_before(graph, node, norm)) is not None:
            log.append(f"batch norm {name} folded into {folded}")
    graph.delete_all_unused_submodules()
    graph.recompile()
    return log


def _affine(norm: Any) -> tuple[Tensor, Tensor]:
    """Scale and offset per channel, in float64."""
    mean, variance = norm.running_mean.double(), norm.running_var.double()
    scale = torch.rsqrt(variance + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    offset = -mean * scale
    if norm.bias is not None:
        offset = offset + norm.bias.double()
    return scale, offset


def _own_layer(graph: fx.GraphModule, node: fx.Node) -> Any:
    """The layer of this call alone: a copy where other calls share it."""
    layer: Any = graph.get_submodule(str(node.target))
    calls = [n for n in graph.graph.nodes if n.op == "call_module" and n.target == node.target]
    if len(calls) > 1:
        taken = {name for name, _ in graph.named_modules()}
        name = next(name for index in count() if (name := f"{node.target}_{index}") not in taken)
        layer = copy.deepcopy(layer)
        graph.add_submodule(name, layer)
        node.target = name
    return layer


def _as_it_is(layer: nn.Module) -> nn.Module:
    """A layer with the same Parameters, which keeps them when the other gets new ones: calls that share stay tied."""
    twin = copy.copy(layer)
    twin._parameters = dict(layer._parameters)
    return twin


def _set(layer: nn.Module, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> None:
    layer.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    layer.bias = nn.Parameter(bias.to(dtype), requires_grad=False)


def fold_into(layer: Any, norm: nn.Module) -> None:
    """Change a layer, in place, so that it computes what layer and norm compute one after the other."""
    scale, offset = _affine(norm)
    weight = layer.weight.double()
    if isinstance(layer, _CONV_TRANSPOSE):  # (in, out / groups, *kernel)
        shaped = scale.view(layer.groups, 1, -1, *[1] * (weight.ndim - 2))
        weight = (weight.view(layer.groups, -1, *weight.shape[1:]) * shaped).view_as(weight)
    else:  # (out, in / groups, *kernel)
        weight = weight * scale.view(-1, *[1] * (weight.ndim - 1))
    bias = offset if layer.bias is None else layer.bias.double() * scale + offset
    _set(layer, weight, bias, layer.weight.dtype)


def _fold_after(graph: fx.GraphModule, node: fx.Node, norm: nn.Module, unfolded: Unfolded | None) -> str | None:
    """Layer, then norm: W' = scale * W, b' = scale * b + offset over output channels."""
    source = _layer_before(node)
    if source is None:
        return None
    as_it_was = _as_it_is(graph.get_submodule(str(source.target)))
    layer = _own_layer(graph, source)
    if unfolded is not None:
        name = str(source.target)
        unfolded[name] = None if name in unfolded else (as_it_was, norm)
    fold_into(layer, norm)
    node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
    graph.graph.erase_node(node)
    return str(source.target)


def _layer_before(node: fx.Node) -> fx.Node | None:
    """The layer whose output channels are the norm's, also behind reshapes that keep the features last."""
    source = node.args[0]
    flat = node.meta["val"].ndim == 2
    while isinstance(source, fx.Node) and _has_one_reader(source):
        before = module_of(source)
        if isinstance(before, (*_CONV, *_CONV_TRANSPOSE)):
            return source if source is node.args[0] else None
        if isinstance(before, nn.Linear):
            return source if flat else None  # else the norm's channels are not the layer's features
        if op_of(source).name != "reshape" or not flat or not _keeps_last(source):
            return None
        source = source.args[0]
    return None


def _has_one_reader(node: fx.Node) -> bool:
    """Whether one operator reads the values; others may read the shape, which no norm changes."""
    return sum(not aten_name(user).startswith("sym_") for user in node.users) == 1


def _keeps_last(node: fx.Node) -> bool:
    """Whether a reshape leaves the last axis as it is."""
    source = node.args[0]
    if not isinstance(source, fx.Node):
        return False
    sizes = source.meta["val"].shape[-1], node.meta["val"].shape[-1]
    return all(isinstance(size, int) for size in sizes) and sizes[0] == sizes[1]


def _fold_before(graph: fx.GraphModule, node: fx.Node, norm: nn.Module) -> str | None:
    """Norm, then layer: W' = W * scale over input channels, b' = b + W @ offset."""
    if len(node.users) != 1:
        return None
    user = next(iter(node.users))
    after = module_of(user)
    if user.args[:1] != (node,) or not _takes_norm(after, node):
        return None
    layer = _own_layer(graph, user)
    scale, offset = _affine(norm)
    weight = layer.weight.double()
    if isinstance(layer, nn.Linear):
        bias = weight @ offset
        weight = weight * scale
    else:
        per_group = weight.view(layer.groups, -1, *weight.shape[1:])  # (groups, out / groups, in / groups, *kernel)
        shape = (layer.groups, 1, -1, *[1] * (weight.ndim - 2))
        bias = (per_group * offset.view(shape)).flatten(2).sum(2).flatten()
        weight = (per_group * scale.view(shape)).view_as(weight)
    if layer.bias is not None:
        bias = bias + layer.bias.double()
    _set(layer, weight, bias, layer.weight.dtype)
    node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
    graph.graph.erase_node(node)
    return str(user.target)


def _takes_norm(layer: nn.Module | None, node: fx.Node) -> bool:
    if isinstance(layer, nn.Linear):
        return bool(node.meta["val"].ndim == 2)
    if not isinstance(layer, _CONV):
        return False
    return layer.padding == "valid" or not any(p for p in layer.padding if p != 0)
