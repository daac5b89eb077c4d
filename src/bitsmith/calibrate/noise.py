"""Signal to quantization noise, accumulated over chunks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_ENOUGH = 16  # samples whose variance says something


class Noise:
    """Signal and noise power of a quantized tensor against its float original.

    >>> noise = Noise()
    >>> noise.update(torch.tensor([10.0, 0.0]), torch.tensor([9.0, 0.0]))
    >>> noise.db
    20.0
    """

    def __init__(self) -> None:
        self.signal = 0.0
        self.error = 0.0

    def update(self, exact: Tensor, quantized: Tensor) -> None:
        """Add one chunk."""
        self.error += float(torch.linalg.vector_norm(quantized - exact)) ** 2
        self.signal += float(torch.linalg.vector_norm(exact)) ** 2

    @property
    def db(self) -> float | None:
        """10 log10(signal / noise); infinite without noise, None without a signal."""
        if not self.signal:
            return None
        return 10.0 * math.log10(self.signal / self.error) if self.error else math.inf


class OutputNoise(Noise):
    """Noise at a model's output, which also knows whether it is as large as the output's variation over samples."""

    def __init__(self) -> None:
        super().__init__()
        self._means: dict[tuple[int, ...], tuple[Tensor, int]] = {}

    def update(self, exact: Tensor, quantized: Tensor) -> None:
        """Add one chunk."""
        super().update(exact, quantized)
        if exact.ndim > 1:
            total, count = self._means.get(tuple(exact.shape[1:]), (torch.zeros(()), 0))
            self._means[tuple(exact.shape[1:])] = total + exact.double().sum(0), count + len(exact)

    @property
    def is_chance(self) -> bool:
        """Whether constant outputs would do as well: the error is no less than the variance (16 samples or more)."""
        counted = [(total, count) for total, count in self._means.values() if count >= _ENOUGH]
        constant = sum(float(total.square().sum()) / count for total, count in counted)
        return bool(counted) and self.error >= self.signal - constant > 0
