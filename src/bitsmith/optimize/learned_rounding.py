"""AdaRound on one layer at a time: learn which weights to round up, from the layer's inputs and float outputs.

Source: Nagel et al., Up or Down? Adaptive Rounding for Post-Training Quantization (arXiv 2004.10568), equations (21)
and (25) without the activation function. The squared error of a layer's output, summed over all samples, is a
quadratic form of its weights: with H = sum x' x'^T of the inputs x' that it reads and T = sum (W x) x'^T of these
with the float outputs, it is tr(V H V^T) - 2 tr(T V^T) + const for quantized weights V. H and T are summed once; then
an iteration is one small matrix product and sees all samples. Where the layer has a bias, means are taken out of the
sums and the bias makes up for them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..grid import Grid, IntFormat, fake_quantize
from ..place.layers import QuantLayer
from ..steps import LearnedRounding
from .moments import MATRICES, Moments, as_rows, as_weight, patches_of
from .soft_rounding import SoftRounding, beta_at
from .visit import LayerStep, LayerVisit


class Sums:
    """H, T, the float output's power and the means over all samples, of a layer as (groups, rows, columns).

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> _ = nn.init.ones_(layer.weight)
    >>> sums = Sums(layer)
    >>> sums.update(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 1.0]]))
    >>> [part.tolist() for part in sums.finish(centre=False)]
    [[[[1.0, 2.0], [2.0, 4.0]]], [[[2.0, 4.0]]], 4.0]
    """

    def __init__(self, layer: nn.Module, *, crossed: bool = True) -> None:
        self.layer, self.crossed = layer, crossed
        weight = layer.weight
        assert isinstance(weight, Tensor)
        self.rows = as_rows(layer, weight.detach()).double()
        self.moments = Moments(layer, cross=crossed)
        self.power: Tensor = torch.zeros((), dtype=torch.float64, device=weight.device)
        self.count = 0
        groups, _, columns = self.rows.shape
        self.read_sum = self.rows.new_zeros(groups, columns)
        self.exact_sum = self.rows.new_zeros(groups, columns)

    def update(self, read: Tensor, exact: Tensor) -> None:
        """Add one chunk of inputs, as the quantized layer reads them and as the float one does."""
        self.moments.update(read, exact if self.crossed else None)
        bias = getattr(self.layer, "bias", None)
        parameters = {"bias": torch.zeros_like(bias)} if isinstance(bias, Tensor) else {}
        output = functional_call(self.layer, parameters, (exact,))
        self.power += output.square().sum(dtype=torch.float64)
        self.count += output.numel() // (self.rows.shape[0] * self.rows.shape[1])
        self.read_sum += patch_sum(self.layer, read)
        self.exact_sum += patch_sum(self.layer, exact) if self.crossed else 0.0
        if not self.crossed:
            self.exact_sum = self.read_sum

    def finish(self, *, centre: bool) -> tuple[Tensor, Tensor, Tensor]:
        """H, T and the power; with ``centre`` those of what is left when the means are taken away."""
        h = self.moments.h
        t = self.rows @ (h if self.moments.g is None else self.moments.g.mT)
        if not centre:
            return h, t, self.power
        read, output = self.read_sum.unsqueeze(-1), self.rows @ self.exact_sum.unsqueeze(-1)
        return (
            h - read @ read.mT / self.count,
            t - output @ read.mT / self.count,
            self.power - output.square().sum() / self.count,
        )

    def bias_shift(self, rounded: Tensor) -> Tensor:
        """What the bias must change by so that the output's means are the float ones, per output channel."""
        outputs = self.rows @ self.exact_sum.unsqueeze(-1) - rounded @ self.read_sum.unsqueeze(-1)
        return outputs.flatten() / self.count


class LearnedRoundingStep(LayerStep):
    """AdaRound on a layer's output before its activation function."""

    name = "learned_rounding"
    needs_float_inputs = True

    def __init__(self, options: LearnedRounding) -> None:
        self.options = options

    def refusal(self, layer: QuantLayer) -> str:
        """Why a layer is left alone: its weights must be integers, in a matrix that multiplies its input."""
        assert layer.weight_quantizer is not None
        if not isinstance(layer.weight_quantizer.require_grid().format, IntFormat):
            return "its weights are no integers"
        return "" if isinstance(layer.layer, MATRICES) else f"it is of type {type(layer.layer).__name__}"

    def run(self, visit: LayerVisit) -> tuple[float, float]:
        """Learn the rounding; the squared errors of the output are those with the bias that goes with it."""
        layer, crossed = visit.layer, self.options.inputs == "quantized"
        assert layer.weight_quantizer is not None
        sums = Sums(layer.layer, crossed=crossed)
        for read, exact in zip(visit.inputs(self.options.inputs), visit.inputs("float")):
            sums.update(read, exact)
        h, t, power = sums.finish(centre=layer.bias is not None)
        weight, grid = layer.weight.detach().clone(), layer.weight_quantizer.require_grid()
        nearest = as_rows(layer.layer, fake_quantize(weight, grid)).double()
        before = output_error(nearest, h, t, power)
        rounded = learn_rounding(layer.layer, grid, h, t, max(before, 1e-12), self.options)
        rows = as_rows(layer.layer, rounded).double()
        after = output_error(rows, h, t, power)
        if after < before:
            layer.weight.data.copy_(rounded)
            if layer.bias is not None:
                layer.bias.data.add_(sums.bias_shift(rows).to(layer.bias.dtype))
        return before, after


def patch_sum(layer: nn.Module, x: Tensor) -> Tensor:
    """The sum of all patches of a batch, (groups, columns): the patches of its sum, since they are linear in it."""
    if isinstance(layer, nn.Linear):
        return x.reshape(1, -1, x.shape[-1]).sum(1, dtype=torch.float64)
    total = x.sum(0, keepdim=True)
    groups = int(getattr(layer, "groups", 1))
    return patches_of(layer, total, groups).sum(1, dtype=torch.float64)


def output_error(rows: Tensor, h: Tensor, t: Tensor, power: Tensor) -> float:
    """The squared error of a layer's output for the weight V: tr(V H V^T) - 2 tr(T V^T) + power."""
    return float(((rows @ h - 2 * t) * rows).sum() + power)


def learn_rounding(layer: nn.Module, grid: Grid, h: Tensor, t: Tensor, norm: float, options: LearnedRounding) -> Tensor:
    """A layer's weight with each number rounded up or down so that the output's error, over ``norm``, is least."""
    original = layer.weight
    assert isinstance(original, Tensor)
    home = original.device
    weight, h, t = (x.to(options.device or home) for x in (original.detach(), h, t))
    soft = SoftRounding([(weight, grid)], options.form)
    rows = as_rows(layer, weight).double()
    start, curve = ((rows @ h - t) / norm).float(), (h / norm).float()  # the gradient at W, and what changes it
    exact = rows.float()
    optimizer = torch.optim.Adam([soft.v], fused=True)
    (leaf,) = soft.weights
    gradient, best, least = leaf.grad, soft.harden()[0], float("inf")
    assert gradient is not None
    with torch.no_grad():
        for iteration in range(options.iterations):
            soft.refresh()
            change = as_rows(layer, leaf) - exact
            slope = torch.baddbmm(start, change, curve, alpha=2.0, beta=2.0)
            gradient.copy_(as_weight(layer, slope))
            if options.form == "linear":  # on the grid at every iteration, and restless: the best of them is kept
                loss = float((change * (start + 0.5 * slope)).sum())
                if loss < least:
                    best, least = leaf.clone(), loss
            progress = iteration / options.iterations
            optimizer.param_groups[0]["lr"] = options.rate(progress)
            beta = beta_at(progress, options.warmup, options.beta_start, options.beta_end)
            soft.pull_back(0.0 if beta is None else options.regulariser, beta or 2.0)
            optimizer.step()
            soft.project()
    return (best if options.form == "linear" else soft.harden()[0]).to(home)
