"""The calls of torch.ao's quantized functions in a converted FX graph, as calls of modules with grids."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..errors import MigrationError
from ..grid import Grid
from .pieces import CONVOLUTIONS, Dequantize, Function, conv, grid_of, linear, on_grid, quantize_to, weighted


def _add_relu(a: Tensor, b: Tensor) -> Tensor:
    return torch.relu(a + b)


def _mul_relu(a: Tensor, b: Tensor) -> Tensor:
    return torch.relu(a * b)


def _cat(*parts: Tensor, dim: int = 0) -> Tensor:
    return torch.cat(parts, dim)


# quantized.NAME(a, b, scale, zero_point)
_PAIRS: dict[str, Callable[..., Tensor]] = {
    "add": torch.add, "add_relu": _add_relu, "mul": torch.mul, "mul_relu": _mul_relu, "matmul": torch.matmul,
}  # fmt: skip
# quantized.NAME(x, ..., scale, zero_point)
_SINGLES: dict[str, Callable[..., Tensor]] = {
    "hardswish": F.hardswish, "sigmoid": torch.sigmoid, "leaky_relu": F.leaky_relu, "elu": F.elu, "celu": F.celu,
    "layer_norm": F.layer_norm, "softmax": torch.softmax,
}  # fmt: skip


def convert_functions(graph: fx.GraphModule) -> None:
    """Rewrite a converted graph in place."""
    for node in list(graph.graph.nodes):
        if node.op == "call_method" and node.target == "dequantize":
            _replace(graph, node, Dequantize(), node.args[:1])
        elif node.op == "call_function":
            name = _name(node)
            if name == "quantize_per_tensor":
                source, scale, zero, dtype = _values(graph, node, 4)
                _replace(graph, node, quantize_to(grid_of(scale, zero, dtype)), (source,))
            elif name.startswith("quantized."):
                _quantized(graph, node, name.removeprefix("quantized.").split(".")[0])
            elif name == "dequantize":
                _replace(graph, node, Dequantize(), node.args[:1])
            elif name in ("quantize_per_channel", "quantize_per_tensor_dynamic"):
                raise MigrationError(f"{node.name} ({name}) has no static form: {_ANEW}")
    graph.graph.eliminate_dead_code()
    graph.delete_all_unused_submodules()
    graph.recompile()


_ANEW = "quantize the float model with bitsmith.quantize instead"


def _name(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, torch._ops.OpOverloadPacket | torch._ops.OpOverload):
        return str(target).replace("::", ".")
    return getattr(target, "__name__", str(target))


def _values(graph: fx.GraphModule, node: fx.Node, count: int) -> list[Any]:
    """The arguments of a call, attributes of the graph by their value; nodes stay nodes."""
    given = [*node.args, *node.kwargs.values()]
    if len(given) < count:
        raise MigrationError(f"{node.name} ({_name(node)}) has {len(given)} arguments where {count} are known: {_ANEW}")
    return [_attribute(graph, value) for value in given]


def _attribute(graph: fx.GraphModule, value: Any) -> Any:
    if not isinstance(value, fx.Node) or value.op != "get_attr":
        return value
    owner, _, leaf = str(value.target).rpartition(".")
    return getattr(graph.get_submodule(owner), leaf)


def _replace(graph: fx.GraphModule, node: fx.Node, module: nn.Module, operands: Any) -> None:
    graph.add_submodule(name := f"{node.name}_bitsmith", module)
    with graph.graph.inserting_after(node):
        call = graph.graph.call_module(name, tuple(operands))
    node.replace_all_uses_with(call)
    graph.graph.erase_node(node)


def _quantized(graph: fx.GraphModule, node: fx.Node, name: str) -> None:
    values = _values(graph, node, 2)
    if name in _PAIRS and len(values) == 4:
        a, b, *numbers = values
        _replace(graph, node, on_grid(Function(_PAIRS[name]), grid_of(*numbers)), (a, b))
    elif name == "cat" and len(values) == 4:
        parts, dim, *numbers = values
        _replace(graph, node, on_grid(Function(_cat, dim=dim), grid_of(*numbers)), parts)
    elif name in _SINGLES and len(values) >= 3:
        source, *rest, scale, zero = values
        _replace(graph, node, on_grid(Function(_SINGLES[name], *rest), grid_of(scale, zero)), (source,))
    elif name.removesuffix("_relu") in _LAYERS and hasattr(values[1], "unpack"):
        source, packed, *numbers = values
        output = grid_of(*numbers) if len(numbers) == 2 else None
        activation = nn.ReLU() if name.endswith("_relu") else None
        module = _LAYERS[name.removesuffix("_relu")](packed, output, activation, node.name)
        _replace(graph, node, module, (source,))
    else:
        more = f" {_SCALAR}" if name in ("add", "mul", "add_relu", "mul_relu") else f" {_ANEW}"
        raise MigrationError(f"{node.name}: torch.ao's quantized::{name} cannot be migrated:{more}")


_SCALAR = (
    "torch.ao finds the grid of a product or sum with a number when it runs; write the number into the layer before "
    "(its weight or bias), or quantize the float model with bitsmith.quantize"
)


def _packed_conv(rank: int, packed: Any, output: Grid | None, activation: nn.Module | None, where: str) -> nn.Module:
    weight, bias = packed.unpack()
    stride, padding, dilation = (list(part()) for part in (packed.stride, packed.padding, packed.dilation))
    kind = getattr(nn, f"Conv{rank}d")
    layer = conv(kind, weight, stride, padding, dilation, packed.groups())
    return weighted(CONVOLUTIONS[kind], layer, weight, bias, where, output=output, activation=activation)


def _packed_linear(packed: Any, output: Grid | None, activation: nn.Module | None, where: str) -> nn.Module:
    weight, bias = packed.unpack()
    return linear(weight, bias, output, activation, where)


_LAYERS: dict[str, Callable[..., nn.Module]] = {
    "linear": _packed_linear,
    **{f"conv{rank}d": partial(_packed_conv, rank) for rank in (1, 2, 3)},
}
