"""Equalization for the least noise at the outputs, in place of equal ranges.

To first order, what rounding does to the outputs is a sum over layers (``gradients.py``). With a step d of a layer's
grid its weights add d^2 / 12 * sum_oi f_oi, where f_oi is the squared gradient of the outputs at them; the step a of
its input adds a^2 / 12 * sum_i h_i, with the squared gradients h_i there. A scale on a channel multiplies its rows
and divides its columns, and gradients the other way round, so that all of this is a function of the scales alone,
which gradient descent on their logarithms minimizes. What a clip costs that cuts a channel elsewhere is a table by
its scale.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ..capture.inputs import Arguments
from ..grid import TensorSpec
from ..recipe import Recipe
from .channels import FIXED, ChannelFlow, Clip, Link
from .gradients import SHIFTS, Felt, Gradients
from .weights import by_channel

_SAMPLES = 64
_STEPS, _RATE = 400, 0.02
_LEAST = 1e-12


@dataclass
class _Layer:
    """log of the largest weights and of f (groups, out, in), of h and of the input's peaks, by channel."""

    link: Link
    weights: Tensor
    felt: Tensor
    input_felt: Tensor
    peaks: Tensor


@dataclass
class Noise:
    """The noise at the outputs as a function of the scales: of layers, and of clips that may cut elsewhere."""

    layers: list[_Layer]
    clips: list[tuple[Tensor, Tensor]]  # the channels in front of a clip, and what cutting them elsewhere costs


def feel(
    flow: ChannelFlow, graph: fx.GraphModule, batches: list[Arguments], recipe: Recipe, clips: list[Clip]
) -> Noise:
    """Measure what noise depends on, from a few samples."""
    links = {name: link for name, link in flow.links.items() if link.reads is not None}
    centred = any(step.stage == "bias" for step in recipe.steps)
    found = Gradients(graph, links, clips, centred=centred).take(batches, _SAMPLES)
    tables = [(clip.channels, found.clipped[clip.node].float()) for clip in clips]
    return Noise([_layer(links[name], felt) for name, felt in found.layers.items()], tables)


def quietest_scales(flow: ChannelFlow, noise: Noise, limit: Tensor, recipe: Recipe) -> Tensor:
    """The scale of every channel that leaves the least noise at the outputs; never above ``limit``."""
    free = _free(flow)
    most = torch.full((flow.count,), torch.inf, dtype=torch.float64).scatter_reduce(0, flow.roots, limit, "amin").log()
    log_scale = torch.zeros(flow.count, requires_grad=True)
    optimizer = torch.optim.Adam([log_scale], lr=_RATE)
    best, least = log_scale.detach().clone(), torch.inf
    with torch.enable_grad():
        for step in range(_STEPS):
            optimizer.param_groups[0]["lr"] = _RATE * (1 - step / _STEPS)
            optimizer.zero_grad()
            scales = log_scale[flow.roots]
            parts = [_of_layer(layer, scales, recipe) for layer in noise.layers]
            parts += [_of_clip(scales[channels], table) for channels, table in noise.clips]
            total = torch.stack(parts).logsumexp(0)
            if total.item() < least:
                best, least = log_scale.detach().clone(), total.item()
            torch.autograd.backward(total)
            optimizer.step()
            with torch.no_grad():
                log_scale.copy_(torch.where(free, torch.minimum(log_scale, most), 0.0))
    return best.double().exp()[flow.roots]


def _free(flow: ChannelFlow) -> Tensor:
    """Which channels some layer gives and some layer reads."""
    given, read = torch.zeros(flow.count, dtype=torch.bool), torch.zeros(flow.count, dtype=torch.bool)
    for link in flow.links.values():
        given[flow.roots[link.gives]] = True
        if link.reads is not None:
            read[flow.roots[link.reads]] = True
    free = given & read
    free[FIXED] = False
    return free


def _of_layer(layer: _Layer, log_scale: Tensor, recipe: Recipe) -> Tensor:
    """The logarithm of the noise that a layer's weights and input add to the outputs."""
    groups, outputs, inputs = layer.weights.shape
    reads = log_scale[layer.link.reads]
    parts = []
    if recipe.weights is not None:
        moved = log_scale[layer.link.gives].view(groups, outputs, 1) - reads.view(groups, 1, inputs)
        largest = (layer.weights + moved).amax(2, keepdim=True)
        step = largest if recipe.weights.granularity != "tensor" else largest.amax()
        parts.append((layer.felt - 2 * moved + 2 * step).flatten().logsumexp(0) + _log_step(recipe.weights, 2.0))
    if recipe.activations is not None:
        step = (layer.peaks + reads).amax()
        parts.append((layer.input_felt - 2 * reads).logsumexp(0) + 2 * step + _log_step(recipe.activations, 1.0))
    return torch.stack(parts).logsumexp(0)


def _log_step(spec: TensorSpec, width: float) -> float:
    """log of what rounding adds, d^2 / 12, on a grid whose range has this width."""
    bits = getattr(spec.format, "bits", 8)
    return 2 * math.log(width * 2.0**-bits) - math.log(12)


def _of_clip(log_scale: Tensor, table: Tensor) -> Tensor:
    """The logarithm of what clips cost that cut channels elsewhere: between entries of the table, roots are linear."""
    at = ((log_scale - SHIFTS[0]) / (SHIFTS[1] - SHIFTS[0])).float().clamp(0.0, len(SHIFTS) - 1.001)
    below = at.detach().floor().long().unsqueeze(0)
    roots = torch.lerp(table.gather(0, below)[0].sqrt(), table.gather(0, below + 1)[0].sqrt(), at - below[0])
    return roots.square().sum().clamp_min(_LEAST * table.max().clamp_min(_LEAST)).log()


def _layer(link: Link, felt: Felt) -> _Layer:
    largest = by_channel(link.layer).abs().amax(3).double().cpu()
    logs = [
        x.clamp_min(_LEAST * x.max().clamp_min(_LEAST)).log().float()
        for x in (largest, felt.weights, felt.inputs, felt.peaks)
    ]
    return _Layer(link, *logs)
