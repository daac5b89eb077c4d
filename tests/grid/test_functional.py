"""quantize, dequantize and fake_quantize against a scalar oracle in exact arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitsmith.errors import RecipeError
from bitsmith.grid import (
    FP8_E4M3,
    FP8_E5M2,
    FloatFormat,
    Grid,
    IntFormat,
    dequantize,
    fake_quantize,
    quantize,
)

FLOAT_FORMATS = [
    FP8_E4M3,
    FP8_E5M2,
    FloatFormat(2, 1),
    FloatFormat(3, 2),
    FloatFormat(2, 3),
    FloatFormat(4, 0),
    FloatFormat(1, 2),
    FloatFormat(5, 10, reserved="ieee"),
]


def oracle_code(x: float, scale: float, zero_point: int, fmt: IntFormat) -> int:
    """The definition with Python integers; the quotient is rounded to float32 first, as is defined."""
    with np.errstate(over="ignore"):
        ratio = float(np.float32(x) / np.float32(scale))
    if math.isinf(ratio):
        return fmt.qmax if ratio > 0 else fmt.qmin
    return min(max(round(Fraction(ratio)) + zero_point, fmt.qmin), fmt.qmax)


def representable(fmt: FloatFormat) -> list[float]:
    """Every non-negative finite number of the format, from its codes."""
    values = []
    top = (1 << fmt.exponent_bits) - 1
    for exponent in range(top + 1):
        for mantissa in range(1 << fmt.mantissa_bits):
            if exponent == top and fmt.reserved == "ieee":
                continue
            if exponent == top and fmt.reserved == "nan" and mantissa == (1 << fmt.mantissa_bits) - 1:
                continue
            fraction = mantissa / (1 << fmt.mantissa_bits)
            power = 2.0 ** (max(exponent, 1) - fmt.bias)
            values.append((fraction if exponent == 0 else 1.0 + fraction) * power)
    return values


int_formats = st.builds(IntFormat, bits=st.integers(2, 32), signed=st.booleans(), narrow=st.booleans()) | st.just(
    IntFormat(1, signed=False)
)
scales = st.floats(2.0**-30, 2.0**30, width=32)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), fmt=int_formats, scale=scales)
def test_integer_codes_are_the_definition(data: st.DataObject, fmt: IntFormat, scale: float) -> None:
    """Any width, sign, scale and zero point, on arbitrary floats and on exact ties."""
    affine = data.draw(st.booleans())
    limit = (1 << 31) - 1
    zero = data.draw(st.integers(max(fmt.qmin, -limit), min(fmt.qmax, limit))) if affine else 0
    ties = [(k + 0.5) * scale for k in data.draw(st.lists(st.integers(-300, 300), max_size=4))]
    anything = data.draw(st.lists(st.floats(width=32, allow_nan=False), max_size=8))
    edges = [(q - zero) * scale for q in (fmt.qmin - 1, fmt.qmin, fmt.qmax, fmt.qmax + 1)]
    x = torch.tensor([*ties, *anything, *edges, 0.0])
    grid = Grid(fmt, torch.tensor(scale), torch.tensor(zero, dtype=torch.int32) if affine else None)
    codes = quantize(x, grid)
    expected = [oracle_code(v, scale, zero, fmt) for v in x.tolist()]
    assert codes.dtype == grid.code_dtype
    assert codes.tolist() == expected
    with np.errstate(over="ignore"):
        real = [float(np.float32(q - zero) * np.float32(scale)) for q in expected]
    assert dequantize(codes, grid).tolist() == real
    assert fake_quantize(x, grid).tolist() == real


def test_ties_round_to_even() -> None:
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    assert quantize(x, Grid(IntFormat(8), torch.tensor(1.0))).tolist() == [-2, -2, 0, 0, 2, 2]


def test_division_is_not_by_the_reciprocal() -> None:
    """x / s and x * (1 / s) differ in the last place for some x; the definition divides."""
    scale = np.float32(0.37)
    x = (np.arange(1, 4001, dtype=np.float32) * np.float32(0.5)) * scale
    divided, multiplied = np.rint(x / scale), np.rint(x * (np.float32(1) / scale))
    assert (divided != multiplied).any()
    codes = quantize(torch.from_numpy(x), Grid(IntFormat(16), torch.tensor(0.37)))
    assert codes.tolist() == divided.tolist()


@pytest.mark.parametrize("fmt", FLOAT_FORMATS, ids=str)
def test_every_value_of_a_float_format_is_kept_and_every_other_goes_to_the_nearest(fmt: FloatFormat) -> None:
    """Exhaustive: all numbers, all midpoints (ties to the even mantissa), and both sides of each midpoint."""
    values = representable(fmt)
    assert max(values) == fmt.max_value
    grid = Grid(fmt, torch.tensor(1.0))
    exact = torch.tensor(values)
    assert torch.equal(quantize(exact, grid), exact)
    assert torch.equal(quantize(-exact, grid), -exact)
    low, high = exact[:-1], exact[1:]
    middle = (low + high) / 2  # exact: one more mantissa bit
    even = torch.where(torch.arange(len(values) - 1) % 2 == 0, low, high)
    if fmt.mantissa_bits == 0:  # a power of two is once its step, odd, and the next is twice it, even
        even = torch.cat([low[:1], high[1:]])
    assert torch.equal(quantize(middle, grid), even)
    assert torch.equal(quantize(-middle, grid), -even)
    assert torch.equal(quantize(torch.nextafter(middle, low), grid), low)
    assert torch.equal(quantize(torch.nextafter(middle, high), grid), high)
    beyond = torch.tensor([fmt.max_value * 1.01, fmt.max_value * 64, math.inf])
    assert torch.equal(quantize(beyond, grid), torch.full((3,), fmt.max_value))


@pytest.mark.parametrize(
    ("fmt", "dtype"), [(FP8_E4M3, torch.float8_e4m3fn), (FP8_E5M2, torch.float8_e5m2)], ids=["e4m3", "e5m2"]
)
def test_fp8_agrees_with_torch_casts(fmt: FloatFormat, dtype: torch.dtype) -> None:
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-8, 1, 20_000)
    x = x.clamp(-fmt.max_value, fmt.max_value)
    assert torch.equal(quantize(x, Grid(fmt, torch.tensor(1.0))), x.to(dtype).float())


@pytest.mark.parametrize(
    ("fmt", "dtype"),
    [
        (FloatFormat(8, 7, reserved="ieee"), torch.bfloat16),
        (FloatFormat(5, 10, reserved="ieee"), torch.float16),
        (FloatFormat(8, 23, reserved="ieee"), torch.float32),
    ],
    ids=["bfloat16", "float16", "float32"],
)
def test_wide_float_formats_agree_with_torch_casts(fmt: FloatFormat, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5_000, generator=generator) * torch.logspace(-44, 38, 5_000)
    x = x.clamp(-fmt.max_value, fmt.max_value)
    assert torch.equal(quantize(x, Grid(fmt, torch.tensor(1.0))), x.to(dtype).float())


def by_hand(x: Tensor, scale: Tensor, zero_point: Tensor, fmt: IntFormat) -> Tensor:
    """The definition with scale and zero point already spread to ``x``'s shape."""
    code = (torch.round(x / scale) + zero_point).clamp(fmt.qmin, fmt.qmax)
    return (code - zero_point) * scale


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_per_channel_along_any_axis(axis: int) -> None:
    fmt = IntFormat(4, signed=False)
    x = torch.randn(3, 4, 5)
    scale = torch.rand(x.shape[axis]) + 0.1
    zero = torch.randint(0, 16, scale.shape, dtype=torch.int32)
    shape = [1, 1, 1]
    shape[axis] = -1
    expected = by_hand(x, scale.view(shape).expand_as(x), zero.view(shape).expand_as(x), fmt)
    grid = Grid(fmt, scale, zero, axis)
    assert torch.equal(fake_quantize(x, grid), expected)
    assert torch.equal(dequantize(quantize(x, grid), grid), expected)


@pytest.mark.parametrize(("axis", "size"), [(0, 2), (1, 3), (1, 4), (-1, 5), (2, 2)])
def test_per_group_even_with_a_shorter_last_group(axis: int, size: int) -> None:
    fmt = IntFormat(4, signed=False)
    x = torch.randn(4, 6, 5)
    groups = list(x.shape)
    groups[axis] = -(-x.shape[axis] // size)
    scale = torch.rand(groups) + 0.1
    zero = torch.randint(0, 16, groups, dtype=torch.int32)
    wide_scale, wide_zero = (t.repeat_interleave(size, axis).narrow(axis, 0, x.shape[axis]) for t in (scale, zero))
    grid = Grid(fmt, scale, zero, axis, size)
    expected = by_hand(x, wide_scale, wide_zero, fmt)
    assert torch.equal(fake_quantize(x, grid), expected)
    assert torch.equal(dequantize(quantize(x, grid), grid), expected)


def test_a_scale_that_does_not_fit_is_refused_in_words() -> None:
    with pytest.raises(RecipeError, match=r"shape \(3,\) along axis 1 .* tensor of shape \(2, 4\)"):
        fake_quantize(torch.zeros(2, 4), Grid(IntFormat(8), torch.ones(3), axis=1))


@pytest.mark.parametrize("zero", [None, 3])
def test_gradient_is_straight_through_where_not_clipped(zero: int | None) -> None:
    grid = Grid(IntFormat(4), torch.tensor(0.5), None if zero is None else torch.tensor(zero, dtype=torch.int32))
    low, high = (-8 - (zero or 0)) * 0.5, (7 - (zero or 0)) * 0.5
    x = torch.tensor([low - 0.3, low - 0.2, low, 0.1, high, high + 0.2, high + 0.3], requires_grad=True)
    upstream = torch.arange(1.0, 8.0)
    (fake_quantize(x, grid) * upstream).sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 2.0, 3.0, 4.0, 5.0, 6.0, 0.0]


def test_gradient_of_float_formats_and_groups() -> None:
    x = torch.tensor([[1.0, 449.0, 500.0, -1e30]], requires_grad=True)
    fake_quantize(x, Grid(FP8_E4M3, torch.tensor(1.0))).sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    assert x.grad.tolist() == [[1.0, 1.0, 0.0, 0.0]]
    y = torch.tensor([[1.0, 9.0, 9.0, 90.0]], requires_grad=True)
    grid = Grid(IntFormat(4), torch.tensor([[1.0, 10.0]]), axis=1, group_size=2)
    fake_quantize(y, grid).sum().backward()  # type: ignore[no-untyped-call]
    assert y.grad is not None
    assert y.grad.tolist() == [[1.0, 0.0, 1.0, 0.0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_fake_quantize_keeps_the_dtype(dtype: torch.dtype) -> None:
    x = torch.tensor([0.6, 100.0], dtype=dtype)
    y = fake_quantize(x, Grid(IntFormat(8), torch.tensor(0.5)))
    assert y.dtype == dtype
    assert y.tolist() == [0.5, 63.5]


def test_nan_neither_hangs_nor_crashes() -> None:
    x = torch.tensor([float("nan"), 1.0])
    for fmt in (IntFormat(8), IntFormat(32), FP8_E4M3):
        grid = Grid(fmt, torch.tensor(0.5))
        assert fake_quantize(x, grid)[1] == 1.0
        assert quantize(x, grid).shape == x.shape
    assert fake_quantize(torch.zeros(0, 3), grid).shape == (0, 3)


class RoundTrip(torch.nn.Module):
    """Codes and fake-quantized values of its input."""

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.format, self.axis = grid.format, grid.axis
        self.register_buffer("scale", grid.scale)
        self.register_buffer("zero_point", grid.zero_point)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        assert isinstance(self.scale, Tensor)
        grid = Grid(self.format, self.scale, self.zero_point, self.axis)  # type: ignore[arg-type]
        return quantize(x, grid), fake_quantize(x, grid)


@pytest.mark.parametrize(
    "grid",
    [
        Grid(IntFormat(8), torch.tensor(0.1)),
        Grid(IntFormat(4, signed=False), torch.tensor([0.1, 0.2]), torch.tensor([3, 4], dtype=torch.int32), 0),
        Grid(FP8_E4M3, torch.tensor(0.1)),
    ],
    ids=["tensor", "channel", "fp8"],
)
def test_export_traces_the_same_numbers(grid: Grid) -> None:
    """torch.export sees plain operations, and no value of a scale is frozen into the graph."""
    x = torch.randn(2, 300) * 3
    model = RoundTrip(grid)
    exported = torch.export.export(model, (x,)).module()
    for traced, eager in zip(exported(x), model(x)):
        assert torch.equal(traced, eager)
