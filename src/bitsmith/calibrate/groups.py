"""One scale for several tensors: what the fx and flexml placements ask of adds and concats."""

from __future__ import annotations

import dataclasses

import torch

from ..grid import Grid, IntFormat


def join_grids(grids: list[Grid], kind: str) -> list[Grid]:
    """Grids with one scale (``add``), or one grid for all (``cat``), that lose no value any of them held.

    For an add every tensor keeps its own sign and zero point, and an unsigned one its full range of codes: the
    common scale is the largest of the single ones, not one that makes room for signs that are not there.
    """
    if any(not isinstance(grid.format, IntFormat) for grid in grids):
        largest = max(grids, key=lambda grid: float(grid.scale))
        return [dataclasses.replace(grid, scale=largest.scale) for grid in grids]
    if kind == "cat":
        return [_union(grids)] * len(grids)
    scale = torch.stack([grid.scale for grid in grids]).max()
    return [_rescaled(grid, scale) for grid in grids]


def _ends(grid: Grid) -> tuple[float, float]:
    """The least and greatest real value on a grid."""
    assert isinstance(grid.format, IntFormat)
    zero = 0 if grid.zero_point is None else int(grid.zero_point)
    return (grid.format.qmin - zero) * float(grid.scale), (grid.format.qmax - zero) * float(grid.scale)


def _is_affine(grid: Grid) -> bool:
    return grid.zero_point is not None and int(grid.zero_point) != 0


def _rescaled(grid: Grid, scale: torch.Tensor) -> Grid:
    """The same range on a coarser scale; an affine grid moves its zero point so that its range stays centred."""
    fmt = grid.format
    assert isinstance(fmt, IntFormat)
    middle_code = (fmt.qmin + fmt.qmax + 1) // 2
    if not _is_affine(grid) or int(grid.zero_point) == middle_code or scale == grid.scale:  # type: ignore[arg-type]
        return dataclasses.replace(grid, scale=scale)
    low, high = _ends(grid)
    zero = round((fmt.qmin + fmt.qmax) / 2 - (low + high) / 2 / float(scale))
    zero = min(max(zero, fmt.qmin), fmt.qmax)
    return dataclasses.replace(grid, scale=scale, zero_point=torch.tensor(zero, dtype=torch.int32))


def _union(grids: list[Grid]) -> Grid:
    """One grid that covers all: signed or affine as soon as one of them is."""
    widest = max(grids, key=lambda grid: _ends(grid)[1] - _ends(grid)[0])
    low = min(_ends(grid)[0] for grid in grids)
    high = max(_ends(grid)[1] for grid in grids)
    if _ends(widest) == (low, high):
        return widest
    fmt = next((grid.format for grid in grids if _ends(grid)[0] < 0), widest.format)
    assert isinstance(fmt, IntFormat)
    signed = next((grid for grid in grids if _ends(grid)[0] < 0), widest)
    if not _is_affine(signed) and fmt.signed:  # symmetric, zero point 0
        bound = max(-low / -fmt.qmin, high / fmt.qmax)
        return dataclasses.replace(signed, scale=_power(bound, grids))
    zero = None if signed.zero_point is None else signed.zero_point
    if zero is not None and int(zero) == (fmt.qmax + 1) // 2:  # symmetric in unsigned codes
        bound = max(-low / int(zero), high / (fmt.qmax - int(zero)))
        return dataclasses.replace(signed, scale=_power(bound, grids))
    scale = _power((high - low) / (fmt.qmax - fmt.qmin), grids)
    point = min(max(round(fmt.qmin - low / float(scale)), fmt.qmin), fmt.qmax)
    return dataclasses.replace(signed, format=fmt, scale=scale, zero_point=torch.tensor(point, dtype=torch.int32))


def _power(value: float, grids: list[Grid]) -> torch.Tensor:
    """``value`` as a scale; rounded up to a power of two where all scales are such powers."""
    scales = torch.stack([grid.scale for grid in grids]).double()
    exponents = torch.log2(scales)
    scale = torch.tensor(value, dtype=torch.float64)
    if bool((exponents == exponents.round()).all()):
        scale = torch.exp2(torch.ceil(torch.log2(scale)))
    return scale.float()
