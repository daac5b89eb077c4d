"""solve_grid: from a range to a scale and a zero point."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from bitsmith.errors import CalibrationError, NonFiniteError
from bitsmith.grid import FP8_E4M3, Grid, IntFormat, TensorSpec, dequantize, fake_quantize
from bitsmith.ranges import solve_grid

ends = st.floats(2.0**-40, 2.0**40, width=32)
bit_widths = st.integers(2, 16)


def step(grid: Grid) -> float:
    return float(grid.scale)


@settings(max_examples=150, deadline=None)
@given(
    lo=st.just(0.0) | ends,
    hi=ends,
    bits=bit_widths,
    signed=st.booleans(),
    symmetric=st.booleans(),
    scale=st.sampled_from(["float32", "po2"]),
    rounding=st.sampled_from(["ceil", "nearest"]),
)
def test_a_grid_holds_zero_exactly_and_both_ends_within_half_a_step(
    lo: float, hi: float, bits: int, signed: bool, symmetric: bool, scale: str, rounding: str
) -> None:
    spec = TensorSpec.model_validate(
        {
            "format": {"bits": bits, "signed": signed},
            "symmetric": symmetric,
            "scale": scale,
            "po2_rounding": rounding,
        }
    )
    if symmetric and not signed:
        lo = 0.0
    grid = solve_grid(-lo, hi, spec)
    real = fake_quantize(torch.tensor([0.0, -lo, hi]), grid)
    assert real[0] == 0.0
    assert step(grid) >= torch.finfo(torch.float32).tiny
    assert math.isfinite(step(grid))
    if grid.zero_point is not None:
        assert grid.format.qmin <= int(grid.zero_point) <= grid.format.qmax  # type: ignore[union-attr]
    if scale == "po2":
        assert math.frexp(step(grid))[0] == 0.5
    if rounding == "ceil":
        slack = 1e-6 * max(lo, hi)  # a float32 scale may be rounded down by half an ulp
        assert abs(real[1] + lo) <= 0.5 * step(grid) * (1 + 1e-5) + slack
        assert abs(real[2] - hi) <= 0.5 * step(grid) * (1 + 1e-5) + slack


@settings(max_examples=150, deadline=None)
@given(lo=ends, hi=ends, bits=bit_widths, narrow=st.booleans())
def test_a_po2_scale_rounded_up_clips_neither_end_and_is_the_least_that_does(
    lo: float, hi: float, bits: int, narrow: bool
) -> None:
    assume(max(lo, hi) / min(lo, hi) < 1e6)
    for symmetric in (True, False):
        spec = TensorSpec(format=IntFormat(bits, narrow=narrow), symmetric=symmetric, scale="po2", granularity="tensor")
        grid = solve_grid(-lo, hi, spec)
        zero = 0 if grid.zero_point is None else int(grid.zero_point)
        fmt = grid.format
        assert isinstance(fmt, IntFormat)
        low, high = (round(float(torch.tensor(v) / grid.scale)) + zero for v in (-lo, hi))
        assert fmt.qmin <= low
        assert high <= fmt.qmax
        half = step(grid) / 2
        if symmetric:
            assert half * fmt.qmax < max(lo, hi)
        else:  # half the step either cannot span the range, or no integer zero point would let it
            levels = fmt.qmax - fmt.qmin
            assert half * levels < lo + hi or round(hi / half) - round(-lo / half) > levels


def test_nearest_po2_rounds_the_exponent() -> None:
    spec = TensorSpec(format=IntFormat(8), scale="po2", po2_rounding="nearest")
    assert step(solve_grid(-127.0 * 1.41, 0.0, spec)) == 1.0
    assert step(solve_grid(-127.0 * 1.42, 0.0, spec)) == 2.0
    assert step(solve_grid(-127.0, 0.0, spec)) == 1.0


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_symmetric_thresholds_have_a_code(bits: int) -> None:
    signed = solve_grid(-3.0, 2.0, TensorSpec(format=IntFormat(bits)))
    assert step(signed) == pytest.approx(3.0 / (2 ** (bits - 1) - 1), rel=1e-6)
    assert signed.zero_point is None
    unsigned = solve_grid(0.0, 2.0, TensorSpec(format=IntFormat(bits)), non_negative=True)
    assert unsigned.format == IntFormat(bits, signed=False)
    assert step(unsigned) == pytest.approx(2.0 / (2**bits - 1), rel=1e-6)
    assert unsigned.zero_point is None


def test_non_negative_without_auto_unsigned_keeps_the_format() -> None:
    spec = TensorSpec(format=IntFormat(8), symmetric=False, auto_unsigned=False)
    grid = solve_grid(0.5, 2.55, spec, non_negative=True)
    assert grid.format == IntFormat(8)
    assert grid.zero_point is not None
    assert int(grid.zero_point) == -128
    assert step(grid) == pytest.approx(0.01)


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_unsigned_codes_are_the_same_real_numbers(narrow: bool, symmetric: bool) -> None:
    spec = TensorSpec(format=IntFormat(8, narrow=narrow), symmetric=symmetric)
    signed = solve_grid(-1.0, 2.0, spec)
    moved = solve_grid(-1.0, 2.0, spec, unsigned_codes=True)
    assert moved.format == IntFormat(8, signed=False, narrow=narrow)
    assert moved.zero_point is not None
    assert moved.zero_point.dtype == torch.int32
    codes = torch.arange(-128 + narrow, 128, dtype=torch.int16)
    assert torch.equal(dequantize(codes, signed), dequantize(codes + 128, moved))
    if symmetric:
        assert int(moved.zero_point) == 128


def test_float_formats_reach_their_greatest_value() -> None:
    assert step(solve_grid(-896.0, 3.0, TensorSpec(format=FP8_E4M3))) == 2.0
    assert step(solve_grid(-900.0, 3.0, TensorSpec(format=FP8_E4M3, scale="po2"))) == 4.0


def test_a_range_always_includes_zero() -> None:
    spec = TensorSpec(format=IntFormat(8, signed=False), symmetric=False)
    above, below = solve_grid(5.0, 10.0, spec), solve_grid(-10.0, -5.0, spec)
    assert (int(above.zero_point), int(below.zero_point)) == (0, 255)  # type: ignore[arg-type]
    assert step(above) == step(below) == pytest.approx(10 / 255)


def test_dead_channels_get_the_largest_live_scale() -> None:
    """Not a tiny one: the bias of a dead channel is stored in units of s_x * s_w and must fit int32."""
    grid = solve_grid(
        torch.tensor([-1.0, 0.0, -1e-41]),
        torch.tensor([2.54, 0.0, 1e-41]),
        TensorSpec(format=IntFormat(8)),
        axis=0,
    )
    assert grid.scale.tolist() == pytest.approx([0.02, 0.02, 0.02])
    assert grid.axis == 0


@pytest.mark.parametrize("pair", [(0.0, 0.0), (0.0, 1e-44)])
def test_a_zero_range_is_an_error(pair: tuple[float, float]) -> None:
    with pytest.raises(CalibrationError, match="range is zero"):
        solve_grid(*pair, TensorSpec(format=IntFormat(8)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_range_that_is_not_finite_is_an_error(bad: float) -> None:
    with pytest.raises(NonFiniteError):
        solve_grid(bad, 1.0, TensorSpec(format=IntFormat(8)))


def test_an_upside_down_range_is_an_error() -> None:
    with pytest.raises(CalibrationError, match="upside down: lo 2 is above hi 1"):
        solve_grid(2.0, 1.0, TensorSpec(format=IntFormat(8)))


def test_ranges_at_the_ends_of_float32_give_finite_scales() -> None:
    huge = torch.finfo(torch.float32).max
    for scale in ("float32", "po2"):
        spec = TensorSpec.model_validate({"format": {"bits": 1}, "symmetric": False, "scale": scale})
        assert math.isfinite(step(solve_grid(-huge, huge, spec)))
