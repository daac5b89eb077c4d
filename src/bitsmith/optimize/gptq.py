"""GPTQ: round weights column by column, each time letting the columns to come make up for the error.

Source: Frantar et al., GPTQ (arXiv 2210.17323), algorithm 1; symbols as there. All groups of a grouped layer are
done side by side: the leading axis of every tensor here is the group.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..grid import Grid, fake_quantize
from ..place.layers import QuantLayer
from ..steps import Gptq
from .visit import LayerStep, LayerVisit

_DAMPING = 0.01  # of the mean diagonal of H
_BLOCK = 128  # columns whose updates of the rest are put off and applied at once
_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Hessian:
    """H = sum of x x^T over all patches that a layer's weights meet, shape (groups, columns, columns).

    >>> layer = nn.Linear(2, 3)
    >>> hessian = Hessian(layer)
    >>> hessian.update(torch.tensor([[1.0, 2.0]]))
    >>> hessian.value
    tensor([[[1., 2.],
             [2., 4.]]], dtype=torch.float64)
    """

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        groups = getattr(layer, "groups", 1)
        weight = layer.weight
        assert isinstance(weight, Tensor)
        assert isinstance(groups, int)
        columns = weight[0].numel()
        self.value = torch.zeros(groups, columns, columns, dtype=torch.float64, device=weight.device)

    def update(self, x: Tensor) -> None:
        """Add the patches of one chunk of inputs."""
        patches = _patches(self.layer, x)  # (groups, columns, count)
        self.value += (patches @ patches.mT).double()


class GptqStep(LayerStep):
    """GPTQ on what a layer reads in the quantized stream."""

    name = "gptq"

    def __init__(self, options: Gptq) -> None:
        self.options = options
        self.needs_float_inputs = options.asymmetric

    def refusal(self, layer: QuantLayer) -> str:
        """Why GPTQ is not defined here for a layer: it takes linears and convolutions, one scale per tensor or row."""
        assert layer.weight_quantizer is not None
        grid = layer.weight_quantizer.require_grid()
        if grid.group_size is not None or (grid.scale.ndim and grid.axis != 0):
            return "its weight scales are not per tensor or per output channel"
        if isinstance(layer.layer, _CONV):
            zeros = layer.layer.padding_mode == "zeros" and not isinstance(layer.layer.padding, str)
            return "" if zeros else "its padding is not a number of zeros"
        return "" if isinstance(layer.layer, nn.Linear) else f"it is a {type(layer.layer).__name__}"

    def run(self, visit: LayerVisit) -> tuple[float, float]:
        """Round the weight by the Hessian of its inputs, and by their errors where the step is asymmetric."""
        layer = visit.layer
        assert layer.weight_quantizer is not None
        weight, grid = layer.weight.detach(), layer.weight_quantizer.require_grid()
        hessian = Hessian(layer.layer)
        lag, missed = torch.zeros_like(hessian.value), 0.0
        for x, exact in zip(visit.inputs("quantized"), self._exact_inputs(visit)):
            hessian.update(x)
            if exact is not None:
                error = _patches(layer.layer, exact - x)
                lag += (error @ _patches(layer.layer, x).mT).double()
                missed += float((weight.reshape(len(lag), -1, lag.shape[-1]) @ error).double().square().sum())
        h = hessian.value
        target = weight + compensation(weight, h, lag) if self.options.asymmetric else weight
        rounded, nearest = gptq(target, h, grid), fake_quantize(weight, grid)
        before, after = (
            missed + output_error(new - weight, h) - 2 * _overlap(weight, new - weight, lag)
            for new in (nearest, rounded)
        )
        weight.copy_(rounded)
        return before, after

    def _exact_inputs(self, visit: LayerVisit) -> Iterator[Tensor | None]:
        return visit.inputs("float") if self.options.asymmetric else repeat(None)


def compensation(weight: Tensor, hessian: Tensor, lag: Tensor) -> Tensor:
    """The change of weight that makes up best for quantized inputs: W L (H + damping)^-1, L = sum (x - x') x'^T.

    It minimizes |W x - (W + change) x'|^2 over the inputs x and their quantized selves x'. Source: the asymmetric
    objective of Li et al., GPTAQ (arXiv 2504.02692), here solved for all columns at once, before they are rounded.

    >>> x, quantized = torch.tensor([[1.0, 2.0, 3.0]]).double(), torch.tensor([[1.0, 2.0, 2.0]]).double()
    >>> change = compensation(torch.ones(1, 1), (quantized @ quantized.T)[None], ((x - quantized) @ quantized.T)[None])
    >>> round(float(change), 3)  # 11 / 9 would fit x best; damping holds back a hundredth
    0.22
    """
    w = weight.double().reshape(len(lag), -1, lag.shape[-1])
    solved: Tensor = torch.linalg.solve(_damped(hessian), (w @ lag).mT).mT
    return solved.reshape(weight.shape).to(weight.dtype)


def _damped(hessian: Tensor) -> Tensor:
    """H with a hundredth of its mean diagonal added, and ones for inputs that are always 0."""
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    dead = diagonal == 0  # their weights do not matter
    return hessian + torch.diag_embed(dead + _DAMPING * diagonal.mean(-1, keepdim=True).clamp_min(1e-12))


def _overlap(weight: Tensor, change: Tensor, lag: Tensor) -> float:
    """How much of the output's error from its inputs a change of the weight takes back: tr(W L dW^T)."""
    w, d = (t.double().reshape(len(lag), -1, lag.shape[-1]) for t in (weight, change))
    return float(((w @ lag) * d).sum())


def output_error(change: Tensor, hessian: Tensor) -> float:
    """The squared error of a layer's output when its weight changes: tr(dW H dW^T).

    >>> output_error(torch.tensor([[1.0, 1.0]]), torch.tensor([[[1.0, 0.5], [0.5, 1.0]]], dtype=torch.float64))
    3.0
    """
    d = change.double().reshape(hessian.shape[0], -1, hessian.shape[-1])
    return float(((d @ hessian) * d).sum())


def _patches(layer: nn.Module, x: Tensor) -> Tensor:
    """What each row of the weight is multiplied with: (groups, columns, count)."""
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, x.shape[-1]).T.unsqueeze(0)
    conv: Any = layer
    rank = x.ndim - 2
    x = F.pad(x, [edge for p in reversed(conv.padding) for edge in (p, p)])
    for axis in range(rank):  # (batch, channels, *out, *kernel)
        span = conv.dilation[axis] * (conv.kernel_size[axis] - 1) + 1
        x = x.unfold(2 + axis, span, conv.stride[axis])[..., :: conv.dilation[axis]]
    x = x.reshape(x.shape[0], conv.groups, -1, *x.shape[2:])  # (batch, groups, in / groups, *out, *kernel)
    kernel = range(3 + rank, 3 + 2 * rank)
    return x.permute(1, 2, *kernel, 0, *range(3, 3 + rank)).flatten(1 + rank + 1).flatten(1, 1 + rank)


def gptq(weight: Tensor, hessian: Tensor, grid: Grid) -> Tensor:
    """The weight on ``grid``, its rounding errors spread by ``hessian``; shapes as those of the layer.

    ``weight`` is (out, in / groups, *kernel) with a grid per tensor or per output channel.

    >>> w = torch.tensor([[0.4, 0.4]])
    >>> h = torch.tensor([[[1.0, 0.999], [0.999, 1.0]]], dtype=torch.float64)  # two nearly equal inputs
    >>> from bitsmith.grid import IntFormat
    >>> gptq(w, h, Grid(IntFormat(4), torch.tensor(1.0))).sum()  # 0.4 + 0.4 rounds to 1, not to 0 + 0
    tensor(1.)
    """
    groups, columns = hessian.shape[0], hessian.shape[-1]
    w = weight.detach().double().reshape(groups, -1, columns).clone()  # (groups, rows, columns)
    h = _damped(hessian)
    u = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    quantized = torch.empty_like(w)
    for start in range(0, columns, _BLOCK):
        stop = min(start + _BLOCK, columns)
        errors = torch.zeros_like(w[..., start:stop])
        for i in range(start, stop):
            quantized[..., i] = _column(w[..., i], grid)
            error = (w[..., i] - quantized[..., i]) / u[:, i, i, None]
            w[..., i:stop] -= error.unsqueeze(-1) * u[:, i, None, i:stop]
            errors[..., i - start] = error
        w[..., stop:] -= errors @ u[:, start:stop, stop:]
    return quantized.reshape(weight.shape).to(weight.dtype)


def _column(values: Tensor, grid: Grid) -> Tensor:
    """One column, (groups, rows), on the grid of its rows."""
    rows = values.float().reshape(-1, 1)
    if grid.scale.ndim:
        grid = Grid(grid.format, grid.scale, grid.zero_point, axis=0)
    return fake_quantize(rows, grid).reshape(values.shape).double()
