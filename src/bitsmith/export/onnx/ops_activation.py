"""Activation functions, and the clamps that a following Quantizer makes superfluous."""

from __future__ import annotations

import math

from torch import fx

from ...grid import Grid, IntFormat, Quantizer
from .registry import Call, Result, lowers

_SQRT_HALF = math.sqrt(0.5)


@lowers("aten.relu.default")
def relu(call: Call) -> Result:
    return call.emit("Relu", call.tensor())


@lowers("aten.sigmoid.default")
def sigmoid(call: Call) -> Result:
    return call.emit("Sigmoid", call.tensor())


@lowers("aten.tanh.default")
def tanh(call: Call) -> Result:
    return call.emit("Tanh", call.tensor())


@lowers("aten.hardsigmoid.default")
def hardsigmoid(call: Call) -> Result:
    return call.emit("HardSigmoid", call.tensor(), alpha=1 / 6, beta=0.5)


@lowers("aten.hardswish.default")
def hardswish(call: Call) -> Result:
    if call.opset >= 14:
        return call.emit("HardSwish", call.tensor())
    return call.emit("Mul", call.tensor(), call.emit("HardSigmoid", call.tensor(), alpha=1 / 6, beta=0.5))


@lowers("aten.silu.default")
def silu(call: Call) -> Result:
    return call.emit("Mul", call.tensor(), call.emit("Sigmoid", call.tensor()))


@lowers("aten.log_sigmoid.default")
@lowers("aten.logsigmoid.default")
def log_sigmoid(call: Call) -> Result:
    return call.emit("Neg", call.emit("Softplus", call.emit("Neg", call.tensor())))


@lowers("aten.softsign.default")
def softsign(call: Call) -> Result:
    return call.emit("Softsign", call.tensor())


@lowers("aten.mish.default")
def mish(call: Call) -> Result:
    if call.opset >= 18:
        return call.emit("Mish", call.tensor())
    return call.emit("Mul", call.tensor(), call.emit("Tanh", call.emit("Softplus", call.tensor())))


@lowers("aten.gelu.default")
def gelu(call: Call) -> Result:
    if call.opset >= 20:
        return call.emit("Gelu", call.tensor(), approximate=call["approximate"])
    x, dtype = call.tensor(), call.out.dtype
    if call["approximate"] == "tanh":
        cube = call.emit("Mul", call.emit("Mul", x, x), x)
        inner = call.emit("Add", x, call.emit("Mul", cube, call.scalar(0.044715, dtype, "cubic")))
        squashed = call.emit("Tanh", call.emit("Mul", inner, call.scalar(math.sqrt(2 / math.pi), dtype, "slope")))
    else:
        squashed = call.emit("Erf", call.emit("Mul", x, call.scalar(_SQRT_HALF, dtype, "sqrt_half")))
    doubled = call.emit("Mul", x, call.emit("Add", squashed, call.scalar(1.0, dtype, "one")))
    return call.emit("Mul", doubled, call.scalar(0.5, dtype, "half"))


@lowers("aten.elu.default")
def elu(call: Call) -> Result:
    if call["input_scale"] != 1:
        raise call.refuse("input_scale is not 1")
    if call["scale"] == 1:
        return call.emit("Elu", call.tensor(), alpha=float(call["alpha"]))
    return call.emit("Selu", call.tensor(), alpha=float(call["alpha"]), gamma=float(call["scale"]))


@lowers("aten.selu.default")
def selu(call: Call) -> Result:
    return call.emit("Selu", call.tensor())


@lowers("aten.celu.default")
def celu(call: Call) -> Result:
    return call.emit("Celu", call.tensor(), alpha=float(call["alpha"]))


@lowers("aten.leaky_relu.default")
def leaky_relu(call: Call) -> Result:
    return call.emit("LeakyRelu", call.tensor(), alpha=float(call["negative_slope"]))


@lowers("aten.softplus.default")
def softplus(call: Call) -> Result:
    # Above torch's threshold (20 by default) softplus(x) and x agree in float32.
    if call["beta"] == 1:
        return call.emit("Softplus", call.tensor())
    beta = call.scalar(call["beta"], call.out.dtype, "beta")
    return call.emit("Div", call.emit("Softplus", call.emit("Mul", call.tensor(), beta)), beta)


@lowers("aten.softmax.int", "aten._softmax.default")
def softmax(call: Call) -> Result:
    return call.emit("Softmax", call.operand("self", call.out.dtype), axis=call.dim(call["dim"]))


@lowers("aten.log_softmax.int", "aten._log_softmax.default")
def log_softmax(call: Call) -> Result:
    return call.emit("LogSoftmax", call.operand("self", call.out.dtype), axis=call.dim(call["dim"]))


@lowers("aten.glu.default")
def glu(call: Call) -> Result:
    dim = call.dim(call["dim"])
    half = int(call.out.shape[dim])
    value, gate = call.builder.emit("Split", [call.tensor(), call.ints([half, half], "split")], outputs=2, axis=dim)
    return call.emit("Mul", value, call.emit("Sigmoid", gate))


@lowers("aten.prelu.default")
def prelu(call: Call) -> Result:
    return call.emit("PRelu", call.tensor(), call.tensor("weight"))


@lowers(
    "aten.hardtanh.default", "aten.relu6.default", "aten.clamp.default", "aten.clamp_min.default",
    "aten.clamp_max.default",
)  # fmt: skip
def clamp(call: Call) -> Result:
    """A clamp to constants, without the side at which the Quantizer that follows saturates anyway."""
    low, high = _bounds(call)
    drop_low, drop_high = _saturated(call, low, high)
    high = None if drop_high else high
    if low == 0 and high is None and call.out.dtype.is_floating_point:
        return call.emit("Relu", call.tensor())
    low = None if drop_low else low
    if low is None and high is None:
        return call.tensor()
    limits = [
        None if bound is None else call.scalar(bound, call.out.dtype, end)
        for end, bound in (("min", low), ("max", high))
    ]
    return call.emit("Clip", call.operand("self", call.out.dtype), *limits)


def _bounds(call: Call) -> tuple[float | None, float | None]:
    if "relu6" in str(call.node.target):
        return 0.0, 6.0
    args = call.args
    low, high = args.get("min", args.get("min_val")), args.get("max", args.get("max_val"))
    for bound in (low, high):
        if isinstance(bound, fx.Node):
            raise call.refuse("a bound that is computed", "clamp to numbers")
    return low, high


def _saturated(call: Call, low: float | None, high: float | None) -> tuple[bool, bool]:
    """Which bounds change nothing, because the only reader is a Quantizer that saturates at or inside them.

    A value beyond the bound then gets the end code with the clamp and without it: the bound itself rounds to
    that code when it is less than half a step inside. Without it, onnxruntime fuses the layer before.
    """
    grid = _next_grid(call.node)
    if grid is None or not isinstance(grid.format, IntFormat) or grid.scale.ndim:
        return False, False
    scale, zero = float(grid.scale), 0 if grid.zero_point is None else int(grid.zero_point)
    margin = 0.49 * scale
    first, last = (grid.format.qmin - zero) * scale, (grid.format.qmax - zero) * scale
    return low is None or low <= first + margin, high is None or high >= last - margin


def _next_grid(node: fx.Node) -> Grid | None:
    if len(node.users) != 1:
        return None
    reader = next(iter(node.users))
    graph = node.graph.owning_module
    if reader.op != "call_module" or graph is None:
        return None
    module = graph.get_submodule(str(reader.target))
    return module.grid if isinstance(module, Quantizer) else None


@lowers("aten.clamp.Tensor", "aten.clamp_min.Tensor", "aten.clamp_max.Tensor")
def clamp_tensor(call: Call) -> Result:
    x = call.operand("self", call.out.dtype)
    for name, op_type in (("min", "Max"), ("max", "Min")):
        if call.args.get(name) is not None:
            x = call.emit(op_type, x, call.operand(name, call.out.dtype))
    return x
