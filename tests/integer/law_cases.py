"""For each law: how to draw an operator, which kernel onnxruntime runs it with, and what our law makes of it.

``python tests/integer/law_cases.py`` writes ``golden_laws.npz``: small draws with onnxruntime's own answers,
so that the laws stay tested where another onnxruntime or another processor computes something else.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from ort_kernels import Array, Codes, run_kernel
from torch import Tensor

from bitsmith.grid import Grid, IntFormat
from bitsmith.integer import laws

GOLDEN = Path(__file__).with_name("golden_laws.npz")
CARRIERS = {"float": torch.float32, "integer": torch.int32}
Random = np.random.Generator


@dataclass(frozen=True)
class Case:
    """One operator with its operands, its output grid (``scale`` None: float) and ONNX attributes."""

    operands: list[Codes]
    scale: float | None
    zero: int
    attributes: dict[str, Any] = field(default_factory=dict)
    bias: Array | None = None

    @property
    def grids(self) -> list[Grid]:
        return [grid_of(x.codes.dtype, x.scale, x.zero) for x in self.operands]

    @property
    def output(self) -> Grid:
        return grid_of(self.operands[0].codes.dtype, self.scale, self.zero)

    def centred(self, carrier: torch.dtype) -> list[Tensor]:
        return [torch.from_numpy(x.codes.astype(np.int32) - x.zero).to(carrier) for x in self.operands]

    def run(self, op: str) -> tuple[Array, list[str]]:
        return run_kernel(
            op,
            self.operands,
            self.scale,
            self.zero,
            dtype=self.operands[0].codes.dtype,
            bias=self.bias,
            **self.attributes,
        )


@dataclass(frozen=True)
class Law:
    """``draw(rng, scales)`` makes a Case; ``apply(case, carrier)`` gives centred codes, or real numbers."""

    op: str
    kernel: str
    draw: Callable[[Random, list[np.float32]], Case]
    apply: Callable[[Case, torch.dtype], Tensor]


def grid_of(dtype: Any, scale: Any, zero: int) -> Grid:
    scales = torch.as_tensor(np.asarray(scale, dtype=np.float32))
    fmt = IntFormat(8, signed=np.dtype(dtype) == np.int8)
    return Grid(fmt, scales, torch.tensor(zero, dtype=torch.int32), 0 if scales.ndim else None)


def draw_scales(rng: Random, kind: int) -> list[np.float32]:
    """Any scales; powers of two; small multiples of them; multiples of 1/255; all equal. Most of them tie."""

    def one() -> np.float32:
        return [
            lambda: np.float32(np.exp(rng.uniform(-6, 2))),
            lambda: np.float32(2.0 ** rng.integers(-8, 3)),
            lambda: np.float32(2.0 ** rng.integers(-8, 3) * rng.choice([1, 1.5, 3, 5, 1.25, 0.75])),
            lambda: np.float32(rng.integers(1, 300) / 255),
        ][kind % 4]()

    return [one()] * 3 if kind == 4 else [one() for _ in range(3)]


def codes(rng: Random, *shape: int) -> Array:
    return rng.integers(0, 256, shape).astype(np.uint8)


def zero(rng: Random) -> int:
    return int(rng.choice([0, 128, 255, rng.integers(0, 256)]))


def operand(rng: Random, scale: np.float32, *shape: int) -> Codes:
    return Codes(codes(rng, *shape), float(scale), zero(rng))


def _output(rng: Random, base: np.float32, *factors: float) -> tuple[float, int]:
    return float(np.float32(base * np.float32(rng.choice(factors)))), zero(rng)


BROADCASTS = [
    ((2, 3, 40), (2, 3, 40)),
    ((2, 8, 5, 5), (2, 8, 1, 1)),
    ((2, 8, 1, 1), (2, 8, 5, 5)),
    ((9, 7), (7,)),
    ((7,), (9, 7)),
    ((2, 1, 4, 9), (2, 5, 4, 9)),
    ((1, 8, 1), (4, 1, 8)),
    ((2, 8, 1, 1), (1, 8, 1, 1)),
    ((1,), (4, 33)),
]


def _binary(*factors: float, product: bool) -> Callable[[Random, list[np.float32]], Case]:
    def draw(rng: Random, s: list[np.float32]) -> Case:
        shape_a, shape_b = BROADCASTS[rng.integers(len(BROADCASTS))]
        base = s[0] * s[1] if product else max(s[0], s[1])
        return Case([operand(rng, s[0], *shape_a), operand(rng, s[1], *shape_b)], *_output(rng, base, *factors))

    return draw


def _add(case: Case, carrier: torch.dtype) -> Tensor:
    return laws.add(*case.centred(carrier), *case.grids, case.output, carrier)


def _mul(case: Case, carrier: torch.dtype) -> Tensor:
    return laws.multiply(*case.centred(carrier), *case.grids, case.output, carrier)


def _draw_cat(rng: Random, s: list[np.float32]) -> Case:
    a, b = operand(rng, s[0], 2, 8, 5), operand(rng, s[1], 2, 3, 5)
    if rng.random() < 0.2:  # the first operand is on the output's own grid
        return Case([a, b], a.scale, a.zero, {"axis": 1})
    return Case([a, b], *_output(rng, max(s[0], s[1]), 0.5, 1, 2, 1.5), {"axis": 1})


def _cat(case: Case, carrier: torch.dtype) -> Tensor:
    parts = [laws.rescale(x, g, case.output, carrier) for x, g in zip(case.centred(carrier), case.grids)]
    return torch.cat(parts, 1)


def _draw_global_mean(rng: Random, s: list[np.float32]) -> Case:
    side = int(rng.choice([1, 2, 3, 4, 7, 8]))
    return Case([operand(rng, s[0], 2, 19, side, side)], *_output(rng, s[0], 0.25, 0.5, 1, 0.3, 2))


def _global_mean(case: Case, carrier: torch.dtype) -> Tensor:
    return laws.mean(*case.centred(carrier), [2, 3], *case.grids, case.output, carrier)


def _draw_window_mean(rng: Random, s: list[np.float32]) -> Case:
    kernel, stride, pad = int(rng.integers(2, 5)), int(rng.integers(1, 4)), int(rng.integers(0, 2))
    geometry = {
        "kernel_shape": [kernel] * 2,
        "strides": [stride] * 2,
        "pads": [pad] * 4,
        "count_include_pad": int(rng.integers(0, 2)),
    }
    return Case([operand(rng, s[0], 1, 5, 9, 11)], *_output(rng, s[0], 0.25, 0.5, 1, 0.3, 2), geometry)


def _window_mean(case: Case, carrier: torch.dtype) -> Tensor:
    at = case.attributes
    pool = laws.AveragePool(
        tuple(at["kernel_shape"]), tuple(at["strides"]), tuple(at["pads"][:2]), bool(at["count_include_pad"])
    )
    return laws.window_mean(*case.centred(carrier), pool, *case.grids, case.output, carrier)


def _draw_sigmoid(rng: Random, s: list[np.float32]) -> Case:
    x = Codes(np.arange(256, dtype=np.uint8), float(s[0]), zero(rng))
    return Case([x], *((1 / 256, 0) if rng.random() < 0.5 else _output(rng, np.float32(1), 1 / 255, 1 / 128)))


def _draw_leaky(rng: Random, s: list[np.float32]) -> Case:
    x = Codes(np.arange(256, dtype=np.uint8), float(s[0]), zero(rng))
    alpha = float(np.float32(rng.choice([0.01, 0.1, 0.25])))
    return Case([x], *_output(rng, s[0], 0.5, 1, 1.5), {"alpha": alpha})


def _table(function: Callable[..., Tensor]) -> Callable[[Case, torch.dtype], Tensor]:
    def apply(case: Case, carrier: torch.dtype) -> Tensor:
        real = laws.dequantize_centred(*case.centred(carrier), *case.grids)
        return laws.quantize_centred(function(real, *case.attributes.values()), case.output, carrier)

    return apply


def _draw_matmul(quantized: bool) -> Callable[[Random, list[np.float32]], Case]:
    def draw(rng: Random, s: list[np.float32]) -> Case:
        a, b = operand(rng, s[0], 2, 5, 33), operand(rng, s[1], 2, 33, 17)
        return Case([a, b], *(_output(rng, s[0] * s[1], 64, 300, 512) if quantized else (None, 0)))

    return draw


def _weighted(rng: Random, s: list[np.float32], *shape: int) -> tuple[Codes, Array]:
    per_channel = s[1] * rng.choice([0.5, 1, 2, 0.7], shape[0])
    scale: Any = per_channel.astype(np.float32) if rng.random() < 0.7 else float(s[1])
    weight = rng.integers(-127, 128, shape).astype(np.int8)
    return Codes(weight, scale, 0, constant=True), rng.integers(-20_000, 20_000, shape[0]).astype(np.int32)


def _draw_gemm(quantized: bool) -> Callable[[Random, list[np.float32]], Case]:
    def draw(rng: Random, s: list[np.float32]) -> Case:
        weight, bias = _weighted(rng, s, 10, 64)
        output = _output(rng, s[0] * s[1], 64, 300, 512) if quantized else (None, 0)
        return Case([operand(rng, s[0], 5, 64), weight], *output, {"transB": 1}, bias)

    return draw


def _draw_conv(groups: int) -> Callable[[Random, list[np.float32]], Case]:
    def draw(rng: Random, s: list[np.float32]) -> Case:
        rank = int(rng.integers(1, 4))
        weight, bias = _weighted(rng, s, 12, 12 // groups, *[3] * rank)
        geometry = {"group": groups, "pads": [1] * 2 * rank, "strides": [int(rng.integers(1, 3))] * rank}
        x = operand(rng, s[0], 1, 12, *(8, 4, 3)[:rank])
        return Case([x, weight], *_output(rng, s[0] * s[1], 64, 300, 512), geometry, bias)

    return draw


def _product(case: Case, carrier: torch.dtype) -> Tensor:
    """The exact sum of products, by int64 or float64, and then the law."""
    wide = torch.float64 if carrier == torch.float32 else torch.int64
    a, b = (x.to(wide) for x in case.centred(torch.int32))
    at = case.attributes
    if "group" in at:
        function: Any = (F.conv1d, F.conv2d, F.conv3d)[a.ndim - 3]
        accumulator = function(a, b, None, at["strides"], 1, 1, at["group"])
    else:
        accumulator = a @ (b.T if at.get("transB") else b)
    channels = (-1, *[1] * (a.ndim - 2)) if "group" in at else (-1,)
    if case.bias is not None:
        accumulator = accumulator + torch.from_numpy(case.bias).to(wide).view(channels)
    scale = case.grids[0].scale * case.grids[1].scale
    scale = scale.view(channels) if scale.ndim else scale
    if case.scale is None:
        return accumulator.float() * scale
    return laws.requantize(accumulator, laws.multiplier(scale, case.output), case.output, carrier)


LAWS: dict[str, Law] = {
    "add": Law("Add", "QLinearAdd", _binary(1, 2, 1.5, 1.1, 4, product=False), _add),
    "mul": Law("Mul", "QLinearMul", _binary(1, 16, 64, 100, 255, product=True), _mul),
    "cat": Law("Concat", "QLinearConcat", _draw_cat, _cat),
    "global mean": Law("GlobalAveragePool", "QLinearGlobalAveragePool", _draw_global_mean, _global_mean),
    "window mean": Law("AveragePool", "QLinearAveragePool", _draw_window_mean, _window_mean),
    "sigmoid": Law("Sigmoid", "QLinearSigmoid", _draw_sigmoid, _table(torch.sigmoid)),
    "leaky relu": Law("LeakyRelu", "QLinearLeakyRelu", _draw_leaky, _table(F.leaky_relu)),
    "matmul": Law("MatMul", "QLinearMatMul", _draw_matmul(True), _product),
    "matmul, float output": Law("MatMul", "MatMulIntegerToFloat", _draw_matmul(False), _product),
    "linear": Law("Gemm", "QGemm", _draw_gemm(True), _product),
    "linear, float output": Law("Gemm", "QGemm", _draw_gemm(False), _product),
    "conv": Law("Conv", "QLinearConv", _draw_conv(1), _product),
    "grouped conv": Law("Conv", "QLinearConv", _draw_conv(3), _product),
    "depthwise conv": Law("Conv", "QLinearConv", _draw_conv(12), _product),
}


def _fused_product(case: Case) -> Tensor:
    """A product scaled and moved by the zero point with one rounding."""
    a, b = case.centred(torch.float32)
    ratio = laws.multiplier(case.grids[0].scale * case.grids[1].scale, case.output)
    return (a.double() * b.double() * ratio.double() + case.zero).float().round() - case.zero


def _add_by(case: Case, *, swapped: bool, fused_offset: bool) -> Tensor:
    (a, b), grids, zeros = case.centred(torch.float32), case.grids, [x.zero for x in case.operands]
    if swapped:
        a, b, grids, zeros = b, a, grids[::-1], zeros[::-1]
    ratio_a, ratio_b = ((grid.scale / case.output.scale).double() for grid in grids)
    first, second = ratio_a * zeros[0], (ratio_b * zeros[1]).float()
    offset = (first + second.double()).float() if fused_offset else first.float() + second
    inner = ((b.double() + zeros[1]) * ratio_b + (case.zero - offset).double()).float()
    return ((a.double() + zeros[0]) * ratio_a + inner.double()).float().round() - case.zero


NEAR_MISSES: dict[str, dict[str, Callable[[Case], Tensor]]] = {
    "mul": {"one rounding": _fused_product},
    "add": {
        "a first": lambda case: _add_by(case, swapped=True, fused_offset=True),
        "b first": lambda case: _add_by(case, swapped=False, fused_offset=True),
        "offset in three roundings": lambda case: _add_by(case, swapped=False, fused_offset=False),
    },
}
"""Formulas that agree with onnxruntime on all but one in some thousand outputs."""


def misses(case: Case, expected: Array, formula: Callable[[Case], Tensor]) -> int:
    """How many outputs a wrong formula gets wrong."""
    low, high = laws.code_range(case.output)
    found = formula(case).clamp(low, high) + case.zero
    return int((found.numpy() != expected).sum())


def differing(case: Case, law: Law, expected: Array, carrier: torch.dtype) -> int:
    """How many outputs our law gets wrong."""
    found = law.apply(case, carrier)
    if case.scale is not None:
        assert found.dtype == carrier
        found = found.to(torch.int64) + case.zero
    return int((found.numpy() != expected.astype(found.numpy().dtype)).sum())


def write_golden(per_law: int = 5) -> None:
    arrays: dict[str, Array] = {}
    for name, law in LAWS.items():
        rng = np.random.default_rng(2026)
        wanted: list[Any] = [*NEAR_MISSES.get(name, {}).values(), *[None] * per_law]
        for index, refuted in enumerate(wanted):
            while True:
                case = law.draw(rng, draw_scales(rng, index % 5))
                expected, kernels = case.run(law.op)
                assert law.kernel in kernels
                if refuted is None or misses(case, expected, refuted):
                    break
            key = f"{name}.{index}"
            meta = {
                "scale": case.scale,
                "zero": case.zero,
                "attributes": case.attributes,
                "operands": [
                    {"scale": np.asarray(x.scale).tolist(), "zero": x.zero, "constant": x.constant}
                    for x in case.operands
                ],
            }
            arrays |= {f"{key}.meta": np.array(json.dumps(meta)), f"{key}.y": expected}
            arrays |= {f"{key}.x{i}": x.codes for i, x in enumerate(case.operands)}
            if case.bias is not None:
                arrays[f"{key}.bias"] = case.bias
    np.savez_compressed(GOLDEN, **arrays)  # type: ignore[arg-type]


def read_golden(name: str) -> list[tuple[Case, Array]]:
    with np.load(GOLDEN) as file:
        found = []
        for key in sorted(
            k.removesuffix(".meta") for k in file.files if k.startswith(f"{name}.") and k.endswith(".meta")
        ):
            meta = json.loads(str(file[f"{key}.meta"]))
            operands = [Codes(file[f"{key}.x{i}"], **x) for i, x in enumerate(meta.pop("operands"))]
            bias = file[f"{key}.bias"] if f"{key}.bias" in file.files else None
            found.append((Case(operands, **meta, bias=bias), file[f"{key}.y"]))
        return found


if __name__ == "__main__":
    write_golden()
