"""Half-quadratic optimization of weight scales: least ``|error|**p`` with p < 1, so outliers are given up.

Source: H. Badri and A. Shaji, Half-Quadratic Quantization of Large Machine Learning Models, 2023. The symbols
are theirs: W the weights, W_e the error's sparse part, beta the penalty, kappa its growth. They solve for the
zero point; with a symmetric grid the closed form is that of the scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..grid.formats import IntFormat
from ..grid.grid import Grid
from ..grid.kernels import fake_quantize
from ..grid.spec import TensorSpec
from .solve import solve_grid

P = 0.7
_BETA, _KAPPA = 10.0, 1.01
_ITERATIONS, _PATIENCE = 20, 3
_STARTS = 16


def hqo(rows: Tensor, spec: TensorSpec) -> tuple[Tensor, Tensor]:
    """The range of each row of ``rows`` (scales, elements) with the least ``sum |W - W'|**0.7`` found.

    Alternates ``W_e <- shrink(W - W', beta)`` with the least-squares scale (and, on an affine grid, zero
    point) for ``W - W_e``, from the best of a few fractions of the min-max range, and keeps every row's best
    grid. As the min-max range is among the starts, no row is ever worse than under min-max.

    >>> from bitsmith.grid import IntFormat, TensorSpec
    >>> W = torch.tensor([[-1.0, 0.0, 1.0, 0.5, -0.5, 4.0]])
    >>> lo, hi = hqo(W, TensorSpec(format=IntFormat(3), granularity="channel"))
    >>> bool(hi < 4.0)
    True
    """
    lo, hi = rows.amin(1).double().clamp(max=0.0), rows.amax(1).double().clamp(min=0.0)
    unit = solve_grid(lo, hi, spec, axis=0).scale[:, None]  # errors are measured in LSBs of the min-max grid
    least = torch.full_like(lo, torch.inf)
    best_lo, best_hi = lo, hi

    def judge(grid: Grid) -> tuple[Tensor, Tensor, bool]:
        """``W'`` and the error under ``grid``, which is kept for the rows where it is the best so far."""
        nonlocal least, best_lo, best_hi
        W_q = fake_quantize(rows, grid)
        error = (rows - W_q).div_(unit)
        found = error.abs().pow_(P).sum(1, dtype=torch.float64)
        better = found < least
        new_lo, new_hi = _ends(grid)
        least = torch.where(better, found, least)
        best_lo, best_hi = torch.where(better, new_lo, best_lo), torch.where(better, new_hi, best_hi)
        return W_q, error, bool(better.any())

    for start in range(_STARTS, 1, -1):
        judge(solve_grid(lo * (start / _STARTS), hi * (start / _STARTS), spec, axis=0))
    grid = solve_grid(best_lo, best_hi, spec, axis=0)
    beta, stale = _BETA, 0
    for _ in range(_ITERATIONS):
        W_q, error, improved = judge(grid)
        stale = 0 if improved else stale + 1
        if stale >= _PATIENCE:
            break
        W_e = _shrink(error, beta).mul_(unit)
        grid = _closed_form(rows - W_e, W_q, grid, spec)
        beta *= _KAPPA
    return best_lo, best_hi


def objective(W: Tensor, W_q: Tensor) -> Tensor:
    """``sum |W - W_q|**0.7`` over each row.

    >>> objective(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 3.0]]))
    tensor([1.])
    """
    return (W - W_q).abs().pow(P).sum(1)


def _shrink(x: Tensor, beta: float) -> Tensor:
    """The generalized soft threshold: ``sign(x) * relu(|x| - |x|**(p - 1) / beta)``."""
    magnitude = x.abs()
    return (magnitude - magnitude.pow(P - 1.0).div_(beta)).relu_().mul_(x.sign())


def _closed_form(target: Tensor, W_q: Tensor, grid: Grid, spec: TensorSpec) -> Grid:
    """The grid nearest to ``target`` in least squares, with the codes of ``W_q`` held fixed."""
    scale = grid.scale.double()[:, None]
    code = W_q.double() / scale  # code - zero_point
    target = target.double()
    zero_point = grid.zero_point
    shift = torch.zeros_like(scale)
    if zero_point is not None and not spec.symmetric:
        shift = (code - target / scale).mean(1, keepdim=True)  # on top of the present zero point
        code = code - shift
    power = code.square().sum(1, keepdim=True)
    fitted = (code * target).sum(1, keepdim=True) / power
    fitted = torch.where((power > 0) & (fitted > 0) & torch.isfinite(fitted), fitted, scale)
    moved = None if zero_point is None else zero_point.double()[:, None] + shift
    lo, hi = _ends(grid, fitted, moved)
    return solve_grid(lo, hi, spec, axis=0)


def _ends(grid: Grid, scale: Tensor | None = None, zero_point: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The range that ``solve_grid`` turns into this scale and zero point again."""
    s = grid.scale.double() if scale is None else scale[:, 0]
    if not isinstance(grid.format, IntFormat):
        return -s * grid.format.max_value, s * grid.format.max_value
    qmin, qmax = grid.format.qmin, grid.format.qmax
    if grid.zero_point is None:
        return (-s * max(qmax, 1) if grid.format.signed else torch.zeros_like(s)), s * max(qmax, 1)
    z = grid.zero_point.double() if zero_point is None else zero_point[:, 0].clamp(qmin, qmax)
    return (qmin - z) * s, (qmax - z) * s
