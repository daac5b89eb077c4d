"""The loop that GPTQ, GPFQ and Qronos share: round one column, let the columns to come make up for it.

Matrices are laid out as (groups, columns, rows): a column of all rows and groups is rounded at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..errors import CalibrationError
from .row_grid import RowGrid

_GROWTH, _MOST_DAMPING = 10.0, 1e3
Codes = Callable[[Tensor, int], Tensor]  # a column of values and its index to codes


@dataclass(frozen=True)
class Feedback:
    """What a method makes of a layer before the loop, columns in the order in which they are rounded.

    ``start`` (groups, columns, rows) are the values to round. Column t takes from its value ``passes[i, t]`` times
    the ``error`` (value less rounded value) or the ``rounded`` value of each column i before it; passes: (groups,
    columns, columns). Weights equal to ``target`` would leave the least error. ``first`` replaces what is rounded,
    not what the error is counted from, in the first column.
    """

    start: Tensor
    passes: Tensor
    target: Tensor
    of: Literal["error", "rounded"] = "error"
    first: Tensor | None = None

    def repeated(self, count: int) -> Feedback:
        """Every row ``count`` times: rows are (count, row)."""
        first = None if self.first is None else self.first.repeat(1, count)
        return Feedback(
            self.start.repeat(1, 1, count), self.passes, self.target.repeat(1, 1, count), self.of, first
        )  # fmt: skip


def round_columns(feedback: Feedback, grid: RowGrid, codes_of: Codes, block: int) -> Tensor:
    """The codes of all columns, (groups, columns, rows).

    The effect on columns outside the present block of ``block`` columns is put off and applied at once: the same
    sums in fewer passes over memory.
    """
    values, passes = feedback.start.clone(), feedback.passes
    groups, columns, rows = values.shape
    codes = torch.empty_like(values)
    passed = values.new_empty(groups, min(block, columns), rows)
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        for i in range(start, stop):
            value = values[:, i] if i or feedback.first is None else feedback.first
            codes[:, i] = codes_of(value, i)
            rounded = grid.real(codes[:, i], i)
            effect = values[:, i] - rounded if feedback.of == "error" else rounded
            values[:, i + 1 : stop].addcmul_(passes[:, i, i + 1 : stop, None], effect.unsqueeze(1), value=-1)
            passed[:, i - start] = effect
        if stop < columns:
            values[:, stop:].baddbmm_(passes[:, start:stop, stop:].mT, passed[:, : stop - start], alpha=-1)
    return codes


def output_error(change: Tensor, hessian: Tensor) -> Tensor:
    """The squared error of each row's output when its weights change: d^T H d, (groups, rows).

    ``change`` is (groups, columns, rows), ``hessian`` (groups, columns, columns).

    >>> output_error(torch.ones(1, 2, 1).double(), torch.tensor([[[1.0, 0.5], [0.5, 1.0]]]).double())
    tensor([[3.]], dtype=torch.float64)
    """
    return ((hessian @ change) * change).sum(1)


@dataclass(frozen=True)
class Damped:
    """H with ``damping`` times the mean of its diagonal added to that, and its Cholesky factor (lower)."""

    h: Tensor
    added: Tensor
    factor: Tensor

    @classmethod
    def of(cls, hessian: Tensor, damping: float, notes: list[str] | None = None) -> Damped:
        """Damped as asked, or ten times as much as often as it takes for H to be positive definite.

        Inputs that are always 0 get a diagonal of their own: their weights do not matter.
        """
        diagonal = hessian.diagonal(dim1=-2, dim2=-1)
        mean = diagonal.mean(-1, keepdim=True)
        scale, asked = torch.where(mean > 0, mean, torch.ones_like(mean)), damping
        while True:
            added = damping * scale + (diagonal == 0) * scale
            h = hessian + torch.diag_embed(added)
            factor, info = torch.linalg.cholesky_ex(h)
            if not bool(info.any()) and bool(factor.isfinite().all()):
                if damping > asked and notes is not None:
                    notes.append(f"damping grown from {asked:g} to {damping:g}")
                return cls(h, added, factor)
            damping *= _GROWTH
            if damping > _MOST_DAMPING:
                raise CalibrationError(
                    "the second moments of its inputs are not positive semidefinite, whatever the damping: look for "
                    "huge or non-finite inputs of this layer"
                )

    def passes(self) -> Tensor:
        """What column t takes over of the error of column i: U[i, t] / U[i, i], where U^T U = H^-1."""
        u: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(self.factor), upper=True)
        return u / u.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)

    def solve(self, right: Tensor) -> Tensor:
        """H^-1 times ``right``."""
        solution: Tensor = torch.cholesky_solve(right, self.factor)
        return solution
