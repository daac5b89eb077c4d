"""What the outputs feel of small changes at layers and clips, to first order, summed over samples.

A change of the outputs is a sum over all values of gradient times change. What is the same at every position of a
sample, as the error of a weight is, adds up there before it is squared; what differs from value to value, as the
rounding of activations does, is squared first. With random signs as the outputs' weights, the square of one such
projection is on average the squared change of all outputs together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from ..capture.inputs import Arguments, sample, sample_count
from .channels import Clip, Link
from .structure import takes_any_batch
from .weights import arranged, out_channels

SHIFTS = torch.linspace(-3.0, 3.0, 13, dtype=torch.float64) * torch.tensor(2.0).log()  # log scales in front of a clip


@dataclass
class Felt:
    """Squared gradients at a layer's weights (groups, out, in), taps summed, and at its inputs; the inputs' peaks."""

    weights: Tensor
    inputs: Tensor
    peaks: Tensor


@dataclass
class _Sums:
    """Over samples: products of the gradients at weights and bias, squares at the inputs, the inputs' sum and count."""

    weight_weight: Any = 0.0
    weight_bias: Any = 0.0
    bias_bias: Any = 0.0
    inputs: Any = 0.0
    total: Any = 0.0
    count: int = 0
    peaks: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.float64))


class Gradients(fx.Interpreter):
    """Takes gradients of a graph's outputs at ``links`` (layers that read channels) and behind ``clips``, by name.

    ``centred`` leaves out what the mean of a layer's inputs adds, for recipes that take the mean error out of biases.
    ``layers`` and ``clipped`` hold what was found: of a clip, by scale (``SHIFTS``) and channel, what it costs to cut
    elsewhere.
    """

    def __init__(self, graph: fx.GraphModule, links: dict[str, Link], clips: list[Clip], *, centred: bool) -> None:
        super().__init__(graph)
        self.graph_module, self.links, self.centred = graph, links, centred
        self.callers = {node: name for name, link in links.items() for node in link.callers}
        self.clips = {clip.node: clip for clip in clips}
        self.clipped: dict[fx.Node, Tensor] = {}
        self.sums = {name: _Sums() for name in links}

    @torch.enable_grad()
    def take(self, batches: list[Arguments], count: int) -> Gradients:
        """From the first ``count`` samples, one by one; whole batches where the graph takes no others."""
        generator = torch.Generator().manual_seed(0)
        for args, kwargs in _one_by_one(self.graph_module, batches, count):
            self._start()
            outputs = self.run(*args, *kwargs.values())
            found = [o for o in torch.utils._pytree.tree_leaves(outputs) if isinstance(o, Tensor) and o.requires_grad]
            signs = [(torch.randint(2, o.shape, generator=generator) * 2 - 1).to(o) for o in found]
            at = [*self._weights.values(), *self._biases.values(), *(bump for *_, bump in self._bumps)]
            gradients = iter(torch.autograd.grad(found, at, signs, materialize_grads=True))
            with torch.no_grad():
                self._add(gradients)
        return self

    @property
    def layers(self) -> dict[str, Felt]:
        """What was found at each layer."""
        return {name: self._felt(name, sums) for name, sums in self.sums.items()}

    def run_node(self, n: fx.Node) -> Any:
        """The value of a node; zeros whose gradient is wanted are added around layers and behind clips."""
        if n not in self.callers and n not in self.clips:
            return super().run_node(n)
        source = n.args[0]
        assert isinstance(source, fx.Node)
        x: Tensor = self.env[source]
        if n in self.clips:
            value = super().run_node(n)
            self._bumps.append((n, x.detach(), torch.zeros_like(value, requires_grad=True)))
            return value + self._bumps[-1][-1]
        name = self.callers[n]
        layer = self.links[name].layer
        self._bumps.append((n, x.detach(), torch.zeros_like(x, requires_grad=True)))
        value = functional_call(layer, {"weight": self._weights[name]}, (x + self._bumps[-1][-1],))
        return value + self._biases[name].view(-1, *[1] * (value.ndim - 2 if _axis(layer) == 1 else 0))

    def _start(self) -> None:
        layers = {name: link.layer for name, link in self.links.items()}
        self._weights = {n: x.weight.detach().clone().requires_grad_() for n, x in layers.items()}  # type: ignore[operator]
        self._biases = {
            n: torch.zeros(out_channels(x), device=x.weight.device, requires_grad=True)  # type: ignore[arg-type]
            for n, x in layers.items()
        }
        self._bumps: list[tuple[fx.Node, Tensor, Tensor]] = []

    def _add(self, gradients: Iterator[Tensor]) -> None:
        at_weights = {name: next(gradients) for name in self._weights}
        at_biases = {name: next(gradients) for name in self._biases}
        for name, sums in self.sums.items():
            weight = arranged(self.links[name].layer, at_weights[name]).double()
            bias = at_biases[name].double().view(*weight.shape[:2], 1)
            sums.weight_weight += weight.square().sum(3)
            sums.weight_bias += weight.sum(3) * bias
            sums.bias_bias += bias.square() * weight.shape[3]
        for (node, x, _), gradient in zip(self._bumps, gradients):
            if node in self.clips:
                self.clipped[node] = self.clipped.get(node, 0.0) + _cut_elsewhere(self.clips[node], x, gradient)
                continue
            sums, axis = self.sums[self.callers[node]], _axis(self.links[self.callers[node]].layer)
            values = _rows(x, axis)
            sums.inputs += _rows(gradient, axis).square().sum(0)
            sums.total += values.sum(0)
            sums.count += len(values)
            sums.peaks = sums.peaks.maximum(values.abs().amax(0).cpu())

    def _felt(self, name: str, sums: _Sums) -> Felt:
        groups, _, inputs = sums.weight_weight.shape
        mean = (sums.total / max(sums.count, 1) if self.centred else 0.0 * sums.total).view(groups, 1, inputs)
        weights = sums.weight_weight - 2 * mean * sums.weight_bias + mean.square() * sums.bias_bias
        return Felt(*(x.cpu() for x in (weights.clamp_min(0.0), sums.inputs, sums.peaks)))


def _cut_elsewhere(clip: Clip, x: Tensor, gradient: Tensor) -> Tensor:
    """The squared change of the outputs, by scale and channel, where each is scaled before the clip and back after."""
    others = [d for d in range(x.ndim) if d != 1]
    exact = x.clamp(clip.low, clip.high)
    changes = (((x * s).clamp(clip.low, clip.high) / s - exact) * gradient for s in SHIFTS.exp().tolist())
    return torch.stack([change.sum(others).double().square() for change in changes]).cpu()


def _one_by_one(graph: fx.GraphModule, batches: list[Arguments], count: int) -> Iterator[Arguments]:
    cut = takes_any_batch(graph)
    for batch in batches:
        if count > 0:
            yield from (sample(batch, i) for i in range(min(count, sample_count(batch)))) if cut else (batch,)
        count -= sample_count(batch)


def _axis(layer: nn.Module) -> int:
    return -1 if isinstance(layer, nn.Linear) else 1


def _rows(x: Tensor, axis: int) -> Tensor:
    return x.movedim(axis, -1).reshape(-1, x.shape[axis]).double()
