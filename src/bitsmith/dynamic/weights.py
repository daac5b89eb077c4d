"""A layer's weight, brought onto its grid once and kept as integers (or as float16)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import NonFiniteError, RecipeError
from ..grid import FloatFormat, IntFormat, TensorSpec, quantize
from ..ranges.weights import weight_grid

HALF = FloatFormat(5, 10, reserved="ieee")


def check_weights(spec: TensorSpec, where: str) -> None:
    """Refuse what no dynamic kernel takes: 8-bit symmetric integers and float16 are all there is."""
    is_int8 = isinstance(spec.format, IntFormat) and spec.format.bits == 8 and spec.format.signed and spec.symmetric
    if not (is_int8 or spec.format == HALF) or spec.granularity not in ("tensor", "channel"):
        raise RecipeError(
            f"{where}: dynamic layers have weights of 8 bits, signed and symmetric, per channel or per tensor, or "
            f"float16, not {spec.format} per {spec.granularity}"
        )


def quantize_weight(weight: Tensor, spec: TensorSpec, where: str) -> tuple[Tensor, Tensor | None]:
    """The codes of a weight ``(out, ...)`` and its scales, ``(out,)`` or ``()``; float16 values have none."""
    weight = weight.detach()
    if not bool(weight.isfinite().all()):
        raise NonFiniteError(f"{where} holds NaN or infinite values: load a good checkpoint before quantizing")
    if spec.format == HALF:
        limit = torch.finfo(torch.float16).max
        return weight.clamp(-limit, limit).half(), None
    grid = weight_grid(weight, spec)
    return quantize(weight.contiguous(), grid).contiguous(), grid.scale.contiguous()
