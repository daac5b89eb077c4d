"""Input and output channels of a layer's parameters, whatever the layer's layout: their ranges, and scaling them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Gain(nn.Module):
    """A multiplication by a constant of one value per channel, as norms written by hand end with."""

    bias = None

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)  # the same memory


NORMS = (Gain, nn.LayerNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def in_channels(layer: Any) -> int:
    """How many channels a layer reads."""
    found = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
    return int(found)


def out_channels(layer: Any) -> int:
    """How many channels a layer gives."""
    if isinstance(layer, NORMS):
        return int(layer.weight.shape[0])
    found = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    return int(found)


def by_channel(layer: Any) -> Tensor:
    """The weight as (groups, out / groups, in / groups, taps), a view where that is possible."""
    return arranged(layer, layer.weight.detach())


def arranged(layer: Any, weight: Tensor) -> Tensor:
    """A tensor of the weight's shape as (groups, out / groups, in / groups, taps)."""
    groups = getattr(layer, "groups", 1)
    if isinstance(layer, _TRANSPOSED):  # (in, out / groups, *kernel)
        return weight.reshape(groups, -1, weight.shape[1], weight[0, 0].numel()).transpose(1, 2)
    return weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)


def in_range(layer: Any) -> Tensor:
    """The largest absolute weight on each input channel.

    >>> in_range(nn.Conv2d(4, 6, 3, groups=2)).shape
    torch.Size([4])
    """
    return by_channel(layer).abs().amax((1, 3)).flatten().double()


def out_range(layer: Any, with_bias: bool = False) -> Tensor:
    """The largest absolute weight (and bias) of each output channel."""
    if isinstance(layer, NORMS):
        found = layer.weight.detach().abs().double()
    else:
        found = by_channel(layer).abs().amax((2, 3)).flatten().double()
    if with_bias and layer.bias is not None:
        found = torch.maximum(found, layer.bias.detach().abs().double())
    return found


def scale_inputs(layer: Any, factor: Tensor) -> None:
    """Multiply the weights on each input channel, in place."""
    groups = getattr(layer, "groups", 1)
    taps = [1] * (layer.weight.ndim - 2)
    if isinstance(layer, _TRANSPOSED):
        shaped = factor.view(-1, 1, *taps)
    else:  # each group of output channels reads its own input channels
        shaped = factor.view(groups, 1, -1).expand(groups, layer.weight.shape[0] // groups, -1)
        shaped = shaped.reshape(layer.weight.shape[0], -1, *taps)
    layer.weight.data.copy_(layer.weight.double() * shaped)


def scale_outputs(layer: Any, factor: Tensor) -> None:
    """Multiply weights and bias of each output channel, in place."""
    groups = getattr(layer, "groups", 1)
    weight = layer.weight
    if isinstance(layer, _TRANSPOSED):
        shaped = factor.view(groups, 1, -1).expand(groups, weight.shape[0] // groups, -1)
        shaped = shaped.reshape(weight.shape[0], -1, *[1] * (weight.ndim - 2))
    else:
        shaped = factor.view(-1, *[1] * (weight.ndim - 1))
    weight.data.copy_(weight.double() * shaped)
    if layer.bias is not None:
        layer.bias.data.copy_(layer.bias.double() * factor)
