"""The simulation and the integer executor are one program: equal bit for bit, and equal to numpy by hand."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bitsmith as bs
from bitsmith.grid import Quantizer, quantize
from bitsmith.integer.program import Program, codes_of
from bitsmith.place.layers import QuantLayer
from bitsmith.recipe import NAMED, bits_recipe


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Residual(nn.Module):
    """Convolution, ReLU, residual add, average pool, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(x + self.conv(x))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Everything(nn.Module):
    """Depthwise, grouped, dilated and transposed layers, a gate, a concat, pools and a leaky ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.depth = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8)
        self.squeeze, self.excite = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2)
        self.down = nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        y = F.relu6(self.depth(x))
        y = y * torch.sigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(y, 1)))))
        z = self.down(F.leaky_relu(self.up(F.max_pool2d(x, 2)), 0.1))
        z = F.interpolate(z, scale_factor=2)
        z = torch.cat([y, F.avg_pool2d(z, 3, stride=1, padding=1)], 1)
        return self.head(z.mean((2, 3)))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.softmax(self.q(x) @ self.k(x).transpose(1, 2), -1)
        return weights @ self.v(x)


def seeded(net: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return net()


def images(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def assert_carriers_agree(q: Any, x: Tensor) -> None:
    simulated, exact = q(x), Program(q.graph, q.target, carrier="integer")(x)
    assert torch.equal(simulated, exact)
    assert bool(simulated.isfinite().all())


INTEGER_RECIPES = {
    **{name: recipe for name, recipe in NAMED.items() if name != "fp8"},
    **{f"w{bits}a{bits}": bits_recipe(bits, bits) for bits in range(2, 8)},
    "w2a8": bits_recipe(2, 8),
    "w8a4-po2": bits_recipe(8, 4, scale="po2", symmetric=True),
}


@pytest.mark.parametrize("name", INTEGER_RECIPES)
def test_carriers_agree_for_every_integer_recipe(name: str) -> None:
    q = bs.quantize(seeded(Everything), [images(16)], recipe=INTEGER_RECIPES[name], target="generic")
    assert_carriers_agree(q, images(8, seed=1))
    assert q.report.coverage.fraction == 1.0


@pytest.mark.parametrize("target", ["onnxruntime", "openvino", "torch", "generic"])
@pytest.mark.parametrize("placement", ["runtime", "fx", "layerwise", "flexml"])
@pytest.mark.parametrize("net", [Residual, Everything])
def test_carriers_agree_for_every_placement_and_target(net: type[nn.Module], placement: Any, target: str) -> None:
    q = bs.quantize(seeded(net), [images(16)], placement=placement, target=target)
    assert_carriers_agree(q, images(8, seed=1))


def test_carriers_agree_where_floats_lie_between() -> None:
    x = torch.randn(16, 5, 8, generator=torch.Generator().manual_seed(0))
    assert_carriers_agree(bs.quantize(seeded(Attention), [x]), x)
    assert_carriers_agree(bs.quantize(seeded(Attention), [x], recipe="int16", target="generic"), x)


def test_the_integer_executor_holds_integer_tensors_alone() -> None:
    q = bs.quantize(seeded(Everything), [images(16)], target="generic")
    program = q.integer_executor()
    env = program.run(images(4), keep=True)
    codes = [env[node] for node in program.grids]
    assert len(codes) >= 10
    assert all(value.dtype == torch.int32 for value in codes if isinstance(value, Tensor))


def test_any_batch_size_runs() -> None:
    q = bs.quantize(seeded(Everything), [images(16)])
    whole = q(images(7))
    assert torch.equal(whole, torch.cat([q(images(7)[i : i + 1]) for i in range(7)]))


def test_intermediate_values_are_dropped_and_on_request_kept() -> None:
    q = bs.quantize(seeded(Residual), [images(16)])
    assert [key for key in q.program.run(images(2)) if key != "output"] != []
    assert len(q.program.run(images(2))) < 4 < len(q.program.run(images(2), keep=True))


def test_stored_codes_are_those_of_the_grid() -> None:
    q = bs.quantize(seeded(Residual), [images(16)])
    env = q.program.run(images(2), keep=True)
    for node, grid in q.program.grids.items():
        if node.args[0].op == "placeholder":
            assert torch.equal(codes_of(env[node], grid), quantize(images(2), grid))
            return
    pytest.fail("the input is not quantized")


# The model by hand: numpy, int64 sums, and the laws as onnxruntime's documentation of its kernels has them.


class ByHand:
    """The Residual net on codes, one line per law; reads only scales, zero points and float weights."""

    def __init__(self, q: Any) -> None:
        self.layers = {n.split(".")[-1]: m for n, m in q.graph.named_modules() if isinstance(m, QuantLayer)}
        self.grids = {
            n.removeprefix("quantizers."): m.require_grid()
            for n, m in q.graph.named_modules()
            if isinstance(m, Quantizer) and n.startswith("quantizers.")
        }

    def scale(self, name: str) -> np.float32:
        return np.float32(self.grids[name].scale.item())

    def zero(self, name: str) -> int:
        zero = self.grids[name].zero_point
        return 0 if zero is None else int(zero)

    def parameters(self, layer: str, source: str) -> tuple[Any, Any, Any]:
        """Weight codes, bias codes and the scale of a product."""
        wrapped = self.layers[layer]
        s_w = wrapped.weight_quantizer.require_grid().scale.numpy()
        w = wrapped.weight.detach().numpy()
        columns = s_w.reshape(-1, *[1] * (w.ndim - 1))
        codes = np.clip(np.rint(w / columns), -128, 127).astype(np.int64)
        s = self.scale(source) * s_w
        return codes, np.rint(wrapped.bias.detach().numpy() / s).astype(np.int64), s

    def conv(self, x: Any, layer: str, source: str, output: str) -> Any:
        w, b, s = self.parameters(layer, source)
        padded = np.pad(x - self.zero(source), [(0, 0), (0, 0), (1, 1), (1, 1)])
        acc = np.zeros((x.shape[0], w.shape[0], 8, 8), dtype=np.int64) + b[:, None, None]
        for i in range(3):
            for j in range(3):
                acc += np.einsum("oc,nchw->nohw", w[:, :, i, j], padded[:, :, i : i + 8, j : j + 8])
        m = (s / self.scale(output))[:, None, None]
        return np.clip(np.rint(acc.astype(np.float32) * m) + self.zero(output), 0, 255).astype(np.int64)

    def __call__(self, x: Tensor) -> Any:
        f32 = np.float32
        names = list(self.grids)
        image, relu, conv, total, pool = names[0], "relu", "conv", "relu_1", "adaptive_avg_pool2d"
        codes = np.clip(np.rint(x.numpy() / self.scale(image)) + self.zero(image), 0, 255).astype(np.int64)
        a = self.conv(codes, "stem", image, relu)
        b = self.conv(a, "conv", relu, conv)
        r_a, r_b = self.scale(relu) / self.scale(total), self.scale(conv) / self.scale(total)

        def fma(u: Any, v: Any, w: Any) -> Any:
            return (np.float64(u) * np.float64(v) + np.float64(w)).astype(f32)

        constant = f32(self.zero(total)) - fma(r_a, self.zero(relu), f32(r_b * f32(self.zero(conv))))
        c = np.clip(np.rint(fma(a, r_a, fma(b, r_b, constant))), 0, 255).astype(np.int64)
        m = self.scale(total) / f32(self.scale(pool) * f32(64))
        sums = (c - self.zero(total)).sum((2, 3)).astype(f32)
        d = np.clip(np.rint(sums * m) + self.zero(pool), 0, 255).astype(np.int64)
        w, bias, s = self.parameters("head", pool)
        return ((d - self.zero(pool)) @ w.T + bias).astype(f32) * s


def test_a_net_by_hand_gives_the_same_bits() -> None:
    q = bs.quantize(seeded(Residual), [images(64)])
    by_hand = ByHand(q)
    assert set(by_hand.grids) == {"x", "relu", "conv", "relu_1", "adaptive_avg_pool2d"}
    x = images(32, seed=1)
    expected = torch.from_numpy(by_hand(x))
    assert torch.equal(q(x), expected)
    assert torch.equal(q.integer_executor()(x), expected)


def test_a_clamp_that_the_grid_does_not_cover_is_not_fused() -> None:
    """A ReLU6 whose output grid reaches past 6 must still clamp at 6."""

    class Clamped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.relu6(self.conv(x)))

    x = images(8) * 50
    q = bs.quantize(seeded(Clamped), [x])
    quantizer = next(m for n, m in q.graph.named_modules() if n == "quantizers.relu6")
    quantizer.set_grid(type(quantizer.grid)(quantizer.format, torch.tensor(0.1), quantizer.zero_point))
    q._program = None
    program = q.program
    env = program.run(x, keep=True)
    node = next(n for n in program.grids if n.name == "relu6_quantized")
    assert float(program.real(node, env).max()) == pytest.approx(6.0, abs=1e-6)


def test_wide_layers_run_in_float64_and_agree() -> None:
    """Sums past 2**24: the float carrier widens, the answer is that of the integers."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3000, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        net[0].weight.fill_(0.01)
        net[0].weight[0, 0] = 0.0099
    x = torch.rand(16, 3000, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        q = bs.quantize(net, [x], recipe="int8-tensor")
        assert_carriers_agree(q, x)


@pytest.mark.parametrize(
    ("pool", "shape"),
    [
        (nn.AvgPool2d(3, 2), (5, 9, 9)),
        (nn.AdaptiveAvgPool2d(1), (5, 9, 9)),
        (nn.AvgPool3d(2), (2, 5, 4, 4, 4)),
        (nn.AdaptiveAvgPool3d(1), (2, 5, 4, 4, 4)),
        (nn.AvgPool1d(3, 2, 1), (2, 5, 9)),
        (nn.AdaptiveAvgPool1d(1), (2, 5, 9)),
        (nn.AvgPool2d(3, 2, 1, count_include_pad=False), (2, 5, 9, 9)),
        (nn.AdaptiveAvgPool2d((3, 1)), (2, 5, 9, 9)),
    ],
    ids=str,
)
def test_float_pools_are_torchs_up_to_rounding(pool: nn.Module, shape: tuple[int, ...]) -> None:
    """With and without a batch axis, in every rank: only the order of summation may differ."""

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pool, self.head = pool, nn.Linear(shape[-1], 4)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.pool(x.tanh()), self.head(x)

    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    q = bs.quantize(Pooled().eval(), [x], placement="layerwise")
    torch.testing.assert_close(q(x)[0], pool(x.tanh()), rtol=1e-6, atol=1e-6)
