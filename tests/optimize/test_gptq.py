"""GPTQ against a direct implementation of the paper's equations, and the patches against the layers themselves."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import bitsmith as bs
from bitsmith.grid import Grid, IntFormat, Quantizer, TensorSpec, fake_quantize
from bitsmith.optimize.gptq import GptqStep, Hessian, _patches, compensation, gptq
from bitsmith.optimize.visit import LayerVisit
from bitsmith.place.layers import QuantLayer
from bitsmith.ranges import weight_grid
from bitsmith.recipe import bits_recipe
from bitsmith.steps import BiasCorrection, FoldBatchNorm, Gptq

LAYERS = {
    "linear": (nn.Linear(5, 4, bias=False), (7, 5)),
    "linear over sequences": (nn.Linear(5, 4, bias=False), (2, 3, 5)),
    "conv1d": (nn.Conv1d(4, 6, 3, padding=1, stride=2, bias=False), (2, 4, 9)),
    "conv2d": (nn.Conv2d(3, 4, (3, 2), padding=(1, 0), dilation=(2, 1), bias=False), (2, 3, 8, 7)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2, bias=False), (2, 4, 6, 6)),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4, padding=1, bias=False), (2, 4, 6, 6)),
    "conv3d": (nn.Conv3d(2, 3, 2, stride=(1, 2, 1), bias=False), (2, 2, 4, 5, 4)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_weight_rows_times_patches_are_the_layer(name: str) -> None:
    layer, shape = LAYERS[name]
    x = torch.randn(shape)
    patches = _patches(layer, x)
    rows = layer.weight.detach().reshape(patches.shape[0], -1, patches.shape[1])
    product = (rows @ patches).flatten(0, 1)  # (out, count)
    expected = layer(x).detach()
    expected = expected.reshape(-1, expected.shape[-1]).T if "linear" in name else expected.transpose(0, 1).flatten(1)
    torch.testing.assert_close(product, expected, rtol=1e-5, atol=1e-5)


def by_the_paper(w: Tensor, h: Tensor, scale: Tensor, qmax: int) -> Tensor:
    """Equations (2) and (3) of arXiv 2210.17323, column after column, with the inverse of what is left."""
    w, h = w.double().clone(), h.clone()
    h += torch.eye(len(h)) * 0.01 * h.diagonal().mean()
    result = torch.zeros_like(w)
    left = list(range(w.shape[1]))
    while left:
        inverse = torch.linalg.inv(h[left][:, left])
        column = left[0]
        q = (w[:, column] / scale).round().clamp(-qmax - 1, qmax) * scale
        result[:, column] = q
        delta = -((w[:, column] - q) / inverse[0, 0]).unsqueeze(1) * inverse[0]
        w[:, left] += delta
        left = left[1:]
    return result


def test_columns_are_rounded_as_in_the_paper() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(40, 6, generator=generator) @ torch.randn(6, 6, generator=generator)
    weight = torch.randn(3, 6, generator=generator)
    hessian = (x.T @ x).double()
    scale = weight.abs().amax(1) / 7
    quantized = gptq(weight, hessian.unsqueeze(0), Grid(IntFormat(4), scale, axis=0))
    expected = by_the_paper(weight, hessian, scale.double(), 7)
    torch.testing.assert_close(quantized.double(), expected, rtol=1e-5, atol=1e-6)


def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = nn.Linear(20, 5, bias=False), torch.randn(64, 20) @ torch.randn(20, 20)
    hessian = Hessian(layer)
    hessian.update(x)
    grid = weight_grid(layer.weight.detach(), TensorSpec(format=IntFormat(3), granularity="channel"))
    whole = gptq(layer.weight, hessian.value, grid)
    monkeypatch.setattr("bitsmith.optimize.gptq._BLOCK", 3)
    torch.testing.assert_close(gptq(layer.weight, hessian.value, grid), whole)


@pytest.mark.parametrize("name", ["linear", "conv2d", "grouped", "depthwise"])
def test_the_layer_s_output_error_is_less_than_that_of_nearest_rounding(name: str) -> None:
    layer, shape = LAYERS[name]
    errors = {"gptq": 0.0, "nearest": 0.0}
    for seed in range(6):
        torch.manual_seed(seed)
        layer.reset_parameters()
        x = torch.randn(16, *shape[1:]).cumsum(-1)  # neighbours alike, as in images
        hessian = Hessian(layer)
        hessian.update(x)
        exact, weight = layer(x).detach(), layer.weight.detach()
        grid = weight_grid(weight, TensorSpec(format=IntFormat(3), granularity="channel"))
        rounded = {"gptq": gptq(weight, hessian.value, grid), "nearest": fake_quantize(weight, grid)}
        assert torch.equal(rounded["gptq"], fake_quantize(rounded["gptq"], grid))
        for name_, value in rounded.items():
            output = torch.func.functional_call(layer, {"weight": value}, (x,))
            errors[name_] += float((output - exact).detach().square().sum())
    assert errors["gptq"] < 0.9 * errors["nearest"]


def test_inputs_that_are_always_zero_do_no_harm() -> None:
    layer, x = nn.Linear(4, 2, bias=False), torch.randn(32, 4)
    x[:, 1] = 0
    hessian = Hessian(layer)
    hessian.update(x)
    grid = weight_grid(layer.weight.detach(), TensorSpec(format=IntFormat(8), granularity="channel"))
    assert bool(gptq(layer.weight, hessian.value, grid).isfinite().all())


def test_a_recipe_with_gptq_loses_less_at_three_bits() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten())
    x = torch.randn(64, 3, 8, 8).cumsum(-1)
    plain = bs.quantize(net, [x], bits_recipe(3, 8))
    better = bs.quantize(net, [x], bits_recipe(3, 8, steps=("fold_batch_norm", "gptq", "bias_correction")))
    assert better.report.output_sqnr_db > plain.report.output_sqnr_db + 1


def test_compensation_is_the_least_squares_weight_for_quantized_inputs() -> None:
    generator = torch.Generator().manual_seed(2)
    exact = torch.randn(6, 200, generator=generator, dtype=torch.float64)
    quantized = exact + 0.3 * torch.randn(6, 200, generator=generator, dtype=torch.float64)
    weight = torch.randn(3, 6, generator=generator)
    hessian, lag = (quantized @ quantized.T)[None], ((exact - quantized) @ quantized.T)[None]
    damping = 0.01 * hessian.diagonal(dim1=1, dim2=2).mean()
    rows = torch.cat([quantized, damping**0.5 * torch.eye(6, dtype=torch.float64)], 1)  # pulls the change to 0
    wanted = torch.cat([weight.double() @ (exact - quantized), torch.zeros(3, 6, dtype=torch.float64)], 1)
    expected = torch.linalg.lstsq(rows.T, wanted.T).solution.T
    torch.testing.assert_close(compensation(weight, hessian, lag).double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("name", ["linear", "conv2d", "grouped"])
def test_the_logged_errors_are_those_of_the_outputs(name: str, asymmetric: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    layer, shape = LAYERS[name]
    spec = TensorSpec(format=IntFormat(3), granularity="channel")
    wrapped = QuantLayer(copy.deepcopy(layer), Quantizer(spec))
    weight = layer.weight.detach().clone()
    grid = weight_grid(weight, spec)
    wrapped.weight_quantizer.set_grid(grid)  # type: ignore[union-attr]
    exact = [torch.randn(64, *shape[1:], generator=generator) for _ in range(2)]
    quantized = [x + 0.2 * torch.randn(x.shape, generator=generator) for x in exact]

    def squared_error(rounded: Tensor) -> float:
        targets = exact if asymmetric else quantized
        total = 0.0
        for x, target in zip(quantized, targets):
            found, wanted = (functional_call(layer, {"weight": w}, (v,)) for w, v in ((rounded, x), (weight, target)))
            total += float((found - wanted).double().square().sum())
        return total

    step = GptqStep(Gptq(asymmetric=asymmetric))
    before, after = step.run(LayerVisit("layer", wrapped, lambda s: iter(exact if s == "float" else quantized)))
    assert before == pytest.approx(squared_error(fake_quantize(weight, grid)), rel=1e-3)
    assert after == pytest.approx(squared_error(wrapped.weight.detach()), rel=1e-3)
    assert after <= before


def test_asymmetric_gptq_takes_back_what_the_layers_before_lost() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(*(m for _ in range(6) for m in (nn.Linear(32, 32), nn.ReLU())), nn.Linear(32, 8))
    x = torch.randn(1024, 32) @ torch.randn(32, 32)

    def noise(asymmetric: bool) -> float:
        steps = FoldBatchNorm(), Gptq(asymmetric=asymmetric), BiasCorrection()
        q = bs.quantize(net, [x[:512]], recipe=bits_recipe(4, 4, steps=steps))
        return float((q(x[512:]) - net(x[512:])).square().mean())

    assert noise(asymmetric=True) < 0.8 * noise(asymmetric=False)
