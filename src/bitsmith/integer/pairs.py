"""Depthwise convolutions whose products PyTorch adds in pairs, in 16 bits that saturate.

A process packs convolutions of more than 100 groups for FBGEMM, whose depthwise kernels multiply with ``vpmaddubsw``
on every processor: the u8 x s8 products of two neighbouring taps, in row-major order, meet in 16 bits. A pair comes
out exact, whatever the layer reads, where 255 (|w1| + |w2|) < 2**15 for weights of one sign: up to a sum of 128.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from ..grid import Grid, IntFormat

ONEDNN_GROUPS = 100  # torch packs convolutions of more groups for FBGEMM
PAIR_LIMIT = 128
_CHANNELS_AT_ONCE = 8


def adds_pairs(layer: nn.Module) -> bool:
    """Whether torch packs a layer for FBGEMM and FBGEMM has a depthwise kernel for it.

    >>> adds_pairs(nn.Conv2d(128, 128, 3, padding=1, groups=128))
    True
    >>> adds_pairs(nn.Conv2d(128, 256, 3, padding=1, groups=128))
    False
    """
    if type(layer) not in (nn.Conv2d, nn.Conv3d) or isinstance(layer.padding, str):
        return False
    options: Any = layer
    groups, taps = options.groups, options.kernel_size[0]
    return bool(
        groups > ONEDNN_GROUPS
        and groups == options.in_channels == options.out_channels
        and groups % _CHANNELS_AT_ONCE == 0
        and taps > 1
        and taps % 2 == 1
        and all(k == taps for k in options.kernel_size)
        and all(p == (taps - 1) // 2 for p in options.padding)
        and all(d == 1 for d in options.dilation)
    )


def largest_pair(weight: Tensor) -> Tensor:
    """Per channel of a depthwise weight the largest |w1| + |w2| of a pair whose products have one sign.

    >>> largest_pair(torch.tensor([[[100, 27], [-3, 50]], [[-90, 9], [-70, -60]]]))
    tensor([127, 130])
    """
    taps = weight.flatten(1)
    if taps.shape[1] % 2:
        taps = torch.cat([taps, taps.new_zeros(len(taps), 1)], 1)
    pairs = taps.view(len(taps), -1, 2)
    return torch.maximum(pairs.clamp(min=0).sum(-1), -pairs.clamp(max=0).sum(-1)).amax(1)


def is_exact_in_pairs(layer: nn.Module, codes: Tensor) -> bool:
    """Whether FBGEMM's depthwise kernel sums products with these centred codes without saturating."""
    return adds_pairs(layer) and int(largest_pair(codes.int()).max()) <= PAIR_LIMIT


def raised_for_pairs(layer: nn.Module, weight: Tensor, grid: Grid, *, power_of_two: bool = False) -> Grid:
    """``grid``, its scales raised where a pair of codes could exceed the limit, however both are rounded.

    By a factor of two at most, which costs such a channel one of its weight's bits.
    """
    if not adds_pairs(layer) or not isinstance(grid.format, IntFormat) or grid.format.bits > 8:
        return grid
    if grid.group_size is not None or grid.axis not in (None, 0):
        return grid
    needed = (largest_pair(weight.detach()) / (PAIR_LIMIT - 1)).to(grid.scale.dtype)
    needed = needed if grid.scale.ndim else needed.max()
    if power_of_two:
        needed = torch.exp2(torch.ceil(torch.log2(needed)))
    if not bool((needed > grid.scale).any()):
        return grid
    return dataclasses.replace(grid, scale=torch.maximum(grid.scale, needed))
