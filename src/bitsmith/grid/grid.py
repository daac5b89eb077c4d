"""A Grid: a Format with the scale and zero point that lay it over the real numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .formats import Format, IntFormat


@dataclass(frozen=True)
class Grid:
    """``real = (code - zero_point) * scale`` for the codes of ``format``.

    ``scale`` and ``zero_point`` are 0-dimensional (per tensor), 1-dimensional (per channel along ``axis``), or
    shaped like the tensor with ``axis`` divided by ``group_size`` (per group). ``scale`` is float32, strictly
    positive and finite; ``zero_point`` is an int32 tensor, or None where it is 0.
    """

    format: Format
    scale: Tensor
    zero_point: Tensor | None = None
    axis: int | None = None
    group_size: int | None = None

    @property
    def code_dtype(self) -> torch.dtype:
        """The smallest integer dtype that holds every code (float32 for a float format's values)."""
        if not isinstance(self.format, IntFormat):
            return torch.float32
        if self.format.bits <= 8:
            return torch.int8 if self.format.signed else torch.uint8
        if self.format.bits <= 16 and self.format.signed:
            return torch.int16
        return torch.int32 if self.format.bits < 32 or self.format.signed else torch.int64
