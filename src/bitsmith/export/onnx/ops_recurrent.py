"""Recurrent layers and cells in float, and what the dynamic ones share with them.

torch orders gates i, f, g, o (LSTM) and r, z, n (GRU); ONNX i, o, f, c and z, r, h.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from .ops_create import fill_value
from .registry import Call, Result, lowers

_ORDER = {"lstm": (0, 3, 1, 2), "gru": (1, 0, 2), "rnn_tanh": (0,), "rnn_relu": (0,)}

# Kind -> ONNX operator and its attributes for so many directions.
ONNX_NAMES: dict[str, tuple[str, Callable[[int], dict[str, Any]]]] = {
    "lstm": ("LSTM", lambda _: {}),
    "gru": ("GRU", lambda _: {"linear_before_reset": 1}),
    "rnn_tanh": ("RNN", lambda directions: {"activations": ["Tanh"] * directions}),
    "rnn_relu": ("RNN", lambda directions: {"activations": ["Relu"] * directions}),
}


def gate_rows(kind: str, tensor: Tensor, axis: int) -> Tensor:
    """The gates along ``axis`` from torch's order in that of ONNX."""
    blocks = tensor.chunk(len(_ORDER[kind]), axis)
    return torch.cat([blocks[i] for i in _ORDER[kind]], axis).contiguous()


def emit_outputs(call: Call, outputs: tuple[str, ...], directions: int) -> tuple[str, ...]:
    """ONNX's Y ``(time, directions, batch, hidden)`` as torch's ``(time, batch, directions * hidden)``."""
    y, *states = outputs
    if directions == 1:
        return (call.emit("Squeeze", y, call.ints([1])), *states)
    turned = call.emit("Transpose", y, perm=[0, 2, 1, 3])
    return (call.emit("Reshape", turned, call.ints([0, 0, -1], "shape")), *states)


@lowers("aten.lstm.input", "aten.gru.input", "aten.rnn_tanh.input", "aten.rnn_relu.input")
def recurrent(call: Call) -> Result:
    kind = str(call.node.target).split(".")[1]
    if call["train"] and call["dropout"]:
        raise call.refuse("it drops out, as in training", "call model.eval() first")
    directions = 2 if call["bidirectional"] else 1
    hx = call["hx"] if kind == "lstm" else [call["hx"]]
    parameters = call["params"]
    per_direction = len(parameters) // (call["num_layers"] * directions)
    if per_direction != (4 if call["has_biases"] else 2):
        raise call.refuse("ONNX's LSTM has no projection (proj_size)", "leave proj_size at 0")
    x = call.tensor("input")
    if call["batch_first"]:
        x = call.emit("Transpose", x, perm=[1, 0, 2])
    last: list[list[str]] = [[] for _ in hx]
    for layer in range(call["num_layers"]):
        first = layer * directions * per_direction
        weights = [parameters[first + d * per_direction :][:per_direction] for d in range(directions)]
        states = [_state(call, s, layer, directions) for s in hx]
        x, *ends = _layer(call, kind, x, weights, states)
        for kept, end in zip(last, ends):
            kept.append(end)
    if call["batch_first"]:
        x = call.emit("Transpose", x, perm=[1, 0, 2])
    return (x, *(names[0] if len(names) == 1 else call.emit("Concat", *names, axis=0) for names in last))


def _layer(call: Call, kind: str, x: str, weights: list[list[fx.Node]], states: list[str | None]) -> tuple[str, ...]:
    """One layer; ``weights`` are those of each direction."""
    constants = call.builder.constants
    if not all(node in constants for part in weights for node in part):
        raise call.refuse("its weights are computed by the model", "make them parameters")
    op_type, attributes = ONNX_NAMES[kind]
    name = str(weights[0][0].target).rpartition(".")[0]
    w, r = (torch.stack([gate_rows(kind, constants[part[i]], 0) for part in weights]) for i in (0, 1))
    names = [call.builder.initializer(f"{weights[0][i].target}.stacked", t, share=True) for i, t in ((0, w), (1, r))]
    bias = None
    if len(weights[0]) == 4:
        both = [torch.cat([gate_rows(kind, constants[part[i]], 0) for i in (2, 3)]) for part in weights]
        bias = call.builder.initializer(f"{name}bias", torch.stack(both), share=True)
    outputs = call.builder.emit(
        op_type, [x, *names, bias, None, *states], outputs=1 + len(states), hidden_size=r.shape[2],
        direction="bidirectional" if len(weights) == 2 else "forward", **attributes(len(weights)),
    )  # fmt: skip
    return emit_outputs(call, outputs, len(weights))


def _state(call: Call, node: fx.Node, layer: int, directions: int) -> str | None:
    """The first state of one layer; None where it is zeros, which is what ONNX takes then."""
    constant = call.builder.constants.get(node)
    if fill_value(node) == 0 or (constant is not None and not bool(constant.any())):
        return None
    if call["num_layers"] == 1:
        return call.builder.value(node)
    ends = (call.ints([layer * directions], "start"), call.ints([(layer + 1) * directions], "end"))
    return call.emit("Slice", call.builder.value(node), *ends, call.ints([0]))


@lowers("aten.lstm_cell.default", "aten.gru_cell.default", "aten.rnn_tanh_cell.default", "aten.rnn_relu_cell.default")
def cell(call: Call) -> Result:
    kind = str(call.node.target).split(".")[1].removesuffix("_cell")
    h = call.builder.value(call["hx"][0] if kind == "lstm" else call["hx"])
    count = {"lstm": 4, "gru": 3}.get(kind, 1)
    x, product = _product(call, call.tensor("input"), "ih"), _product(call, h, "hh")
    if kind == "gru":
        (xr, xz, xn), (hr, hz, hn) = _split(call, x, count), _split(call, product, count)
        reset, update = (call.emit("Sigmoid", call.emit("Add", a, b)) for a, b in ((xr, hr), (xz, hz)))
        new = call.emit("Tanh", call.emit("Add", xn, call.emit("Mul", reset, hn)))
        return call.emit("Add", new, call.emit("Mul", update, call.emit("Sub", h, new)))
    gates = call.emit("Add", x, product)
    if kind != "lstm":
        return call.emit("Tanh" if kind == "rnn_tanh" else "Relu", gates)
    i, f, g, o = _split(call, gates, count)
    i, f, o = (call.emit("Sigmoid", gate) for gate in (i, f, o))
    kept = call.emit("Mul", f, call.builder.value(call["hx"][1]))
    c = call.emit("Add", kept, call.emit("Mul", i, call.emit("Tanh", g)))
    return call.emit("Mul", o, call.emit("Tanh", c)), c


def _product(call: Call, x: str, which: str) -> str:
    return call.emit("Gemm", x, call.tensor(f"w_{which}"), call.optional(f"b_{which}"), transB=1)


def _split(call: Call, x: str, count: int) -> tuple[str, ...]:
    parts = count if call.opset >= 18 else None
    return call.builder.emit("Split", [x], outputs=count, axis=-1, num_outputs=parts)
