"""Weight ranges: per tensor, per channel or per group, every rule vectorised over all of them at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import NonFiniteError, RecipeError
from ..grid.grid import Grid
from ..grid.kernels import fake_quantize
from ..grid.spec import TensorSpec
from .hqo import hqo
from .solve import solve_grid
from .tails import tail_rank

_NEGLIGIBLE = 2.0**-100
_REFINEMENTS = 8
_ROUNDING = 0.99  # an error in float32 may come out less than it is
_PIECE = 32_767  # elements; torch starts to use threads at 32,768


def weight_grid(weight: Tensor, spec: TensorSpec, axis: int = 0) -> Grid:
    """The grid of ``spec`` for a weight.

    ``axis`` is the operator's output-channel axis; ``spec.axis`` overrides it. Per group, the groups lie
    along ``spec.axis``, else along axis 1 (the input features of a linear layer, the input channels of a
    convolution; axis 0 of a vector), and the scale has the weight's shape with that axis divided by the group
    size, rounded up. Rules: ``minmax``, ``percentile``, ``mse``, ``hqo``.

    A channel of zeros gets the largest scale among the others (see ``solve_grid``); a weight that is all
    zeros gets the scale of a range of 1. Raises ``NonFiniteError`` for a NaN or an infinity and
    ``RecipeError`` for an unknown rule or an axis that the weight does not have.

    >>> from bitsmith.grid import IntFormat, TensorSpec
    >>> weight = torch.tensor([[0.5, -1.27], [2.54, 0.0]])
    >>> weight_grid(weight, TensorSpec(format=IntFormat(8), granularity="channel")).scale
    tensor([0.0100, 0.0200])
    """
    weight = weight.detach().float()
    if spec.range.name not in RULES:
        raise RecipeError(f"{spec.range.name!r} is no range rule for weights: choose one of {', '.join(RULES)}")
    if not bool(torch.isfinite(weight).all()):
        bad = int((~torch.isfinite(weight)).sum())
        raise NonFiniteError(f"{bad} of {weight.numel()} weights are NaN or infinite: the checkpoint is corrupt")
    rows, shape, grid_axis = _rows(weight, spec, axis)
    lo, hi = _ends(rows, spec)
    return solve_grid(lo.reshape(shape), hi.reshape(shape), spec, axis=grid_axis)


def _ends(rows: Tensor, spec: TensorSpec) -> tuple[Tensor, Tensor]:
    """The range of every row: what the rule finds, 0 for a row of zeros, and 0 .. 1 if all rows are.

    On a CPU the rows go to the rule in pieces too small for torch to split among threads: a search makes
    hundreds of short passes, which run from the cache, and waiting for other threads would cost more than it
    gains.
    """
    lo, hi = rows.new_zeros(len(rows), dtype=torch.float64), rows.new_zeros(len(rows), dtype=torch.float64)
    if not rows.numel():
        return lo, hi + 1.0
    alive = (rows.abs().amax(1) >= _NEGLIGIBLE).nonzero()[:, 0]
    if not alive.numel():
        return lo, hi + 1.0
    row_spec = spec.model_copy(update={"granularity": "channel", "group_size": None})
    rule = RULES[spec.range.name]
    at_once = max(1, _PIECE // rows.shape[1]) if rows.device.type == "cpu" else len(rows)
    for start in range(0, alive.numel(), at_once):
        index = alive[start : start + at_once]
        piece_lo, piece_hi = rule(rows[index], row_spec)
        lo[index], hi[index] = piece_lo.double(), piece_hi.double()
    return lo, hi


def _rows(weight: Tensor, spec: TensorSpec, axis: int) -> tuple[Tensor, list[int], int | None]:
    """The weight as (scales, elements), the scale's shape, and the grid's axis."""
    if spec.granularity == "tensor":
        return weight.reshape(1, -1), [], None
    if spec.granularity == "group" and spec.axis is None:
        axis = min(1, weight.ndim - 1)
    axis = axis if spec.axis is None else spec.axis
    if not -weight.ndim <= axis < weight.ndim:
        raise RecipeError(f"a weight of shape {tuple(weight.shape)} has no axis {axis} to put scales along")
    axis %= weight.ndim
    if spec.granularity == "channel":
        return weight.movedim(axis, 0).reshape(weight.shape[axis], -1), [weight.shape[axis]], axis
    assert spec.group_size is not None
    size, length = spec.group_size, weight.shape[axis]
    groups = -(-length // size)
    last = weight.movedim(axis, -1)
    # zeros fill a short last group: they are in every range and have no error
    last = torch.nn.functional.pad(last, (0, groups * size - length))
    split = last.unflatten(-1, (groups, size)).movedim(-2, axis)  # type: ignore[no-untyped-call]
    shape = list(weight.shape)
    shape[axis] = groups
    return split.reshape(-1, size), shape, axis


def _minmax(rows: Tensor, spec: TensorSpec) -> tuple[Tensor, Tensor]:
    return rows.amin(1), rows.amax(1)


def _percentile(rows: Tensor, spec: TensorSpec) -> tuple[Tensor, Tensor]:
    count = rows.shape[1]
    rank = tail_rank(spec.range.percentile, count)
    lo, hi = rows.kthvalue(rank, dim=1).values, rows.kthvalue(count - rank + 1, dim=1).values
    return lo.clamp(max=0.0), hi.clamp(min=0.0)


def _mse(rows: Tensor, spec: TensorSpec) -> tuple[Tensor, Tensor]:
    """Least squared error over clip ratios ``1/candidates .. 1``, then between the best one's neighbours.

    Exact: every candidate is the grid itself, applied to the weights. An affine grid's ends are also moved
    one at a time. The coarse search stops where what clipping does to the largest weight alone is more than the
    least error so far: at 8 bits after a few candidates of a hundred.
    """
    lo, hi = rows.amin(1).double().clamp(max=0.0), rows.amax(1).double().clamp(min=0.0)
    buffer = torch.empty_like(rows)

    def error(lo: Tensor, hi: Tensor) -> Tensor:
        torch.sub(fake_quantize(rows, solve_grid(lo, hi, spec, axis=0)), rows, out=buffer)
        return buffer.square_().sum(1, dtype=torch.float64)

    least = error(lo, hi)
    count = spec.range.candidates
    coarse = [i / count for i in range(count - 1, 0, -1)]
    fine = [1.0 + (i / _REFINEMENTS - 0.5) * 2.0 / count for i in range(_REFINEMENTS + 1)]
    moves = [(True, True)] if spec.symmetric else [(True, True), (False, True), (True, False)]
    # here the threshold is that of the ratio, neither rounded up nor fixed
    largest = torch.maximum(-lo, hi) if spec.symmetric and spec.scale == "float32" and not spec.range.fixed else None
    for ratios in (coarse, fine):
        for move_lo, move_hi in moves:
            from_lo, from_hi = lo, hi
            for ratio in ratios:
                if largest is not None and ratios is coarse:
                    clipped = _ROUNDING * ((1.0 - ratio) * largest).square()
                    if bool((clipped > least).all()):
                        break
                new_lo = from_lo * ratio if move_lo else from_lo
                new_hi = from_hi * ratio if move_hi else from_hi
                found = error(new_lo, new_hi)
                better = found < least
                least = torch.where(better, found, least)
                lo, hi = torch.where(better, new_lo, lo), torch.where(better, new_hi, hi)
    return lo, hi


RULES: dict[str, Callable[[Tensor, TensorSpec], tuple[Tensor, Tensor]]] = {
    "minmax": _minmax,
    "percentile": _percentile,
    "mse": _mse,
    "hqo": hqo,
}
