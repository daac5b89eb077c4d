"""Equalization for the least noise at the outputs, in place of equal ranges.

To first order, what rounding does to the outputs is a sum over layers. With a step d of a layer's grid its weights add
d^2 / 12 * sum_o g_o * sum_i e_i, where g_o is the squared gradient of the outputs at output channel o and e_i the power
of input channel i; the step a of its input adds a^2 / 12 * sum_i h_i, with the squared gradients h_i there. A scale on
a channel multiplies its rows and its power and divides its columns and gradients, so that all of this is a function of
the scales alone, which gradient descent on their logarithms minimizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..capture.inputs import Arguments, first_samples
from ..grid import TensorSpec
from ..recipe import Recipe
from .channels import FIXED, ChannelFlow, Link
from .weights import by_channel

_SAMPLES = 64
_STEPS, _RATE = 400, 0.05
_LEAST = 1e-12


@dataclass
class _Layer:
    """log of the largest weights (groups, out, in), log of g, h, e and of the input's peaks, by channel."""

    link: Link
    weights: Tensor
    gradients: Tensor
    input_gradients: Tensor
    power: Tensor
    peaks: Tensor


class _Gradients(fx.Interpreter):
    """Runs a graph so that gradients at the inputs and outputs of layers, and what these read, can be taken."""

    def __init__(self, graph: fx.GraphModule, callers: set[fx.Node]) -> None:
        super().__init__(graph)
        self.callers = callers
        self.taken: list[tuple[fx.Node, Tensor, Tensor, Tensor]] = []

    def run_node(self, n: fx.Node) -> Any:
        """The value of a node; zeros whose gradient is wanted are added around layers."""
        if n not in self.callers:
            return super().run_node(n)
        source = n.args[0]
        assert isinstance(source, fx.Node)
        x: Tensor = self.env[source]
        before = torch.zeros_like(x, requires_grad=True)
        output = self.module.get_submodule(str(n.target))(x + before)
        behind = torch.zeros_like(output, requires_grad=True)
        self.taken.append((n, x.detach(), before, behind))
        return output + behind


@torch.enable_grad()
def quietest_scales(
    flow: ChannelFlow, graph: fx.GraphModule, batch: Arguments, limit: Tensor, recipe: Recipe
) -> Tensor:
    """The scale of every channel that leaves the least noise at the outputs; never above ``limit``."""
    layers = _measure(flow, graph, batch)
    given, read = torch.zeros(flow.count, dtype=torch.bool), torch.zeros(flow.count, dtype=torch.bool)
    for link in flow.links.values():
        given[flow.roots[link.gives]] = True
        if link.reads is not None:
            read[flow.roots[link.reads]] = True
    free = given & read
    free[FIXED] = False
    most = torch.full((flow.count,), torch.inf, dtype=torch.float64).scatter_reduce(0, flow.roots, limit, "amin").log()
    log_scale = torch.zeros(flow.count, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([log_scale], lr=_RATE)
    best, least = torch.zeros_like(log_scale), torch.inf
    for step in range(_STEPS):
        optimizer.param_groups[0]["lr"] = _RATE * (1 - step / _STEPS)
        optimizer.zero_grad()
        noise = torch.stack([_noise(layer, log_scale[flow.roots], recipe) for layer in layers]).logsumexp(0)
        if noise.item() < least:
            best, least = log_scale.detach().clone(), noise.item()
        torch.autograd.backward(noise)
        optimizer.step()
        with torch.no_grad():
            log_scale.copy_(torch.where(free, torch.minimum(log_scale, most), 0.0))
    return best.exp()[flow.roots]


def _noise(layer: _Layer, log_scale: Tensor, recipe: Recipe) -> Tensor:
    """The logarithm of the noise that a layer's weights and input add to the outputs."""
    gives, reads = log_scale[layer.link.gives], log_scale[layer.link.reads]
    groups, outputs, inputs = layer.weights.shape
    parts = []
    if recipe.weights is not None:
        by_output, by_input = gives.view(groups, outputs, 1), reads.view(groups, 1, inputs)
        peaks = (layer.weights + by_output - by_input).amax(2)
        step = peaks if recipe.weights.granularity != "tensor" else peaks.amax()
        felt = layer.gradients.view(groups, outputs) - 2 * by_output.squeeze(2) + 2 * step
        power = (layer.power + 2 * reads).view(groups, inputs).logsumexp(1, keepdim=True)
        parts.append((felt + power).flatten().logsumexp(0) + _log_step(recipe.weights))
    if recipe.activations is not None:
        step = (layer.peaks + reads).amax()
        parts.append((layer.input_gradients - 2 * reads).logsumexp(0) + 2 * step + _log_step(recipe.activations))
    return torch.stack(parts).logsumexp(0)


def _log_step(spec: TensorSpec) -> float:
    """log of the squared step of a grid whose range is 1."""
    return float(torch.tensor(2.0 ** -getattr(spec.format, "bits", 8)).square().log())


def _measure(flow: ChannelFlow, graph: fx.GraphModule, batch: Arguments) -> list[_Layer]:
    links = [link for link in flow.links.values() if link.reads is not None]
    callers = {node: link for link in links for node in link.callers}
    sums: dict[int, list[Tensor]] = {}
    args = first_samples(batch, _SAMPLES)
    generator = torch.Generator().manual_seed(0)
    run = _Gradients(graph, set(callers))
    with torch.enable_grad():
        outputs = run.run(*args[0], *args[1].values())
    found = [o for o in torch.utils._pytree.tree_leaves(outputs) if isinstance(o, Tensor) and o.requires_grad]
    signs = [(torch.randint(2, o.shape, generator=generator) * 2 - 1).to(o) for o in found]
    bumps = [bump for _, _, *both in run.taken for bump in both]
    gradients = torch.autograd.grad(found, bumps, signs, materialize_grads=True)
    for (node, x, *_), before, behind in zip(run.taken, gradients[::2], gradients[1::2]):
        link = callers[node]
        axis = -1 if isinstance(link.layer, nn.Linear) else 1
        at_output, at_input, values = (_rows(t, axis) for t in (behind, before, x))
        own = [at_output.square().sum(0), at_input.square().sum(0), values.square().mean(0), values.abs().amax(0)]
        old = sums.get(id(link))
        sums[id(link)] = own if old is None else [*(a + b for a, b in zip(old[:3], own)), old[3].maximum(own[3])]
    return [_layer(link, *sums[id(link)]) for link in links]


def _rows(x: Tensor, axis: int) -> Tensor:
    return x.movedim(axis, -1).reshape(-1, x.shape[axis]).double()


def _layer(link: Link, gradients: Tensor, input_gradients: Tensor, power: Tensor, peaks: Tensor) -> _Layer:
    weight = by_channel(link.layer)
    largest, taps = weight.abs().amax(3).double(), weight.shape[3]
    logs = [
        x.clamp_min(_LEAST * x.max().clamp_min(_LEAST)).log()
        for x in (largest, gradients, input_gradients, power * taps, peaks)
    ]
    return _Layer(link, *logs)
