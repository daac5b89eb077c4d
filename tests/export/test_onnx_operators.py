"""Every operator in ONNX computes what torch computes, at old and new opsets and any batch size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx_helpers import float_graph, run_onnx
from torch import Tensor, nn

from bitsmith.export.onnx import DEFAULT_OPSET, NEWEST_OPSET, build_onnx

OPSETS = sorted({13, 17, 18, DEFAULT_OPSET, NEWEST_OPSET})
IMAGE, SEQUENCE, VECTOR, SIGNAL, VOLUME = (3, 4, 6, 6), (3, 5, 8), (3, 8), (3, 4, 12), (3, 2, 4, 6, 6)


class Function(nn.Module):
    """A model that is one function of its inputs."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


TABLE = torch.linspace(-1, 1, 5 * 8).reshape(5, 8)
MASK = torch.ones(5, 5, dtype=torch.bool).tril()

UNARY: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Any]]] = {
    "relu": (IMAGE, torch.relu),
    "relu6": (IMAGE, lambda x: F.relu6(4 * x)),
    "hardtanh": (IMAGE, lambda x: F.hardtanh(x, -0.5, 0.7)),
    "clamp": (IMAGE, lambda x: x.clamp(-0.5, 0.25)),
    "clamp_min": (IMAGE, lambda x: x.clamp_min(0.1)),
    "clamp_max": (IMAGE, lambda x: x.clamp(max=0.1)),
    "hardswish": (IMAGE, lambda x: F.hardswish(3 * x)),
    "hardsigmoid": (IMAGE, lambda x: F.hardsigmoid(3 * x)),
    "sigmoid": (IMAGE, torch.sigmoid),
    "tanh": (IMAGE, torch.tanh),
    "gelu": (SEQUENCE, F.gelu),
    "gelu_tanh": (SEQUENCE, lambda x: F.gelu(x, approximate="tanh")),
    "silu": (IMAGE, F.silu),
    "elu": (IMAGE, lambda x: F.elu(x, 0.8)),
    "selu": (IMAGE, F.selu),
    "celu": (IMAGE, lambda x: F.celu(x, 1.3)),
    "leaky_relu": (IMAGE, lambda x: F.leaky_relu(x, 0.2)),
    "softplus": (IMAGE, F.softplus),
    "softplus_beta": (IMAGE, lambda x: F.softplus(x, beta=2.0)),
    "mish": (IMAGE, F.mish),
    "softsign": (IMAGE, F.softsign),
    "logsigmoid": (IMAGE, F.logsigmoid),
    "glu": (IMAGE, lambda x: F.glu(x, 1)),
    "softmax": (SEQUENCE, lambda x: x.softmax(-1)),
    "log_softmax": (SEQUENCE, lambda x: F.log_softmax(x, 1)),
    "max_pool1d": (SIGNAL, lambda x: F.max_pool1d(x, 3, 2, 1)),
    "max_pool2d": (IMAGE, lambda x: F.max_pool2d(x, 3, 2, 1)),
    "max_pool2d_ceil": (IMAGE, lambda x: F.max_pool2d(x, 3, 2, ceil_mode=True)),
    "max_pool2d_ceil_padded": ((2, 3, 7, 7), lambda x: F.max_pool2d(x, 2, 2, 1, ceil_mode=True)),
    "max_pool2d_dilated": (IMAGE, lambda x: F.max_pool2d(x, 2, 1, 0, 2)),
    "max_pool3d": (VOLUME, lambda x: F.max_pool3d(x, 2)),
    "avg_pool1d": (SIGNAL, lambda x: F.avg_pool1d(x, 3, 2, 1)),
    "avg_pool2d": (IMAGE, lambda x: F.avg_pool2d(x, 2)),
    "avg_pool2d_counted": (IMAGE, lambda x: F.avg_pool2d(x, 3, 2, 1)),
    "avg_pool2d_uncounted": (IMAGE, lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False)),
    "avg_pool2d_ceil": (IMAGE, lambda x: F.avg_pool2d(x, 3, 2, ceil_mode=True)),
    "avg_pool2d_divisor": (IMAGE, lambda x: F.avg_pool2d(x, 2, divisor_override=3)),
    "avg_pool2d_global": (IMAGE, lambda x: F.avg_pool2d(x, 6).flatten(1)),
    "avg_pool3d": (VOLUME, lambda x: F.avg_pool3d(x, 2)),
    "adaptive_avg_pool1d": (SIGNAL, lambda x: F.adaptive_avg_pool1d(x, 4)),
    "adaptive_avg_pool2d": (IMAGE, lambda x: F.adaptive_avg_pool2d(x, (3, 2))),
    "adaptive_avg_pool2d_one": (IMAGE, lambda x: F.adaptive_avg_pool2d(x, 1)),
    "adaptive_avg_pool2d_same": (IMAGE, lambda x: F.adaptive_avg_pool2d(x, 6) + 1),
    "adaptive_avg_pool3d": (VOLUME, lambda x: F.adaptive_avg_pool3d(x, (2, 3, 3))),
    "adaptive_max_pool2d": (IMAGE, lambda x: F.adaptive_max_pool2d(x, 2)),
    "mean_global": (IMAGE, lambda x: x.mean((2, 3))),
    "mean_global_keep": (IMAGE, lambda x: x.mean((-1, -2), keepdim=True)),
    "mean_tokens": (SEQUENCE, lambda x: x.mean(1)),
    "mean_all": (SEQUENCE, lambda x: x.mean()),
    "sum": (SEQUENCE, lambda x: x.sum((1, 2), keepdim=True)),
    "amax": (SEQUENCE, lambda x: x.amax(1)),
    "amin": (SEQUENCE, lambda x: x.amin((1, 2))),
    "max_dim": (SEQUENCE, lambda x: x.max(1)),
    "argmax": (SEQUENCE, lambda x: x.argmax(-1)),
    "var": (SEQUENCE, lambda x: x.var(-1)),
    "std_biased": (SEQUENCE, lambda x: x.std(-1, correction=0, keepdim=True)),
    "normalize": (SEQUENCE, lambda x: F.normalize(x, dim=-1)),
    "cumsum": (SEQUENCE, lambda x: x.cumsum(1)),
    "topk": (SEQUENCE, lambda x: x.topk(2, dim=1).values),
    "view": (IMAGE, lambda x: x.view(x.size(0), -1)),
    "view_split_heads": (SEQUENCE, lambda x: x.view(x.shape[0], 5, 2, 4)),
    "view_merge_batch": (SEQUENCE, lambda x: x.reshape(x.shape[0] * 5, 8)),
    "view_to_front": (SEQUENCE, lambda x: x.reshape(5, x.shape[0], 8)),
    "flatten": (IMAGE, lambda x: torch.flatten(x, 1)),
    "flatten_middle": (IMAGE, lambda x: x.flatten(1, 2)),
    "unflatten": (VECTOR, lambda x: x.unflatten(1, (2, 4))),
    "permute": (IMAGE, lambda x: x.permute(0, 2, 3, 1)),
    "transpose": (SEQUENCE, lambda x: x.transpose(1, 2)),
    "t": (VECTOR, lambda x: x.t()),
    "slice": (IMAGE, lambda x: x[:, 1:, ::2, :-1]),
    "slice_batch": (IMAGE, lambda x: x[1:]),
    "select": (SEQUENCE, lambda x: x[:, -1]),
    "split": (IMAGE, lambda x: [y + 1 for y in x.split(3, 1)]),
    "split_with_sizes": (IMAGE, lambda x: x.split([1, 3], 1)),
    "chunk": (IMAGE, lambda x: x.chunk(2, 1)[1]),
    "unbind": (SEQUENCE, lambda x: x.unbind(1)[2]),
    "cat": (IMAGE, lambda x: torch.cat([x, 2 * x, x[:, :1]], 1)),
    "stack": (SEQUENCE, lambda x: torch.stack([x, x * 2], 2)),
    "pad": (IMAGE, lambda x: F.pad(x, (1, 2, 0, 3))),
    "pad_value": (IMAGE, lambda x: F.pad(x, (1, 0), value=-2.0)),
    "pad_reflect": (IMAGE, lambda x: F.pad(x, (1, 2, 2, 1), mode="reflect")),
    "pad_replicate": (IMAGE, lambda x: F.pad(x, (1, 2, 2, 1), mode="replicate")),
    "pad_negative": (IMAGE, lambda x: F.pad(x, (-1, 0, 1, -2))),
    "unsqueeze": (SEQUENCE, lambda x: x.unsqueeze(-2)),
    "squeeze": ((3, 1, 4, 1), lambda x: x.squeeze(1).squeeze(-1)),
    "expand": (VECTOR, lambda x: x[:, None].expand(-1, 4, -1)),
    "class_token": (SEQUENCE, lambda x: torch.cat([TABLE[:1].expand(x.shape[0], -1, -1), x], 1)),
    "repeat": (SEQUENCE, lambda x: x.repeat(1, 2, 3)),
    "repeat_more": (VECTOR, lambda x: x.repeat(2, 1, 3)),
    "flip": (SEQUENCE, lambda x: x.flip(1)),
    "roll": (IMAGE, lambda x: x.roll((1, -2), (2, 3))),
    "pixel_shuffle": (IMAGE, lambda x: F.pixel_shuffle(x, 2)),
    "pixel_unshuffle": (IMAGE, lambda x: F.pixel_unshuffle(x, 2)),
    "channel_shuffle": (IMAGE, lambda x: F.channel_shuffle(x, 2)),
    "upsample_nearest": (IMAGE, lambda x: F.interpolate(x, scale_factor=2)),
    "upsample_nearest_size": (IMAGE, lambda x: F.interpolate(x, size=(9, 7))),
    "upsample_bilinear": (IMAGE, lambda x: F.interpolate(x, scale_factor=2.0, mode="bilinear")),
    "upsample_bilinear_half": (IMAGE, lambda x: F.interpolate(x, scale_factor=1.5, mode="bilinear")),
    "upsample_bilinear_size": (IMAGE, lambda x: F.interpolate(x, size=(7, 10), mode="bilinear")),
    "upsample_bilinear_corners": (
        IMAGE,
        lambda x: F.interpolate(x, size=(7, 11), mode="bilinear", align_corners=True),
    ),
    "upsample_bicubic": (IMAGE, lambda x: F.interpolate(x, scale_factor=2.0, mode="bicubic")),
    "upsample_linear1d": (SIGNAL, lambda x: F.interpolate(x, scale_factor=2.0, mode="linear")),
    "scalars": (SEQUENCE, lambda x: (2 * x + 1 - x / 3) * 0.5 - (1 - x)),
    "add_alpha": (SEQUENCE, lambda x: torch.add(x, x.sigmoid(), alpha=0.3)),
    "neg_abs_exp": (SEQUENCE, lambda x: (-x.abs()).exp()),
    "log_sqrt_rsqrt": (SEQUENCE, lambda x: (x * x + 1).log() + (x * x + 1).sqrt() + (x * x + 1).rsqrt()),
    "pow_reciprocal": (SEQUENCE, lambda x: (x.abs() + 1).pow(1.5) + (x.abs() + 1).reciprocal() + x**2),
    "trigonometric": (SEQUENCE, lambda x: x.sin() + x.cos() + x.erf() + x.floor() + x.round()),
    "where_compare": (
        SEQUENCE,
        lambda x: torch.where((x > 0) & (x <= 1), x, -x) + (x == 0).float() + (x != 1),
    ),
    "masked_fill": (SEQUENCE, lambda x: x.masked_fill(x < 0, -3.0)),
    "maximum": (SEQUENCE, lambda x: torch.maximum(x, -x) + torch.minimum(x, x * x)),
    "remainder": (SEQUENCE, lambda x: (5 * x) % 2 + torch.div(5 * x, 2, rounding_mode="floor")),
    "gather": (SEQUENCE, lambda x: x.gather(1, x.argmax(1, keepdim=True))),
    "index_select": (SEQUENCE, lambda x: x.index_select(1, torch.tensor([2, 0]))),
    "index_list": (SEQUENCE, lambda x: x[:, [3, 1, 1]]),
    "ones_zeros_full": (SEQUENCE, lambda x: x + torch.ones(8) + torch.full((5, 1), 2.0) + torch.arange(8)),
    "zeros_like": (SEQUENCE, lambda x: torch.cat([x, torch.zeros_like(x), x.new_ones(x.shape[0], 1, 8)], 1)),
    "layer_norm": (SEQUENCE, lambda x: F.layer_norm(x, (8,))),
    "rms_norm": (SEQUENCE, lambda x: F.rms_norm(x, (8,), eps=1e-6)),
    "instance_norm": (IMAGE, F.instance_norm),
    "group_norm": (IMAGE, lambda x: F.group_norm(x, 2)),
    "matmul": (SEQUENCE, lambda x: x @ x.transpose(1, 2)),
    "bmm": (SEQUENCE, lambda x: torch.bmm(x, x.transpose(1, 2))),
    "einsum": (SEQUENCE, lambda x: torch.einsum("bij,kj->bik", x, TABLE)),
    "attention": (SEQUENCE, lambda x: F.scaled_dot_product_attention(x, x * 2, x + 1)),
    "attention_causal": (
        SEQUENCE,
        lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True, scale=0.3),
    ),
    "attention_mask": (SEQUENCE, lambda x: F.scaled_dot_product_attention(x, x, x, attn_mask=MASK)),
    "attention_bias": (SEQUENCE, lambda x: F.scaled_dot_product_attention(x, x, x, attn_mask=MASK.float())),
    "dynamic_conv": (
        IMAGE,
        lambda x: F.conv2d(x, x[:1].mean(0, keepdim=True).expand(2, -1, -1, -1), padding=1),
    ),
    "batch_size_as_number": (VECTOR, lambda x: x / x.shape[0]),
}

LAYERS: dict[str, tuple[tuple[int, ...], Callable[[], nn.Module]]] = {
    "conv1d": (SIGNAL, lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1)),
    "conv2d": (IMAGE, lambda: nn.Conv2d(4, 6, 3, padding=1, dilation=2)),
    "conv2d_same": (IMAGE, lambda: nn.Conv2d(4, 6, (4, 3), padding="same", bias=False)),
    "conv2d_valid": (IMAGE, lambda: nn.Conv2d(4, 6, 3, padding="valid")),
    "conv2d_depthwise": (IMAGE, lambda: nn.Conv2d(4, 8, 3, groups=4)),
    "conv3d": (VOLUME, lambda: nn.Conv3d(2, 3, 3, padding=(1, 0, 1))),
    "conv_transpose1d": (SIGNAL, lambda: nn.ConvTranspose1d(4, 3, 3, 2)),
    "conv_transpose2d": (IMAGE, lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2)),
    "conv_transpose3d": (VOLUME, lambda: nn.ConvTranspose3d(2, 3, 2, 2)),
    "linear": (VECTOR, lambda: nn.Linear(8, 5)),
    "linear_3d": (SEQUENCE, lambda: nn.Linear(8, 5)),
    "linear_3d_no_bias": (SEQUENCE, lambda: nn.Linear(8, 5, bias=False)),
    "batch_norm1d": (VECTOR, lambda: nn.BatchNorm1d(8)),
    "batch_norm2d": (IMAGE, lambda: nn.BatchNorm2d(4, affine=False)),
    "batch_norm3d": (VOLUME, lambda: nn.BatchNorm3d(2)),
    "layer_norm": (SEQUENCE, lambda: nn.LayerNorm(8)),
    "layer_norm_2d": (SEQUENCE, lambda: nn.LayerNorm((5, 8), bias=False)),
    "group_norm": (IMAGE, lambda: nn.GroupNorm(2, 4)),
    "prelu": (IMAGE, lambda: nn.PReLU(4)),
    "prelu_one": (IMAGE, lambda: nn.PReLU()),
    "attention": (SEQUENCE, lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)),
}


def assert_same(model: nn.Module, shape: tuple[int, ...]) -> None:
    """The file's outputs are torch's, at every opset and for batches of 1 and 5."""
    torch.manual_seed(0)
    model = model.eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.running_mean)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 2.0)  # type: ignore[arg-type]
    graph = float_graph(model, torch.randn(shape))
    for opset in OPSETS:
        file = build_onnx(graph, opset=opset)
        for batch in (1, 5) if "batch" in str(file.graph.input[0]) else (shape[0],):
            x = torch.randn(batch, *shape[1:])
            with torch.no_grad():
                expected = [y for y in torch.utils._pytree.tree_leaves(model(x)) if isinstance(y, Tensor)]
            for got, want in zip(run_onnx(file, x), expected, strict=True):
                torch.testing.assert_close(
                    got,
                    want,
                    atol=1e-5,
                    rtol=1e-4,
                    msg=lambda m, o=opset, b=batch: f"opset {o}, batch {b}: {m}",
                )
        assert_complete(file)


def assert_complete(file: onnx.ModelProto) -> None:
    """Every value has a shape, every node a name of its own."""
    known = {info.name: info for info in (*file.graph.value_info, *file.graph.output)}
    for node in file.graph.node:
        for name in node.output:
            assert known[name].type.tensor_type.HasField("shape"), f"{name} has no shape"
    names = [node.name for node in file.graph.node]
    assert len(set(names)) == len(names)
    assert all(names)


@pytest.mark.parametrize("name", UNARY)
def test_a_function_computes_what_torch_computes(name: str) -> None:
    shape, function = UNARY[name]
    assert_same(Function(function), shape)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_computes_what_torch_computes(name: str) -> None:
    shape, make = LAYERS[name]
    torch.manual_seed(1)
    assert_same(nn.Sequential(make()), shape)
