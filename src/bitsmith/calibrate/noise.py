"""Signal to quantization noise, accumulated over chunks."""

from __future__ import annotations

import math

import torch
from torch import Tensor


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
