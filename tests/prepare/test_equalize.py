"""Equalization: the function stays, the ranges meet where the paper says, and channels are tied as they must be."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import bitsmith as bs
from benchmarks import nets
from bitsmith.capture import capture, read_batches
from bitsmith.prepare import fold_batch_norm
from bitsmith.prepare.channels import ChannelFlow, _components
from bitsmith.prepare.equalize import equalize
from bitsmith.prepare.prepare import _REWRITES as rewrites
from bitsmith.prepare.weights import in_range, out_range, scale_inputs, scale_outputs
from bitsmith.recipe import bits_recipe, load_recipe
from bitsmith.steps import Equalize

RECIPE = load_recipe("int8")


class _Net(nn.Module):
    def __init__(self, forward: Any, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self._forward = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)  # type: ignore[no-any-return]


def _conv(i: int, o: int, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(i, o, options.pop("kernel_size", 3), padding=options.pop("padding", 1), **options)


def _shuffle(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


NETS: dict[str, tuple[Any, int]] = {  # the model, and how many of its layers' outputs can be equalized
    "chain": (nn.Sequential(_conv(3, 6), nn.ReLU(), _conv(6, 4)), 1),
    "leaky, pool, resize": (
        nn.Sequential(_conv(3, 6), nn.LeakyReLU(), nn.MaxPool2d(2), nn.Upsample(scale_factor=2), _conv(6, 4)), 1),
    "prelu": (nn.Sequential(_conv(3, 6), nn.PReLU(6), nn.AvgPool2d(2), _conv(6, 4)), 1),
    "flattened": (nn.Sequential(_conv(3, 4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 64, 5)), 1),
    "pooled": (nn.Sequential(_conv(3, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)), 1),
    "depthwise": (nn.Sequential(_conv(3, 6), nn.ReLU(), _conv(6, 6, groups=6), nn.ReLU(), _conv(6, 4)), 2),
    "grouped": (nn.Sequential(_conv(3, 6), nn.ReLU(), _conv(6, 4, groups=2), nn.ReLU(), _conv(4, 2)), 2),
    "transposed": (
        nn.Sequential(_conv(3, 6), nn.ConvTranspose2d(6, 4, 2, groups=2), nn.ReLU(), _conv(4, 2)), 2),
    "residual": (
        _Net(lambda s, x: s.c(torch.relu(s.a(x) + s.b(torch.relu(s.a(x))))), a=_conv(3, 6), b=_conv(6, 6),
             c=_conv(6, 2)), 2),
    "padded shortcut": (
        _Net(lambda s, x: s.c(F.relu(s.b(x) + F.pad(s.a(x)[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)))),
             a=_conv(3, 4), b=_conv(3, 8, stride=2), c=_conv(8, 2)), 2),
    "concat": (
        _Net(lambda s, x: s.c(torch.cat([torch.relu(s.a(x)), s.b(x)], 1)), a=_conv(3, 4), b=_conv(3, 2),
             c=_conv(6, 2)), 2),
    "split": (
        _Net(lambda s, x: s.c(torch.cat([s.b(s.a(x).chunk(2, 1)[0]), s.a(x)[:, 2:]], 1)), a=_conv(3, 4),
             b=_conv(2, 2), c=_conv(4, 2)), 2),
    "shuffle": (_Net(lambda s, x: s.b(_shuffle(s.a(x))), a=_conv(3, 6), b=_conv(6, 2)), 1),
    "gate": (
        _Net(lambda s, x: s.c(s.a(x) * torch.sigmoid(s.b(x).mean((2, 3), keepdim=True))), a=_conv(3, 6),
             b=_conv(3, 6), c=_conv(6, 2)), 1),
    "sigmoid": (nn.Sequential(_conv(3, 6), nn.Sigmoid(), _conv(6, 4)), 0),
    "shared layer": (_Net(lambda s, x: s.b(torch.relu(s.b(torch.relu(s.a(x))))), a=_conv(3, 4), b=_conv(4, 4)), 0),
    "batch norm": (nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), _conv(3, 4)), 1),
    "norm and linear": (
        nn.Sequential(nn.Flatten(2), nn.LayerNorm(64), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 4)), 2),
    "reflected": (nn.Sequential(_conv(3, 4), _conv(4, 4, padding_mode="reflect")), 1),
}  # fmt: skip


def _graph(model: nn.Module, x: Tensor) -> fx.GraphModule:
    graph = capture(model.eval(), read_batches(model, [x])[0])
    fold_batch_norm(graph)
    return graph


def _spoiled(model: nn.Module) -> nn.Module:
    """A copy whose channels differ in scale by orders of magnitude."""
    torch.manual_seed(0)
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            scale_outputs(module, torch.exp2(torch.randn(out_range(module).shape, dtype=torch.float64) * 2))
    return model


@pytest.mark.parametrize("objective", ["range", "noise"])
@pytest.mark.parametrize("name", NETS)
def test_the_function_stays(name: str, objective: str) -> None:
    model, expected = NETS[name]
    merge = {"merge_bias": True} if (name, objective) == ("chain", "range") else {}
    model = _spoiled(model)
    x = torch.randn(4, 3, 8, 8)
    graph = _graph(model, x)
    with torch.no_grad():
        before = graph(x)
        note = equalize(graph, read_batches(model, [x]), Equalize(objective=objective, **merge), RECIPE)
        after = graph(x)
    assert note.startswith(f"equalized the output channels of {expected} of")
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5 * float(before.abs().max()))


def test_two_layers_meet_at_the_geometric_mean() -> None:
    """Equation (11): after equalization both ranges of every channel are sqrt(r1 r2)."""
    model = _spoiled(nn.Sequential(_conv(3, 6), nn.ReLU(), _conv(6, 4)))
    x = torch.randn(2, 3, 8, 8)
    graph = _graph(model, x)
    first, second = graph.get_submodule("0"), graph.get_submodule("2")
    mean = (out_range(first) * in_range(second)).sqrt()
    equalize(graph, read_batches(model, [x]), Equalize(), RECIPE)
    torch.testing.assert_close(out_range(first), mean, rtol=1e-5, atol=0)
    torch.testing.assert_close(in_range(second), mean, rtol=1e-5, atol=0)


def test_a_chain_of_depthwise_layers_comes_to_rest_with_equal_ranges() -> None:
    model = _spoiled(NETS["depthwise"][0])
    x = torch.randn(2, 3, 8, 8)
    graph = _graph(model, x)
    equalize(graph, read_batches(model, [x]), Equalize(iterations=200), RECIPE)
    first, middle, last = (graph.get_submodule(name) for name in "024")
    torch.testing.assert_close(out_range(first), in_range(middle), rtol=1e-3, atol=0)
    torch.testing.assert_close(out_range(middle), in_range(last), rtol=1e-3, atol=0)


def test_in_front_of_a_clip_only_channels_with_room_move() -> None:
    model = nn.Sequential(_conv(3, 4, kernel_size=1, padding=0), nn.ReLU6(), _conv(4, 2, kernel_size=1, padding=0))
    with torch.no_grad():
        model[0].weight.fill_(0.0)
        model[0].weight[:, 0, 0, 0] = torch.tensor([0.1, 1.0, 20.0, 0.001])
        model[0].bias.zero_()
        model[2].weight.fill_(1.0)
    x = torch.rand(8, 3, 4, 4)
    x[0, 0, 0, 0] = 1.0  # the third channel comes to 20 and is clipped, the others to 0.1, 1 and 0.001
    graph = _graph(model, x)
    with torch.no_grad():
        before = graph(x)
        equalize(graph, read_batches(model, [x]), Equalize(iterations=100), RECIPE)
        torch.testing.assert_close(graph(x), before, rtol=1e-5, atol=1e-6)
    found = out_range(graph.get_submodule("0"))
    assert float(found[2]) == 20.0
    assert bool((found[[0, 1, 3]] <= 6 + 1e-6).all())
    torch.testing.assert_close(found[0], torch.tensor(0.1, dtype=torch.float64).sqrt(), rtol=1e-3, atol=0)


def test_the_least_noise_is_where_trying_every_ratio_finds_it() -> None:
    """Two hidden units: weights of one scale per tensor add noise that depends on the ratio of their scales alone."""
    model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    model[0].weight.data.copy_(torch.tensor([[1.0], [0.1]]))
    model[2].weight.data.copy_(torch.tensor([[0.2, 5.0]]))
    x = torch.rand(64, 1)
    graph = _graph(model, x)
    weights_only = bits_recipe(8, 8, granularity="tensor").model_copy(update={"activations": None})
    equalize(graph, read_batches(model, [x]), Equalize(objective="noise"), weights_only)
    first = graph.get_submodule("0").weight.flatten()
    found = float(first[1] / first[0] / 0.1)

    power = float(x.square().mean())
    ratios = torch.logspace(-3, 3, 6001, dtype=torch.float64)
    step = torch.maximum(torch.tensor(1.0), 0.1 * ratios) ** 2
    noise = step * power * (0.2**2 + 5.0**2 / ratios**2)  # gradients at the units: what the second layer multiplies
    step = torch.maximum(torch.tensor(0.2), 5.0 / ratios) ** 2
    noise += step * power * (1.0**2 + (0.1 * ratios) ** 2)
    assert found == pytest.approx(float(ratios[noise.argmin()]), rel=0.03)


def test_a_clip_is_traded_where_it_rarely_cuts() -> None:
    """Large rows are held by one value in a hundred that is cut, small ones have no room: one scale fits both badly."""
    torch.manual_seed(0)
    model = nn.Sequential(_conv(3, 8, kernel_size=1, padding=0), nn.ReLU6(), _conv(8, 4, kernel_size=1, padding=0))
    x = torch.rand(64, 3, 8, 8)
    with torch.no_grad():
        model[0].weight[::2] = 3.0
        model[0].weight[1::2] *= 0.02
        model[0].bias[::2] = -1.0
        model[0].bias[1::2] = 5.9
        model[2].weight[:, 1::2] *= 50.0
        model[2].bias -= model(x).mean((0, 2, 3))
        exact = model(x)
        cut = (model[0](x) > 6).float().mean((0, 2, 3))
    assert 0 < float(cut[::2].min()) <= float(cut.max()) < 0.2
    noise = {}
    for clips in ("keep", "trade"):
        steps = ("fold_batch_norm", Equalize(objective="noise", clips=clips), "bias_correction")
        q = bs.quantize(model, [x], bits_recipe(8, 8, granularity="tensor", steps=steps))
        noise[clips] = float((q(x) - exact).square().sum())
    assert noise["trade"] < 0.5 * noise["keep"]


def test_options_of_the_other_objective_are_refused() -> None:
    with pytest.raises(ValueError, match="clips 'trade' weighs noise"):
        Equalize(clips="trade")
    with pytest.raises(ValueError, match="iterations, merge_bias belong to objective 'range'"):
        Equalize(objective="noise", iterations=3, merge_bias=True)


def test_a_dead_channel_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    model[0].weight.data[1] = 0.0
    x = torch.randn(8, 4)
    graph = _graph(model, x)
    kept = graph.get_submodule("2").weight[:, 1].clone()
    equalize(graph, read_batches(model, [x]), Equalize(), RECIPE)
    torch.testing.assert_close(graph.get_submodule("2").weight[:, 1], kept, rtol=0, atol=0)


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 30), st.data())
def test_tied_channels_have_the_least_of_them_as_root(count: int, data: st.DataObject) -> None:
    index = st.integers(0, count - 1)
    pairs = data.draw(st.lists(st.tuples(index, index), max_size=40))
    expected = list(range(count))
    for _ in range(count):  # by brute force: the least label spreads along every pair
        for a, b in pairs:
            expected[a] = expected[b] = min(expected[a], expected[b])
    found = _components(count, [(torch.tensor([a]), torch.tensor([b])) for a, b in pairs])
    assert found.tolist() == expected


@pytest.mark.parametrize("layer", [
    nn.Linear(4, 6), _conv(4, 6), _conv(4, 6, groups=2), nn.Conv1d(4, 4, 3, groups=4), nn.ConvTranspose2d(4, 6, 3),
    nn.ConvTranspose1d(4, 6, 3, groups=2), nn.Conv3d(2, 4, 2)], ids=str)  # fmt: skip
def test_scaling_channels_of_a_layer(layer: Any) -> None:
    reads = 4 if not isinstance(layer, nn.Conv3d) else 2
    shape = (2, reads) if isinstance(layer, nn.Linear) else (2, reads, *[6] * (layer.weight.ndim - 2))
    x = torch.randn(shape)
    factor = torch.rand(reads).double() + 0.5
    channels = factor.float().view(-1, *[1] * (x.ndim - 2))
    scaled = copy.deepcopy(layer)
    scale_inputs(scaled, factor)
    torch.testing.assert_close(scaled(x), layer(x * channels), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(in_range(scaled), in_range(layer) * factor, rtol=1e-6, atol=0)
    factor = torch.rand(out_range(layer).shape).double() + 0.5
    scaled = copy.deepcopy(layer)
    scale_outputs(scaled, factor)
    channels = factor.float().view(-1, *[1] * (x.ndim - 2))
    torch.testing.assert_close(scaled(x), layer(x) * channels, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out_range(scaled), out_range(layer) * factor, rtol=1e-6, atol=0)


def test_a_recipe_keeps_it_where_it_helps_and_says_so() -> None:
    torch.manual_seed(0)
    model = _spoiled(nn.Sequential(_conv(3, 8), nn.ReLU(), _conv(8, 8, groups=8), nn.ReLU(), _conv(8, 4)))
    x = torch.randn(64, 3, 8, 8)
    recipe = bits_recipe(8, 8, granularity="tensor", steps=("fold_batch_norm", "equalize"))
    q = bs.quantize(model, [x], recipe)
    plain = bs.quantize(model, [x], bits_recipe(8, 8, granularity="tensor", steps=("fold_batch_norm",)))
    assert any(note.startswith("equalize: equalized the output channels of 2 of 3") for note in q.report.notes)
    assert q.report.output_sqnr_db > plain.report.output_sqnr_db + 6


def test_a_recipe_undoes_it_where_it_does_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(_conv(3, 8), nn.ReLU(), _conv(8, 4))
    x = torch.randn(16, 3, 8, 8)

    def harmful(graph: fx.GraphModule, batches: Any, options: Equalize, recipe: Any) -> str:
        scale_outputs(graph.get_submodule("0"), torch.tensor([1e3] + [1.0] * 7).double())
        scale_inputs(graph.get_submodule("2"), torch.tensor([1e-3] + [1.0] * 7).double())
        return "spoiled"

    monkeypatch.setitem(rewrites, "equalize", harmful)
    q = bs.quantize(model, [x], bits_recipe(8, 8, steps=("fold_batch_norm", "equalize")))
    assert any(note.startswith("equalize: undone") for note in q.report.notes)
    plain = bs.quantize(model, [x], bits_recipe(8, 8, steps=("fold_batch_norm",)))
    torch.testing.assert_close(q(x), plain(x), rtol=0, atol=0)


def test_channels_are_followed_through_flattening() -> None:
    model = NETS["flattened"][0]
    x = torch.randn(2, 3, 8, 8)
    flow = ChannelFlow(_graph(model, x)).follow(read_batches(model, [x[:1]])[0])
    reads = flow.links["3"].reads
    assert reads is not None
    assert reads.view(4, 64).unique(dim=1).flatten().tolist() == flow.links["0"].gives.tolist()


@pytest.mark.usefixtures("data_folder")
@pytest.mark.parametrize(("name", "objective"), [
    ("resnet20", "range"), ("shufflenetv2_x0_5", "range"), ("dscnn_kws", "range"), ("dscnn_kws", "noise")])  # fmt: skip
def test_real_nets_keep_their_function(name: str, objective: str) -> None:
    model, calibration, test, _ = nets.load(name)
    batches = read_batches(model, calibration)
    graph = _graph(model, batches[0][0][0])
    x = test[0][0][:32]
    with torch.no_grad():
        before = graph(x)
        equalize(graph, batches, Equalize(objective=objective), RECIPE)
        after = graph(x)
    assert float((after - before).abs().max()) < 1e-5 * float(before.abs().max())
