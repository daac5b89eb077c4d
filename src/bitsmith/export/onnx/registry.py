"""The tables of what can be written: ATen operators and layers, each with the function that writes it.

Adding an operator is one decorated function (or one line in a table such as ``ops_math.UNARY``):

    @lowers("aten.relu.default")
    def relu(call: Call) -> str:
        return call.emit("Relu", call.tensor("self"))
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn

from ...errors import UnsupportedOperatorError
from ...grid import Grid
from .builder import Builder, Dim

Result = str | tuple[str, ...]
Lowering = Callable[["Call"], Result]

FUNCTIONS: dict[str, Lowering] = {}
LAYERS: dict[type[nn.Module], Callable[[LayerCall], str]] = {}


def lowers(*names: str) -> Callable[[Lowering], Lowering]:
    """Register a function as the writer of ATen overloads, by their names (``aten.add.Tensor``)."""

    def register(function: Lowering) -> Lowering:
        for name in names:
            assert name not in FUNCTIONS, f"{name} has two writers"
            FUNCTIONS[name] = function
        return function

    return register


def lowers_layer(
    *types: type[nn.Module],
) -> Callable[[Callable[[LayerCall], str]], Callable[[LayerCall], str]]:
    """Register a function as the writer of layer types."""

    def register(function: Callable[[LayerCall], str]) -> Callable[[LayerCall], str]:
        for layer_type in types:
            LAYERS[layer_type] = function
        return function

    return register


@dataclass(frozen=True)
class Call:
    """One ``call_function`` node with its arguments bound to the operator's schema."""

    builder: Builder
    node: fx.Node

    @cached_property
    def args(self) -> dict[str, Any]:
        """Arguments by the schema's names, defaults filled in."""
        target = self.node.target
        if not isinstance(target, torch._ops.OpOverload):
            return {"self": self.node.args[0]}
        bound: dict[str, Any] = {}
        for i, argument in enumerate(target._schema.arguments):
            if i < len(self.node.args):
                bound[argument.name] = self.node.args[i]
            else:
                bound[argument.name] = self.node.kwargs.get(argument.name, argument.default_value)
        # The first argument is "self" or "input" as the operator was written: both names are good here.
        bound.setdefault("self", next(iter(bound.values()), None))
        return bound

    def __getitem__(self, name: str) -> Any:
        return self.args[name]

    @property
    def opset(self) -> int:
        """The opset being written."""
        return self.builder.opset

    @property
    def out(self) -> Tensor:
        """The fake tensor that this node yields (the first, where it yields several)."""
        value = self.node.meta["val"]
        value = value[0] if isinstance(value, tuple | list) else value
        assert isinstance(value, Tensor)
        return value

    def fake(self, name: str = "self") -> Tensor:
        """The fake tensor of an argument."""
        return fake(self.args[name])

    def tensor(self, name: str = "self") -> str:
        """The ONNX name of a tensor argument."""
        return self.builder.value(self.args[name])

    def optional(self, name: str) -> str | None:
        """The ONNX name of a tensor argument, or None where it is None."""
        return None if self.args[name] is None else self.tensor(name)

    def operand(self, name: str, dtype: torch.dtype) -> str:
        """A tensor or number argument, as a tensor of ``dtype``."""
        argument = self.args[name]
        if isinstance(argument, fx.Node):
            value = argument.meta["val"]
            if not isinstance(value, Tensor):
                size = self.builder.dim_tensor(value)
                scalar = self.emit("Squeeze", size, self.ints([0]))
                return self.builder.cast(scalar, torch.int64, dtype)
            return self.builder.cast(self.builder.value(argument), value.dtype, dtype)
        return self.scalar(argument, dtype, name)

    def scalar(self, value: float, dtype: torch.dtype = torch.float32, hint: str = "scalar") -> str:
        """A 0-dimensional constant."""
        return self.builder.constant(torch.tensor(value, dtype=dtype), hint)

    def ints(self, values: Sequence[int], hint: str = "axes") -> str:
        """A 1-dimensional int64 constant."""
        return self.builder.constant(torch.tensor(list(values), dtype=torch.int64), hint)

    def emit(self, op_type: str, *inputs: str | None, outputs: int = 1, **attributes: Any) -> str:
        """Write one ONNX node; the name of its (first) output."""
        return self.builder.emit(op_type, inputs, outputs=outputs, **attributes)[0]

    def dim(self, dim: int, rank: int | None = None) -> int:
        """A dimension counted from the front."""
        rank = self.fake().ndim if rank is None else rank
        return dim % max(rank, 1)

    def refuse(self, why: str, hint: str = "rewrite the model without it") -> UnsupportedOperatorError:
        """The error that says what cannot be written, where and what to do."""
        return unsupported(self.node, why, hint)


@dataclass(frozen=True)
class LayerCall:
    """One ``call_module`` node: the layer, its name, and its parameters as ONNX tensors."""

    builder: Builder
    node: fx.Node
    layer: nn.Module
    parameter: Callable[..., str]
    grid: Callable[[str], Grid | None]
    source: str | None = None
    omitted: tuple[str, ...] = ()

    @property
    def input(self) -> fx.Node:
        """The layer's first input."""
        node = self.node.args[0] if self.node.args else next(iter(self.node.kwargs.values()))
        assert isinstance(node, fx.Node)
        return node

    @property
    def x(self) -> str:
        """The ONNX name of the layer's input (``source``, where that is another form of it)."""
        return self.source or self.builder.value(self.input)

    def grouped(self, name: str) -> bool:
        """Whether a parameter has a scale per group."""
        grid = self.grid(name)
        return grid is not None and grid.group_size is not None

    def optional_parameter(self, name: str) -> str | None:
        """A parameter that the layer may not have (``bias``), or that is ``omitted``, since it is written elsewhere."""
        absent = name in self.omitted or getattr(self.layer, name, None) is None
        return None if absent else self.parameter(name)

    def emit(self, op_type: str, *inputs: str | None, **attributes: Any) -> str:
        """Write one ONNX node; the name of its output."""
        return self.builder.emit(op_type, inputs, **attributes)[0]


def fake(node: Any) -> Tensor:
    """The fake tensor that an ``fx`` node yields."""
    value = node.meta["val"]
    assert isinstance(value, Tensor)
    return value


def is_static(dim: Dim) -> bool:
    """Whether a dimension is a number, not a symbol (asked by type: comparing a SymInt would add a guard)."""
    return not isinstance(dim, torch.SymInt)


def unsupported(node: fx.Node, why: str, hint: str) -> UnsupportedOperatorError:
    """The error for what has no ONNX form here."""
    return UnsupportedOperatorError(f"ONNX export of {operator_name(node)} at node {node.name!r}: {why}; {hint}")


def operator_name(node: fx.Node) -> str:
    """``aten.add.Tensor``, ``getitem`` or a module's name."""
    if node.target is operator.getitem:
        return "getitem"
    return str(node.target)
