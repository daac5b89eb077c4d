"""The layers with parameters: convolutions, linears, norms, embeddings."""

from __future__ import annotations

import torch
from torch import nn

from ...errors import UnsupportedOperatorError
from .ops_pool import per_axis
from .registry import LayerCall, fake, is_static, lowers_layer, unsupported


def _refuse(call: LayerCall, why: str, hint: str) -> UnsupportedOperatorError:
    return unsupported(call.node, why, hint)


def same_padding(kernel: list[int], dilation: list[int]) -> list[int]:
    """The pads of ``padding='same'``: what is odd goes to the end, as torch does it."""
    totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    return [t // 2 for t in totals] + [t - t // 2 for t in totals]


@lowers_layer(nn.Conv1d, nn.Conv2d, nn.Conv3d)
def conv(call: LayerCall) -> str:
    layer = call.layer
    assert isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    if layer.padding_mode != "zeros":
        raise _refuse(call, f"padding_mode {layer.padding_mode!r}", "pad with torch.nn.functional.pad before the layer")
    kernel, dilation, rank = list(layer.kernel_size), list(layer.dilation), len(layer.kernel_size)
    if layer.padding == "same":
        pads = same_padding(kernel, dilation)
    elif isinstance(layer.padding, str):
        pads = [0] * (2 * rank)
    else:
        pads = per_axis(layer.padding, rank) * 2
    return call.emit(
        "Conv", _batched(call, rank), call.parameter("weight"), call.optional_parameter("bias"),
        kernel_shape=kernel, strides=list(layer.stride), dilations=dilation, pads=pads, group=layer.groups,
    )  # fmt: skip


@lowers_layer(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
def conv_transpose(call: LayerCall) -> str:
    layer = call.layer
    assert isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d)
    rank = len(layer.kernel_size)
    assert not isinstance(layer.padding, str)
    return call.emit(
        "ConvTranspose", _batched(call, rank), call.parameter("weight"), call.optional_parameter("bias"),
        kernel_shape=list(layer.kernel_size), strides=list(layer.stride), dilations=list(layer.dilation),
        pads=per_axis(layer.padding, rank) * 2, output_padding=per_axis(layer.output_padding, rank),
        group=layer.groups,
    )  # fmt: skip


def _batched(call: LayerCall, rank: int) -> str:
    if fake(call.input).ndim != rank + 2:
        raise _refuse(call, "the input has no batch dimension", "add one with unsqueeze(0)")
    return call.x


@lowers_layer(nn.Linear)
def linear(call: LayerCall) -> str:
    if fake(call.input).ndim == 2 and not call.grouped("weight"):
        return call.emit("Gemm", call.x, call.parameter("weight"), call.optional_parameter("bias"), transB=1)
    if not call.grouped("weight") and all(is_static(d) for d in fake(call.input).shape[1:]):
        return _linear_over_rows(call)
    # MatMul has no transB: the weight is stored transposed, (in_features, out_features).
    bias = call.optional_parameter("bias")
    product = call.emit("MatMul", call.x, call.parameter("weight", transposed=True))
    return product if bias is None else call.emit("Add", product, bias)


def _linear_over_rows(call: LayerCall) -> str:
    """Leading axes as rows of one Gemm: its integer kernel adds the bias in integers, that of MatMul in float."""
    inner = [int(d) for d in fake(call.input).shape[1:]]
    rows = call.emit("Reshape", call.x, call.builder.constant(torch.tensor([-1, inner[-1]]), "rows"))
    y = call.emit("Gemm", rows, call.parameter("weight"), call.optional_parameter("bias"), transB=1)
    outer = torch.tensor([-1, *inner[:-1], int(fake(call.node).shape[-1])])
    return call.emit("Reshape", y, call.builder.constant(outer, "shape"))


@lowers_layer(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
def batch_norm(call: LayerCall) -> str:
    layer = call.layer
    assert isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d)
    if layer.running_mean is None or layer.running_var is None:
        raise _refuse(call, "no running statistics", "train with track_running_stats=True")
    ones = torch.ones_like(layer.running_mean)
    name = str(call.node.target)
    weight = call.optional_parameter("weight") or call.builder.initializer(f"{name}.weight", ones, share=True)
    bias = call.optional_parameter("bias") or call.builder.initializer(f"{name}.bias", ones - ones, share=True)
    return call.emit(
        "BatchNormalization", call.x, weight, bias, call.parameter("running_mean"),
        call.parameter("running_var"), epsilon=layer.eps,
    )  # fmt: skip


@lowers_layer(nn.LayerNorm)
def layer_norm(call: LayerCall) -> str:
    layer = call.layer
    assert isinstance(layer, nn.LayerNorm)
    from .ops_matmul import emit_layer_norm

    weight = call.optional_parameter("weight")
    bias = call.optional_parameter("bias")
    return emit_layer_norm(call.builder, call.x, list(layer.normalized_shape), weight, bias, layer.eps)


@lowers_layer(nn.GroupNorm)
def group_norm(call: LayerCall) -> str:
    layer = call.layer
    assert isinstance(layer, nn.GroupNorm)
    from .ops_matmul import emit_group_norm

    shape = (layer.num_channels, *([1] * (fake(call.input).ndim - 2)))
    weight = call.parameter("weight", shape=shape) if layer.affine else None
    bias = call.parameter("bias", shape=shape) if layer.affine and layer.bias is not None else None
    return emit_group_norm(call.builder, call.x, fake(call.input).shape, layer.num_groups, weight, bias, layer.eps)


@lowers_layer(nn.PReLU)
def prelu(call: LayerCall) -> str:
    rank = fake(call.input).ndim
    slopes = call.layer.weight
    assert isinstance(slopes, torch.Tensor)
    if slopes.numel() == 1:
        return call.emit("PRelu", call.x, call.parameter("weight"))
    # ONNX broadcasts from the last axis: (C,) becomes (C, 1, 1).
    return call.emit("PRelu", call.x, call.parameter("weight", shape=(-1, *([1] * (rank - 2)))))


@lowers_layer(nn.Embedding)
def embedding(call: LayerCall) -> str:
    return call.emit("Gather", call.parameter("weight"), call.x, axis=0)
