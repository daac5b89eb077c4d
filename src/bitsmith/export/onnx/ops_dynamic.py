"""Dynamically quantized operators (``bitsmith/dynamic``): activations get their scales in the file, at run time.

A linear layer is DynamicQuantizeLinear and MatMulInteger, which onnxruntime fuses to DynamicQuantizeMatMul, or, where
several layers read one quantized input, to MatMulIntegerToFloat. An LSTM is onnxruntime's own DynamicQuantizeLSTM.
What has no integer kernel (GRU, RNN, float16 weights) is a float operator behind its dequantized weights.
"""

from __future__ import annotations

import torch
from onnx import TensorProto
from torch import Tensor

from ...dynamic.weights import merged
from .builder import Builder
from .ops_recurrent import ONNX_NAMES, emit_outputs, gate_rows
from .registry import Call, Result, lowers

_ZERO_SCALE = torch.finfo(torch.float32).tiny
RUNTIME_DOMAIN = "com.microsoft"  # operators of onnxruntime


@lowers("bitsmith.dynamic_linear.default")
def dynamic_linear(call: Call) -> Result:
    weight, scale = _constant(call, "weight"), _constant(call, "scale")
    assert weight is not None
    if scale is None or call["activations"] == "float":
        y = call.emit("MatMul", call.tensor("x"), _dequantized(call, weight, scale))
    else:
        by_token = call["activations"] == "token"
        codes, x_scale, zero_point = (
            _quantized_tokens(call) if by_token else quantized_tensor(call.builder, call.tensor("x"))
        )
        name = call.builder.initializer(f"{_name(call, 'weight')}.codes", weight.t().contiguous(), share=True)
        product = call.emit("MatMulInteger", codes, name, zero_point)
        w_scale = call.builder.initializer(f"{_name(call, 'weight')}.scale", scale, share=True)
        real = call.emit("Cast", product, to=TensorProto.FLOAT)
        if by_token:  # apart: onnxruntime 1.31 fuses Mul(x_scale, w_scale) as if x had one scale
            y = call.emit("Mul", call.emit("Mul", real, w_scale), x_scale)
        else:
            y = call.emit("Mul", real, call.emit("Mul", x_scale, w_scale))
    return y if call["bias"] is None else call.emit("Add", y, call.tensor("bias"))


def quantized_tensor(builder: Builder, x: str) -> tuple[str, str, str]:
    """Codes, scale and zero point of ``x``; written once, whoever reads it."""
    key = ("dynamic", x)
    if (*key, 0) not in builder.cache:
        names = builder.emit("DynamicQuantizeLinear", [x], outputs=3)
        builder.cache.update({(*key, i): name for i, name in enumerate(names)})
    codes, scale, zero_point = (builder.cache[(*key, i)] for i in range(3))
    return codes, scale, zero_point


def _quantized_tokens(call: Call) -> tuple[str, str, str]:
    """Codes ``round(x / scale) + 128`` with ``scale = max |x| / 127`` of each token."""
    x = call.tensor("x")
    magnitude = call.emit("Abs", x)
    if call.opset >= 18:
        largest = call.emit("ReduceMax", magnitude, call.ints([-1]), keepdims=1)
    else:
        largest = call.emit("ReduceMax", magnitude, axes=[-1], keepdims=1)
    scale = call.emit("Max", call.emit("Div", largest, call.scalar(127.0)), call.scalar(_ZERO_SCALE))
    zero_point = call.builder.constant(torch.tensor(128, dtype=torch.uint8), "zero_point")
    codes = call.emit("QuantizeLinear", call.emit("Div", x, scale), call.scalar(1.0), zero_point)
    return codes, scale, zero_point


@lowers("bitsmith.dynamic_embedding.default")
def dynamic_embedding(call: Call) -> Result:
    weight, scale = _constant(call, "weight"), _constant(call, "scale")
    assert weight is not None
    codes = call.builder.initializer(f"{_name(call, 'weight')}.codes", weight, share=True)
    indices = call.tensor("indices")
    rows = call.emit("Cast", call.emit("Gather", codes, indices, axis=0), to=TensorProto.FLOAT)
    if scale is None:
        return rows
    if scale.ndim:  # as a column, whose rows are looked up alike
        name = call.builder.initializer(f"{_name(call, 'weight')}.scale", scale.unsqueeze(-1), share=True)
        name = call.emit("Gather", name, indices, axis=0)
    else:
        name = call.builder.initializer(f"{_name(call, 'weight')}.scale", scale, share=True)
    return call.emit("Mul", rows, name)


@lowers("bitsmith.dynamic_recurrent.default")
def dynamic_recurrent(call: Call) -> Result:
    kind = call["kind"]
    w_ih, w_hh, bias = _constant(call, "w_ih"), _constant(call, "w_hh"), _constant(call, "bias")
    s_ih, s_hh = _constant(call, "s_ih"), _constant(call, "s_hh")
    assert w_ih is not None
    assert w_hh is not None
    state = [call.optional("h"), call.optional("c")] if kind == "lstm" else [call.optional("h")]
    name = call.node.name
    rows = None if bias is None else call.builder.initializer(f"{name}.bias", gate_rows(kind, bias, 2).flatten(1))
    direction = "bidirectional" if len(w_ih) == 2 else "forward"
    if call["activations"] == "tensor" and kind == "lstm":
        weights = [_lstm_weight(call, part, w, s) for part, w, s in (("w_ih", w_ih, s_ih), ("w_hh", w_hh, s_hh))]
        (w, w_scale, w_zero), (r, r_scale, r_zero) = weights
        outputs = call.builder.emit(
            "DynamicQuantizeLSTM",
            [call.tensor("x"), w, r, rows, None, *state, None, w_scale, w_zero, r_scale, r_zero],
            outputs=3, domain=RUNTIME_DOMAIN, hidden_size=w_hh.shape[2], direction=direction,
        )  # fmt: skip
        return emit_outputs(call, outputs, len(w_ih))
    if call["activations"] != "float":
        raise call.refuse(
            f"onnxruntime has no integer kernel for {kind} with its input quantized per {call['activations']}",
            "quantize with target='onnxruntime', which keeps the inputs of such layers in float",
        )
    op_type, attributes = ONNX_NAMES[kind]
    matrices = [
        _stacked(call, f"{name}.{part}", gate_rows(kind, w, 1), None if s is None else _row_scales(kind, s, w))
        for part, w, s in (("w_ih", w_ih, s_ih), ("w_hh", w_hh, s_hh))
    ]
    outputs = call.builder.emit(
        op_type, [call.tensor("x"), *matrices, rows, None, *state], outputs=2 + (kind == "lstm"),
        hidden_size=w_hh.shape[2], direction=direction, **attributes(len(w_ih)),
    )  # fmt: skip
    return emit_outputs(call, outputs, len(w_ih))


def _lstm_weight(call: Call, part: str, weight: Tensor, scale: Tensor | None) -> tuple[str, str, str]:
    """Codes ``(directions, in, 4 * hidden)``, scales and zero points in the order of ONNX's gates."""
    assert scale is not None
    name = f"{call.node.name}.{part}"
    codes = gate_rows("lstm", weight, 1).transpose(1, 2).contiguous()
    scale = merged(scale)
    scale = gate_rows("lstm", scale, 1) if scale.ndim == 2 else scale
    zero = torch.zeros_like(scale, dtype=torch.int8)
    parts = (("codes", codes), ("scale", scale.contiguous()), ("zero_point", zero))
    first, second, third = (call.builder.initializer(f"{name}.{suffix}", tensor) for suffix, tensor in parts)
    return first, second, third


def _row_scales(kind: str, scale: Tensor, weight: Tensor) -> Tensor:
    """A scale for each row of all directions, in the order of ONNX's gates."""
    if scale.ndim == 1:
        return scale.repeat_interleave(weight.shape[1])
    return gate_rows(kind, scale, 1).flatten()


def _stacked(call: Call, name: str, weight: Tensor, scale: Tensor | None) -> str:
    """``(directions, rows, in)`` in float: DequantizeLinear knows one axis of scales, so the rows come in one."""
    rows = weight.flatten(0, 1).contiguous()
    codes = call.builder.initializer(f"{name}.codes", rows)
    if scale is None:
        real = call.emit("Cast", codes, to=TensorProto.FLOAT)
    else:
        real = call.emit("DequantizeLinear", codes, call.builder.initializer(f"{name}.scale", scale), axis=0)
    return call.emit("Reshape", real, call.builder.constant(torch.tensor(weight.shape), "shape"))


def _dequantized(call: Call, weight: Tensor, scale: Tensor | None) -> str:
    """A weight in float ``(in, out)``, stored as its integers or in float16."""
    name = _name(call, "weight")
    codes = call.builder.initializer(f"{name}.codes", weight.t().contiguous(), share=True)
    if scale is None:
        return call.emit("Cast", codes, to=TensorProto.FLOAT)
    scales = call.builder.initializer(f"{name}.scale", scale, share=True)
    return call.emit("DequantizeLinear", codes, scales, axis=1 if scale.ndim else None)


def _constant(call: Call, name: str) -> Tensor | None:
    node = call[name]
    if node is None:
        return None
    if node not in call.builder.constants:
        raise call.refuse(f"its {name} is computed by the model", "make it a buffer")
    return call.builder.constants[node]


def _name(call: Call, argument: str) -> str:
    return str(call[argument].target)
