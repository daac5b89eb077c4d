"""Grids that share a scale hold every value that each of them held before."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitsmith.calibrate.groups import join_grids
from bitsmith.grid import FP8_E4M3, Grid, IntFormat, TensorSpec, fake_quantize
from bitsmith.ranges.solve import solve_grid


def ends(grid: Grid) -> tuple[float, float]:
    assert isinstance(grid.format, IntFormat)
    zero = 0 if grid.zero_point is None else int(grid.zero_point)
    return (grid.format.qmin - zero) * float(grid.scale), (grid.format.qmax - zero) * float(grid.scale)


def affine(lo: float, hi: float, *, scale: str = "float32", unsigned_codes: bool = False) -> Grid:
    spec = TensorSpec(format=IntFormat(8, signed=False), symmetric=False, scale=scale)
    return solve_grid(lo, hi, spec, non_negative=lo >= 0, unsigned_codes=unsigned_codes)


def symmetric(
    bound: float, *, scale: str = "float32", unsigned_codes: bool = False, non_negative: bool = False
) -> Grid:
    spec = TensorSpec(format=IntFormat(8), scale=scale)
    return solve_grid(-bound, bound, spec, non_negative=non_negative, unsigned_codes=unsigned_codes)


def test_an_add_takes_the_largest_scale_and_each_keeps_its_own_sign() -> None:
    """A ReLU branch up to 5.07 and a signed branch of +-3.06: 5.07 / 255 is less than 3.06 / 127."""
    relu, conv = symmetric(5.07, non_negative=True), symmetric(3.06)
    first, second = join_grids([relu, conv], "add")
    assert first.scale == second.scale == torch.tensor(3.06 / 127)
    assert (first.format, second.format) == (IntFormat(8, signed=False), IntFormat(8))


def test_an_add_leaves_the_range_of_the_coarser_branch_alone() -> None:
    grids = [affine(-1.0, 3.0), affine(-0.2, 0.3)]
    joined = join_grids(grids, "add")
    assert joined[0] == grids[0]
    assert joined[1].scale == grids[0].scale


def test_zero_points_of_symmetric_grids_in_unsigned_codes_stay_in_the_middle() -> None:
    grids = [symmetric(1.0, unsigned_codes=True), symmetric(3.0, unsigned_codes=True)]
    for grid in join_grids(grids, "add"):
        assert int(grid.zero_point) == 128  # type: ignore[arg-type]
        assert float(grid.scale) == pytest.approx(3 / 127)


def test_a_concat_has_one_grid() -> None:
    joined = join_grids([affine(0.0, 6.0), affine(-1.0, 2.0), affine(0.0, 1.0)], "cat")
    assert all(grid is joined[0] for grid in joined)
    low, high = ends(joined[0])
    assert low <= -1.0 + float(joined[0].scale) / 2
    assert high >= 6.0 - float(joined[0].scale) / 2


def test_a_concat_of_unsigned_tensors_stays_unsigned() -> None:
    grid = join_grids([symmetric(2.0, non_negative=True), symmetric(5.0, non_negative=True)], "cat")[0]
    assert grid.format == IntFormat(8, signed=False)
    assert float(grid.scale) == pytest.approx(5 / 255)


@pytest.mark.parametrize("kind", ["add", "cat"])
def test_powers_of_two_stay_powers_of_two(kind: str) -> None:
    grids = [
        symmetric(5.0, scale="po2", non_negative=True),
        symmetric(3.0, scale="po2"),
        symmetric(0.1, scale="po2"),
    ]
    for grid in join_grids(grids, kind):
        assert math.log2(float(grid.scale)).is_integer()


@pytest.mark.parametrize("kind", ["add", "cat"])
def test_small_floats_share_the_largest_scale(kind: str) -> None:
    grids = [Grid(FP8_E4M3, torch.tensor(s)) for s in (0.5, 2.0, 1.0)]
    assert [float(grid.scale) for grid in join_grids(grids, kind)] == [2.0, 2.0, 2.0]


ranges = st.tuples(st.floats(-100, 0), st.floats(0.01, 100))


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(ranges, st.sampled_from(["affine", "symmetric", "unsigned codes", "non-negative"])),
        min_size=2,
        max_size=4,
    ),
    st.sampled_from(["add", "cat"]),
    st.sampled_from(["float32", "po2"]),
)
def test_nothing_that_was_on_a_grid_clips_afterwards(
    drawn: list[tuple[tuple[float, float], str]], kind: str, scale: str
) -> None:
    """Both ends of every grid come back within half a step of the shared scale."""
    kinds = {name for _, name in drawn}
    if "affine" in kinds and kinds & {"symmetric", "unsigned codes"}:
        drawn = [(r, "affine") for r, _ in drawn]  # one recipe makes the one or the other
    if {"symmetric", "unsigned codes"} <= kinds:
        drawn = [(r, "symmetric" if n == "unsigned codes" else n) for r, n in drawn]
    grids = [
        affine(lo, hi, scale=scale)
        if name == "affine"
        else symmetric(hi, scale=scale, unsigned_codes=name == "unsigned codes", non_negative=name == "non-negative")
        for (lo, hi), name in drawn
    ]
    for before, after in zip(grids, join_grids(grids, kind)):
        step = float(after.scale)
        points = torch.tensor(ends(before))
        assert (fake_quantize(points, after) - points).abs().max() <= step * 0.5001
        assert fake_quantize(torch.zeros(1), after).item() == 0
        assert step >= float(before.scale) * (1 - 1e-6)
    scales = {float(grid.scale) for grid in join_grids(grids, kind)}
    assert len(scales) == 1
