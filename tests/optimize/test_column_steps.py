"""GPTQ, GPFQ and Qronos against direct float64 implementations of their papers' equations; what they have in common."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bitsmith as bs
from bitsmith.errors import NonFiniteError
from bitsmith.grid import Grid, IntFormat, Quantizer, TensorSpec, fake_quantize
from bitsmith.optimize import layer_step
from bitsmith.optimize.visit import LayerVisit
from bitsmith.place.layers import QuantLayer
from bitsmith.ranges import weight_grid
from bitsmith.recipe import bits_recipe
from bitsmith.steps import Gpfq, Gptq, Qronos

DAMPING = 1e-9
METHODS: dict[str, Any] = {"gptq": Gptq, "gpfq": Gpfq, "qronos": Qronos}


def gptq_by_the_paper(w: Tensor, exact: Tensor, x: Tensor, scale: Tensor, qmax: int) -> Tensor:
    """Equations (2) and (3) of arXiv 2210.17323, column after column, with the inverse of what is left."""
    w, h = w.clone(), x.T @ x
    result, left = torch.zeros_like(w), list(range(w.shape[1]))
    while left:
        inverse = torch.linalg.inv(h[left][:, left])
        q = nearest(w[:, left[0]], scale, qmax)
        result[:, left[0]] = q
        w[:, left] -= ((w[:, left[0]] - q) / inverse[0, 0]).unsqueeze(1) * inverse[0]
        left = left[1:]
    return result


def gpfq_by_the_paper(w: Tensor, exact: Tensor, x: Tensor, scale: Tensor, qmax: int) -> Tensor:
    """Algorithm 1 of arXiv 2201.11113, with the residual u itself."""
    result = torch.zeros_like(w)
    u = torch.zeros(w.shape[0], len(x), dtype=x.dtype)
    for t in range(w.shape[1]):
        u += w[:, t, None] * exact[:, t]
        q = nearest(u @ x[:, t] / x[:, t].square().sum(), scale, qmax)
        u -= q[:, None] * x[:, t]
        result[:, t] = q
    return result


def qronos_by_the_paper(w: Tensor, exact: Tensor, x: Tensor, scale: Tensor, qmax: int) -> Tensor:
    """Section 3 of arXiv 2505.11695: q_t for the weights to come as they are, these then for q_1..q_t."""
    goal, w = exact @ w.T, w.clone()  # (samples, rows)
    result = torch.zeros_like(w)
    for t in range(w.shape[1]):
        residual = goal - x[:, :t] @ result[:, :t].T - x[:, t + 1 :] @ w[:, t + 1 :].T
        result[:, t] = nearest(residual.T @ x[:, t] / x[:, t].square().sum(), scale, qmax)
        if t + 1 < w.shape[1]:
            residual = goal - x[:, : t + 1] @ result[:, : t + 1].T
            w[:, t + 1 :] = torch.linalg.lstsq(x[:, t + 1 :], residual).solution.T
    return result


def nearest(values: Tensor, scale: Tensor, qmax: int) -> Tensor:
    return (values / scale).round().clamp(-qmax - 1, qmax) * scale


PAPERS = {"gptq": gptq_by_the_paper, "gpfq": gpfq_by_the_paper, "qronos": qronos_by_the_paper}


def visit(layer: nn.Module, quantized: Tensor, exact: Tensor, bits: int = 4, **spec: Any) -> LayerVisit:
    spec.setdefault("granularity", "channel")
    wrapped = QuantLayer(layer, Quantizer(TensorSpec(format=IntFormat(bits), **spec)))
    axis = 1 if type(layer).__name__.startswith("ConvTranspose") else 0
    assert wrapped.weight_quantizer is not None
    wrapped.weight_quantizer.set_grid(weight_grid(layer.weight.detach(), wrapped.weight_quantizer.spec, axis))
    return LayerVisit("layer", wrapped, lambda stream: iter([exact if stream == "float" else quantized]))


def run(method: str, v: LayerVisit, **options: Any) -> tuple[float, float]:
    with torch.no_grad():
        return layer_step(METHODS[method](**options)).run(v)


def correlated(samples: int, columns: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Inputs of a float and of a quantized stream."""
    generator = torch.Generator().manual_seed(seed)
    exact = torch.randn(samples, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    return exact + 0.2 * torch.randn(samples, columns, generator=generator), exact


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", range(3))
def test_columns_are_rounded_as_in_the_paper(method: str, seed: int) -> None:
    quantized, exact = correlated(40, 6, seed)
    layer = nn.Linear(6, 5, bias=False)
    w, scale = layer.weight.detach().double().clone(), (layer.weight.detach().abs().amax(1) / 7).double()
    expected = PAPERS[method](w, exact.double(), quantized.double(), scale, 7)
    options = {} if method == "gpfq" else {"damping": DAMPING}
    run(method, visit(layer, quantized, exact), act_order=False, scales=1, block_size=4, **options)
    torch.testing.assert_close(layer.weight.detach().double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_act_order_is_to_permute_and_round(method: str) -> None:
    quantized, exact = correlated(64, 8)
    layer, permuted = nn.Linear(8, 4, bias=False), nn.Linear(8, 4, bias=False)
    order = quantized.square().sum(0).argsort(descending=True)
    permuted.weight.data.copy_(layer.weight.detach()[:, order])
    run(method, visit(layer, quantized, exact), act_order=True)
    run(method, visit(permuted, quantized[:, order], exact[:, order]), act_order=False)
    torch.testing.assert_close(layer.weight[:, order], permuted.weight)


@pytest.mark.parametrize("method", METHODS)
def test_groups_are_separate_layers_each_in_its_own_order(method: str) -> None:
    x = torch.randn(16, 4, 6, 6).cumsum(-1) * torch.tensor([1.0, 3.0, 2.0, 0.5]).view(1, -1, 1, 1)
    exact = x + 0.1 * torch.randn_like(x)
    grouped = nn.Conv2d(4, 6, 3, groups=2, bias=False)
    halves = [nn.Conv2d(2, 3, 3, bias=False) for _ in range(2)]
    for half, weight in zip(halves, grouped.weight.detach().split(3)):
        half.weight.data.copy_(weight)
    run(method, visit(grouped, x, exact, bits=3), scales=5)
    for half, part, exact_part in zip(halves, x.split(2, 1), exact.split(2, 1)):
        run(method, visit(half, part, exact_part, bits=3), scales=5)
    torch.testing.assert_close(grouped.weight, torch.cat([half.weight for half in halves]))


@pytest.mark.parametrize(("spec", "scales"), [({}, 1), ({"granularity": "group", "group_size": 4}, 11)])
def test_gptq_tries_scales_by_itself_where_they_are_per_group(spec: dict[str, Any], scales: int) -> None:
    quantized, exact = correlated(40, 16)
    layers = [nn.Linear(16, 5, bias=False) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    run("gptq", visit(layers[0], quantized, exact, bits=3, **spec))
    run("gptq", visit(layers[1], quantized, exact, bits=3, **spec), scales=scales)
    torch.testing.assert_close(layers[0].weight, layers[1].weight, rtol=0, atol=0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scales", [1, 5])
def test_block_size_does_not_change_the_result(method: str, scales: int) -> None:
    quantized, exact = correlated(64, 20)
    results = []
    weight = torch.randn(5, 20)
    for block in (3, 20, 64):
        layer = nn.Linear(20, 5, bias=False)
        layer.weight.data.copy_(weight)
        run(method, visit(layer, quantized, exact, bits=3), block_size=block, scales=scales)
        results.append(layer.weight.detach())
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(results[0], results[2])


SPECS: dict[str, dict[str, Any]] = {
    "channel": {},
    "tensor": {"granularity": "tensor"},
    "group": {"granularity": "group", "group_size": 3},
    "affine": {"symmetric": False},
    "power of two": {"scale": "po2"},
}
LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(8, 6, bias=False), (128, 8)),
    "conv2d": (nn.Conv2d(6, 8, 3, padding=1, bias=False), (8, 6, 7, 7)),
    "depthwise": (nn.Conv2d(6, 6, 3, groups=6, padding="same", bias=False), (8, 6, 7, 7)),
    "transposed": (nn.ConvTranspose2d(6, 4, 3, stride=2, bias=False), (8, 6, 6, 6)),
    "transposed, grouped": (nn.ConvTranspose2d(6, 4, 3, groups=2, bias=False), (8, 6, 6, 6)),
    "conv3d": (nn.Conv3d(3, 4, 2, padding_mode="circular", padding=1, bias=False), (8, 3, 4, 4, 4)),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", LAYERS)
def test_the_output_is_nearer_to_the_float_layer_s_than_with_nearest_rounding(
    method: str, spec: str, name: str
) -> None:
    layer, shape = LAYERS[name]
    if (name, spec) == ("depthwise", "group"):
        pytest.skip("every weight would have a scale of its own")
    errors = dict.fromkeys(("nearest", "plain", "scales"), 0.0)
    for seed in range(2):
        torch.manual_seed(seed)
        exact = torch.randn(shape).cumsum(-1)  # neighbours alike, as in images
        quantized = exact + 0.1 * torch.randn(shape)
        weight = torch.randn_like(layer.weight)
        goal = torch.func.functional_call(layer, {"weight": weight}, (quantized if method == "gptq" else exact,))
        for kind in errors:
            layer.weight.data.copy_(weight)
            v = visit(layer, quantized, exact, bits=3, **SPECS[spec])
            assert v.layer.weight_quantizer is not None
            if kind == "nearest":
                layer.weight.data.copy_(fake_quantize(weight, v.layer.weight_quantizer.require_grid()))
            else:
                run(method, v, scales=5 if kind == "scales" else 1)
                again = fake_quantize(layer.weight.detach(), v.layer.weight_quantizer.require_grid())
                assert torch.equal(layer.weight.detach(), again)
            errors[kind] += float((layer(quantized) - goal).detach().square().sum())
    assert errors["plain"] < 0.95 * errors["nearest"]
    assert errors["scales"] <= errors["plain"] * (1.001 if method == "gptq" else 1.05)


def test_inputs_that_are_always_zero_do_no_harm() -> None:
    for method in METHODS:
        quantized, exact = correlated(32, 4)
        quantized[:, 1] = 0
        layer = nn.Linear(4, 2, bias=False)
        run(method, visit(layer, quantized, exact, bits=8))
        assert bool(layer.weight.isfinite().all())


def test_nan_is_named() -> None:
    quantized, exact = correlated(32, 4)
    quantized[3, 1] = torch.nan
    with pytest.raises(NonFiniteError, match="layer 'layer' reads NaN"):
        run("gptq", visit(nn.Linear(4, 2), quantized, exact))


def test_damping_grows_where_the_hessian_is_not_positive_definite() -> None:
    x = torch.ones(4, 6) * 1e3 + torch.arange(6) * 1e-3  # rank one within float32
    v = visit(nn.Linear(6, 3, bias=False), x, x)
    run("gptq", v, damping=1e-15)
    assert v.notes
    assert v.notes[0].startswith("damping grown from 1e-15")
    assert bool(v.layer.weight.isfinite().all())


@pytest.mark.parametrize("method", METHODS)
def test_a_recipe_with_it_loses_less_at_three_bits(method: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten())
    x = torch.randn(64, 3, 8, 8).cumsum(-1)
    plain = bs.quantize(net, [x], bits_recipe(3, 8))
    better = bs.quantize(net, [x], bits_recipe(3, 8, steps=("fold_batch_norm", {method: {"scales": 4}})))
    assert better.report.output_sqnr_db > plain.report.output_sqnr_db + 1
    exact = bs.integer.program.Program(better.graph, better.target, carrier="integer")
    assert torch.equal(exact(x), better(x))


@pytest.mark.parametrize("inputs", ["quantized", "float"])
def test_weight_only_recipes_by_group(inputs: str) -> None:
    spec = TensorSpec(format=IntFormat(3), granularity="group", group_size=4)
    recipe = bs.Recipe(weights=spec, steps=({"gptq": {"inputs": inputs, "scales": 3}},))
    net = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 5))
    q = bs.quantize(net, [correlated(64, 8)[0]], recipe)
    assert all(entry.error_after < entry.error_before for entry in q.report.steps)


def test_embeddings_are_refused_in_words() -> None:
    step = layer_step(Gptq())
    reason = step.refusal(QuantLayer(nn.Embedding(4, 2), None))
    assert reason == "it is of type Embedding: it looks rows up and multiplies nothing"


def test_per_tensor_scales_are_one_number() -> None:
    quantized, exact = correlated(32, 4)
    v = visit(nn.Linear(4, 3, bias=False), quantized, exact, bits=2, granularity="tensor")
    run("qronos", v, scales=9)
    assert v.layer.weight_quantizer is not None
    grid = v.layer.weight_quantizer.require_grid()
    assert grid.scale.ndim == 0
    assert isinstance(grid, Grid)


@pytest.mark.parametrize("name", ["linear", "conv2d", "transposed, grouped"])
@pytest.mark.parametrize("step", [Gptq(), Gptq(asymmetric=True), Gpfq(), Qronos()], ids=str)
def test_the_logged_errors_differ_as_those_of_the_outputs_do(name: str, step: Any) -> None:
    layer, shape = LAYERS[name]
    torch.manual_seed(3)
    weight = torch.randn_like(layer.weight)
    layer.weight.data.copy_(weight)
    exact = torch.randn(64, *shape[1:])
    quantized = exact + 0.2 * torch.randn(exact.shape)
    v = visit(layer, quantized, exact, bits=3)
    assert v.layer.weight_quantizer is not None
    grid = v.layer.weight_quantizer.require_grid()
    with torch.no_grad():
        goal = layer(quantized if step == Gptq() else exact).double()
        before, after = layer_step(step).run(v)
        rounded = (layer(quantized) - goal).square().sum()
        layer.weight.copy_(fake_quantize(weight, grid))
        nearest = (layer(quantized) - goal).square().sum()
    assert before - after == pytest.approx(float(nearest - rounded), rel=0.04)  # but for damping


def test_asymmetric_gptq_takes_back_what_the_layers_before_lost() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(*(m for _ in range(6) for m in (nn.Linear(32, 32), nn.ReLU())), nn.Linear(32, 8))
    x = torch.randn(1024, 32) @ torch.randn(32, 32)

    def noise(step: Any) -> float:
        q = bs.quantize(net, [x[:512]], recipe=bits_recipe(4, 4, steps=(step, "bias_correction")))
        return float((q(x[512:]) - net(x[512:])).detach().square().mean())

    plain = noise(Gptq())
    assert noise(Gptq(asymmetric=True)) < 0.8 * plain
    assert noise(Qronos()) < 0.9 * plain


@pytest.mark.parametrize("step", [Gptq(asymmetric=True, damping="auto"), Qronos(damping="auto")], ids=str)
def test_automatic_damping_holds_weights_where_samples_are_few(step: Any) -> None:
    def damping_and_error(samples: int, step: Any) -> tuple[str, float]:
        quantized, exact = correlated(samples + 1000, 40)
        torch.manual_seed(0)
        layer = nn.Linear(40, 8, bias=False)
        goal = layer(exact)[samples:].detach()
        v = visit(layer, quantized[:samples], exact[:samples])
        with torch.no_grad():
            layer_step(step).run(v)
            return (v.notes or [""])[0], float((layer(quantized[samples:]) - goal).square().sum())

    few, error = damping_and_error(44, step)
    assert float(few.removeprefix("damping ")) >= 0.1
    assert error < damping_and_error(44, step.model_copy(update={"damping": 0.01}))[1]
    assert damping_and_error(4000, step)[0] == "damping 0.01"


def test_contradicting_options_are_refused() -> None:
    with pytest.raises(ValueError, match="inputs cannot be float"):
        Gptq(asymmetric=True, inputs="float")
