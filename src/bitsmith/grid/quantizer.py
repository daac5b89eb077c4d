"""The module that stands on one edge of a model: it watches first, then maps values onto its grid."""

from __future__ import annotations

from torch import Tensor, nn

from .formats import IntFormat
from .functional import dequantize, fake_quantize, quantize
from .grid import Grid
from .spec import TensorSpec


class Quantizer(nn.Module):
    """One edge's quantizer: float in, float on the grid out.

    Without a grid it passes values through. ``set_grid`` gives it one; scale and zero point are buffers, so
    ``state_dict`` and ``.to(device)`` carry them. A Quantizer called at several places is one grid for all of them.

    >>> import torch
    >>> from bitsmith.grid import Grid, IntFormat
    >>> quantizer = Quantizer(TensorSpec(format=IntFormat(8)))
    >>> quantizer.set_grid(Grid(IntFormat(8), torch.tensor(0.5)))
    >>> quantizer(torch.tensor([0.6, -1.3, 100.0]))
    tensor([ 0.5000, -1.5000, 63.5000])
    >>> quantizer.to_int(torch.tensor([0.6, -1.3, 100.0]))
    tensor([  1,  -3, 127], dtype=torch.int8)
    """

    scale: Tensor | None
    zero_point: Tensor | None

    def __init__(self, spec: TensorSpec, *, non_negative: bool = False) -> None:
        super().__init__()
        self.spec = spec
        self.non_negative = non_negative
        self.format = spec.format
        self.axis: int | None = None
        self.register_buffer("scale", None)
        self.register_buffer("zero_point", None)

    @property
    def grid(self) -> Grid | None:
        """The grid, or None while there is none yet."""
        if self.scale is None:
            return None
        return Grid(self.format, self.scale, self.zero_point, self.axis, self.spec.group_size)

    def set_grid(self, grid: Grid) -> None:
        """Fix the grid; from here on ``forward`` quantizes."""
        self.format, self.axis = grid.format, grid.axis
        self.scale, self.zero_point = grid.scale, grid.zero_point

    def require_grid(self) -> Grid:
        """The grid; an error where calibration has not set one."""
        if (grid := self.grid) is None:
            from ..errors import CalibrationError

            raise CalibrationError("this Quantizer has no grid yet: run calibration first")
        return grid

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantize ``x``, with a straight-through gradient; a dynamic spec finds its grid in ``x`` itself."""
        grid = self.dynamic_grid(x) if self.spec.dynamic else self.grid
        return x if grid is None else fake_quantize(x, grid)

    def dynamic_grid(self, x: Tensor) -> Grid | None:
        """The grid that covers ``x`` from its least to its greatest value; None where all of it is 0."""
        from ..ranges import MinMax, solve_grid  # ranges build on grids

        axis = self.spec.axis if self.spec.granularity == "channel" else None
        statistic = MinMax(axis)
        statistic.update(x)
        seen = statistic.finish()
        if not bool((seen.lo != 0).any() | (seen.hi != 0).any()):
            return None
        return solve_grid(seen.lo, seen.hi, self.spec, non_negative=self.non_negative, axis=axis)

    def to_int(self, x: Tensor) -> Tensor:
        """The codes of ``x``."""
        return quantize(x, self.require_grid())

    def from_int(self, codes: Tensor) -> Tensor:
        """The real values of codes."""
        return dequantize(codes, self.require_grid())

    def extra_repr(self) -> str:
        """Format, scale and zero point in one line."""
        if self.scale is None:
            return f"{self.format}, no grid yet"
        kind = "scale" if self.scale.ndim == 0 else f"{self.scale.numel()} scales, first"
        zero = 0 if self.zero_point is None else int(self.zero_point.flatten()[0])
        sign = "s" if isinstance(self.format, IntFormat) and self.format.signed else "u"
        name = f"{sign}int{self.format.bits}" if isinstance(self.format, IntFormat) else str(self.format)
        return f"{name}, {kind}={float(self.scale.flatten()[0]):.6g}, zero_point={zero}"
