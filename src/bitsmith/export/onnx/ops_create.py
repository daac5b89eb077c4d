"""Tensors made from nothing but a shape; those of a fixed shape are evaluated and stored (``build.fold``)."""

from __future__ import annotations

import torch
from torch import fx

from .ops_shape import expand_to
from .registry import Call, Result, is_static, lowers

_FILLS = {
    "zeros": 0, "zeros_like": 0, "new_zeros": 0, "ones": 1, "ones_like": 1, "new_ones": 1,
    "empty": 0, "empty_like": 0, "new_empty": 0,
}  # fmt: skip


def fill_value(node: fx.Node) -> float | None:
    """The one value that a creating operator fills its output with, whatever its inputs hold."""
    target = node.target
    name = target._schema.name.split("::")[-1] if isinstance(target, torch._ops.OpOverload) else ""
    if name in _FILLS:
        return _FILLS[name]
    if name in ("full", "full_like", "new_full"):
        value = node.args[1] if len(node.args) > 1 else node.kwargs["fill_value"]
        if name == "new_full":
            value = node.args[2] if len(node.args) > 2 else node.kwargs["fill_value"]
        return value if isinstance(value, int | float) else None
    return None


def filled(call: Call, value: float) -> str:
    """A constant tensor of the output's shape."""
    shape = call.out.shape
    if all(map(is_static, shape)):
        whole = torch.full([int(dim) for dim in shape], value, dtype=call.out.dtype)
        return call.builder.constant(whole, "value")
    one = call.builder.constant(torch.full((1,), value, dtype=call.out.dtype), "value")
    return expand_to(call, one, [1], shape)


@lowers(*(f"aten.{name}.{'memory_format' if name == 'empty' else 'default'}" for name in _FILLS))
def zeros_or_ones(call: Call) -> Result:
    name = str(call.node.target).split(".")[1]
    return filled(call, _FILLS[name])


@lowers("aten.full.default", "aten.full_like.default", "aten.new_full.default")
def full(call: Call) -> Result:
    return filled(call, call["fill_value"])


@lowers("aten.scalar_tensor.default")
def scalar_tensor(call: Call) -> Result:
    return call.operand("s", call.out.dtype)


@lowers("aten.arange.default", "aten.arange.start", "aten.arange.start_step")
def arange(call: Call) -> Result:
    """A range whose end is free (a fixed one is folded)."""
    dtype = call.out.dtype
    start = call.operand("start", dtype) if "start" in call.args else call.scalar(0, dtype, "start")
    step = call.operand("step", dtype) if "step" in call.args else call.scalar(1, dtype, "step")
    return call.emit("Range", start, call.operand("end", dtype), step)


@lowers("aten.triu.default", "aten.tril.default")
def triangle(call: Call) -> Result:
    if call.opset < 14:
        raise call.refuse("Trilu needs opset 14", "export with opset=14 or later")
    upper = int("triu" in str(call.node.target))
    diagonal = call.builder.constant(torch.tensor(call["diagonal"]), "diagonal")
    return call.emit("Trilu", call.tensor(), diagonal, upper=upper)
