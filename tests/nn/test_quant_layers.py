"""Quantized layers: the float layers' signatures, weights and functions; grids by spec; training; files."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import bitsmith as bs
from bitsmith.errors import CalibrationError, DataError, RecipeError
from bitsmith.grid import IntFormat, TensorSpec
from bitsmith.recipe import bits_recipe

FOUR = TensorSpec(format=IntFormat(4), granularity="channel")

# name -> (arguments, shape of an input)
WEIGHTED = {
    "Conv1d": ((4, 6, 3), (2, 4, 9)),
    "Conv2d": ((4, 6, 3, 2, 1), (2, 4, 9, 9)),
    "Conv3d": ((2, 4, 3), (2, 2, 5, 5, 5)),
    "ConvTranspose1d": ((4, 6, 3), (2, 4, 9)),
    "ConvTranspose2d": ((4, 6, 3, 2, 1, 1, 2), (2, 4, 6, 6)),
    "ConvTranspose3d": ((2, 4, 3), (2, 2, 4, 4, 4)),
    "Linear": ((5, 7), (3, 5)),
}


def pair(name: str, **keywords: object) -> tuple[nn.Module, nn.Module, Tensor]:
    """The float layer, the quantized one with its weights, an input."""
    arguments, shape = WEIGHTED[name]
    torch.manual_seed(0)
    exact = getattr(nn, name)(*arguments).eval()
    quantized = getattr(bs.nn, f"Quant{name}")(*arguments, **keywords).eval()
    quantized.load_state_dict(exact.state_dict())
    return exact, quantized, torch.randn(shape)


@pytest.mark.parametrize("name", WEIGHTED)
def test_before_calibration_a_layer_is_the_float_layer(name: str) -> None:
    exact, quantized, x = pair(name)
    assert isinstance(quantized, type(exact))
    assert quantized.state_dict().keys() == exact.state_dict().keys()
    assert torch.equal(quantized(x), exact(x))
    wanted = inspect.signature(type(exact)).parameters
    assert list(inspect.signature(type(quantized)).parameters)[: len(wanted)] == list(wanted)


@pytest.mark.parametrize("name", WEIGHTED)
def test_after_calibration_its_weight_is_on_the_grid_and_trains(name: str) -> None:
    exact, quantized, x = pair(name, weights=FOUR, inputs="int8", outputs="w8a16")
    bs.nn.calibrate(quantized, [x])
    weight = quantized.weight_quantizer(quantized.weight)
    axis = 1 if "Transpose" in name else 0
    assert all(len(row.unique()) <= 16 for row in weight.detach().transpose(0, axis))
    assert (quantized.input_quantizer.format.bits, quantized.output_quantizer.format.bits) == (8, 16)
    y = quantized(x)
    assert 0 < float((y - exact(x)).detach().abs().max()) < float(exact(x).detach().abs().max())
    y.square().sum().backward()
    assert bool(quantized.weight.grad.isfinite().all())
    assert float(quantized.weight.grad.abs().sum()) > 0
    before = weight.detach().clone()
    with torch.no_grad():
        quantized.weight.mul_(2)
    assert torch.equal(quantized.weight_quantizer(quantized.weight).detach(), 2 * before)


class Written(nn.Module):
    """A network written with quantized layers, or with float ones."""

    def __init__(self, layers: object, **keywords: object) -> None:
        super().__init__()
        prefix = "Quant" if layers is bs.nn else ""
        conv, linear, relu = (getattr(layers, prefix + name) for name in ("Conv2d", "Linear", "ReLU"))
        self.input = bs.nn.QuantIdentity() if prefix else nn.Identity()
        self.a, self.norm, self.act = conv(3, 8, 3, padding=1), nn.BatchNorm2d(8), relu()
        self.b, self.out = conv(8, 8, 3, groups=8, **keywords), relu()
        self.head = linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.a(self.input(x))))
        return self.head(self.out(self.b(x)).mean((2, 3)))  # type: ignore[no-any-return]


def images(count: int, seed: int) -> Tensor:
    return torch.randn(count, 3, 10, 10, generator=torch.Generator().manual_seed(seed))


BATCHES = [images(40, 1), images(40, 2)]


def written(**keywords: object) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    exact, quantized = Written(nn).eval(), Written(bs.nn, **keywords).eval()
    quantized.load_state_dict(exact.state_dict())
    return exact, quantized


def test_quantize_gives_the_model_that_the_float_layers_give() -> None:
    exact, quantized = written()
    assert torch.equal(bs.quantize(exact, BATCHES)(images(8, 3)), bs.quantize(quantized, BATCHES)(images(8, 3)))


def test_quantize_and_prepare_honour_the_specs_that_layers_carry(tmp_path: Path) -> None:
    _, quantized = written(weights=FOUR)
    q = bs.quantize(quantized, BATCHES)
    assert {layer.name: layer.weight_bits for layer in q.report.layers} == {"a": 8, "b": 4, "head": 8}
    prepared = bs.prepare(quantized, "int8", BATCHES[0])
    for batch in BATCHES:
        prepared(batch)
    assert torch.equal(bs.convert(prepared)(images(8, 3)), q(images(8, 3)))
    bs.save(q, tmp_path / "q")
    assert torch.equal(bs.load(tmp_path / "q", written(weights=FOUR)[1])(images(8, 3)), q(images(8, 3)))


def test_what_a_layer_reads_takes_the_spec_that_it_carries() -> None:
    _, quantized = written(recipe=bits_recipe(4, 4))
    bits = {
        layer.name: (layer.weight_bits, layer.input_bits) for layer in bs.quantize(quantized, BATCHES).report.layers
    }
    assert bits == {"a": (8, 8), "b": (4, 4), "head": (8, 8)}


def test_a_calibrated_model_converts_with_its_grids(tmp_path: Path) -> None:
    exact, quantized = written()
    bs.nn.calibrate(quantized, BATCHES)
    x = images(16, 3)
    simulated = quantized(x).detach()
    assert 0 < float((simulated - exact(x)).detach().abs().max()) < 0.1
    q = bs.convert(quantized, example_inputs=x)
    assert float((q(x) - simulated).abs().max()) < 0.03
    grid = quantized.act.output_quantizer.grid
    assert torch.equal(q.graph.quantizers.relu.grid.scale, grid.scale)
    assert bs.verify(q, bs.export_onnx(q, tmp_path / "q.onnx"), x).max_lsb == 0
    bs.save(q, tmp_path / "q")
    assert torch.equal(bs.load(tmp_path / "q", written()[1])(x), q(x))


def test_a_calibrated_model_trains_straight_through() -> None:
    """Three-bit weights lose the answer; training on the grids finds it again."""
    torch.manual_seed(0)
    teacher = nn.Linear(6, 1)
    x = torch.randn(512, 6)
    net = nn.Sequential(bs.nn.QuantIdentity(), bs.nn.QuantLinear(6, 8, weights=bits_recipe(3, 8)), bs.nn.QuantReLU())
    net.append(bs.nn.QuantLinear(8, 1, weights=bits_recipe(3, 8)))
    bs.nn.calibrate(net, [x])
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    losses = []
    for _ in range(150):
        loss = (net(x) - teacher(x).detach()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.1 * losses[0]
    q = bs.convert(net, example_inputs=x[:4])
    assert torch.allclose(q(x), net(x).detach(), atol=0.02)


def test_a_state_dict_carries_the_grids() -> None:
    _, quantized = written()
    bs.nn.calibrate(quantized, BATCHES)
    other = written()[1]
    other.load_state_dict(quantized.state_dict())
    assert torch.equal(other(images(4, 3)), quantized(images(4, 3)))
    quantized.load_state_dict(written()[0].state_dict())  # a float one goes on loading


def test_a_lookup_table_has_a_grid_of_its_own(tmp_path: Path) -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = bs.nn.QuantEmbedding(20, 6, weights="int8"), bs.nn.QuantLinear(6, 3)

        def forward(self, words: Tensor) -> Tensor:
            return self.head(self.table(words))

    torch.manual_seed(0)
    net, words = Words().eval(), torch.randint(0, 20, (16, 5))
    exact = net(words).detach()
    q = bs.quantize(net, [words])
    assert q.graph.table.weight_quantizer.grid.scale.shape == (20,)
    assert float((q(words) - exact).abs().max()) < 0.05
    assert bs.verify(q, bs.export_onnx(q, tmp_path / "q.onnx"), words).passed


ATTENTION = [
    {"batch_first": True},
    {"batch_first": False, "bias": False},
    {"batch_first": True, "kdim": 6, "vdim": 10},
]


@pytest.mark.parametrize("options", ATTENTION, ids=str)
def test_attention_in_float_is_torch_s(options: dict[str, object]) -> None:
    torch.manual_seed(0)
    exact = nn.MultiheadAttention(8, 2, **options).eval()
    quantized = bs.nn.QuantMultiheadAttention(8, 2, **options).eval()
    quantized.load_state_dict(exact.state_dict())
    query, key, value = torch.randn(3, 3, 8), torch.randn(3, 3, 6), torch.randn(3, 3, 10)
    if "kdim" not in options:
        key = value = query
    mask = torch.ones(3, 3, dtype=torch.bool).triu(1)
    for extra in ({}, {"attn_mask": mask}, {"need_weights": False}, {"key_padding_mask": mask}):
        for a, b in zip(exact(query, key, value, **extra), quantized(query, key, value, **extra)):
            assert (a is None and b is None) or torch.allclose(a, b, atol=1e-6)


def test_attention_quantizes_both_products(tmp_path: Path) -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = bs.nn.QuantMultiheadAttention(16, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x, need_weights=False)[0]

    torch.manual_seed(0)
    net, x = Attends().eval(), torch.randn(8, 5, 16)
    exact = net(x).detach()
    bs.nn.calibrate(net, [x])
    simulated = net(x).detach()
    q = bs.convert(net, example_inputs=x)
    assert sum(layer.weight_bits is not None for layer in q.report.layers) == 6  # four projections, two products
    for found in (simulated, q(x)):
        assert float((found - exact).abs().max()) < 0.1 * float(exact.abs().max())
    assert bs.verify(q, bs.export_onnx(q, tmp_path / "q.onnx"), x).passed


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_an_lstm_in_float_is_torch_s(layers: int, both: bool, batch_first: bool) -> None:
    torch.manual_seed(0)
    exact = nn.LSTM(4, 6, layers, batch_first=batch_first, bidirectional=both).eval()
    quantized = bs.nn.QuantLSTM(4, 6, layers, batch_first=batch_first, bidirectional=both).eval()
    quantized.load_state_dict(exact.state_dict())
    x = torch.randn(3, 3, 4)
    state = tuple(torch.randn(layers * (1 + both), 3, 6) for _ in range(2))
    for arguments in ((x,), (x, state)):
        (y, (h, c)), (y2, (h2, c2)) = exact(*arguments), quantized(*arguments)
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in ((y, y2), (h, h2), (c, c2)))


def test_an_lstm_on_grids_is_captured_and_runs_in_a_file(tmp_path: Path) -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = bs.nn.QuantLSTM(4, 8, batch_first=True), bs.nn.QuantLinear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x)[0][:, -1])

    torch.manual_seed(0)
    net, x = Reads().eval(), torch.randn(16, 5, 4)
    exact = net(x).detach()
    bs.nn.calibrate(net, [x])
    q = bs.convert(net, example_inputs=x)
    for found in (net(x).detach(), q(x)):
        assert 0 < float((found - exact).abs().max()) < 0.05
    assert bs.verify(q, bs.export_onnx(q, tmp_path / "q.onnx"), x).passed


def test_wrong_words_are_refused() -> None:
    with pytest.raises(RecipeError, match="no recipe is called"):
        bs.nn.QuantLinear(2, 2, weights="int9")
    with pytest.raises(RecipeError, match="takes a TensorSpec or a recipe"):
        bs.nn.QuantLinear(2, 2, weights=True)
    with pytest.raises(DataError, match="holds no quantized layer"):
        bs.nn.calibrate(nn.Linear(2, 2), [torch.zeros(2, 2)])
    with pytest.raises(CalibrationError, match=r"run first bitsmith\.nn\.calibrate"):
        bs.convert(nn.Sequential(bs.nn.QuantIdentity(), bs.nn.QuantLinear(2, 2)), example_inputs=torch.zeros(2, 2))
    with pytest.raises(RecipeError, match="add_bias_kv"):
        bs.nn.QuantMultiheadAttention(4, 2, add_bias_kv=True)
    with pytest.raises(RecipeError, match="proj_size"):
        bs.nn.QuantLSTM(4, 4, proj_size=2)
