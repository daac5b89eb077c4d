"""Second moments of what a layer's weights are multiplied with: H = sum of x x^T, and G = sum of x y^T of two streams.

A layer is a matrix here: ``as_rows`` lays its weight out as (groups, rows, columns), and ``Moments`` sums over all
patches of its inputs, chunk by chunk: products in float32, sums in float64.

Neighbouring windows of a convolution overlap, so that most products of an im2col matrix with itself are the same
numbers again. Along the last axis, where windows are one step apart, H is nearly a Toeplitz matrix: the correlation of
two kernel positions depends on their distance alone, but for windows that stick out at the ends. Only one product a
distance is formed, and the ends are taken out exactly; a 3x3 convolution costs a third of im2col.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CONV_TRANSPOSE = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
MATRICES = (nn.Linear, *_CONV, *_CONV_TRANSPOSE)
"""The layers that are matrices over patches of their input."""


def as_rows(layer: nn.Module, weight: Tensor) -> Tensor:
    """A tensor of the weight's shape as (groups, rows, columns): row r of a group makes one output channel.

    A transposed convolution is an ordinary one with a flipped kernel over its input with zeros between the elements.

    >>> as_rows(nn.Conv2d(4, 6, 3, groups=2), torch.zeros(6, 2, 3, 3)).shape
    torch.Size([2, 3, 18])
    """
    groups = int(getattr(layer, "groups", 1))
    if isinstance(layer, _CONV_TRANSPOSE):  # (in, out / groups, *kernel)
        grouped = weight.reshape(groups, -1, *weight.shape[1:]).transpose(1, 2)
        return grouped.flip(list(range(3, grouped.ndim))).flatten(2)
    return weight.reshape(groups, -1, weight[0].numel())


def as_weight(layer: nn.Module, rows: Tensor) -> Tensor:
    """The inverse of ``as_rows``: a tensor of the weight's shape."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if isinstance(layer, _CONV_TRANSPOSE):
        groups, outputs, kernel = rows.shape[0], rows.shape[1], weight.shape[2:]
        unflattened = rows.reshape(groups, outputs, -1, *kernel).flip(list(range(3, 3 + len(kernel))))
        return unflattened.transpose(1, 2).reshape(weight.shape)
    return rows.reshape(weight.shape)


class Moments:
    """H (and with ``cross`` G) of a layer, shape (groups, columns, columns), float64.

    >>> moments = Moments(nn.Linear(2, 3))
    >>> moments.update(torch.tensor([[1.0, 2.0]]))
    >>> moments.h
    tensor([[[1., 2.],
             [2., 4.]]], dtype=torch.float64)
    """

    def __init__(self, layer: nn.Module, *, cross: bool = False) -> None:
        self.layer = layer
        weight = layer.weight
        assert isinstance(weight, Tensor)
        groups, _, columns = as_rows(layer, weight.detach()).shape
        self.h = torch.zeros(groups, columns, columns, dtype=torch.float64, device=weight.device)
        self.g = torch.zeros_like(self.h) if cross else None

    def update(self, x: Tensor, exact: Tensor | None = None) -> None:
        """Add one chunk of inputs; for G also the same samples in the other stream."""
        if isinstance(self.layer, nn.Linear):
            self._add(x.reshape(1, -1, x.shape[-1]), None if exact is None else exact.reshape(1, -1, x.shape[-1]))
            return
        groups, windows = self.h.shape[0], _windows(self.layer)
        if groups == 1 and windows.has_bands(x):
            bands = _Bands(windows, x)
            self.h += bands.product(bands)
            if self.g is not None and exact is not None:
                self.g += bands.product(_Bands(windows, exact))
            return
        self._add(_patches(windows, x, groups), None if exact is None else _patches(windows, exact, groups))

    def _add(self, patches: Tensor, exact: Tensor | None) -> None:
        self.h += (patches.mT @ patches).double()
        if self.g is not None and exact is not None:
            self.g += (patches.mT @ exact).double()


@dataclass(frozen=True)
class _Windows:
    """How a convolution's kernel moves over its input, axis by axis; ``zeros`` stand between input elements."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]
    zeros: tuple[int, ...]
    mode: str

    def reach(self, axis: int) -> int:
        """How far apart the ends of the kernel are."""
        return self.dilation[axis] * (self.kernel[axis] - 1)

    def has_bands(self, x: Tensor) -> bool:
        """Whether windows overlap so much along the last axis that distances pay."""
        return self.stride[-1] == 1 and self.zeros[-1] == 0 and x.shape[-1] + sum(self.pads[-1]) > 2 * self.reach(-1)

    def unfold(self, x: Tensor, axes: int) -> Tensor:
        """Windows along the first spatial axes, as views: kernel axes go to the end."""
        for axis in range(axes):
            x = x.unfold(2 + axis, self.reach(axis) + 1, self.stride[axis])[..., :: self.dilation[axis]]
        return x

    def pad(self, x: Tensor, axes: int) -> Tensor:
        """``x`` with its first ``axes`` spatial axes padded (all of them where the padding is not zeros)."""
        if any(self.zeros):
            spread = x.new_zeros(*x.shape[:2], *((n - 1) * (z + 1) + 1 for n, z in zip(x.shape[2:], self.zeros)))
            spread[(slice(None), slice(None), *(slice(None, None, z + 1) for z in self.zeros))] = x
            x = spread
        count = len(self.pads) if self.mode != "constant" else axes
        edges = [(0, 0)] * (len(self.pads) - count) + list(reversed(self.pads[:count]))
        flat = [n for edge in edges for n in edge]
        return F.pad(x, flat, mode=self.mode) if any(flat) else x


def _windows(layer: nn.Module) -> _Windows:
    conv: Any = layer
    kernel, stride, dilation = tuple(conv.kernel_size), tuple(conv.stride), tuple(conv.dilation)
    reach = [d * (k - 1) for d, k in zip(dilation, kernel)]
    pads: list[tuple[int, int]]
    if isinstance(layer, _CONV_TRANSPOSE):
        pads = [(r - p, r - p + more) for r, p, more in zip(reach, conv.padding, conv.output_padding)]
        return _Windows(kernel, (1,) * len(kernel), dilation, tuple(pads), tuple(s - 1 for s in stride), "constant")
    if conv.padding == "same":
        pads = [(r // 2, r - r // 2) for r in reach]
    elif conv.padding == "valid":
        pads = [(0, 0)] * len(kernel)
    else:
        pads = [(p, p) for p in conv.padding]
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    return _Windows(kernel, stride, dilation, tuple(pads), (0,) * len(kernel), mode)


def _patches(windows: _Windows, x: Tensor, groups: int) -> Tensor:
    """The im2col matrix of each group: (groups, count, columns)."""
    rank = len(windows.kernel)
    x = windows.unfold(windows.pad(x, rank), rank)  # (batch, channels, *out, *kernel)
    x = x.reshape(x.shape[0], groups, -1, *x.shape[2:])  # (batch, groups, in / groups, *out, *kernel)
    x = x.permute(1, 0, *range(3, 3 + rank), 2, *range(3 + rank, 3 + 2 * rank))
    return x.flatten(1, 1 + rank).flatten(2)


def patches_of(layer: nn.Module, x: Tensor, groups: int) -> Tensor:
    """The patches of ``x`` that a convolution's rows are multiplied with: (groups, count, columns)."""
    return _patches(_windows(layer), x, groups)


class _Bands:
    """An input whose windows are unfolded along all axes but the last: ``rows`` is (rows, positions, band).

    A band is all that lies at one position of the last axis, in the order (leading kernel positions, channels). Zeros
    at the end of each row keep distances up to the kernel's reach from running into the next one.
    """

    def __init__(self, windows: _Windows, x: Tensor) -> None:
        self.windows, self.channels = windows, x.shape[1]
        rank = len(windows.kernel)
        reach = windows.reach(-1)
        x = windows.pad(x, rank - 1)
        left, right = windows.pads[-1] if windows.mode == "constant" else (0, 0)
        if min(left, right) < 0:  # a transposed convolution may crop
            x = F.pad(x, (min(left, 0), min(right, 0)))
            left, right = max(left, 0), max(right, 0)
        self.filled = range(left, left + x.shape[-1])  # positions that are not all zeros
        self.positions = left + x.shape[-1] + right
        self.out = self.positions - reach
        x = windows.unfold(x, rank - 1)
        # (batch, channels, *out, last, *kernel) -> (batch, *out, last, *kernel, channels)
        x = x.permute(0, *range(2, x.ndim), 1)
        length = left + x.shape[rank] + max(right, reach - left)
        canvas = x.new_zeros(*x.shape[:rank], length, *x.shape[rank + 1 :])
        canvas.narrow(rank, left, x.shape[rank]).copy_(x)
        self.rows = canvas.view(-1, length, canvas[(0,) * (rank + 1)].numel())

    def product(self, other: _Bands) -> Tensor:
        """Sum over windows of what this and ``other`` have in them: (1, columns, columns), in a weight's order."""
        steps, dilation, band = self.windows.kernel[-1], self.windows.dilation[-1], self.rows.shape[-1]
        blocks = self.rows.new_zeros(steps, steps, band, band, dtype=torch.float64)
        for distance in range(0 if other is self else 1 - steps, steps):
            whole = self._correlation(other, distance * dilation)
            ends: dict[int, Tensor] = {}
            for first in range(max(0, -distance), min(steps, steps - distance)):
                block = blocks[first, first + distance]
                block.copy_(whole)
                for position in self._outside(other, first * dilation, distance * dilation):
                    if position not in ends:
                        ends[position] = self._at(other, position, distance * dilation)
                    block -= ends[position]
                if other is self and distance:
                    blocks[first + distance, first] = block.T
        leading = band // self.channels
        grid = blocks.view(steps, steps, leading, self.channels, leading, self.channels)
        return grid.permute(3, 2, 0, 5, 4, 1).reshape(1, steps * band, steps * band)

    def _correlation(self, other: _Bands, distance: int) -> Tensor:
        """The sum over all positions of band times band ``distance`` further on."""
        a, b = self.rows.flatten(0, 1), other.rows.flatten(0, 1)
        count = len(a) - abs(distance)
        a, b = (a[:count], b[distance:]) if distance >= 0 else (a[-distance:], b[:count])
        return (a.T @ b).double()

    def _outside(self, other: _Bands, first: int, distance: int) -> list[int]:
        """Positions that the whole correlation has, but no window whose kernel position ``first`` lies there."""
        inside = range(first, first + self.out)
        return [u for u in self.filled if u not in inside and u + distance in other.filled]

    def _at(self, other: _Bands, position: int, distance: int) -> Tensor:
        return (self.rows[:, position].T @ other.rows[:, position + distance]).double()
