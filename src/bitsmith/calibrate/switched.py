"""A calibrated graph whose Quantizers are switched on and off layer by layer: what each of them costs."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from ..capture.inputs import Arguments
from ..capture.ops import module_of, op_of, quantizer_of
from ..place.layers import QuantLayer
from .noise import Noise

Values = dict[fx.Node, Any]


@dataclass(frozen=True)
class Switches:
    """What is on a grid: every edge, and, at each compute layer, its weight and what it reads."""

    edges: bool
    weights: bool
    inputs: bool


FLOAT = Switches(edges=False, weights=False, inputs=False)
QUANTIZED = Switches(edges=True, weights=True, inputs=True)
WEIGHTS_ONLY = Switches(edges=False, weights=True, inputs=False)
ACTIVATIONS_ONLY = Switches(edges=True, weights=False, inputs=True)
ALONE = Switches(edges=False, weights=True, inputs=True)  # of one layer among float ones
LEFT_OUT = Switches(edges=True, weights=False, inputs=False)  # of one layer among quantized ones


class Switched:
    """Runs a calibrated graph with some of it in float.

    ``floats`` are the layers as they were before any step changed their weights, by name, where one did.
    A layer reads a Quantizer's value or the value before it; other readers of the same edge are not touched.
    """

    def __init__(self, graph: fx.GraphModule, floats: Mapping[str, nn.Module] | None = None) -> None:
        self.graph, self.floats = graph, floats or {}
        self.nodes = [node for node in graph.graph.nodes if node.op not in ("placeholder", "output")]
        self.layers = [node for node in self.nodes if op_of(node).role == "compute" and _is_quantized(node)]
        output = next(node for node in graph.graph.nodes if node.op == "output")
        self.outputs: list[fx.Node] = output.all_input_nodes

    def run(self, batch: Arguments, switches: Switches) -> Values:
        """All values, with every layer switched alike."""
        leaves = torch.utils._pytree.tree_leaves(batch)
        values: Values = dict(zip((n for n in self.graph.graph.nodes if n.op == "placeholder"), leaves))
        for node in self.nodes:
            values[node] = self._value(node, values, switches)
        return values

    def rerun(self, values: Values, changed: Collection[fx.Node], rest: Switches, these: Switches) -> Values:
        """``values`` of a run with ``rest``, after the ``changed`` layers are switched to ``these``."""
        values = dict(values)
        for node in self.after(changed):
            values[node] = self._value(node, values, these if node in changed else rest)
        return values

    def after(self, changed: Collection[fx.Node]) -> list[fx.Node]:
        """These nodes and all that depends on them, in order."""
        touched = set(changed)
        for node in self.nodes:
            if any(source in touched for source in node.all_input_nodes):
                touched.add(node)
        return [node for node in self.nodes if node in touched]

    def local(self, values: Values, node: fx.Node) -> Any:
        """What one layer gives with its Quantizers on, for the float inputs that a float run has."""
        return self._value(node, values, ALONE)

    def compare(self, noise: Noise, exact: Values, values: Values) -> None:
        """Add the outputs of one run to ``noise``."""
        for node in self.outputs:
            if isinstance(exact[node], Tensor) and exact[node].is_floating_point():
                noise.update(exact[node], values[node])

    def _value(self, node: fx.Node, values: Values, switches: Switches) -> Any:
        quantizer = quantizer_of(node)
        if quantizer is not None:
            x = values[node.args[0]]  # type: ignore[index]
            return quantizer(x) if switches.edges else x
        if op_of(node).role != "compute":
            return self._call(node, values, switches)
        read = dict(values)
        for source in node.all_input_nodes:
            if (quantizer := quantizer_of(source)) is not None:
                before = values[source.args[0]]  # type: ignore[index]
                read[source] = quantizer(before) if switches.inputs else before
        return self._call(node, read, switches)

    def _call(self, node: fx.Node, values: Values, switches: Switches) -> Any:
        if node.op == "get_attr":
            return _attribute(self.graph, str(node.target))
        args, kwargs = fx.map_arg(node.args, values.__getitem__), fx.map_arg(node.kwargs, values.__getitem__)
        if node.op != "call_module":
            return node.target(*args, **kwargs)  # type: ignore[operator]
        module = self.graph.get_submodule(str(node.target))
        if not isinstance(module, QuantLayer):
            return module(*args, **kwargs)
        exact = self.floats.get(str(node.target), module.layer)
        if not switches.weights:
            return exact(*args, **kwargs)
        parameters = module.quantized_parameters()
        if not switches.edges and "bias" in parameters:  # a corrected bias makes up for errors that are not there
            bias: Any = exact.bias
            parameters["bias"] = bias if module.bias_quantizer is None else module.bias_quantizer(bias)
        return functional_call(module.layer, parameters, args, kwargs)


def _is_quantized(node: fx.Node) -> bool:
    layer = module_of(node)
    if isinstance(layer, QuantLayer) and layer.weight_quantizer is not None:
        return True
    return any(quantizer_of(source) is not None for source in node.all_input_nodes)


def _attribute(root: nn.Module, path: str) -> Any:
    value: Any = root
    for part in path.split("."):
        value = getattr(value, part)
    return value


def decibels(noises: Iterable[Noise]) -> list[float | None]:
    """SQNR of each, None where there is no noise or no signal."""
    return [None if (db := noise.db) is None or db == float("inf") else db for noise in noises]
