"""A weight's grid as the matrix of ``as_rows`` sees it, for algorithms that round one column of all rows at a time."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..grid import FloatFormat, Format, Grid, IntFormat, fake_quantize
from ..grid.kernels import broadcast
from .moments import as_rows

_UNIT = torch.tensor(1.0)


@dataclass(frozen=True)
class RowGrid:
    """Scale and least and greatest code (less the zero point), each (groups, columns or 1, rows), float64.

    Column i of all rows is contiguous. Codes are centred: the real value is ``code * scale``.
    """

    format: Format
    scale: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, layer: nn.Module, weight: Tensor, grid: Grid) -> RowGrid:
        """The grid of a layer's weight, per tensor, channel or group alike."""
        blocks, scale, zero_point = broadcast(weight, grid)
        fmt = grid.format
        ends = (fmt.qmin, fmt.qmax) if isinstance(fmt, IntFormat) else (-fmt.max_value, fmt.max_value)
        zero = torch.zeros_like(scale) if zero_point is None else zero_point

        def lay_out(value: Tensor) -> Tensor:
            rows = as_rows(layer, value.double().expand(blocks.shape).reshape(weight.shape)).mT
            same = bool((rows == rows[:, :1]).all())
            return (rows[:, :1] if same else rows).contiguous()

        return cls(fmt, lay_out(scale), lay_out(ends[0] - zero), lay_out(ends[1] - zero))

    def round(self, values: Tensor, column: int) -> Tensor:
        """The codes nearest to a column of values, (groups, rows)."""
        ratio = values / self.at(self.scale, column)
        if isinstance(self.format, FloatFormat):
            return fake_quantize(ratio.float(), Grid(self.format, _UNIT.to(ratio.device))).double()
        return ratio.round_().clamp_(self.at(self.low, column), self.at(self.high, column))

    def real(self, codes: Tensor, column: int) -> Tensor:
        """The values of a column of codes."""
        return codes * self.at(self.scale, column)

    def nearest(self, w: Tensor) -> Tensor:
        """The codes nearest to all columns, (groups, columns, rows)."""
        if isinstance(self.format, FloatFormat):
            return fake_quantize((w / self.scale).float(), Grid(self.format, _UNIT.to(w.device))).double()
        return torch.minimum(torch.maximum((w / self.scale).round_(), self.low), self.high)

    def taken(self, order: Tensor) -> RowGrid:
        """The same with its columns in another order, (groups, columns)."""
        return replace(self, scale=take(self.scale, order), low=take(self.low, order), high=take(self.high, order))

    def times(self, ratios: list[float]) -> RowGrid:
        """Every row once for each ratio, with its scale times that: rows are (ratio, row)."""
        scale = torch.cat([self.scale * ratio for ratio in ratios], dim=-1)
        return replace(self, scale=scale, low=_tile(self.low, len(ratios)), high=_tile(self.high, len(ratios)))

    @staticmethod
    def at(value: Tensor, column: int) -> Tensor:
        """A column of one of the grid's own tensors, (groups, rows)."""
        return value[:, column if value.shape[1] > 1 else 0]


def take(value: Tensor, order: Tensor) -> Tensor:
    """Columns (dimension 1) in another order, which each group has for itself; what is the same for all stays."""
    if value.shape[1] == 1:
        return value
    return value.gather(1, order.unsqueeze(-1).expand(-1, -1, value.shape[-1]))


def _tile(value: Tensor, count: int) -> Tensor:
    return value.repeat(1, 1, count)
