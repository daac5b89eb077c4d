"""Ranges that follow the data in training."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..errors import NonFiniteError
from ..grid import Grid, IntFormat, RangeRule, TensorSpec
from ..ranges import weight_grid
from ..ranges.statistics import extremes
from .kernels import Extremes, StraightThrough
from .training_quantizer import TrainingQuantizer, clipping_range

_TINY, _HUGE = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


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
        if self.low.ndim == 0 and self.low.device.type == "cpu":
            grid = self._short(float(self.low), float(self.high))
            if grid is not None:
                return grid
        return self._solve(self.low, self.high, self._grid_axis())

    def _short(self, low: float, high: float) -> Grid | None:
        """What ``_solve`` finds for one float32 scale, without its dozens of operations; None where it must."""
        fmt, spec = self.format, self.spec
        if not isinstance(fmt, IntFormat) or spec.scale != "float32" or spec.range.limit is not None:
            return None
        from_zero = self.subsumes_relu or (spec.symmetric and fmt.signed)
        if not from_zero and (spec.symmetric or self.non_negative or fmt != spec.format):
            return None
        exact = max(-low, high) / fmt.qmax if from_zero else (high - low) / (fmt.qmax - fmt.qmin)
        if not _TINY <= exact <= _HUGE:
            return None
        scale = np.float32(exact)
        if from_zero:
            return Grid(fmt, torch.tensor(scale))
        least, greatest = fmt.qmin - round(np.float32(low) / scale), fmt.qmax - round(np.float32(high) / scale)
        zero = min(max(round(fmt.qmin - low / float(scale)), fmt.qmin), fmt.qmax)
        zero = min(max(zero, least), greatest) if least <= greatest else zero
        return Grid(fmt, torch.tensor(scale), torch.tensor(zero, dtype=torch.int32))

    def _train(self, x: Tensor) -> Tensor:
        if self.of_weight:
            grid = self._follow(x.detach())
            # nothing is clipped, unless exponents are rounded down or ranges limited
            rounded_down = self.spec.scale == "po2" and self.spec.po2_rounding != "ceil"
            clipping = self._clipping(grid) if rounded_down or self.spec.range.limit is not None else None
            return StraightThrough.apply(x, grid, clipping, None)  # type: ignore[no-any-return,no-untyped-call]
        grid = self._current()
        watch = Extremes(greatest_only=self.subsumes_relu) if self.training else None
        inline = watch if self.spec.granularity == "tensor" else None
        y: Tensor = StraightThrough.apply(x, grid, self._clipping(grid), inline)  # type: ignore[no-untyped-call]
        if inline is not None:
            low, high = inline.ends()
            self._take_in(torch.tensor(low, device=x.device), torch.tensor(high, device=x.device))
        elif watch is not None:
            self._take_in(*extremes(x, self._grid_axis()))
        return y

    def _follow(self, weight: Tensor) -> Grid:
        """The weight's own grid; what is left behind is that of the last weight seen."""
        fmt, spec = self.format, self.spec
        plain = spec.symmetric and spec.scale == "float32" and spec.range.limit is None
        if spec.granularity == "channel" and plain and isinstance(fmt, IntFormat):
            high = weight.abs().amax([d for d in range(weight.ndim) if d != self.along % weight.ndim]).double()
            exact = high / fmt.qmax
            if fmt.signed and bool(((exact >= _TINY) & (exact <= _HUGE)).all()):  # no channel is dead
                self.low, self.high = -high, high
                return Grid(fmt, exact.float(), None, self.along)
        rule = RangeRule(limit=spec.range.limit, fixed=spec.range.fixed)
        grid = weight_grid(weight, spec.model_copy(update={"range": rule}), self.along)
        self.low, self.high = clipping_range(grid, symmetric=spec.symmetric)
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
