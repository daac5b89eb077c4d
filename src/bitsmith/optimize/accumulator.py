"""Weights whose sums of products cannot leave an accumulator of a given width, whatever the inputs.

Source: Colbert et al., Accumulator-Aware Post-Training Quantization (arXiv 2409.17092). No partial sum of a layer
exceeds sum(|q|) * max(|x|) + |b| (``integer.accumulate``), so each row may spend sum(|q|) up to a budget. Two things
keep the first columns from spending all of it: every value is shrunk by the row's threshold, which projects its weights
onto the l1 ball of the budget (section 3), and no code takes more than what is left.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import CalibrationError
from ..grid import Grid, IntFormat
from ..integer.kernels import centred_weight
from ..integer.laws import largest_code
from ..place.layers import QuantLayer
from .feedback import Codes
from .moments import as_rows
from .row_grid import RowGrid
from .visit import LayerVisit

_RESERVE = 1 / 32  # of the accumulator: room for a bias that is corrected later
_HALVINGS = 48


@dataclass(frozen=True)
class Budget:
    """What the rows of a layer may spend: ``limit`` is the largest sum, ``largest`` the largest code of an input.

    ``bias`` is the magnitude of each row's bias in steps of the accumulator, (groups, rows).
    """

    limit: int
    largest: int
    bias: Tensor

    @classmethod
    def of(cls, visit: LayerVisit, bits: int) -> Budget:
        """The budget of a layer; CalibrationError where no bound can be promised, or none of its products fits."""
        layer, grid = visit.layer, visit.input_grid
        assert layer.weight_quantizer is not None
        weights = layer.weight_quantizer.require_grid()
        where = f"accumulator_bits={bits} cannot be kept in layer {visit.name!r}"
        if grid is None or not isinstance(grid.format, IntFormat) or not isinstance(weights.format, IntFormat):
            raise CalibrationError(f"{where}: its inputs or weights are no integers; quantize both, or exclude it")
        if weights.group_size is not None:
            raise CalibrationError(f"{where}: its weights have scales by group; use one per output channel or tensor")
        limit, largest = (1 << (bits - 1)) - 1, largest_code(grid)
        bias = as_rows(layer.layer, layer.weight.detach())[..., 0].double() * 0
        if layer.bias is not None:
            assert layer.bias_quantizer is not None
            steps = layer.bias.detach().double().abs() / layer.bias_quantizer.require_grid().scale.double()
            bias = steps.view_as(bias) + _RESERVE * limit
        if limit - float(bias.max()) < 2 * largest:
            raise CalibrationError(
                f"{where}: inputs up to {largest} and its bias leave no room for weights; allow more bits, narrow the "
                "activations, or exclude it"
            )
        return cls(limit, largest, bias)

    def spender(self, rows: RowGrid, w: Tensor, ratios: list[float]) -> Codes:
        """A rounding function for columns of ``w`` (groups, columns, rows), to be called once a column."""
        room = torch.cat([self.limit - self.bias / ratio for ratio in ratios], dim=-1)
        left = (room.clamp_min(0) / self.largest).floor()
        threshold = shrinkage((w / rows.scale).abs(), left)

        def spend(values: Tensor, column: int) -> Tensor:
            scale = rows.at(rows.scale, column)
            shrunk = values.sign() * (values.abs() - threshold * scale).clamp_min(0)
            codes = rows.round(shrunk, column)
            codes = torch.maximum(torch.minimum(codes, left), -left)
            left.sub_(codes.abs())
            return codes

        return spend


def shrinkage(magnitudes: Tensor, budget: Tensor) -> Tensor:
    """The threshold t of each row at which sum(max(m - t, 0)) is its budget; 0 where the sum is within it.

    ``magnitudes`` is (groups, columns, rows), ``budget`` and the result (groups, rows).

    >>> shrinkage(torch.tensor([[[3.0], [1.0]]]), torch.tensor([[2.0]])).round(decimals=4)
    tensor([[1.]])
    """
    low, high = torch.zeros_like(budget), magnitudes.amax(1)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        too_much = (magnitudes - middle.unsqueeze(1)).clamp_min(0).sum(1) > budget
        low, high = torch.where(too_much, middle, low), torch.where(too_much, high, middle)
    return torch.where(magnitudes.sum(1) > budget, high, torch.zeros_like(high))


def clamp_bias(layer: QuantLayer, grid: Grid, bits: int) -> None:
    """Keep a bias within what the weights leave of the accumulator, in place."""
    assert layer.bias is not None
    assert layer.bias_quantizer is not None
    spent = as_rows(layer.layer, centred_weight(layer)).abs().sum(-1).flatten().double() * largest_code(grid)
    room = ((1 << (bits - 1)) - 1 - spent).clamp_min(0)
    most = (room * layer.bias_quantizer.require_grid().scale).float()
    layer.bias.data.copy_(torch.maximum(torch.minimum(layer.bias, most), -most))
