"""How much work an operator is: multiply-accumulates for one sample."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from ..capture.ops import layer_of, op_of


def size_of(dimension: Any) -> int:
    """A dimension as a number, with one sample in the batch."""
    if isinstance(dimension, int):
        return dimension
    expression = dimension.node.expr
    return int(expression.subs(dict.fromkeys(expression.free_symbols, 1)))


def elements_of(node: fx.Node) -> int:
    """Elements of a node's output for one sample."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return 0
    return math.prod(map(size_of, value.shape))


def macs_of(node: fx.Node) -> int:
    """Multiply-accumulates of a compute node for one sample; 0 for other nodes."""
    op = op_of(node)
    if op.role != "compute":
        return 0
    if op.name == "matmul":
        left = node.args[0]
        assert isinstance(left, fx.Node)
        return elements_of(node) * size_of(left.meta["val"].shape[-1])
    layer: Any = layer_of(node)
    if layer is None:
        weight = node.args[1]
        assert isinstance(weight, fx.Node)
        return elements_of(node) * math.prod(map(size_of, weight.meta["val"].shape[1:]))
    per_output: int = math.prod(layer.weight.shape[1:])
    if op.name == "conv_transpose":  # every input element meets (out / groups) * kernel weights
        source = node.args[0]
        assert isinstance(source, fx.Node)
        return elements_of(source) * per_output
    return elements_of(node) * per_output
