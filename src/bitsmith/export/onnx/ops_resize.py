"""Interpolation as Resize, with torch's coordinates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from .builder import Dim
from .registry import Call, Result, is_static, lowers

_AXES_OPSET = 18
_NEAREST = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}


def _resize(call: Call, attributes: dict[str, Any]) -> str:
    sizes, outputs = list(call.fake().shape[2:]), list(call.out.shape[2:])
    if all(is_static(a) and is_static(b) and int(a) == int(b) for a, b in zip(sizes, outputs, strict=True)):
        return call.tensor()
    given = _given_scales(call)
    scales = given if given is not None else _exact_scales(sizes, outputs)
    if scales is not None and _gives(scales, sizes, outputs):
        ends = call.builder.constant(torch.tensor([1.0, 1.0, *scales], dtype=torch.float32), "scales")
        return call.emit("Resize", call.tensor(), None, ends, **attributes)
    if given is not None and not _whole_ratio(given, sizes, outputs):
        # Sizes alone would lay the coordinates out by output / input, where torch uses the given factor.
        raise call.refuse(f"scale factors {given} that do not give the output size in float32", "give size= instead")
    if call.opset >= _AXES_OPSET:
        target = call.builder.shape_tensor(outputs)
        axes = list(range(2, call.out.ndim))
        return call.emit("Resize", call.tensor(), None, None, target, axes=axes, **attributes)
    return call.emit("Resize", call.tensor(), None, None, call.builder.shape_tensor(call.out.shape), **attributes)


def _given_scales(call: Call) -> list[float] | None:
    """The scale factors that the model names, which torch then uses for the coordinates."""
    factors = call.args.get("scale_factors")
    if factors is None:
        names = [name for name in ("scales_d", "scales_h", "scales_w", "scales") if name in call.args]
        factors = [call[name] for name in names]
    if not factors or any(factor is None for factor in factors):
        return None
    return [float(factor) for factor in factors]


def _exact_scales(sizes: Sequence[Dim], outputs: Sequence[Dim]) -> list[float] | None:
    """Whole-numbered factors; others are left to sizes."""
    if not all(map(is_static, [*sizes, *outputs])) or any(int(o) % int(s) for s, o in zip(sizes, outputs, strict=True)):
        return None
    return [int(o) / int(s) for s, o in zip(sizes, outputs, strict=True)]


def _gives(scales: list[float], sizes: Sequence[Dim], outputs: Sequence[Dim]) -> bool:
    """Whether the runtime's ``floor(size * float32(scale))`` is the output size."""
    return all(
        not is_static(s) or math.floor(np.float32(int(s)) * np.float32(scale)) == int(o)
        for scale, s, o in zip(scales, sizes, outputs, strict=True)
    )


def _whole_ratio(scales: list[float], sizes: Sequence[Dim], outputs: Sequence[Dim]) -> bool:
    return all(
        is_static(s) and abs(scale - int(o) / int(s)) < 1e-6 for scale, s, o in zip(scales, sizes, outputs, strict=True)
    )


@lowers(*(f"aten.upsample_nearest{rank}d.{overload}" for rank in (1, 2, 3) for overload in ("default", "vec")))
def nearest(call: Call) -> Result:
    return _resize(call, _NEAREST)


def _coordinates(call: Call) -> str:
    return "align_corners" if call["align_corners"] else "half_pixel"


@lowers(
    *(
        f"aten.upsample_{name}.{form}"
        for name in ("linear1d", "bilinear2d", "trilinear3d")
        for form in ("default", "vec")
    )
)
def linear(call: Call) -> Result:
    return _resize(call, {"mode": "linear", "coordinate_transformation_mode": _coordinates(call)})


@lowers("aten.upsample_bicubic2d.default", "aten.upsample_bicubic2d.vec")
def cubic(call: Call) -> Result:
    coordinates = _coordinates(call)
    return _resize(call, {"mode": "cubic", "coordinate_transformation_mode": coordinates, "cubic_coeff_a": -0.75})
