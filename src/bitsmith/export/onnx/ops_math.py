"""Arithmetic, comparisons and reductions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from .registry import Call, Lowering, Result, fake, lowers

UNARY = {
    "abs": "Abs", "acos": "Acos", "asin": "Asin", "atan": "Atan", "bitwise_not": "Not", "ceil": "Ceil",
    "cos": "Cos", "erf": "Erf", "exp": "Exp", "floor": "Floor", "isnan": "IsNaN", "log": "Log",
    "logical_not": "Not", "neg": "Neg", "reciprocal": "Reciprocal", "round": "Round", "sign": "Sign",
    "sin": "Sin", "sqrt": "Sqrt", "tan": "Tan",
}  # fmt: skip
BINARY = {
    "maximum": "Max", "minimum": "Min", "pow.Tensor_Tensor": "Pow", "pow.Scalar": "Pow", "max.other": "Max",
    "min.other": "Min",
}  # fmt: skip
COMPARISONS = {"eq": "Equal", "gt": "Greater", "ge": "GreaterOrEqual", "lt": "Less", "le": "LessOrEqual"}
LOGICAL = {
    "logical_and": "And", "logical_or": "Or", "logical_xor": "Xor", "bitwise_and.Tensor": "And",
    "bitwise_or.Tensor": "Or", "bitwise_xor.Tensor": "Xor", "__and__.Tensor": "And", "__or__.Tensor": "Or",
    "__xor__.Tensor": "Xor",
}  # fmt: skip
_REDUCE_AXES_ARE_INPUTS = 18


def _overload(name: str) -> str:
    return f"aten.{name}" if "." in name else f"aten.{name}.default"


def _simple(op_type: str, inputs: Callable[[Call], Sequence[str]]) -> Lowering:
    return lambda call: call.emit(op_type, *inputs(call))


def _register_tables() -> None:
    for name, op_type in UNARY.items():
        lowers(_overload(name))(_simple(op_type, lambda call: [call.tensor()]))
    for name, op_type in BINARY.items():
        lowers(_overload(name))(_simple(op_type, operands))
    for name, op_type in COMPARISONS.items():
        lowers(f"aten.{name}.Tensor", f"aten.{name}.Scalar")(_simple(op_type, operands))
    for name, op_type in LOGICAL.items():
        lowers(_overload(name))(_simple(op_type, _booleans))


def _booleans(call: Call) -> list[str]:
    names = list(call.args)[:2]
    if any(fake(call[name]).dtype != torch.bool for name in names):
        raise call.refuse("bitwise arithmetic on integers", "use booleans")
    return [call.tensor(name) for name in names]


def common_dtype(call: Call, *names: str) -> torch.dtype:
    """The dtype that torch computes a binary operator in."""
    values = [_value(call[name]) for name in names]
    dtype: torch.dtype = torch.result_type(*values)
    return dtype


def _value(argument: Any) -> Any:
    """What decides the dtype: a fake tensor, a number, or 1 for a size of the model."""
    if isinstance(argument, fx.Node):
        value = argument.meta["val"]
        return value if isinstance(value, torch.Tensor) else 1
    return argument


def operands(call: Call) -> list[str]:
    """The two inputs of a binary operator, in the dtype that torch computes it in."""
    names = list(call.args)[:2]
    dtype = common_dtype(call, *names)
    return [call.operand(name, dtype) for name in names]


_register_tables()


def _scaled_other(call: Call, dtype: torch.dtype) -> str:
    other = call.operand("other", dtype)
    alpha = call.args.get("alpha", 1)
    return other if alpha == 1 else call.emit("Mul", other, call.scalar(alpha, dtype, "alpha"))


@lowers("aten.add.Tensor", "aten.add.Scalar")
def add(call: Call) -> Result:
    dtype = common_dtype(call, "self", "other")
    if dtype == torch.bool:
        return call.emit("Or", call.tensor(), call.tensor("other"))
    return call.emit("Add", call.operand("self", dtype), _scaled_other(call, dtype))


@lowers("aten.sub.Tensor", "aten.sub.Scalar")
def sub(call: Call) -> Result:
    dtype = common_dtype(call, "self", "other")
    return call.emit("Sub", call.operand("self", dtype), _scaled_other(call, dtype))


@lowers("aten.rsub.Scalar", "aten.rsub.Tensor")
def rsub(call: Call) -> Result:
    dtype = common_dtype(call, "self", "other")
    if call["alpha"] != 1:
        raise call.refuse("alpha is not 1", "write it as a multiplication and a subtraction")
    return call.emit("Sub", call.operand("other", dtype), call.operand("self", dtype))


@lowers("aten.mul.Tensor", "aten.mul.Scalar")
def mul(call: Call) -> Result:
    dtype = common_dtype(call, "self", "other")
    if dtype == torch.bool:
        return call.emit("And", call.tensor(), call.tensor("other"))
    return call.emit("Mul", call.operand("self", dtype), call.operand("other", dtype))


@lowers(
    "aten.div.Tensor",
    "aten.div.Scalar",
    "aten.div.Tensor_mode",
    "aten.div.Scalar_mode",
    "aten.true_divide.Tensor",
)
def div(call: Call) -> Result:
    mode, dtype = call.args.get("rounding_mode"), common_dtype(call, "self", "other")
    if not dtype.is_floating_point:
        if mode is not None:
            return _integer_division(call, mode, dtype)
        dtype = call.out.dtype
    quotient = call.emit("Div", call.operand("self", dtype), call.operand("other", dtype))
    if mode == "floor":
        return call.emit("Floor", quotient)
    if mode == "trunc":
        return call.emit("Mul", call.emit("Sign", quotient), call.emit("Floor", call.emit("Abs", quotient)))
    return quotient


@lowers("aten.floor_divide.default", "aten.floor_divide.Scalar")
def floor_divide(call: Call) -> Result:
    dtype = common_dtype(call, "self", "other")
    if not dtype.is_floating_point:
        return _integer_division(call, "floor", dtype)
    return call.emit("Floor", call.emit("Div", call.operand("self", dtype), call.operand("other", dtype)))


def _integer_division(call: Call, mode: str, dtype: torch.dtype) -> str:
    a, b = call.operand("self", dtype), call.operand("other", dtype)
    if mode == "floor":
        # ONNX's Div truncates; taking the remainder away first makes it floor.
        a = call.emit("Sub", a, call.emit("Mod", a, b))
    return call.emit("Div", a, b)


@lowers("aten.remainder.Scalar", "aten.remainder.Tensor")
def remainder(call: Call) -> Result:
    dtype = common_dtype(call, "self", "other")
    a, b = call.operand("self", dtype), call.operand("other", dtype)
    if not dtype.is_floating_point:
        return call.emit("Mod", a, b)
    return call.emit("Sub", a, call.emit("Mul", call.emit("Floor", call.emit("Div", a, b)), b))


@lowers("aten.pow.Tensor_Scalar")
def power(call: Call) -> Result:
    exponent, x = call["exponent"], call.operand("self", call.out.dtype)
    if exponent == 2:
        return call.emit("Mul", x, x)
    if exponent == 0.5:
        return call.emit("Sqrt", x)
    return call.emit("Pow", x, call.scalar(exponent, call.out.dtype, "exponent"))


@lowers("aten.square.default")
def square(call: Call) -> Result:
    return call.emit("Mul", call.tensor(), call.tensor())


@lowers("aten.rsqrt.default")
def rsqrt(call: Call) -> Result:
    return call.emit("Reciprocal", call.emit("Sqrt", call.tensor()))


@lowers("aten.log1p.default")
def log1p(call: Call) -> Result:
    return call.emit("Log", call.emit("Add", call.tensor(), call.scalar(1.0, call.out.dtype)))


@lowers("aten.expm1.default")
def expm1(call: Call) -> Result:
    return call.emit("Sub", call.emit("Exp", call.tensor()), call.scalar(1.0, call.out.dtype))


@lowers("aten.ne.Tensor", "aten.ne.Scalar")
def not_equal(call: Call) -> Result:
    return call.emit("Not", call.emit("Equal", *operands(call)))


@lowers("aten.where.self", "aten.where.ScalarOther", "aten.where.ScalarSelf", "aten.where.Scalar")
def where(call: Call) -> Result:
    dtype = call.out.dtype
    return call.emit("Where", call.tensor("condition"), call.operand("self", dtype), call.operand("other", dtype))


@lowers("aten.masked_fill.Scalar", "aten.masked_fill.Tensor")
def masked_fill(call: Call) -> Result:
    return call.emit("Where", call.tensor("mask"), call.operand("value", call.out.dtype), call.tensor())


def reduction_dims(call: Call, name: str = "dim") -> list[int]:
    """The reduced dimensions, counted from the front; all where the argument is missing or empty."""
    dims = call.args.get(name)
    dims = [dims] if isinstance(dims, int) else list(dims or [])
    rank = call.fake().ndim
    return sorted(dim % max(rank, 1) for dim in dims) or list(range(rank))


def reduce(
    call: Call, op_type: str, x: str | None = None, dims: list[int] | None = None, keep: bool | None = None
) -> str:
    """A reduction; its axes are an attribute or an input depending on the opset."""
    x = call.tensor() if x is None else x
    dims = reduction_dims(call) if dims is None else dims
    keep = bool(call.args.get("keepdim", False)) if keep is None else keep
    since = 13 if op_type == "ReduceSum" else _REDUCE_AXES_ARE_INPUTS
    if call.opset >= since:
        return call.emit(op_type, x, call.ints(dims), keepdims=int(keep))
    return call.emit(op_type, x, axes=dims, keepdims=int(keep))


@lowers("aten.mean.dim", "aten.mean.default")
def mean(call: Call) -> Result:
    dims, rank = reduction_dims(call), call.fake().ndim
    if rank >= 3 and dims == list(range(2, rank)):
        # onnxruntime has an int8 kernel for GlobalAveragePool, none for ReduceMean, and it moves a
        # QuantizeLinear back past Squeeze to fuse it, but not past Flatten.
        pooled = call.emit("GlobalAveragePool", call.tensor())
        return pooled if call["keepdim"] else call.emit("Squeeze", pooled, call.ints(dims))
    return reduce(call, "ReduceMean", call.operand("self", call.out.dtype), dims)


@lowers("aten.sum.dim_IntList", "aten.sum.default")
def total(call: Call) -> Result:
    return reduce(call, "ReduceSum", call.operand("self", call.out.dtype))


@lowers("aten.amax.default", "aten.max.default")
def amax(call: Call) -> Result:
    return reduce(call, "ReduceMax")


@lowers("aten.amin.default", "aten.min.default")
def amin(call: Call) -> Result:
    return reduce(call, "ReduceMin")


@lowers("aten.prod.dim_int", "aten.prod.default")
def product(call: Call) -> Result:
    return reduce(call, "ReduceProd")


@lowers("aten.max.dim", "aten.min.dim")
def max_with_indices(call: Call) -> Result:
    kind, dim = ("Max" if "max" in str(call.node.target) else "Min"), call.dim(call["dim"])
    indices = call.emit(f"Arg{kind}", call.tensor(), axis=dim, keepdims=int(call["keepdim"]))
    return reduce(call, f"Reduce{kind}", dims=[dim]), indices


@lowers("aten.argmax.default", "aten.argmin.default")
def argmax(call: Call) -> Result:
    op_type = "ArgMax" if "argmax" in str(call.node.target) else "ArgMin"
    if call["dim"] is None:
        flat = call.emit("Reshape", call.tensor(), call.ints([-1], "shape"))
        return call.emit(op_type, flat, axis=0, keepdims=0)
    return call.emit(op_type, call.tensor(), axis=call.dim(call["dim"]), keepdims=int(call["keepdim"]))


def _variance(call: Call) -> str:
    dims, dtype = reduction_dims(call), call.out.dtype
    correction = call.args.get("correction", call.args.get("unbiased", 1))
    correction = 1 if correction is None else float(correction)
    centered = call.emit("Sub", call.tensor(), reduce(call, "ReduceMean", dims=dims, keep=True))
    variance = reduce(call, "ReduceMean", call.emit("Mul", centered, centered), dims)
    if not correction:
        return variance
    sizes = [fake(call["self"]).shape[dim] for dim in dims]
    if any(isinstance(size, torch.SymInt) for size in sizes):
        raise call.refuse("a corrected variance over a free dimension", "use correction=0 or fix the dimension")
    count = 1
    for size in sizes:
        count *= int(size)
    return call.emit("Mul", variance, call.scalar(count / (count - correction), dtype, "correction"))


@lowers("aten.var.correction", "aten.var.dim")
def variance(call: Call) -> Result:
    return _variance(call)


@lowers("aten.std.correction", "aten.std.dim")
def deviation(call: Call) -> Result:
    return call.emit("Sqrt", _variance(call))


@lowers("aten.linalg_vector_norm.default", "aten.norm.ScalarOpt_dim")
def vector_norm(call: Call) -> Result:
    order = call.args.get("ord", call.args.get("p"))
    if order not in (1, 2, 1.0, 2.0):
        raise call.refuse(f"a norm of order {order}", "use order 1 or 2")
    return reduce(call, "ReduceL1" if order == 1 else "ReduceL2")


@lowers("aten.logsumexp.default")
def log_sum_exp(call: Call) -> Result:
    return reduce(call, "ReduceLogSumExp")


@lowers("aten.cumsum.default")
def cumsum(call: Call) -> Result:
    x = call.operand("self", call.out.dtype)
    axis = call.builder.constant(torch.tensor(call.dim(call["dim"])), "axis")
    return call.emit("CumSum", x, axis)


@lowers("aten.topk.default")
def topk(call: Call) -> Result:
    names = call.builder.emit(
        "TopK", [call.tensor(), call.ints([call["k"]], "k")], outputs=2, axis=call.dim(call["dim"]),
        largest=int(call["largest"]), sorted=int(call["sorted"]),
    )  # fmt: skip
    return names
