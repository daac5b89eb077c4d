"""Bias calibration while batches run: each moves every bias towards where the layer's mean output is that in float.

Source: Nagel et al., Data-Free Quantization through Weight Equalization and Bias Correction (arXiv 1906.04721), section
4.2, equation (17), whose expectation is taken batch by batch, as TI's calibration loops do.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..capture.inputs import Arguments
from ..capture.ops import module_of
from ..place.layers import QuantLayer


class BiasCalibration:
    """Shifts of biases, by their layers' nodes: ``b <- b + gain * (mean float output - mean quantized output)``.

    ``gain`` is ``max(factor, 1 / n)`` for the n-th batch: the mean over all batches to begin with, then a moving
    average of ``1 / factor`` batches. Layers are moved in their order, each on what those before it give with their new
    biases.
    """

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self.batches = 0
        self.shifts: dict[str, Tensor] = {}

    def update(self, exact: fx.GraphModule, quantized: fx.GraphModule, batch: Arguments) -> None:
        """Take in one batch; the biases of ``quantized`` move."""
        self.batches += 1
        leaves = torch.utils._pytree.tree_leaves(batch)
        with torch.no_grad():
            reference = _Means(exact)
            reference.run(*leaves, enable_io_processing=False)
            moving = _Moving(quantized, reference.means, max(self.factor, 1.0 / self.batches))
            moving.run(*leaves, enable_io_processing=False)
        for name, step in moving.steps.items():
            self.shifts[name] = self.shifts.get(name, torch.zeros_like(step)) + step

    def apply(self, graph: fx.GraphModule) -> None:
        """Move the biases of a graph that has seen none of it."""
        for name, (layer, _) in _biased(graph).items():
            if name in self.shifts and layer.bias is not None:
                layer.bias.data.add_(self.shifts[name].to(layer.bias))


class _Means(fx.Interpreter):
    """Runs a graph and takes the mean of every output channel of its layers."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.layers = _biased(graph)
        self.means: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.layers:
            self.means[n.name] = _mean(value, self.layers[n.name][1])
        return value


class _Moving(_Means):
    """Moves each bias before its layer's output is read."""

    def __init__(self, graph: fx.GraphModule, reference: dict[str, Tensor], gain: float) -> None:
        super().__init__(graph)
        self.reference, self.gain = reference, gain
        self.steps: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.layers:
            layer, axis = self.layers[n.name]
            step = self.steps[n.name] = self.gain * (self.reference[n.name] - self.means[n.name])
            assert layer.bias is not None
            layer.bias.data.add_(step.to(layer.bias))
            value = value + step.to(value).view(-1, *[1] * (value.ndim - 1 - axis % value.ndim))
        return value


def _biased(graph: fx.GraphModule) -> dict[str, tuple[QuantLayer, int]]:
    """Layers with a bias that one call alone reads, by the names of these calls, with the axis of their channels."""
    layers = {n.name: m for n in graph.graph.nodes if isinstance(m := module_of(n), QuantLayer)}
    calls = Counter(id(layer.layer) for layer in layers.values())
    return {
        name: (layer, -1 if isinstance(layer.layer, nn.Linear) else 1)
        for name, layer in layers.items()
        if layer.bias is not None and calls[id(layer.layer)] == 1
    }


def _mean(value: Tensor, axis: int) -> Tensor:
    return value.mean([d for d in range(value.ndim) if d != axis % value.ndim], dtype=torch.float64)
