"""Attention: written out, or as one of onnxruntime's own operators."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

import torch
from onnx import TensorProto
from torch import Tensor, fx

from .ops_dynamic import RUNTIME_DOMAIN, quantized_tensor
from .ops_shape import same
from .registry import Call, Result, fake, is_static, lowers, operator_name

_SPLITS = {"aten.view.default", "aten.reshape.default", "aten.unflatten.int"}
_PARTS = {"aten.chunk.default", "aten.split.Tensor", "aten.split_with_sizes.default"}


@lowers("aten.scaled_dot_product_attention.default")
def attention(call: Call) -> Result:
    """softmax(Q K^T * scale + mask) V, written out."""
    if call["enable_gqa"]:
        raise call.refuse("enable_gqa=True", "repeat the key and value heads before the call")
    if call.builder.for_onnxruntime and (fused := _fused_attention(call)) is not None:
        return fused
    query, key, dtype = call.fake("query"), call.fake("key"), call.out.dtype
    scale = call["scale"] or 1 / math.sqrt(int(query.shape[-1]))
    order = [*range(key.ndim - 2), key.ndim - 1, key.ndim - 2]
    scores = call.emit("MatMul", call.tensor("query"), call.emit("Transpose", call.tensor("key"), perm=order))
    scores = call.emit("Mul", scores, call.scalar(scale, dtype, "scale"))
    never = call.scalar(-math.inf, dtype, "minus_infinity")
    if call["is_causal"]:
        rows, columns = query.shape[-2], key.shape[-2]
        if not (is_static(rows) and is_static(columns)):
            raise call.refuse("is_causal=True with a free sequence length", "pass the mask as a tensor")
        allowed = torch.ones(int(rows), int(columns), dtype=torch.bool).tril()
        scores = call.emit("Where", call.builder.constant(allowed, "causal"), scores, never)
    if call["attn_mask"] is not None:
        if call.fake("attn_mask").dtype == torch.bool:
            scores = call.emit("Where", call.tensor("attn_mask"), scores, never)
        else:
            scores = call.emit("Add", scores, call.operand("attn_mask", dtype))
    return call.emit("MatMul", call.emit("Softmax", scores, axis=-1), call.tensor("value"))


def _fused_attention(call: Call) -> str | None:
    """onnxruntime's QAttention or MultiHeadAttention; None where neither applies.

    They take and give ``(batch, length, heads * size)``, which ``reshape`` knows to be what the model goes on with.
    """
    query, value = call.fake("query"), call.fake("value")
    static = all(is_static(d) for t in (query, value) for d in (t.shape[1], t.shape[-1]))
    if query.ndim != 4 or not static or call.out.dtype != torch.float32:
        return None
    out = _quantized_attention(call) or _multi_head_attention(call)
    heads, size = int(query.shape[1]), int(value.shape[-1])
    for user in call.node.users:
        if operator_name(user) == "aten.transpose.int" and set(user.args[1:]) == {1, 2}:
            call.builder.cache["rows", user] = out
    split = call.emit("Reshape", out, call.ints([0, 0, heads, size], "heads"))
    return call.emit("Transpose", split, perm=[0, 2, 1, 3])


def _multi_head_attention(call: Call) -> str:
    query = call.fake("query")
    rows = [_rows(call, call[name]) for name in ("query", "key", "value")]
    bias = None
    if call["attn_mask"] is not None:
        bias = call.tensor("attn_mask")
        if call.fake("attn_mask").dtype == torch.bool:
            zero, never = call.scalar(0.0), call.scalar(-math.inf, hint="minus_infinity")
            bias = call.emit("Where", bias, zero, never)
        # Its last two axes must be whole, its first two may be 1.
        shape = [1, 1, query.shape[-2], call.fake("key").shape[-2]]
        bias = call.emit("Expand", bias, call.builder.shape_tensor(shape))
    scale = call["scale"] or 1 / math.sqrt(int(query.shape[-1]))
    return call.emit(
        "MultiHeadAttention", *rows, None, None, bias, domain=RUNTIME_DOMAIN, num_heads=int(query.shape[1]),
        scale=scale, unidirectional=int(call["is_causal"]),
    )  # fmt: skip


def _rows(call: Call, node: fx.Node) -> str:
    """``(batch, heads, length, size)`` as ``(batch, length, heads * size)``, which it mostly has been before."""
    whole = _whole(node)
    if whole is not None:
        return call.builder.value(whole)
    turned = call.emit("Transpose", call.builder.value(node), perm=[0, 2, 1, 3])
    return call.emit("Reshape", turned, call.ints([0, 0, -1], "rows"))


def _whole(node: fx.Node) -> fx.Node | None:
    """The value ``(batch, length, heads * size)`` that the model split into ``(batch, heads, length, size)``."""
    split = node.args[0] if operator_name(node) == "aten.transpose.int" and set(node.args[1:]) == {1, 2} else None
    whole = split.args[0] if isinstance(split, fx.Node) and operator_name(split) in _SPLITS else None
    if isinstance(whole, fx.Node) and fake(whole).ndim == 3:
        heads, size = fake(node).shape[1], fake(node).shape[3]
        if is_static(fake(whole).shape[2]) and int(fake(whole).shape[2]) == int(heads) * int(size):
            return whole
    return None


@dataclass(frozen=True)
class _Projection:
    """A linear layer on run-time codes, or some of its outputs: ``x`` times ``weight`` ``(out, in)``."""

    x: fx.Node
    weight: Tensor
    scale: Tensor
    bias: Tensor


def _quantized_attention(call: Call) -> str | None:
    """QAttention: query, key and value projected from one input's codes, and the attention, in one operator.

    On 16 tokens of MiniLM it takes a seventh less time than three products and MultiHeadAttention, since fewer
    parts wait for each other's threads. Its mask says which tokens are there: ``(batch, length)``.
    """
    parts = [_projection(call, _whole(call[name])) for name in ("query", "key", "value")]
    projections = [part for part in parts if part is not None]
    size = int(call.fake("query").shape[-1])
    usual = call["scale"] is None or math.isclose(call["scale"], 1 / math.sqrt(size))
    if len(projections) < 3 or not usual or call.fake("value").shape[-1] != size:
        return None
    x = projections[0].x
    mask = _token_mask(call, x)
    if (
        any(part.x is not x for part in projections)
        or fake(x).ndim != 3
        or (mask is None) != (call["attn_mask"] is None)
    ):
        return None
    codes, x_scale, zero_point = quantized_tensor(call.builder, call.builder.value(x))
    named = {
        "codes": torch.cat([part.weight for part in projections]).t().contiguous(),
        "scale": torch.cat([part.scale for part in projections]),
        "bias": torch.cat([part.bias for part in projections]),
    }
    weight, scale, bias = (call.builder.initializer(f"{call.node.name}.{k}", t) for k, t in named.items())
    heads = int(call.fake("query").shape[1])
    return call.emit(
        "QAttention", codes, weight, bias, x_scale, scale, mask, zero_point, domain=RUNTIME_DOMAIN, num_heads=heads,
        unidirectional=int(call["is_causal"]),
    )  # fmt: skip


def _projection(call: Call, node: Any) -> _Projection | None:
    """What ``node`` computes, where that is a product of run-time codes."""
    start, end = 0, None
    if node is not None and node.target is operator.getitem:
        parts, index = node.args
        if operator_name(parts) not in _PARTS or parts.args[2:] not in ((-1,), (2,)):
            return None
        sizes = [int(value.shape[-1]) for value in parts.meta["val"]]
        start, end = sum(sizes[:index]), sum(sizes[: index + 1])
        node = parts.args[0]
    if node is None or operator_name(node) != "bitsmith.dynamic_linear.default":
        return None
    x, *parameters, activations = node.args
    weight, scale, bias = (call.builder.constants.get(p) for p in parameters)
    if activations != "tensor" or weight is None or scale is None:
        return None
    bias = torch.zeros(len(weight)) if bias is None else bias
    weight, scale, bias = (t[start:end] for t in (weight, scale.expand(len(weight)), bias))
    return _Projection(x, weight, scale, bias)


def _token_mask(call: Call, x: fx.Node) -> str | None:
    """A mask of booleans ``(batch, 1, 1, length)`` as QAttention has it; None where it is another one."""
    node = call["attn_mask"]
    if node is None or fake(node).dtype != torch.bool or fake(node).ndim != 4:
        return None
    batch, heads, rows, length = fake(node).shape
    if not (same(batch, fake(x).shape[0]) and heads == rows == 1 and same(length, fake(x).shape[1])):
        return None
    key = ("token mask", node)
    if key not in call.builder.cache:
        squeezed = call.emit("Squeeze", call.builder.value(node), call.ints([1, 2]))
        call.builder.cache[key] = call.emit("Cast", squeezed, to=TensorProto.INT32)
    return call.builder.cache[key]
