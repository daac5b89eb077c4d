"""torch.ao's own model is the oracle: the same integers, and on target ``torch`` the same outputs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.ao.nn.quantized as nnq
import torch.ao.quantization as ao
import torch.nn.functional as F
from torch import Tensor, nn
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

import bitsmith as bs
from bitsmith.capture.ops import module_of
from bitsmith.errors import DataError, MigrationError
from bitsmith.place.layers import QuantLayer

pytestmark = pytest.mark.filterwarnings("ignore")


class Wrapped(nn.Module):
    """What torch.ao's eager mode wants: stubs at both ends."""

    def __init__(self, *layers: nn.Module, call: Callable[[Wrapped, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.quant, self.dequant, self.body = ao.QuantStub(), ao.DeQuantStub(), nn.Sequential(*layers)
        self.skip, self.skip2 = nnq.FloatFunctional(), nnq.FloatFunctional()
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        x = self.quant(x)
        return self.dequant(self.body(x) if self.call is None else self.call(self, x))


def eager(model: nn.Module, x: Tensor, qconfig: str = "x86") -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.eval()
        model.qconfig = ao.get_default_qconfig(qconfig)  # type: ignore[assignment]
        prepared = ao.prepare(model)
        prepared(x)
        converted: nn.Module = ao.convert(prepared)
    return converted


def fx(model: nn.Module, x: Tensor) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepared = prepare_fx(model.eval(), ao.get_default_qconfig_mapping("x86"), (x,))
        prepared(x)
        converted: nn.Module = convert_fx(prepared)
    return converted


def steps_apart(old: nn.Module, new: bs.QuantizedModel, x: Tensor, scale: float) -> int:
    """Largest difference of two outputs, in steps of the output's grid."""
    with torch.no_grad():
        return int(((old(x) - new(x)).abs() / scale).max().round())


def last_scale(q: bs.QuantizedModel) -> float:
    return float(
        [s for n, s in q.graph.state_dict().items() if n.startswith("quantizers.") and n.endswith("scale")][-1]
    )


def residual(net: Wrapped, x: Tensor) -> Tensor:
    y = net.body[0](x)
    return net.skip.add_relu(net.body[1](y), y)


def concat(net: Wrapped, x: Tensor) -> Tensor:
    y = net.skip.cat([net.body[0](x), net.body[1](x)], 1)
    return net.skip2.mul(y, y)


IMAGE, SEQUENCE, VOLUME, ROWS = (4, 3, 10, 10), (4, 3, 20), (2, 3, 6, 6, 6), (16, 12)
EXACT: dict[str, tuple[Callable[[], Wrapped], tuple[int, ...]]] = {
    "conv": (lambda: Wrapped(nn.Conv2d(3, 8, 3, stride=2, padding=1)), IMAGE),
    "conv without bias": (lambda: Wrapped(nn.Conv2d(3, 8, 3, bias=False)), IMAGE),
    "conv, relu as a module": (lambda: Wrapped(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)), IMAGE),
    "a layer called twice": (
        lambda: Wrapped(nn.Conv2d(3, 3, 3, padding=1), call=lambda n, x: n.body(n.body(x))),
        IMAGE,
    ),
    "depthwise": (lambda: Wrapped(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8)), IMAGE),
    "conv1d": (lambda: Wrapped(nn.Conv1d(3, 8, 3, dilation=2)), SEQUENCE),
    "conv3d": (lambda: Wrapped(nn.Conv3d(3, 4, 3)), VOLUME),
    "linear": (lambda: Wrapped(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 5)), ROWS),
    "residual": (lambda: Wrapped(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1), call=residual), IMAGE),
    "concat and product": (lambda: Wrapped(nn.Conv2d(3, 8, 1), nn.Conv2d(3, 4, 1), call=concat), IMAGE),
    "max pool": (lambda: Wrapped(nn.Conv2d(3, 8, 3), nn.MaxPool2d(2)), IMAGE),
    "average pool": (lambda: Wrapped(nn.Conv2d(3, 8, 3), nn.AvgPool2d(2)), IMAGE),
    "average pool behind relu": (
        lambda: Wrapped(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(8, 4, 1)),
        IMAGE,
    ),
    "global pool": (lambda: Wrapped(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)), IMAGE),
    "relu6": (lambda: Wrapped(nn.Conv2d(3, 8, 3), nn.ReLU6(), nn.Conv2d(8, 3, 3)), IMAGE),
    "nearest": (lambda: Wrapped(nn.Conv2d(3, 8, 3), nn.Upsample(scale_factor=2)), IMAGE),
    "sigmoid": (lambda: Wrapped(nn.Conv2d(3, 8, 3), nn.Sigmoid()), IMAGE),
    "sigmoid as a function": (lambda: Wrapped(nn.Conv2d(3, 8, 3), call=lambda n, x: torch.sigmoid(n.body(x))), IMAGE),
    "leaky relu": (lambda: Wrapped(nn.Conv2d(3, 8, 3), nn.LeakyReLU(0.1)), IMAGE),
}
# Float arithmetic of another order than that of torch.ao's kernels: one step at most.
ONE_STEP: dict[str, tuple[Callable[[], Wrapped], tuple[int, ...]]] = {
    "hardswish": (lambda: Wrapped(nn.Conv2d(3, 8, 3), nn.Hardswish()), IMAGE),
    "elu": (lambda: Wrapped(nn.Conv2d(3, 8, 3), nn.ELU()), IMAGE),
    "batch norm": (lambda: Wrapped(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), IMAGE),
    "layer norm": (lambda: Wrapped(nn.Linear(12, 8), nn.LayerNorm(8)), ROWS),
    "group norm": (lambda: Wrapped(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8)), IMAGE),
    "instance norm": (lambda: Wrapped(nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8, affine=True)), IMAGE),
    "tanh as a function": (lambda: Wrapped(nn.Conv2d(3, 8, 3), call=lambda n, x: torch.tanh(n.body(x))), IMAGE),
}


@pytest.mark.parametrize("name", [*EXACT, *ONE_STEP])
def test_outputs_of_eager_models(name: str) -> None:
    make, shape = (EXACT | ONE_STEP)[name]
    torch.manual_seed(0)
    x = torch.randn(shape)
    old = eager(make(), x)
    q = bs.migrate(old, x)
    fresh = torch.randn(shape) * 1.2
    allowed = 0 if name in EXACT else 1
    assert steps_apart(old, q, fresh, last_scale(q)) <= allowed
    if name in EXACT:
        assert bool((old(fresh) == q(fresh)).all())
        assert bool((bs.deploy(q, engine="torch")(fresh) == q(fresh)).all())


def integers(model: nn.Module) -> dict[str, Tensor]:
    """Weights of torch.ao's layers by name."""
    return {n: m.weight().int_repr() for n, m in model.named_modules() if hasattr(m, "weight") and callable(m.weight)}


@pytest.mark.parametrize("qconfig", ["x86", "onednn", "qnnpack"])
@pytest.mark.parametrize("target", ["torch", "onnxruntime"])
def test_integers_scales_and_zero_points_are_those_of_torch_ao(qconfig: str, target: str) -> None:
    torch.manual_seed(1)
    x = torch.randn(8, 3, 10, 10)
    old = eager(Wrapped(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(512, 4)), x, qconfig)
    q = bs.migrate(old, x, target)
    layers = {str(n.target): module_of(n) for n in q.graph.graph.nodes if isinstance(module_of(n), QuantLayer)}
    assert layers.keys() == integers(old).keys()
    for name, codes in integers(old).items():
        layer, weight = layers[name], old.get_submodule(name).weight()  # type: ignore[operator]
        assert isinstance(layer, QuantLayer)
        assert layer.weight_quantizer is not None
        assert torch.equal(layer.weight_quantizer.to_int(layer.weight), codes)
        per_channel = weight.qscheme() == torch.per_channel_affine
        scale = weight.q_per_channel_scales() if per_channel else torch.tensor(weight.q_scale())
        assert torch.equal(layer.weight_quantizer.require_grid().scale, scale.float())
    grids = {
        (float(m.scale), int(m.zero_point))
        for m in q.graph.get_submodule("quantizers").children()
    }  # fmt: skip
    wanted = {(float(torch.tensor(m.scale)), int(m.zero_point)) for m in (old.quant, old.body[0], old.body[3])}
    assert wanted <= grids


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.depth = (
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8),
            nn.Conv2d(8, 8, 3, padding=1, groups=8),
        )
        self.head, self.weight = nn.Linear(8, 4), nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x)))
        y = torch.relu(self.depth(x) + x)
        y = torch.cat([y, x], 1)[:, 4:12]
        y = F.adaptive_avg_pool2d(F.max_pool2d(y, 2), 1).flatten(1)
        return torch.softmax(self.head(F.linear(y, self.weight)), 1)


def test_a_functional_fx_model_to_the_bit(tmp_path) -> None:
    torch.manual_seed(2)
    x = torch.randn(8, 3, 12, 12)
    old = fx(Functional(), x)
    q = bs.migrate(old, x)
    fresh = torch.randn(20, 3, 12, 12)
    assert torch.equal(old(fresh), q(fresh))
    assert q.report.coverage.fraction == 1.0
    assert q.report.notes[-1].startswith("32 of 32 outputs")
    file = bs.migrate(old, x, "onnxruntime")
    bs.export_onnx(file, tmp_path / "m.onnx")
    assert bs.verify(file, tmp_path / "m.onnx", fresh).passed
    bs.export_torchscript(q, tmp_path / "m.pt")
    assert torch.equal(torch.jit.load(tmp_path / "m.pt")(fresh), q(fresh))


@pytest.mark.parametrize("convert", [eager, fx])
def test_saved_and_loaded(convert, tmp_path) -> None:
    torch.manual_seed(3)
    x = torch.randn(4, 3, 10, 10)
    model = Wrapped(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    old = convert(model if convert is eager else model.body, x)
    for target in ("torch", "onnxruntime"):
        q = bs.migrate(old, x, target)
        bs.save(q, tmp_path / target)
        assert torch.equal(bs.load(tmp_path / target, old)(x), q(x))


def test_what_is_averaged_after_the_dequantization_stays_float() -> None:
    torch.manual_seed(4)
    x = torch.randn(4, 3, 10, 10)

    class Tail(Wrapped):
        def forward(self, x: Tensor) -> Tensor:
            y = F.avg_pool2d(super().forward(x), 3)
            return torch.cat([y, y], 1) * 2

    old = eager(Tail(nn.Conv2d(3, 8, 3)), x)
    assert torch.equal(old(x), bs.migrate(old, x)(x))


def test_parts_of_a_split_after_the_dequantization() -> None:
    torch.manual_seed(6)
    x = torch.randn(4, 3, 10, 10)

    class Halves(Wrapped):
        def forward(self, x: Tensor) -> Tensor:
            first, second = super().forward(x).chunk(2, 1)
            return first * 2 - second

    old = eager(Halves(nn.Conv2d(3, 8, 3)), x)
    assert torch.equal(old(x), bs.migrate(old, x)(x))


def test_transposed_convolution() -> None:
    torch.manual_seed(5)
    x = torch.randn(4, 3, 8, 8)
    old = eager(Wrapped(nn.ConvTranspose2d(3, 8, 3, stride=2, output_padding=1)), x, "qnnpack")
    q = bs.migrate(old, x)
    assert steps_apart(old, q, torch.randn(4, 3, 8, 8), last_scale(q)) <= 1


class TestRefusals:
    def test_a_float_model(self) -> None:
        with pytest.raises(MigrationError, match=r"use bitsmith\.quantize"):
            bs.migrate(nn.Sequential(nn.Linear(2, 2)), torch.zeros(1, 2))

    def test_a_prepared_model(self) -> None:
        model = Wrapped(nn.Conv2d(3, 8, 3)).eval()
        model.qconfig = ao.get_default_qconfig("x86")  # type: ignore[assignment]
        with pytest.raises(MigrationError, match=r"prepared by torch\.ao but not converted"):
            bs.migrate(ao.prepare(model), torch.zeros(1, 3, 8, 8))

    def test_no_example(self) -> None:
        x = torch.randn(4, 12)
        with pytest.raises(DataError, match="migrate\\(model, batch\\)"):
            bs.migrate(eager(Wrapped(nn.Linear(12, 3)), x))

    def test_an_unknown_module_is_named(self) -> None:
        model = nn.Sequential(nn.Embedding(10, 8))
        model[0].qconfig = ao.float_qparams_weight_only_qconfig
        old = ao.convert(ao.prepare(model.eval()))
        with pytest.raises(MigrationError, match=r"0: torch.ao's quantized Embedding cannot be migrated"):
            bs.migrate(old, torch.zeros(2, 3, dtype=torch.long))

    def test_a_sum_with_a_number(self) -> None:
        x = torch.randn(4, 12)
        old = eager(Wrapped(nn.Linear(12, 3), call=lambda n, x: n.skip.add_scalar(n.body(x), 2.0)), x)
        with pytest.raises(MigrationError, match="add_scalar"):
            bs.migrate(old, x)

    def test_not_a_module(self) -> None:
        args: Any = ({}, None)
        with pytest.raises(DataError, match="not a dict"):
            bs.migrate(*args)
