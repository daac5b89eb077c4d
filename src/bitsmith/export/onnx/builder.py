"""The ONNX graph while it is being written: nodes, initializers, names, and where each fx value is."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import onnx
import sympy  # type: ignore[import-untyped]
import torch
from onnx import TensorProto, helper
from torch import Tensor, fx

from ...errors import ExportError

Dim = int | torch.SymInt
Style = Literal["qdq", "qcdq"]

ELEMENT_TYPES: dict[torch.dtype, int] = {
    torch.float32: TensorProto.FLOAT,
    torch.float64: TensorProto.DOUBLE,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.float8_e4m3fn: TensorProto.FLOAT8E4M3FN,
    torch.float8_e5m2: TensorProto.FLOAT8E5M2,
    torch.int8: TensorProto.INT8,
    torch.uint8: TensorProto.UINT8,
    torch.int16: TensorProto.INT16,
    torch.uint16: TensorProto.UINT16,
    torch.int32: TensorProto.INT32,
    torch.int64: TensorProto.INT64,
    torch.bool: TensorProto.BOOL,
}


def element_type(dtype: torch.dtype) -> int:
    """The ONNX element type of a torch dtype."""
    if dtype not in ELEMENT_TYPES:
        raise ExportError(f"ONNX export: {dtype} has no ONNX element type here; cast the model to float32")
    return ELEMENT_TYPES[dtype]


def tensor_bytes(tensor: Tensor) -> bytes:
    """The elements in row-major order, as ONNX raw data (little endian)."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@dataclass
class Builder:
    """What has been written so far. Names are unique; a constant is stored once, whoever asks for it."""

    opset: int
    style: Style = "qdq"
    pack_int4: bool = True
    uint8_activations: bool = False
    on_codes: frozenset[fx.Node] = frozenset()
    for_onnxruntime: bool = False
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: dict[str, TensorProto] = field(default_factory=dict)
    infos: dict[str, onnx.ValueInfoProto] = field(default_factory=dict)
    values: dict[fx.Node, str | tuple[str, ...]] = field(default_factory=dict)
    constants: dict[fx.Node, Tensor] = field(default_factory=dict)
    scope: str = ""
    cache: dict[Any, str] = field(default_factory=dict)
    symbols: dict[sympy.Symbol, tuple[str, str, int]] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)
    node_names: set[str] = field(default_factory=set)

    def unique(self, name: str, taken: set[str] | None = None) -> str:
        """``name``, or the first free ``name_1``, ``name_2`` ..."""
        used = self.taken if taken is None else taken
        candidate, i = name, 0
        while candidate in used:
            i += 1
            candidate = f"{name}_{i}"
        used.add(candidate)
        return candidate

    def value(self, node: Any) -> str:
        """The ONNX name of what an fx node yields; a constant becomes an initializer on first use."""
        if node in self.constants and node not in self.values:
            name = str(node.target) if node.op == "get_attr" else node.name
            self.values[node] = self.initializer(name, self.constants[node], share=True)
        if node not in self.values:
            raise ExportError(f"ONNX export: {node!r} is used as a tensor, but is none")
        name = self.values[node]
        if isinstance(name, tuple):
            raise ExportError(f"ONNX export: {node!r} yields several tensors where one is expected")
        return name

    def emit(
        self,
        op_type: str,
        inputs: Sequence[str | None],
        *,
        outputs: int = 1,
        name: str | None = None,
        **attributes: Any,
    ) -> tuple[str, ...]:
        """Write one node. Inputs that are None are left out; the names of its outputs are returned."""
        given = [i or "" for i in inputs]
        while given and not given[-1]:
            given.pop()
        base = name or f"{self.scope}/{op_type}"
        names = tuple(self.unique(base if outputs == 1 else f"{base}_{i}") for i in range(outputs))
        node_name = self.unique(base, self.node_names)
        attributes = {key: value for key, value in attributes.items() if value is not None}
        self.nodes.append(helper.make_node(op_type, given, list(names), name=node_name, **attributes))
        return names

    def initializer(self, name: str, tensor: Tensor, *, share: bool = False) -> str:
        """Store a tensor under a name; with ``share`` an equal one that is there already is used instead."""
        return self.raw_initializer(
            name, element_type(tensor.dtype), list(tensor.shape), tensor_bytes(tensor), share=share
        )

    def raw_initializer(
        self, name: str, data_type: int, shape: Sequence[int], data: bytes, *, share: bool = False
    ) -> str:
        """Store raw bytes as an initializer (4-bit codes come packed, two to a byte)."""
        key = ("bytes", data_type, tuple(shape), hashlib.sha256(data).digest())
        if share and key in self.cache:
            return self.cache[key]
        name = self.unique(name)
        self.initializers[name] = helper.make_tensor(name, data_type, list(shape), data, raw=True)
        self.cache.setdefault(key, name)
        return name

    def constant(self, tensor: Tensor, hint: str) -> str:
        """A helper constant (axes, shapes, scalars), shared wherever equal."""
        return self.initializer(f"{self.scope}/{hint}", tensor, share=True)

    def cast(self, name: str, source: torch.dtype, target: torch.dtype) -> str:
        """``name`` as ``target``; no node where it is that already."""
        return name if source == target else self.emit("Cast", [name], to=element_type(target))[0]

    def finish_node(self, first: int, result: str, base: str, *, rename_node: bool = True) -> str:
        """Give the result of the nodes from ``first`` on, and the node that made it, the layer's own name."""
        written = self.nodes[first:]
        maker = next((node for node in written if result in node.output), None)
        if maker is None:
            return result
        name = self.unique(base)
        for node in written:
            _replace(node.input, result, name)
        _replace(maker.output, result, name)
        if rename_node:
            self.node_names.discard(maker.name)
            maker.name = self.unique(base, self.node_names)
        return name

    # Shapes.

    def add_symbols(self, name: str, tensor: Tensor) -> None:
        """Remember which dimensions of an input are free and name them; the first axis is ``batch``."""
        for axis, dim in enumerate(tensor.shape):
            if isinstance(dim, torch.SymInt) and isinstance(dim.node.expr, sympy.Symbol):
                names = {known for known, _, _ in self.symbols.values()}
                label = "batch" if axis == 0 and "batch" not in names else f"{name}_dim{axis}"
                self.symbols.setdefault(dim.node.expr, (label, name, axis))

    def dim_label(self, dim: Dim) -> int | str:
        """A dimension for a value's type: a number, or a name such as ``batch`` or ``2*batch``."""
        if not isinstance(dim, torch.SymInt):
            return int(dim)
        labels = {symbol: sympy.Symbol(label) for symbol, (label, _, _) in self.symbols.items()}
        expression = dim.node.expr.xreplace(labels)
        return int(expression) if expression.is_Integer else str(expression)

    def describe(self, name: str, tensor: Tensor) -> None:
        """Record a value's type and shape."""
        shape = [self.dim_label(dim) for dim in tensor.shape]
        self.infos[name] = helper.make_tensor_value_info(name, element_type(tensor.dtype), shape)

    def dim_tensor(self, dim: Dim) -> str:
        """A dimension as an int64 tensor of one element, computed from the inputs' shapes if free."""
        if isinstance(dim, torch.SymInt):
            return self._expression(dim.node.expr)
        return self.constant(torch.tensor([int(dim)]), "dim")

    def shape_tensor(self, shape: Sequence[Dim]) -> str:
        """A shape as an int64 tensor: a constant, or a Concat where dimensions are free."""
        if not any(isinstance(dim, torch.SymInt) for dim in shape):
            return self.constant(torch.tensor([int(dim) for dim in shape], dtype=torch.int64), "shape")
        return self.emit("Concat", [self.dim_tensor(dim) for dim in shape], axis=0)[0]

    def _expression(self, expression: Any) -> str:
        key = ("dim", expression)
        if key not in self.cache:
            self.cache[key] = self._new_expression(expression)
        return self.cache[key]

    def _new_expression(self, expression: Any) -> str:
        if expression.is_Integer:
            return self.constant(torch.tensor([int(expression)]), "dim")
        if expression in self.symbols:
            label, source, axis = self.symbols[expression]
            shape = self.emit("Shape", [source], name=f"{source}_shape")[0]
            return self.emit("Gather", [shape, self.constant(torch.tensor([axis]), "axis")], name=f"{label}_size")[0]
        operator = {"Add": "Add", "Mul": "Mul", "FloorDiv": "Div", "Mod": "Mod", "PythonMod": "Mod"}.get(
            type(expression).__name__
        )
        if operator is None:
            raise ExportError(f"ONNX export: the size {expression} cannot be computed in the file; fix that dimension")
        total = self._expression(expression.args[0])
        for term in expression.args[1:]:
            total = self.emit(operator, [total, self._expression(term)])[0]
        return total


def _replace(names: Any, old: str, new: str) -> None:
    for i, name in enumerate(names):
        if name == old:
            names[i] = new
