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


def quantize_state_weight(weight: Tensor, spec: TensorSpec, where: str) -> tuple[Tensor, Tensor | None]:
    """The same for the matrix of a recurrent state: one scale for all rows where that costs less than 1 dB.

    A scale per row costs onnxruntime's LSTM a tenth of its speed, and gains nothing where the rows are alike.
    """
    codes, scale = quantize_weight(weight, spec, where)
    if scale is None or not scale.ndim:
        return codes, scale
    together, one = quantize_weight(weight, spec.model_copy(update={"granularity": "tensor"}), where)
    assert one is not None
    lost, least = ((c * s - weight.detach()).square().sum() for c, s in ((together, one), (codes, scale[:, None])))
    return (together, one.expand_as(scale).clone()) if lost < 10**0.1 * least else (codes, scale)


def merged(scale: Tensor) -> Tensor:
    """Scales ``(directions, rows)`` as ``(directions,)`` where all rows of each direction have the same."""
    return scale.amax(1) if scale.ndim == 2 and bool((scale == scale[:, :1]).all()) else scale
