"""The numbers of run-time quantization: how a tensor gets its scale when it arrives, and exact sums of its codes.

Per tensor, the law is that of ONNX's DynamicQuantizeLinear (opset 11), which onnxruntime's kernels follow to the
bit: with ``lo = min(0, min x)`` and ``hi = max(0, max x)``,

    scale = (hi - lo) / 255,  zero_point = clamp(round(-lo / scale), 0, 255),
    code  = clamp(round(x / scale) + zero_point, 0, 255)

all in float32, rounding half to even. Per token (each vector along the last axis) it is symmetric:
``scale = max |x| / 127``, ``code = round(x / scale)``. Codes are centred here, ``code - zero_point``, and travel in
float32 tensors.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

# How the activations of a layer are quantized: one scale per tensor, one per token, or not at all.
Activations = Literal["tensor", "token", "float"]

_EXACT_TERMS = 512  # products of 8-bit codes that float32 adds up exactly: 512 * 255 * 128 < 2**24
_TINY = torch.finfo(torch.float32).tiny


def quantize_tensor(x: Tensor) -> tuple[Tensor, Tensor]:
    """Centred codes of ``x`` and its scale, one for the whole tensor.

    >>> codes, scale = quantize_tensor(torch.tensor([-1.0, 0.0, 1.55]))
    >>> codes.tolist(), round(float(scale), 4)
    ([-100.0, 0.0, 155.0], 0.01)
    """
    if not x.numel():
        return x, x.new_ones(())
    lo, hi = x.aminmax()
    lo, hi = lo.clamp(max=0.0), hi.clamp(min=0.0)
    scale = torch.where(hi == lo, torch.ones_like(hi), (hi - lo) / 255.0)
    zero_point = (-lo / scale).round().clamp(0, 255)
    codes = (x / scale).round_().clamp_(-zero_point, 255 - zero_point)
    return codes, scale


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """Centred codes of ``x`` and its scales, one for each vector along the last axis: ``(..., 1)``."""
    scale = (x.abs().amax(-1, keepdim=True) / 127.0).clamp(min=_TINY)
    return (x / scale).round_(), scale


def integer_linear(codes: Tensor, weight: Tensor) -> Tensor:
    """``codes @ weight.T`` summed exactly, then rounded once to float32, as processors convert int32.

    ``codes``: centred, float32, ``(..., in)``; ``weight``: int8, ``(out, in)``.
    """
    if codes.shape[-1] <= _EXACT_TERMS:
        return F.linear(codes, weight.float())
    parts = zip(torch.split(codes, _EXACT_TERMS, -1), torch.split(weight, _EXACT_TERMS, -1))
    sums = [F.linear(part, w.float()).to(torch.int32) for part, w in parts]
    return torch.stack(sums).sum(0, dtype=torch.int32).float()


def linear(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, activations: str) -> Tensor:
    """A linear layer with weights on their grid and ``x`` quantized as it arrives.

    ``weight``: int8 codes ``(out, in)`` with ``scale`` ``(out,)`` or ``()``; or float16, without a scale.
    """
    if scale is None or activations == "float":
        return F.linear(x, dequantized(weight, scale), bias)
    if activations == "token":
        codes, x_scale = quantize_tokens(x)
        y = integer_linear(codes, weight).mul_(scale).mul_(x_scale)
    else:
        codes, x_scale = quantize_tensor(x)
        y = integer_linear(codes, weight).mul_(x_scale * scale)
    return y if bias is None else y.add_(bias)


def dequantized(weight: Tensor, scale: Tensor | None) -> Tensor:
    """The float32 values of weights with a scale per row or per tensor, or of float16 weights."""
    real = weight.float()
    return real if scale is None else real * scale.reshape(-1, *[1] * (weight.ndim - 1))
