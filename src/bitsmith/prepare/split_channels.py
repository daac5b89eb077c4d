"""Outlier channel splitting: a channel with large weights becomes two with half of them each.

Source: Zhao et al., Improving Neural Network Quantization without Retraining using Outlier Channel Splitting
(arXiv 1901.09504), section 3.1. ``side="input"`` halves the columns of the layers that read a channel, equation (3),
and repeats the rows of those that give it; ``side="output"`` halves the rows and repeats the columns, which asks that
f(x/2) = f(x)/2 lies between. The function stays the same; the tensors between become wider.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from ..capture.inputs import Arguments
from ..capture.ops import aten_name, op_of
from ..recipe import Recipe
from ..steps import SplitChannels
from .channels import FIXED, ChannelFlow, Link
from .equalize import one_sample
from .structure import propagate_shapes, resize
from .weights import NORMS, in_range, out_channels, out_range

_WIDENS = {"relu", "leaky_relu", "add", "max_pool", "avg_pool", "global_avg_pool", "resize_nearest", "conv", "linear"}


@dataclass
class _Space:
    """A run of channels, in this order, between the layers that give it and those that read it."""

    roots: Tensor
    givers: list[tuple[str, Link]]
    readers: list[tuple[str, Link]]


def split_channels(graph: fx.GraphModule, batches: list[Arguments], options: SplitChannels, _recipe: Recipe) -> str:
    """Split the channels with the largest weights, in place; returns what was done in a line."""
    flow = ChannelFlow(graph).follow(one_sample(graph, batches[0]))
    spaces = [space for space in _spaces(flow) if _can_widen(graph, flow, space, options)]
    count = 0
    for space in spaces:
        ranges = torch.zeros(len(space.roots), dtype=torch.float64)
        for _, link in space.readers if options.side == "input" else space.givers:
            found = in_range(link.layer) if options.side == "input" else out_range(link.layer)
            ranges = torch.maximum(ranges, found.view(len(space.roots), -1).amax(1))
        chosen = ranges.topk(math.ceil(options.ratio * len(ranges))).indices
        count += len(chosen)
        for name, link in space.givers:
            _repeat_rows(graph, name, link.layer, chosen, 0.5 if options.side == "output" else 1.0)
        for name, link in space.readers:
            assert link.reads is not None
            columns = len(link.reads) // len(space.roots)
            _repeat_columns(graph, name, link.layer, chosen, columns, 0.5 if options.side == "input" else 1.0)
    propagate_shapes(graph)
    return f"split {count} channels between layers in {len(spaces)} places"


def _spaces(flow: ChannelFlow) -> list[_Space]:
    """Channels that several layers give or read in one and the same order."""
    spaces: dict[tuple[int, ...], _Space] = {}
    for name, link in flow.links.items():
        roots = flow.roots[link.gives]
        space = spaces.setdefault(tuple(roots.tolist()), _Space(roots, [], []))
        space.givers.append((name, link))
    for name, link in flow.links.items():
        for key, space in spaces.items():
            reads = None if link.reads is None else flow.roots[link.reads]
            if reads is not None and len(reads) % len(key) == 0:
                repeated = space.roots.repeat_interleave(len(reads) // len(key))
                if torch.equal(reads, repeated):
                    space.readers.append((name, link))
    return [space for space in spaces.values() if space.readers]


def _can_widen(graph: fx.GraphModule, flow: ChannelFlow, space: _Space, options: SplitChannels) -> bool:
    """Whether every layer and operator on these channels works as well with more of them."""
    roots = space.roots
    if bool((roots == FIXED).any()) or len(torch.unique(roots)) < len(roots):
        return False
    mine = {name for name, _ in space.givers} | {name for name, _ in space.readers}
    for name, link in flow.links.items():
        touched = [
            v for v in (link.gives, link.reads) if v is not None and bool(torch.isin(flow.roots[v], roots).any())
        ]
        if touched and (name not in mine or isinstance(link.layer, NORMS) or getattr(link.layer, "groups", 1) > 1):
            return False
        if touched and "Transpose" in type(link.layer).__name__:
            return False
    return all(_widens(node, options) for node in flow.nodes_on(roots))


def _widens(node: fx.Node, options: SplitChannels) -> bool:
    """Whether an operator takes any number of channels."""
    name = op_of(node).name
    if name == "reshape":  # into (batch, everything else)
        sizes = node.args[1] if len(node.args) > 1 else ()
        flat = aten_name(node) == "flatten" or (isinstance(sizes, list | tuple) and list(sizes)[1:] == [-1])
        return flat and node.meta["val"].ndim == 2
    if name == "clamp":
        return options.side == "input"
    return name in _WIDENS or aten_name(node) in ("mean", "dropout", "clone", "contiguous")


def _repeat_rows(graph: fx.GraphModule, name: str, layer: nn.Module, chosen: Tensor, factor: float) -> None:
    """Append copies of some output channels; originals and copies times ``factor``."""
    assert isinstance(layer.weight, Tensor)
    weight = torch.cat([layer.weight.data, layer.weight.data[chosen]])
    changed = torch.cat([chosen, torch.arange(out_channels(layer), len(weight))])
    weight[changed] *= factor
    bias = None
    if isinstance(layer.bias, Tensor):
        bias = torch.cat([layer.bias.data, layer.bias.data[chosen]])
        bias[changed] *= factor
    resize(graph, name, weight, bias)


def _repeat_columns(
    graph: fx.GraphModule, name: str, layer: nn.Module, chosen: Tensor, columns: int, factor: float
) -> None:
    """Append copies of some input channels, ``columns`` columns each; originals and copies times ``factor``."""
    assert isinstance(layer.weight, Tensor)
    index = (chosen.unsqueeze(1) * columns + torch.arange(columns)).flatten()
    weight = torch.cat([layer.weight.data, layer.weight.data[:, index]], 1)
    weight[:, torch.cat([index, torch.arange(layer.weight.shape[1], weight.shape[1])])] *= factor
    resize(graph, name, weight, layer.bias.data if isinstance(layer.bias, Tensor) else None)
