"""Soft rounding starts at the float weight, has the gradient that autograd finds, and ends on the grid."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bitsmith.grid import Grid, IntFormat, TensorSpec, fake_quantize, quantize
from bitsmith.optimize.learned_scale import LearnedScale
from bitsmith.optimize.soft_rounding import SoftRounding, beta_at
from bitsmith.ranges import weight_grid

SPECS = {
    "tensor": TensorSpec(format=IntFormat(3)),
    "channel": TensorSpec(format=IntFormat(4), granularity="channel"),
    "affine": TensorSpec(format=IntFormat(2, signed=False), granularity="channel", symmetric=False),
    "group": TensorSpec(format=IntFormat(4), granularity="group", group_size=3, axis=1),
}


def weight_and_grid(name: str, shape: tuple[int, ...] = (4, 6, 3, 3)) -> tuple[Tensor, Grid]:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    if len(shape) == 4:
        weight = weight.contiguous(memory_format=torch.channels_last)
    spec = SPECS[name]
    return weight, weight_grid(weight, spec, 1 if name == "group" else 0)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("form", ["hard_sigmoid", "sigmoid"])
def test_it_starts_at_the_float_weight_and_hardens_to_nearest_rounding(name: str, form: str) -> None:
    weight, grid = weight_and_grid(name)
    soft = SoftRounding([(weight, grid)], form)  # type: ignore[arg-type]
    soft.refresh()
    nearest = fake_quantize(weight, grid)
    codes = quantize(weight, grid)
    inside = (codes > grid.format.qmin) & (codes < grid.format.qmax)  # type: ignore[union-attr]
    tolerance = 1e-5 if form == "hard_sigmoid" else 0.011 * float(grid.scale.max())
    torch.testing.assert_close(soft.weights[0][inside], weight[inside], rtol=0, atol=tolerance)
    torch.testing.assert_close(soft.harden()[0], nearest)


@pytest.mark.parametrize("form", ["hard_sigmoid", "sigmoid", "linear"])
@pytest.mark.parametrize("name", SPECS)
def test_every_end_is_on_the_grid_and_next_to_the_weight(form: str, name: str) -> None:
    weight, grid = weight_and_grid(name)
    soft = SoftRounding([(weight, grid)], form)  # type: ignore[arg-type]
    with torch.no_grad():
        soft.v.copy_(torch.rand(soft.v.shape, generator=torch.Generator().manual_seed(0)) * 4 - 2)
    hard = soft.harden()[0]
    torch.testing.assert_close(hard, fake_quantize(hard, grid))
    codes = quantize(weight, grid)
    inside = (codes > grid.format.qmin) & (codes < grid.format.qmax)  # type: ignore[union-attr]
    assert float((hard - weight)[inside].abs().max()) <= float(grid.scale.max()) * 1.001


@pytest.mark.parametrize("name", SPECS)
def test_weights_on_the_grid_begin_there_and_may_go_one_step_back(name: str) -> None:
    original, grid = weight_and_grid(name)
    rounded = fake_quantize(original + 0.7 * grid.scale.max() * torch.randn_like(original), grid)
    soft = SoftRounding([(rounded, grid)], originals=[original])
    torch.testing.assert_close(soft.harden()[0], rounded)
    with torch.no_grad():
        soft.v.copy_(-soft.v)  # every one to the other end
    other = soft.harden()[0]
    torch.testing.assert_close(other, fake_quantize(other, grid))
    steps = (quantize(other, grid).int() - quantize(rounded, grid).int()).abs()
    assert int(steps.max()) == 1
    moved = steps == 1
    towards = torch.sign(original - rounded) == torch.sign(other - rounded)
    assert bool(towards[moved & ((original - rounded).abs() > 1e-5)].all())


@pytest.mark.parametrize("form", ["hard_sigmoid", "sigmoid"])
def test_the_gradient_is_that_of_the_formulas(form: str) -> None:
    first, second = weight_and_grid("channel"), weight_and_grid("tensor", (5, 7))
    soft = SoftRounding([first, second], form)  # type: ignore[arg-type]
    soft.refresh()
    targets = [torch.randn_like(w) for w in soft.weights]
    torch.autograd.backward(sum(((w - t) ** 3).sum() for w, t in zip(soft.weights, targets)))
    soft.pull_back(0.7, 3.0)
    v = soft.v.detach().clone().requires_grad_()
    h = torch.sigmoid(v) * 1.2 - 0.1 if form == "hard_sigmoid" else torch.sigmoid(v)
    h = h.clamp(0, 1)
    flat = soft.base + soft.step * h
    flat_target = torch.cat([t.as_strided((t.numel(),), (1,)) for t in targets])
    loss = ((flat - flat_target) ** 3).sum() + 0.7 * (1 - (2 * h - 1).abs() ** 3.0).mean()
    torch.autograd.backward(loss)
    between = (h > 1e-4) & (h < 1 - 1e-4)  # at the ends themselves either slope is one
    torch.testing.assert_close(soft.v.grad[between], v.grad[between], rtol=1e-4, atol=1e-5)


def test_the_exponent_falls_after_the_warm_up() -> None:
    values = [beta_at(i / 10, 0.3, 20.0, 2.0) for i in range(11)]
    assert values[:3] == [None] * 3
    rest = [value for value in values[3:] if value is not None]
    assert rest == sorted(rest, reverse=True)
    assert (rest[0], rest[-1]) == (20.0, 2.0)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("drop", [False, True])
def test_the_learned_scale_s_gradients_are_those_of_lsq(drop: bool, layout: torch.memory_format) -> None:
    g = torch.Generator().manual_seed(1)
    x = (torch.randn(4, 5, 6, 7, generator=g) * 3).contiguous(memory_format=layout).requires_grad_()
    scale = torch.tensor(0.37, requires_grad=True)
    kept = (torch.rand(4, 5, 6, 7, generator=g) > 0.5).float() if drop else torch.ones(4, 5, 6, 7)
    kept = kept.contiguous(memory_format=layout)
    slope = torch.randn(4, 5, 6, 7, generator=g)
    out = LearnedScale.apply(x, scale, -4.0, 3.0, kept if drop else None)
    torch.autograd.backward((out * slope).sum())
    ratio = (x / scale).detach()
    code, inside = ratio.clamp(-4, 3).round(), (ratio >= -4) & (ratio <= 3)
    torch.testing.assert_close(out, torch.where(kept > 0, code * scale, x))
    torch.testing.assert_close(x.grad, slope * (1 - kept) + slope * kept * inside)
    expected = (slope * kept * torch.where(inside, code - ratio, code)).sum()
    torch.testing.assert_close(scale.grad, expected, rtol=1e-4, atol=1e-3)
