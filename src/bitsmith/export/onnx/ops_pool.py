"""Pooling. What averages a whole plane is written as GlobalAveragePool, which runtimes have in int8."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .registry import Call, Result, is_static, lowers


def per_axis(value: int | Sequence[int], rank: int) -> list[int]:
    """An option of a pool, for each spatial axis."""
    values = [value] if isinstance(value, int) else list(value)
    return values * rank if len(values) == 1 else values


def _rank(call: Call) -> int:
    """1, 2 or 3, from the operator's name."""
    return int(str(call.node.target).split("pool")[1][0])


def _require_batched(call: Call, rank: int) -> None:
    if call.fake().ndim != rank + 2:
        raise call.refuse("the input has no batch dimension", "add one with unsqueeze(0)")


def _window(call: Call) -> dict[str, list[int]]:
    rank = _rank(call)
    _require_batched(call, rank)
    kernel = per_axis(call["kernel_size"], rank)
    stride = per_axis(call["stride"], rank) if call["stride"] else kernel
    pads, dilations = per_axis(call["padding"], rank), per_axis(call.args.get("dilation", 1), rank)
    return {"kernel_shape": kernel, "strides": stride, "dilations": dilations, "pads": pads + _end_pads(
        call, kernel, stride, pads, dilations
    )}  # fmt: skip


def _end_pads(call: Call, kernel: list[int], stride: list[int], pads: list[int], dilation: list[int]) -> list[int]:
    """Padding at the end that yields torch's output size: no ceil_mode, in which runtimes differ."""
    if not call["ceil_mode"]:
        return pads
    sizes, outputs = call.fake().shape[2:], call.out.shape[2:]
    if not all(map(is_static, [*sizes, *outputs])):
        raise call.refuse("ceil_mode on a free spatial dimension", "fix the image size")
    ends = [
        (int(out) - 1) * s + d * (k - 1) + 1 - int(size) - p
        for out, size, k, s, p, d in zip(outputs, sizes, kernel, stride, pads, dilation, strict=True)
    ]
    return [max(end, pad) for end, pad in zip(ends, pads, strict=True)]


def _plain(window: dict[str, list[int]], *drop: str) -> dict[str, Any]:
    """Attributes without those that are at ONNX's default."""
    defaults = {"dilations": 1, "pads": 0, "strides": 1}
    return {
        key: value for key, value in window.items() if key not in drop and any(v != defaults.get(key) for v in value)
    }


def _is_global(call: Call, window: dict[str, list[int]]) -> bool:
    sizes = call.fake().shape[2:]
    return all(map(is_static, sizes)) and [int(s) for s in sizes] == window["kernel_shape"] and not any(window["pads"])


@lowers("aten.max_pool1d.default", "aten.max_pool2d.default", "aten.max_pool3d.default")
def max_pool(call: Call) -> Result:
    return call.emit("MaxPool", call.tensor(), **_plain(_window(call)))


@lowers(
    "aten.max_pool2d_with_indices.default", "aten.max_pool3d_with_indices.default",
    "aten.max_pool1d_with_indices.default",
)  # fmt: skip
def max_pool_with_indices(call: Call) -> Result:
    # ONNX counts its indices over the whole tensor, torch within a plane: only the values are given.
    return (call.emit("MaxPool", call.tensor(), **_plain(_window(call))),)


@lowers("aten.avg_pool1d.default", "aten.avg_pool2d.default", "aten.avg_pool3d.default")
def avg_pool(call: Call) -> Result:
    window = _window(call)
    if _is_global(call, window) and not call.args.get("divisor_override"):
        return call.emit("GlobalAveragePool", call.tensor())
    rank = _rank(call)
    begins, ends = window["pads"][:rank], window["pads"][rank:]
    include = bool(call["count_include_pad"]) and any(begins)
    if include and begins != ends:
        raise call.refuse(
            "ceil_mode together with counted padding counts some of the padding only",
            "use ceil_mode=False or count_include_pad=False",
        )
    attributes = _plain(window, "dilations")
    divisor = call.args.get("divisor_override")
    if divisor:
        pooled = call.emit("AveragePool", call.tensor(), count_include_pad=1, **attributes)
        factor = math.prod(window["kernel_shape"]) / divisor
        return call.emit("Mul", pooled, call.scalar(factor, call.out.dtype, "divisor"))
    return call.emit("AveragePool", call.tensor(), count_include_pad=1 if include else None, **attributes)


def _adaptive(call: Call, kind: str) -> str:
    rank = _rank(call)
    _require_batched(call, rank)
    outputs, sizes = [int(size) for size in call.out.shape[2:]], call.fake().shape[2:]
    if all(size == 1 for size in outputs):
        return call.emit(f"Global{kind}Pool", call.tensor())
    if not all(map(is_static, sizes)) or any(int(s) % o for s, o in zip(sizes, outputs, strict=True)):
        raise call.refuse(
            f"an adaptive pool from {[str(s) for s in sizes]} to {outputs}, whose windows differ in size",
            "choose an image size that makes the input divisible by the output, or use a plain pool",
        )
    kernel = [int(s) // o for s, o in zip(sizes, outputs, strict=True)]
    if all(size == 1 for size in kernel):
        return call.tensor()
    return call.emit(f"{kind}Pool", call.tensor(), kernel_shape=kernel, strides=kernel)


@lowers(
    "aten.adaptive_avg_pool1d.default", "aten.adaptive_avg_pool2d.default",
    "aten.adaptive_avg_pool3d.default", "aten._adaptive_avg_pool2d.default",
    "aten._adaptive_avg_pool3d.default",
)  # fmt: skip
def adaptive_avg_pool(call: Call) -> Result:
    return _adaptive(call, "Average")


@lowers("aten.adaptive_max_pool1d.default", "aten.adaptive_max_pool2d.default", "aten.adaptive_max_pool3d.default")
def adaptive_max_pool(call: Call) -> Result:
    return (_adaptive(call, "Max"),)
