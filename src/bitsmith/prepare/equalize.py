"""Cross-layer equalization: scale channels so that the layers on both sides of them use the same range.

Source: Nagel et al., Data-Free Quantization through Weight Equalization and Bias Correction (arXiv 1906.04721),
section 4.1. Where f(sx) = s f(x), a channel between two layers may be scaled by any s > 0: its rows in the first
layer times s, its columns in the second divided by s. With ranges r1 and r2, s = sqrt(r2 / r1) makes both
sqrt(r1 r2), equation (11). Adds, concats and shared layers tie channels together (``channels.py``); the range on each
side is then the largest of those tied. Objective "noise" chooses s otherwise: ``noise.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from ..capture.inputs import Arguments, first_samples
from ..capture.ops import layer_of
from ..recipe import Recipe
from ..steps import Equalize
from .channels import FIXED, ChannelFlow
from .gradients import SHIFTS
from .noise import feel, quietest_scales
from .structure import takes_any_batch
from .weights import in_range, out_range, scale_inputs, scale_outputs

_DEAD = 1e-8  # of the largest range of a layer: such a channel is left alone
_CONVERGED = 1e-4


def equalize(graph: fx.GraphModule, batches: list[Arguments], options: Equalize, recipe: Recipe) -> str:
    """Equalize every channel between layers, in place; returns what was done in a line.

    The function stays what it was, to float rounding. In front of a clip such as ReLU6 that holds for inputs that
    come no further than ``batches`` do: channels that reach the clip there are left alone, the others stay below it.
    Where ``options.clips`` is "trade", clips may cut elsewhere, as far as that costs less than it gains.
    """
    flow = ChannelFlow(graph).follow(one_sample(graph, batches[0]))
    trade = options.clips == "trade"
    limit = limits(flow, graph, batches, traded=trade)
    total = torch.ones(flow.count, dtype=torch.float64)
    if options.objective == "noise":
        noise = feel(flow, graph, batches, recipe, flow.clips if trade else [])
        total = quietest_scales(flow, noise, limit, recipe)
        apply_scales(flow, total)
    for _ in range(options.iterations if options.objective == "range" else 0):
        step = _step(flow, options)
        step = torch.minimum(step, limit / total)
        total *= step
        apply_scales(flow, step)
        if float((step - 1).abs().max()) < _CONVERGED:
            break
    changed = sum(bool((total[flow.roots[link.gives]] != 1).any()) for link in flow.links.values())
    note = f"equalized the output channels of {changed} of {len(flow.links)} layers"
    return f"{note}, clips cut elsewhere: the noise of layers is against the model so changed" if trade else note


def one_sample(graph: fx.GraphModule, arguments: Arguments) -> Arguments:
    """The first sample of a batch, if the model takes any number of them."""
    return first_samples(arguments, 1) if takes_any_batch(graph) else arguments


def _step(flow: ChannelFlow, options: Equalize) -> Tensor:
    """s of every channel: sqrt(range where it is read / range where it is given); 1 where one side is missing."""
    gives = torch.zeros(flow.count, dtype=torch.float64)
    reads = torch.zeros(flow.count, dtype=torch.float64)
    for link in flow.links.values():
        raise_to(gives, flow.roots[link.gives], out_range(link.layer, options.merge_bias))
        if link.reads is not None:
            raise_to(reads, flow.roots[link.reads], in_range(link.layer))
    scalable = (gives > 0) & (reads > 0)
    scalable[FIXED] = False
    return torch.where(scalable, (reads / gives).sqrt(), 1.0)[flow.roots]


def raise_to(ranges: Tensor, channels: Tensor, found: Tensor) -> None:
    """The larger of what is there and what is found; next to nothing counts as nothing."""
    found = torch.where(found < _DEAD * found.amax(), 0.0, found)
    ranges.scatter_reduce_(0, channels, found, "amax")


def apply_scales(flow: ChannelFlow, scale: Tensor) -> None:
    """Give every channel times its scale: layers that give it are multiplied, layers that read it divided."""
    for link in flow.links.values():
        scale_outputs(link.layer, scale[flow.roots[link.gives]])
        if link.reads is not None:
            scale_inputs(link.layer, 1 / scale[flow.roots[link.reads]])


class _Ends(fx.Interpreter):
    """The least and greatest value of every channel that some nodes read; 0 counts as seen."""

    def __init__(self, graph: fx.GraphModule, readers: list[fx.Node]) -> None:
        super().__init__(graph)
        self.readers = set(readers)
        self.ends: dict[fx.Node, tuple[Tensor, Tensor]] = {}

    def run_node(self, n: fx.Node) -> Any:
        """The value of a node; the ends of what a reader reads are taken."""
        if n in self.readers:
            x = self.env[n.args[0]]  # type: ignore[index]
            axis = x.ndim - 1 if isinstance(layer_of(n), nn.Linear) else 1
            dims = [d for d in range(x.ndim) if d != axis]
            found = x.amin(dims).double().cpu().clamp_max(0.0), x.amax(dims).double().cpu().clamp_min(0.0)
            low, high = self.ends.get(n, found)
            self.ends[n] = torch.minimum(low, found[0]), torch.maximum(high, found[1])
        return super().run_node(n)


def channel_ends(
    graph: fx.GraphModule, batches: list[Arguments], readers: list[fx.Node]
) -> dict[fx.Node, tuple[Tensor, Tensor]]:
    """The least and greatest value, 0 included, of every channel that each of ``readers`` reads."""
    seen = _Ends(graph, readers)
    with torch.no_grad():
        for args, kwargs in batches:
            seen.run(*args, *kwargs.values())
    return seen.ends


def limits(flow: ChannelFlow, graph: fx.GraphModule, batches: list[Arguments], *, traded: bool = False) -> Tensor:
    """The largest scale of every channel that keeps it clear of the clips it meets; what meets one is fixed.

    Where clips are ``traded`` nothing is fixed, and any channel may grow as far as the cost of cutting it is known.
    """
    limit = torch.full((flow.count,), torch.inf, dtype=torch.float64)
    ends = channel_ends(graph, batches, [clip.node for clip in flow.clips]) if flow.clips else {}
    for clip in flow.clips:
        low, high = ends[clip.node]
        room = torch.where(high > 0, clip.high / high, torch.inf)
        if clip.low < 0:
            room = torch.minimum(room, torch.where(low < 0, clip.low / low, torch.inf))
        if traded:
            room = room.clamp_min(float(SHIFTS[-1].exp()))
        clipped = flow.roots[clip.channels]
        limit.scatter_reduce_(0, clipped, room, "amin")
        flow.roots = torch.where(torch.isin(flow.roots, clipped[room <= 1]), FIXED, flow.roots)
    return limit[flow.roots]
