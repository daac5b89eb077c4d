"""The digits as data sources that commands and sweeps can name."""

from __future__ import annotations

from torch import Tensor

from . import digits


def calibration() -> list[tuple[Tensor, Tensor]]:
    """1,000 training images with their labels, in batches."""
    return _batches(0)


def validation() -> list[tuple[Tensor, Tensor]]:
    """797 test images with their labels, in batches."""
    return _batches(1)


def _batches(part: int) -> list[tuple[Tensor, Tensor]]:
    x, y = digits()[part]
    return [(x[start : start + 100], y[start : start + 100]) for start in range(0, len(x), 100)]
