"""Ranges that follow the data in training."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import NonFiniteError
from ..grid import Grid, IntFormat, RangeRule, TensorSpec
from ..ranges import weight_grid
from ..ranges.statistics import extremes
from .kernels import Extremes, StraightThrough
from .training_quantizer import TrainingQuantizer, clipping_range

_TINY, _HUGE = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
_NEGLIGIBLE = 2.0**-100  # a weight all of which is smaller is left to weight_grid


class MovingAverageQuantizer(TrainingQuantizer):
    """Ranges that follow the data: of activations a moving average of each batch's ends, of weights their own.

    ``v <- (1 - momentum) * v + momentum * batch`` with the spec's ``range.momentum``, whatever rule that names. A batch
    is quantized to the average of those before it, which costs no extra pass over memory: its ends are read while it is
    quantized.

    Source: Jacob et al., Quantization and Training of Neural Networks (arXiv 1712.05877), section 3.1.

    >>> from bitsmith.grid import IntFormat, TensorSpec
    >>> quantizer = MovingAverageQuantizer(TensorSpec(format=IntFormat(8)))
    >>> _ = quantizer(torch.tensor([-1.0, 1.27]))
    >>> quantizer.grid.scale
    tensor(0.0100)
    """

    kind = "moving-average"
    margin = 0.5
    low: Tensor
    high: Tensor

    def __init__(
        self, spec: TensorSpec, *, axis: int | None = None, non_negative: bool = False, of_weight: bool = False
    ) -> None:
        super().__init__(spec, axis=axis, non_negative=non_negative, of_weight=of_weight)
        shape = () if spec.granularity == "tensor" else (0,)
        self.register_buffer("low", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("high", torch.zeros(shape, dtype=torch.float64))

    def _first_rule(self) -> RangeRule:
        return RangeRule(name="minmax")

    def _begin(self, grid: Grid) -> None:
        self.low, self.high = clipping_range(grid, symmetric=self._is_symmetric(grid))

    def _current(self) -> Grid:
        return self._without_offset() or self._solve(self.low, self.high, self._grid_axis())

    def _without_offset(self) -> Grid | None:
        """What ``_solve`` finds in the commonest case, without its dozens of operations; None in others."""
        fmt, spec = self.format, self.spec
        if not isinstance(fmt, IntFormat) or spec.scale != "float32" or self.low.ndim or spec.range.limit is not None:
            return None
        if not (self.subsumes_relu or (spec.symmetric and fmt.signed)):
            return None
        scale = max(-float(self.low), float(self.high)) / fmt.qmax
        if not _TINY <= scale <= _HUGE:
            return None
        return Grid(fmt, torch.tensor(scale, device=self.low.device))

    def _train(self, x: Tensor) -> Tensor:
        if self.of_weight:
            grid = self._follow(x.detach())
            # nothing is clipped, unless exponents are rounded down
            clipping = self._clipping(grid) if self.spec.scale == "po2" and self.spec.po2_rounding != "ceil" else None
            return StraightThrough.apply(x, grid, clipping, None)  # type: ignore[no-any-return,no-untyped-call]
        grid = self._current()
        watch = Extremes(greatest_only=self.subsumes_relu) if self.training else None
        inline = watch if self.spec.granularity == "tensor" else None
        y: Tensor = StraightThrough.apply(x, grid, self._clipping(grid), inline)  # type: ignore[no-untyped-call]
        if watch is not None:
            self._take_in(*(watch.ends() if inline is not None else extremes(x, self.along)))
        return y

    def _follow(self, weight: Tensor) -> Grid:
        """The weight's own grid; what is left behind is that of the last weight seen."""
        if self.spec.granularity == "channel":
            low, high = torch.aminmax(weight.movedim(self.along, 0).flatten(1), dim=1)
            if bool((high - low > _NEGLIGIBLE).any()):
                self.low, self.high = low.double(), high.double()
                return self._solve(self.low, self.high, self.along)
        rule = RangeRule(limit=self.spec.range.limit, fixed=self.spec.range.fixed)
        grid = weight_grid(weight, self.spec.model_copy(update={"range": rule}), self.along)
        self.low, self.high = clipping_range(grid, symmetric=self.spec.symmetric)
        return grid

    @torch.no_grad()
    def _take_in(self, low: Tensor, high: Tensor) -> None:
        if not bool(torch.isfinite(low + high).all()):
            raise NonFiniteError(
                "a value that is quantized in training holds NaN or infinity: the loss has diverged (lower the "
                "learning rate, clip gradients), or the input has them"
            )
        if self.non_negative:
            low = torch.zeros_like(low)
        momentum = self.spec.range.momentum
        self.low.lerp_(low.double().clamp_(max=0.0), momentum)
        self.high.lerp_(high.double().clamp_(min=0.0), momentum)

    def _shared(self) -> list[Tensor]:
        return [self.low, self.high]
