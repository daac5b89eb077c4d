"""Batch-norm re-estimation: give every output channel the mean and the variance back that it has in float.

What re-estimating the statistics of a batch norm does after its layer's weights were quantized (Sun et al.,
arXiv 1910.13877; Finkelstein et al., arXiv 1906.03193), done on the folded layer: with float output y and quantized
y', W' <- g W' and b <- E[y] - g (E[y'] - b), g = sqrt(Var[y] / Var[y']). The gain goes into the scale of the weight,
so that its integers stay what they are.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..place.layers import QuantLayer
from ..prepare.weights import scale_outputs
from .bias_correction import ChannelMean

_LARGEST_GAIN = 2.0  # a channel that all but vanished in the quantized stream is not blown up


class ChannelMoments(ChannelMean):
    """Mean and variance over everything but the channel axis, accumulated over chunks in float64."""

    def __init__(self, axis: int) -> None:
        super().__init__(axis)
        self.squares: Tensor | None = None

    def update(self, x: Tensor) -> None:
        """Add one chunk."""
        super().update(x)
        rows = x.movedim(self.axis, -1).reshape(-1, x.shape[self.axis])  # a view of what lies channels last
        squares = rows.square().sum(0).double()
        self.squares = squares if self.squares is None else self.squares + squares

    @property
    def variance(self) -> Tensor:
        """Variance per channel, shape (channels,)."""
        assert self.squares is not None
        return (self.squares / self.count - self.value.square()).clamp_min(0.0)


def refusal(layer: QuantLayer) -> str:
    """Why a layer's outputs cannot have a gain of their own; empty where they can."""
    if layer.weight_quantizer is None:
        return "its weight is not quantized"
    spec, grid = layer.weight_quantizer.spec, layer.weight_quantizer.require_grid()
    transposed = "Transpose" in type(layer.layer).__name__
    if not grid.scale.ndim or grid.group_size is not None or transposed or grid.axis != 0:
        return "its weight has no scale per output channel"
    return "power-of-two scales take no gain" if spec.scale == "po2" else ""


def match_moments(layer: QuantLayer, exact: ChannelMoments, quantized: ChannelMoments) -> tuple[Tensor, Tensor]:
    """Change weight, weight scale and bias in place; returns gain and shift of the output, y' <- g y' + shift."""
    assert layer.weight_quantizer is not None
    bias = layer.bias
    assert bias is not None
    alive = (exact.variance > 0) & (quantized.variance > 0)
    gain = torch.where(alive, (exact.variance / quantized.variance.clamp_min(1e-30)).sqrt(), 1.0)
    gain = gain.clamp(1 / _LARGEST_GAIN, _LARGEST_GAIN).float()
    shift = (exact.value - gain * quantized.value).float()
    grid = layer.weight_quantizer.require_grid()
    scale_outputs(layer.layer, gain.double())  # the bias too: it becomes g b, and the shift is what is missing
    layer.weight_quantizer.set_grid(dataclasses.replace(grid, scale=grid.scale * gain))
    bias.data.add_(shift)
    return gain, shift
