"""Activation equalization: move what is hard to quantize from activations into the weights that read them.

Source: Xiao et al., SmoothQuant (arXiv 2211.10438), equations (3) and (4): X' = X diag(s)^-1, W' = diag(s) W with
s_j = max|X_j|^alpha / max|W_j|^(1 - alpha). The division goes into the layers that give X where f(sx) = s f(x) lies
between (``channels.py``), else into a multiplication in front of the layers that read X.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.func import functional_call

from ..capture.inputs import Arguments, first_samples
from ..capture.ops import op_of
from ..grid import TensorSpec, fake_quantize
from ..ranges import activation_grid, activation_statistic, weight_grid
from ..recipe import Recipe
from ..steps import EqualizeActivations
from .channels import FIXED, ChannelFlow, Link
from .equalize import apply_scales, channel_ends, limits, one_sample, raise_to
from .structure import insert_scale
from .weights import in_range, scale_inputs

_ALPHAS = (0.25, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_SEARCH_SAMPLES = 8
_WORTH = 0.9  # of the error: what a multiplication must bring it down to


@dataclass(eq=False)
class _Group:
    """Layers that read the same channels and must therefore share their scales."""

    channels: Tensor
    links: list[tuple[str, Link]]


def equalize_activations(
    graph: fx.GraphModule, batches: list[Arguments], options: EqualizeActivations, recipe: Recipe
) -> str:
    """Scale the channels that layers read, in place; returns what was done in a line."""
    flow = ChannelFlow(graph).follow(one_sample(graph, batches[0]))
    links = {name: link for name, link in flow.links.items() if link.reads is not None}
    ends = channel_ends(graph, batches, [caller for link in links.values() for caller in link.callers])
    reach = {
        name: torch.stack([torch.maximum(-ends[c][0], ends[c][1]) for c in link.callers]).amax(0)
        for name, link in links.items()
    }
    limit = limits(flow, graph, batches)
    inputs = _Inputs(graph, links).record(batches) if options.alpha == "search" else {}
    chosen: list[float] = []

    folded = torch.ones(flow.count, dtype=torch.float64)
    for group in _groups(flow, links.items()):
        act, weight = _ranges(flow, group.links, reach)
        alpha, scale = _best(options, act[group.channels], weight[group.channels], group, flow, inputs, recipe)
        folded[group.channels] = scale
        chosen += [alpha] if alpha is not None else []
    folded[FIXED] = 1.0
    apply_scales(flow, torch.minimum(folded[flow.roots], limit))

    everywhere = recipe.placement == "layerwise" if options.insert is None else options.insert
    inserted = 0
    for source, group in _by_source(flow, links):
        if not everywhere and (options.insert is False or not _is_float(source)):
            continue
        weight = torch.stack([in_range(link.layer) for _, link in group.links]).amax(0)
        alpha, scale = _best(options, reach[group.links[0][0]], weight, group, None, inputs, recipe)
        if alpha is not None:
            insert_scale(graph, [name for name, _ in group.links], scale)
            for _, link in group.links:
                scale_inputs(link.layer, 1 / scale)
            chosen.append(alpha)
            inserted += 1
    spread = f"alpha {min(chosen):g} to {max(chosen):g}" if chosen else "nothing to scale"
    return f"scaled what {len(chosen)} groups of layers read ({inserted} by a multiplication), {spread}"


def _groups(flow: ChannelFlow, links: Iterable[tuple[str, Link]]) -> list[_Group]:
    """Layers by the channels that they read, where none of these is fixed."""
    groups: list[_Group] = []
    for name, link in links:
        assert link.reads is not None
        channels = torch.unique(flow.roots[link.reads])
        if bool((channels == FIXED).all()):
            continue
        channels = channels[channels != FIXED]
        touching = [g for g in groups if bool(torch.isin(g.channels, channels).any())]
        merged = _Group(torch.unique(torch.cat([channels, *(g.channels for g in touching)])),
                        [*(item for g in touching for item in g.links), (name, link)])  # fmt: skip
        groups = [g for g in groups if g not in touching] + [merged]
    return groups


def _by_source(flow: ChannelFlow, links: dict[str, Link]) -> list[tuple[fx.Node, _Group]]:
    """Layers by the value that they read, where nothing before it can be scaled."""
    found: dict[tuple[fx.Node, bool], _Group] = {}
    for name, link in links.items():
        assert link.reads is not None
        source = link.callers[0].args[0]
        if len(link.callers) == 1 and bool((flow.roots[link.reads] == FIXED).all()):
            assert isinstance(source, fx.Node)
            along_last = isinstance(link.layer, torch.nn.Linear)
            group = found.setdefault((source, along_last), _Group(torch.arange(len(link.reads)), []))
            group.links.append((name, link))
    return [(source, group) for (source, _), group in found.items()]


def _is_float(node: fx.Node) -> bool:
    """Whether a value is computed in float, so that one more factor costs no rounding; the model's inputs are not."""
    while op_of(node).role == "move" and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return op_of(node).role == "float" and node.op != "placeholder"


def _ranges(flow: ChannelFlow, links: list[tuple[str, Link]], reach: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The largest activation and the largest weight on every channel, over the layers that read it."""
    act = torch.zeros(flow.count, dtype=torch.float64)
    weight = torch.zeros(flow.count, dtype=torch.float64)
    for name, link in links:
        assert link.reads is not None
        raise_to(act, flow.roots[link.reads], reach[name])
        raise_to(weight, flow.roots[link.reads], in_range(link.layer))
    return act, weight


def _scale(act: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """1 / s of equation (4) for every channel, its geometric mean 1; 1 where a channel is dead on one side."""
    alive = (act > 0) & (weight > 0)
    s = torch.where(alive, act.clamp_min(1e-30) ** alpha / weight.clamp_min(1e-30) ** (1 - alpha), 1.0)
    s = torch.where(alive, s / torch.exp(s[alive].log().mean()), 1.0) if bool(alive.any()) else s
    return 1 / s


def _best(
    options: EqualizeActivations, act: Tensor, weight: Tensor, group: _Group, flow: ChannelFlow | None,
    inputs: dict[str, Tensor], recipe: Recipe,
) -> tuple[float | None, Tensor]:  # fmt: skip
    """Alpha and scales of a group; alpha None where leaving it as it is loses least. ``flow`` None: to be inserted."""
    if options.alpha != "search":
        return options.alpha, _scale(act, weight, options.alpha)
    best, chosen, least = None, torch.ones_like(act), math.inf
    for alpha in (None, *_ALPHAS):
        scale = torch.ones_like(act) if alpha is None else _scale(act, weight, alpha)
        error = 0.0
        for name, link in group.links:
            assert link.reads is not None
            mine = scale if flow is None else _of_link(scale, group.channels, flow.roots[link.reads])
            error += _output_error(link, inputs[name], mine, recipe)
        if alpha is None and flow is None:
            error *= _WORTH
        if error < least:
            best, chosen, least = alpha, scale, error
    return best, chosen


def _of_link(scale: Tensor, channels: Tensor, roots: Tensor) -> Tensor:
    """A group's scales in the order of one layer's inputs; fixed channels have 1."""
    position = torch.searchsorted(channels, roots).clamp_max(len(channels) - 1)
    return torch.where(channels[position] == roots, scale[position], 1.0)


def _output_error(link: Link, x: Tensor, scale: Tensor, recipe: Recipe) -> float:
    """The squared error of a layer's output, relative to its signal, with its input and weight on their grids."""
    layer = link.layer
    weight, axis = layer.weight, -1 if isinstance(layer, torch.nn.Linear) else 1
    assert isinstance(weight, Tensor)
    shape = [1] * x.ndim
    shape[axis] = -1
    moved = x * scale.float().view(shape)
    kept = weight.data.clone()
    scale_inputs(layer, 1 / scale)
    changed = weight.data
    weight.data = kept
    exact = layer(x)
    found = functional_call(
        layer, {"weight": _on_grid(changed, recipe.weights, layer)}, (_on_grid(moved, recipe.activations),)
    )
    return float((found - exact).square().sum() / exact.square().sum().clamp_min(1e-30))


def _on_grid(x: Tensor, spec: TensorSpec | None, layer: torch.nn.Module | None = None) -> Tensor:
    if spec is None:
        return x.clone()
    if layer is not None:
        return fake_quantize(x, weight_grid(x, spec, 1 if "Transpose" in type(layer).__name__ else 0))
    statistic = activation_statistic(spec, x.numel())
    statistic.update(x)
    return fake_quantize(x, activation_grid(statistic, spec, non_negative=bool((x >= 0).all())))


class _Inputs(fx.Interpreter):
    """What every layer reads, for a few samples."""

    def __init__(self, graph: fx.GraphModule, links: dict[str, Link]) -> None:
        super().__init__(graph)
        self.callers = {caller: name for name, link in links.items() for caller in link.callers}
        self.found: dict[str, Tensor] = {}

    def record(self, batches: list[Arguments]) -> dict[str, Tensor]:
        """By layer name, from the first samples of the first batch."""
        args, kwargs = first_samples(batches[0], _SEARCH_SAMPLES)
        with torch.no_grad():
            self.run(*args, *kwargs.values())
        return self.found

    def run_node(self, n: fx.Node) -> object:
        """The value of a node; what a layer reads is kept."""
        if n in self.callers:
            self.found[self.callers[n]] = self.env[n.args[0]]  # type: ignore[index]
        return super().run_node(n)
