"""What GPTQ, GPFQ and Qronos do alike: gather moments, order columns, try scales, round, keep what loses least."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from ..errors import NonFiniteError
from ..grid import Grid
from ..place.layers import QuantLayer
from ..steps import ColumnByColumn
from .accumulator import Budget
from .feedback import Codes, Damped, Feedback, output_error, round_columns
from .moments import MATRICES, Moments, as_rows, as_weight
from .row_grid import RowGrid, take
from .visit import LayerStep, LayerVisit, Stream

Options = TypeVar("Options", bound=ColumnByColumn)
_Pair = tuple[Tensor, Tensor | None]  # H and G
_LEAST_RATIO = 0.5
_SCALES_OF_GROUPS = 11
_DAMPINGS = (0.01, 0.1, 1.0, 10.0)
_AT_ONCE = 1 << 24  # weights that are rounded side by side when several scales are tried


class ColumnStep(LayerStep, Generic[Options]):
    """A step that rounds column by column; ``streams`` are those whose inputs it needs."""

    def __init__(self, options: Options, streams: tuple[Stream, ...]) -> None:
        self.options = options
        self.streams = streams
        self.needs_float_inputs = "float" in streams

    @abstractmethod
    def prepare(self, w: Tensor, h: Tensor, g: Tensor | None, damping: float, notes: list[str]) -> Feedback:
        """What the shared loop needs; ``w`` (groups, columns, rows), ``h`` and ``g`` (groups, columns, columns)."""

    def refusal(self, layer: QuantLayer) -> str:
        """Why this step leaves a layer alone: it takes what multiplies its input by a matrix."""
        if isinstance(layer.layer, MATRICES):
            return ""
        looks_up = ": it looks rows up and multiplies nothing" if isinstance(layer.layer, nn.Embedding) else ""
        return f"it is of type {type(layer.layer).__name__}{looks_up}"

    def run(self, visit: LayerVisit) -> tuple[float, float]:
        """Round the layer's weight; its scales too change where others lose less."""
        layer = visit.layer
        assert layer.weight_quantizer is not None
        parts = self._moments(visit)
        weight, grid = layer.weight.detach(), layer.weight_quantizer.require_grid()
        w = as_rows(layer.layer, weight).double().mT.contiguous()
        order = self._order(_sum([part.h for part in parts]))
        halves = [(_square(m.h, order), None if m.g is None else _square(m.g, order)) for m in parts]
        rows, w = RowGrid.of(layer.layer, weight, grid).taken(order), take(w, order)
        budget = None if self.options.accumulator_bits is None else Budget.of(visit, self.options.accumulator_bits)
        damping = self._chosen_damping(w, halves, rows, visit.notes)
        h, g = _added(halves)
        feedback = self.prepare(w, h, g, damping, visit.notes)
        nearest = _nearest(w, rows, budget)
        before = float(output_error(nearest * rows.scale - feedback.target, h).sum())
        ratios = self._ratios(layer)
        codes, errors = self._round(feedback, rows, budget, ratios, h)
        best = _best(errors, layer.layer, grid)  # (groups, rows)
        after = float(errors.gather(0, best.unsqueeze(0)).sum())
        if budget is not None and not after <= before:
            codes, best, after = nearest.unsqueeze(0), torch.zeros_like(best), before
        ratio = torch.tensor(ratios, dtype=torch.float32, device=w.device)[best]
        chosen = codes.gather(0, best[None, :, None].expand(1, -1, w.shape[1], -1))[0]
        back = order.argsort(-1)
        scale = rows.scale.float() * ratio.unsqueeze(1)
        weight.copy_(as_weight(layer.layer, take(chosen.float() * scale, back).mT))
        if bool((ratio != 1).any()):
            layer.weight_quantizer.set_grid(_scaled(grid, ratio, layer.layer))
        return before, after

    def _moments(self, visit: LayerVisit) -> list[Moments]:
        """The moments of all samples; of the even and the odd ones where damping is to be chosen."""
        several, layer = getattr(self.options, "damping", None) == "auto", visit.layer.layer
        parts = [Moments(layer, cross=len(self.streams) > 1) for _ in range(1 + several)]
        first = visit.inputs(self.streams[0])
        others: Iterator[Tensor | None] = visit.inputs(self.streams[1]) if len(self.streams) > 1 else _nothing()
        seen = 0
        for x, exact in zip(first, others):
            for index, part in enumerate(parts):
                own = slice((index - seen) % len(parts), None, len(parts))
                if len(x[own]):
                    part.update(x[own], None if exact is None else exact[own])
            seen += len(x)
        if not all(bool(m.isfinite().all()) for part in parts for m in (part.h, part.g) if m is not None):
            raise NonFiniteError(
                f"layer {visit.name!r} reads NaN, infinite or huge values in the calibration data: look at the float "
                "model on it; a division, a log or an overflow before this layer makes them"
            )
        return parts

    def _chosen_damping(self, w: Tensor, halves: list[_Pair], rows: RowGrid, notes: list[str]) -> float:
        """The damping asked for; ``auto``: what serves the odd samples best when the even ones round."""
        asked = getattr(self.options, "damping", 0.0)
        if asked != "auto":
            return float(asked)
        (h, g), (held_out, crossed) = halves
        errors = []
        for damping in _DAMPINGS:
            feedback = self.prepare(w, h, g, damping, [])
            values = round_columns(feedback, rows, rows.round, self.options.block_size) * rows.scale
            goal = (held_out if crossed is None else crossed) @ w
            errors.append(float(((held_out @ values - 2 * goal) * values).sum()))
        best = _DAMPINGS[errors.index(min(errors))]
        notes.append(f"damping {best:g}")
        return best

    def _order(self, h: Tensor) -> Tensor:
        """The order of the columns, (groups, columns): each group of a grouped layer has its own."""
        if self.options.act_order:
            return h.diagonal(dim1=-2, dim2=-1).argsort(stable=True, dim=-1, descending=True)
        return torch.arange(h.shape[-1], device=h.device).expand(h.shape[0], -1)

    def _ratios(self, layer: QuantLayer) -> list[float]:
        """Scales to try, as shares of the grid's own."""
        assert layer.weight_quantizer is not None
        spec, count = layer.weight_quantizer.spec, self.options.scales
        if count is None:  # few weights a scale leave much to gain; else what the next layers must stand costs more
            count = _SCALES_OF_GROUPS if spec.granularity == "group" else 1
        if count > 1 and spec.scale == "po2":
            return [1.0, _LEAST_RATIO]
        return [1.0 - (1.0 - _LEAST_RATIO) * i / max(count - 1, 1) for i in range(count)]

    def _round(
        self, feedback: Feedback, rows: RowGrid, budget: Budget | None, ratios: list[float], h: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The codes for every ratio, (ratios, groups, columns, rows), and the errors, (ratios, groups, rows)."""
        at_once, w_shape = max(1, _AT_ONCE // feedback.start.numel()), feedback.start.shape
        codes, errors = [], []
        for start in range(0, len(ratios), at_once):
            some = ratios[start : start + at_once]
            many, repeated = rows.times(some), feedback.repeated(len(some))
            codes_of: Codes = many.round if budget is None else budget.spender(many, repeated.start, some)
            rounded = round_columns(repeated, many, codes_of, self.options.block_size)
            error = output_error(rounded * many.scale - repeated.target, h)
            codes.append(rounded.view(*w_shape[:2], len(some), -1).movedim(-2, 0))
            errors.append(error.view(w_shape[0], len(some), -1).movedim(-2, 0))
        return torch.cat(codes), torch.cat(errors)


def aligned(w: Tensor, h: Damped, g: Tensor) -> Tensor:
    """w* = H^-1 G w: the weights that follow the float layer's output best from the quantized stream's inputs.

    What damping adds to H is added to G, so that it holds the weights where they are. (groups, columns, rows)
    """
    return h.solve(g @ w + h.added.unsqueeze(-1) * w)


def _nothing() -> Iterator[None]:
    while True:
        yield None


def _added(pairs: list[_Pair]) -> _Pair:
    """The sums of H and of G."""
    crossed = [g for _, g in pairs if g is not None]
    return _sum([h for h, _ in pairs]), _sum(crossed) if crossed else None


def _sum(parts: list[Tensor]) -> Tensor:
    """Their sum."""
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


def _square(moments: Tensor, order: Tensor) -> Tensor:
    """Rows and columns of each group in another order."""
    return take(take(moments, order).mT, order).mT


def _nearest(w: Tensor, rows: RowGrid, budget: Budget | None) -> Tensor:
    """The codes of rounding to nearest, within the budget."""
    if budget is None:
        return rows.nearest(w)
    spend = budget.spender(rows, w, [1.0])
    return torch.stack([spend(w[:, i], i) for i in range(w.shape[1])], dim=1)


def _best(errors: Tensor, layer: nn.Module, grid: Grid) -> Tensor:
    """The ratio with the least error of what shares a scale: (groups, rows), from (ratios, groups, rows)."""
    if not grid.scale.ndim or (grid.group_size is not None and grid.axis == _output_axis(layer)):
        errors = errors.sum((1, 2), keepdim=True).expand_as(errors)
    elif _shares_scales(layer, errors.shape[1]):
        errors = errors.sum(1, keepdim=True).expand_as(errors)
    return errors.argmin(0)


def _output_axis(layer: nn.Module) -> int:
    return 1 if type(layer).__name__.startswith("ConvTranspose") else 0


def _shares_scales(layer: nn.Module, groups: int) -> bool:
    """Whether the groups have the scales of their outputs in common: axis 1 of a transposed convolution's weight."""
    return groups > 1 and _output_axis(layer) == 1


def _scaled(grid: Grid, ratio: Tensor, layer: nn.Module) -> Grid:
    """The grid with its scales times ``ratio`` (groups, rows)."""
    axis = _output_axis(layer)
    if not grid.scale.ndim or (grid.group_size is not None and grid.axis == axis):
        return replace(grid, scale=grid.scale * ratio[0, 0])
    per_output = ratio[0] if _shares_scales(layer, len(ratio)) else ratio.flatten()
    if grid.group_size is None:
        return replace(grid, scale=grid.scale * per_output)
    shape = [-1 if other == axis else 1 for other in range(grid.scale.ndim)]
    return replace(grid, scale=grid.scale * per_output.view(shape))
