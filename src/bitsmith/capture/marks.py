"""What the author of a model wrote about its quantization, carried through capture.

A Quantizer inside the user's model would be traced into arithmetic. While a model is captured, each one is a mark
instead: an operator without effect that bears its name, and that placement turns back into a Quantizer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn

from ..grid import Quantizer, TensorSpec

INPUT = "input_quantizer"  # the attribute that holds the Quantizer of what one layer reads


class LayerSpecs(NamedTuple):
    """Specs of a layer's parameters; None where the recipe's hold."""

    weights: TensorSpec | None = None
    bias: TensorSpec | None = None


@dataclass(frozen=True)
class Handwritten:
    """Specs by the name of a mark, and by the path of a layer; ``alone``: nothing else is to be quantized."""

    values: dict[str, TensorSpec | None] = field(default_factory=dict)
    layers: dict[str, LayerSpecs] = field(default_factory=dict)
    alone: bool = False

    def of_layer(self, name: str) -> LayerSpecs | None:
        """The specs of a layer: those of the innermost module with specs around it."""
        while name:
            if name in self.layers:
                return self.layers[name]
            name = name.rpartition(".")[0]
        return self.layers.get("")


@torch.library.custom_op("bitsmith::mark", mutates_args=())
def _mark(x: Tensor, name: str) -> Tensor:
    return x.clone()


@_mark.register_fake
def _(x: Tensor, name: str) -> Tensor:
    return torch.empty_like(x)


@contextmanager
def marking(model: nn.Module) -> Iterator[None]:
    """Let every Quantizer of a value in ``model`` leave a mark, and those of parameters do nothing."""
    quantizers = {name: m for name, m in model.named_modules() if isinstance(m, Quantizer)}
    for name, quantizer in quantizers.items():
        of_parameter = getattr(quantizer, "of_parameter", False)
        quantizer.forward = _same if of_parameter else partial(_leave, name)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for quantizer in quantizers.values():
            del quantizer.__dict__["forward"]


def _same(x: Tensor) -> Tensor:
    return x


def _leave(name: str, x: Tensor) -> Tensor:
    marked: Tensor = torch.ops.bitsmith.mark(x, name)
    return marked


def handwritten(model: nn.Module) -> Handwritten:
    """What the modules of ``model`` carry."""
    found = Handwritten()
    for name, module in model.named_modules():
        if isinstance(module, Quantizer) and not getattr(module, "of_parameter", False):
            found.values[name] = getattr(module, "carried", module.spec)
        elif isinstance(specs := getattr(module, "specs", None), LayerSpecs):
            found.layers[name] = specs
    return found


@dataclass(frozen=True)
class Marks:
    """Marks by the node whose value they are on, and those of single edges by (source, consumer)."""

    values: dict[fx.Node, str] = field(default_factory=dict)
    edges: dict[tuple[fx.Node, fx.Node], str] = field(default_factory=dict)


def take_marks(graph: fx.GraphModule) -> Marks:
    """Take all marks out of a graph; where several are on one value, the last of them holds."""
    marks = Marks()
    for node in list(graph.graph.nodes):
        if node.target is not torch.ops.bitsmith.mark.default:
            continue
        source, name = node.args
        if name.rpartition(".")[2] == INPUT:
            marks.edges.update({(source, user): name for user in node.users})
        else:
            marks.values[source] = name
        node.replace_all_uses_with(source)
        graph.graph.erase_node(node)
    return marks
