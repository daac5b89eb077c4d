"""Bias correction: take the mean error of a layer's output out of its bias.

Source: Nagel et al., Data-Free Quantization through Weight Equalization and Bias Correction (arXiv 1906.04721),
section 4.2, equation (17); the means are measured on the walk's data rather than derived from batch norms.
"""

from __future__ import annotations

from torch import Tensor, nn


class ChannelMean:
    """Mean over everything but the channel axis, accumulated over chunks in float64."""

    def __init__(self, axis: int) -> None:
        self.axis = axis
        self.total: Tensor | None = None
        self.count = 0

    def update(self, x: Tensor) -> None:
        """Add one chunk."""
        dims = [d for d in range(x.ndim) if d != self.axis % x.ndim]
        total = x.sum(dims).double()
        self.total = total if self.total is None else self.total + total
        self.count += x.numel() // total.numel()

    @property
    def value(self) -> Tensor:
        """Mean per channel, shape (channels,)."""
        assert self.total is not None
        return self.total / self.count


def correct_bias(layer: nn.Module, exact: ChannelMean, quantized: ChannelMean) -> Tensor:
    """b <- b + E[W x] - E[W' x'], in place; returns the change, shape (channels,).

    >>> import torch
    >>> layer = nn.Linear(1, 1)
    >>> exact, quantized = ChannelMean(-1), ChannelMean(-1)
    >>> exact.update(torch.tensor([[3.0]])); quantized.update(torch.tensor([[2.5]]))
    >>> correct_bias(layer, exact, quantized)
    tensor([0.5000])
    """
    bias = layer.bias
    assert isinstance(bias, Tensor)
    shift = (exact.value - quantized.value).to(bias.dtype)
    bias.data.add_(shift)
    return shift
