"""Step sizes, offsets and clipping thresholds that learn with the model."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..errors import NonFiniteError, RecipeError
from ..grid import FloatFormat, Grid, IntFormat, TensorSpec
from ..ranges.solve import power_of_two
from .kernels import LearnedClipping
from .training_quantizer import TrainingQuantizer

_TINY, _HUGE = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


class _Learned(TrainingQuantizer):
    """What learned kinds share: the Function, and the fixed zero point of a grid without an offset."""

    rounding_counts: ClassVar[bool] = True

    def _size(self) -> nn.Parameter:
        raise NotImplementedError

    def _per_size(self, x: Tensor, grid: Grid) -> Tensor:
        """What the gradient of the logarithm of the scale is multiplied by."""
        raise NotImplementedError

    def _train(self, x: Tensor) -> Tensor:
        grid = self._current()
        offset, per_offset, beta = self._offset_terms(x, grid)
        return LearnedClipping.apply(  # type: ignore[no-any-return,no-untyped-call]
            x, self._size(), offset, self._clipping(grid), self._per_size(x, grid), per_offset, beta,
            self.rounding_counts,
        )  # fmt: skip

    def _offset_terms(self, x: Tensor, grid: Grid) -> tuple[nn.Parameter | None, Tensor | None, Tensor | None]:
        return None, None, None

    def _shared(self) -> list[Tensor]:
        return list(self.parameters(recurse=False))

    def _positive(self, scale: Tensor) -> Tensor:
        """A float32 scale that a grid takes: finite, positive, and a power of two where the spec asks for one."""
        scale = scale.detach().float().clamp(_TINY, _HUGE)
        if not bool((scale > 0).all()):  # NaN
            raise NonFiniteError(
                f"the {self.kind} quantizer has learned a scale that is no number: the loss has diverged; lower the "
                "learning rate of the quantizers, or clip gradients"
            )
        return power_of_two(scale, self.spec) if self.spec.scale == "po2" else scale

    def _raw(self, scale: Tensor) -> Tensor:
        """The scale to learn from: for exponents that are rounded up the middle of those that give ``scale``."""
        up = self.spec.scale == "po2" and self.spec.po2_rounding == "ceil"
        return scale.detach().clone() * (0.5**0.5 if up else 1.0)


class LearnedStepQuantizer(_Learned):
    """A step size that learns (LSQ): ``scale = start * exp(log_scale)``, ``log_scale`` being the Parameter.

    A logarithm, since the scale then stays positive and finite whatever the optimizer does, moves in proportion to
    itself, and is left in place by weight decay. The paper's gradient scale ``1 / sqrt(N * qmax)`` balances
    ``grad_s / s`` against ``norm(grad_w) / norm(w)`` (section 2.2), so ``grad_s / sqrt(N * qmax) / s`` is the gradient
    that the Parameter gets: a step of plain gradient descent moves the scale as the paper's does, to first order. It is
    kept within -1 .. 1: at 8 bits, or where a batch norm folded into a weight makes it small, the paper's steps are a
    multiple of the scale itself, and training diverges. N counts the elements per scale, of one sample for activations.
    Powers of two: the exponent is rounded, and the gradient passes straight through. A zero point stays as it started.

    Source: Esser et al., Learned Step Size Quantization (arXiv 1902.08153), equations (1) to (3), section 2.2; straight
    through the exponent: Jain et al., Trained Quantization Thresholds (arXiv 1903.08066), section 3.

    >>> from bitsmith.grid import IntFormat, TensorSpec
    >>> quantizer = LearnedStepQuantizer(TensorSpec(format=IntFormat(4)), of_weight=True)
    >>> quantizer.initialize(Grid(IntFormat(4), torch.tensor(1.0)))
    >>> quantizer(torch.tensor([0.3, 9.0])).backward(torch.tensor([1.0, 3 / 7]))
    >>> quantizer.log_scale.grad  # (0 - 0.3 + 3) / sqrt(2 * 7)
    tensor(0.7216)
    """

    kind = "lsq"
    start: Tensor

    def __init__(
        self, spec: TensorSpec, *, axis: int | None = None, non_negative: bool = False, of_weight: bool = False
    ) -> None:
        super().__init__(spec, axis=axis, non_negative=non_negative, of_weight=of_weight)
        shape = () if spec.granularity == "tensor" else (0,)
        self.register_buffer("start", torch.ones(shape))
        self.log_scale = nn.Parameter(torch.zeros(shape))

    def _size(self) -> nn.Parameter:
        return self.log_scale

    def _begin(self, grid: Grid) -> None:
        self.start = self._raw(grid.scale)
        self.log_scale.data = torch.zeros_like(self.start)

    def _learned_scale(self) -> Tensor:
        return self._positive(self.start * self.log_scale.detach().exp())

    def _current(self) -> Grid:
        return self._grid_of(self._learned_scale())

    def _gradient_scale(self, x: Tensor, grid: Grid) -> float:
        fmt = grid.format
        greatest = fmt.qmax - int(self.codes[2]) if isinstance(fmt, IntFormat) else fmt.max_value
        count = x.numel() / grid.scale.numel() / (1 if self.of_weight or x.ndim < 2 else x.shape[0])
        return 1.0 / math.sqrt(max(count, 1.0) * max(greatest, 1.0))

    def _per_size(self, x: Tensor, grid: Grid) -> Tensor:
        return self._gradient_scale(x, grid) / grid.scale.square()


class LearnedOffsetQuantizer(LearnedStepQuantizer):
    """A step size and an offset that learn (LSQ+).

    ``beta = offset * unit`` is the real value of code 0, ``unit`` the range at the start, so that ``offset`` moves in
    proportion to it. The grid's zero point is ``round(-beta / scale)`` within the codes, and the gradient passes
    straight through that rounding: ``beta`` gets the gradient of clipped values, scaled as the step's is.
    Values known to be non-negative keep zero point 0, which makes this ``lsq``.

    Source: Bhalgat et al., LSQ+ (arXiv 2004.09576), equations (1) to (4).

    >>> from bitsmith.grid import IntFormat, TensorSpec
    >>> spec = TensorSpec(format=IntFormat(8, signed=False), symmetric=False)
    >>> quantizer = LearnedOffsetQuantizer(spec)
    >>> quantizer.initialize(Grid(spec.format, torch.tensor(0.01), torch.tensor(100, dtype=torch.int32)))
    >>> with torch.no_grad():
    ...     _ = quantizer.offset.add_(0.1)
    >>> quantizer.grid.zero_point
    tensor(74, dtype=torch.int32)
    """

    kind = "lsq+"
    unit: Tensor

    def __init__(
        self, spec: TensorSpec, *, axis: int | None = None, non_negative: bool = False, of_weight: bool = False
    ) -> None:
        super().__init__(spec, axis=axis, non_negative=non_negative, of_weight=of_weight)
        shape = () if spec.granularity == "tensor" else (0,)
        self.fixed = non_negative and spec.auto_unsigned
        if spec.symmetric and not self.fixed:
            raise RecipeError(
                "'lsq+' learns an offset, which a symmetric grid does not have: set symmetric to false, or use 'lsq'"
                + (" for weights, as its authors do" if of_weight else "")
            )
        if not self.fixed:
            self.register_buffer("unit", torch.ones(shape))
            self.offset = nn.Parameter(torch.zeros(shape))

    def _begin(self, grid: Grid) -> None:
        super()._begin(grid)
        if self.fixed:
            return
        assert isinstance(grid.format, IntFormat)
        zero = torch.zeros_like(grid.scale) if grid.zero_point is None else grid.zero_point
        self.unit = self.start * (grid.format.qmax - grid.format.qmin)
        self.offset.data = -zero * grid.scale / self.unit

    def _beta(self) -> Tensor:
        return self.offset.detach() * self.unit

    def _current(self) -> Grid:
        if self.fixed:
            return super()._current()
        assert isinstance(self.format, IntFormat)
        scale, beta = self._learned_scale(), self._beta()
        if not bool(torch.isfinite(beta).all()):
            raise NonFiniteError("the offset learned is not finite: the loss has diverged; lower the learning rate")
        zero = (-beta / scale).round().clamp(self.format.qmin, self.format.qmax).to(torch.int32)
        return Grid(self.format, scale, zero, self._grid_axis(), self.spec.group_size)

    def _offset_terms(self, x: Tensor, grid: Grid) -> tuple[nn.Parameter | None, Tensor | None, Tensor | None]:
        if self.fixed:
            return super()._offset_terms(x, grid)
        assert grid.zero_point is not None
        beta = -grid.zero_point * grid.scale
        return self.offset, self._gradient_scale(x, grid) / self.unit, beta


class LearnedClippingQuantizer(_Learned):
    """A clipping threshold that learns (PACT): ``clip`` is the Parameter, and ``scale = clip / qmax``.

    Its gradient is the sum of those of clipped values; a symmetric signed grid is clipped at both ends, and the lower
    one counts with the opposite sign. The paper draws the threshold down by an L2 penalty: give ``clip`` weight
    decay. It is kept above a thousandth of its start, where values would all be clipped.

    Source: Choi et al., PACT: Parameterized Clipping Activation (arXiv 1805.06085), equations (1) to (3).

    >>> from bitsmith.grid import IntFormat, TensorSpec
    >>> quantizer = LearnedClippingQuantizer(TensorSpec(format=IntFormat(4)), non_negative=True)
    >>> quantizer.initialize(Grid(IntFormat(4, signed=False), torch.tensor(0.4)))
    >>> quantizer(torch.tensor([-1.0, 3.0, 7.0, 8.0])).sum().backward()
    >>> quantizer.clip
    Parameter containing:
    tensor(6., requires_grad=True)
    >>> quantizer.clip.grad
    tensor(2.)
    """

    kind = "pact"
    rounding_counts = False
    start: Tensor

    def __init__(
        self, spec: TensorSpec, *, axis: int | None = None, non_negative: bool = False, of_weight: bool = False
    ) -> None:
        if of_weight:
            raise RecipeError(
                "'pact' learns where activations are clipped and has no meaning for weights: use 'lsq' or "
                "'moving-average' for them"
            )
        if not spec.symmetric and not (non_negative and spec.auto_unsigned):
            raise RecipeError(
                "'pact' has one threshold, which does not fix the two ends of an affine grid: use 'lsq+', or a "
                "symmetric spec"
            )
        super().__init__(spec, axis=axis, non_negative=non_negative, of_weight=of_weight)
        shape = () if spec.granularity == "tensor" else (0,)
        self.register_buffer("start", torch.ones(shape))
        self.clip = nn.Parameter(torch.ones(shape))

    def _size(self) -> nn.Parameter:
        return self.clip

    def _levels(self) -> float:
        """Steps between 0 and the threshold."""
        if isinstance(self.format, FloatFormat):
            return self.format.max_value
        return float(self.format.qmax - int(self.codes[2]))

    def _begin(self, grid: Grid) -> None:
        self.start = self._raw(grid.scale) * self._levels()
        self.clip.data = self.start.clone()

    def _current(self) -> Grid:
        clip = torch.maximum(self.clip.detach(), self.start / 1024)
        scale = self._positive(clip / self._levels())
        return self._grid_of(scale)

    def _per_size(self, x: Tensor, grid: Grid) -> Tensor:
        return 1.0 / (grid.scale * self._levels())
