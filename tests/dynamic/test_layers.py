"""Dynamic layers against the float layers on the same grids, and against torch's own dynamic quantization."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import bitsmith as bs
from bitsmith.dynamic.laws import dequantized
from bitsmith.dynamic.layers import DynamicLayer


def sqnr(exact: Any, found: Any) -> float:
    """Signal to noise over all tensors of an output, in dB."""
    pairs = [(a, b) for a, b in zip(_tensors(exact), _tensors(found), strict=True)]
    signal = sum(float(a.double().square().sum()) for a, _ in pairs)
    noise = sum(float((a - b).double().square().sum()) for a, b in pairs)
    assert all(a.shape == b.shape for a, b in pairs)
    return 300.0 if not noise else 10 * float(torch.log10(torch.tensor(signal / noise)))


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, PackedSequence):
        return [value.data]
    leaves = value if isinstance(value, tuple | list) else [value]
    return [t for leaf in leaves for t in (_tensors(leaf) if not isinstance(leaf, Tensor) else [leaf])]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


SEQUENCES = [
    (kind, layers, both, first)
    for kind in (nn.LSTM, nn.GRU, nn.RNN)
    for layers, both, first in ((1, False, False), (2, True, True), (2, False, True))
]


@pytest.mark.parametrize(("kind", "layers", "both", "first"), SEQUENCES)
@pytest.mark.parametrize("target", ["onnxruntime", "torch"])
def test_recurrent_layers_take_and_give_what_torch_does(
    kind: Any, layers: int, both: bool, first: bool, target: str
) -> None:
    net = kind(12, 16, layers, bidirectional=both, batch_first=first).eval()
    q = bs.quantize_dynamic(net, target=target)
    x = torch.randn(4, 6, 12)
    batch = 4 if first else 6
    h = torch.randn(layers * (2 if both else 1), batch, 16)
    state = (h, torch.randn_like(h)) if kind is nn.LSTM else h
    one = (h[:, 0], state[1][:, 0]) if kind is nn.LSTM else h[:, 0]
    lengths = [3, 6, 1, 5] if first else [4, 1, 3, 2, 4, 1]
    packed = pack_padded_sequence(x, lengths, batch_first=first, enforce_sorted=False)
    with torch.no_grad():
        for args in ((x,), (x, state), (x[0],), (x[0], one), (packed,), (packed, state)):
            exact, found = net(*args), q(*args)
            assert sqnr(exact, found) > 33


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_float16_recurrence_equals_torch_on_the_rounded_weights(kind: Any) -> None:
    net = kind(12, 16, 2, bidirectional=True).eval()
    rounded = copy.deepcopy(net)
    for name, p in rounded.named_parameters():
        if "weight" in name:
            p.data = p.data.half().float()
    x = torch.randn(7, 3, 12)
    packed = pack_padded_sequence(x, [7, 2, 5], enforce_sorted=False)
    q = bs.quantize_dynamic(net, "fp16-dynamic")
    with torch.no_grad():
        for value in (x, packed):
            assert sqnr(rounded(value), q(value)) > 110


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells(kind: Any) -> None:
    cell = kind(12, 16)
    q = bs.quantize_dynamic(cell)
    x, h = torch.randn(5, 12), torch.randn(5, 16)
    state = (h, torch.randn(5, 16)) if kind is nn.LSTMCell else h
    with torch.no_grad():
        for args in ((x,), (x, state), (x[0],)):
            assert sqnr(cell(*args), q(*args)) > 33


ATTENTION = {
    "self": {},
    "sequence first": {"batch_first": False},
    "other sizes": {"kdim": 20, "vdim": 24},
    "no bias": {"bias": False},
    "more keys": {"add_bias_kv": True, "add_zero_attn": True},
}


@pytest.mark.parametrize("options", ATTENTION.values(), ids=ATTENTION)
@pytest.mark.parametrize("need_weights", [True, False])
def test_attention(options: dict[str, Any], need_weights: bool) -> None:
    options = {"batch_first": True, **options}
    net = nn.MultiheadAttention(32, 4, **options).eval()
    if net.in_proj_bias is not None:
        nn.init.normal_(net.in_proj_bias)
    q = bs.quantize_dynamic(net)
    x, y = torch.randn(2, 5, 32), torch.randn(2, 7, 32)
    key, value = (torch.randn(2, 7, net.kdim), torch.randn(2, 7, net.vdim))
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[1, 4:] = True
    mask = torch.ones(5, 7, dtype=torch.bool).triu(2)
    calls: list[tuple[tuple[Tensor, ...], dict[str, Any]]] = [((x, key, value), {"key_padding_mask": padding})]
    calls.append(((x, key, value), {"attn_mask": mask.float() * -2.0}))
    calls.append(((x, key, value), {"attn_mask": mask.expand(8, 5, 7), "average_attn_weights": False}))
    if "kdim" not in options:
        calls += [((x, x, x), {}), ((x, y, y), {"attn_mask": mask}), ((x[0], y[0], y[0]), {})]
    with torch.no_grad():
        for args, kwargs in calls:
            if not options["batch_first"] and args[0].ndim == 3:
                args = tuple(_turned(args))
            exact, found = (m(*args, need_weights=need_weights, **kwargs) for m in (net, q))
            assert (found[1] is None) == (not need_weights)
            assert sqnr([t for t in exact if t is not None], [t for t in found if t is not None]) > 33


def _turned(args: tuple[Tensor, ...]) -> list[Tensor]:
    """Sequence first, tensors that were one staying one."""
    made = {id(t): t.transpose(0, 1) for t in args}
    return [made[id(t)] for t in args]


def test_transformer_layers_run_through_the_quantized_projections() -> None:
    net = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2).eval()
    q = bs.quantize_dynamic(net)
    x, padding = torch.randn(2, 9, 32), torch.zeros(2, 9, dtype=torch.bool)
    padding[0, 6:] = True
    with torch.no_grad():
        for options in ({}, {"src_key_padding_mask": padding}):
            exact, found = net(x, **options), q(x, **options)
            rows = ~padding if options else torch.ones_like(padding)
            assert 33 < sqnr(exact[rows], found[rows]) < 60  # not the float fast path
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(32, 4, 64), 1).eval()
    with torch.no_grad():
        args = torch.randn(5, 2, 32), torch.randn(7, 2, 32)
        assert sqnr(decoder(*args), bs.quantize_dynamic(decoder)(*args)) > 33


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("padding", [None, 3])
def test_embedding_bags_equal_torch_on_the_dequantized_table(mode: str, padding: int | None) -> None:
    bag = nn.EmbeddingBag(20, 6, mode=mode, padding_idx=padding)
    q = bs.quantize_dynamic(bag)
    reference = copy.deepcopy(bag)
    reference.weight.data = dequantized(q.model.weight, q.model.weight_scale)
    indices = torch.randint(0, 20, (5, 7))
    indices[0, :3] = 3
    flat, offsets = indices.flatten(), torch.tensor([0, 2, 2, 30])
    calls: list[dict[str, Any]] = [{"input": indices}, {"input": flat, "offsets": offsets}]
    if mode == "sum":
        calls.append({"input": indices, "per_sample_weights": torch.rand(5, 7)})
    for kwargs in calls:
        (first, *rest) = kwargs.values()
        names = list(kwargs)[1:]
        expected = reference(first, **dict(zip(names, rest)))
        assert torch.allclose(q(first, **dict(zip(names, rest))), expected, atol=1e-6)


@pytest.mark.parametrize("recipe", ["int8-dynamic", "int8-dynamic-token", "fp16-dynamic"])
def test_linear_and_embedding_are_their_definition(recipe: str) -> None:
    net = nn.Sequential(nn.Embedding(11, 700), nn.Linear(700, 9))
    q = bs.quantize_dynamic(net, recipe)
    table, layer = q.model
    indices = torch.randint(0, 11, (2, 3))
    x = dequantized(table.weight, table.weight_scale)[indices]
    assert torch.equal(table(indices), x)
    if recipe != "fp16-dynamic":
        if recipe.endswith("token"):
            scale = x.abs().amax(-1, keepdim=True) / 127
            x = (x / scale).round() * scale
        else:
            low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
            scale = (high - low) / 255
            zero = round(-low / scale)
            x = ((x / scale).round() + zero).clamp(0, 255).sub(zero) * scale
    expected = x.double() @ dequantized(layer.weight, layer.weight_scale).double().t() + layer.bias
    assert torch.allclose(q(indices).double(), expected, atol=1e-4)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.Linear, nn.LSTMCell])
def test_as_good_as_torch_ao(kind: Any) -> None:
    """The quantization that this replaces has 7-bit activations and one scale per weight."""
    import torch.ao.quantization as ao

    net = nn.Sequential(kind(64, 64)).eval()
    x = torch.randn(8, 64) if kind is not nn.LSTM else torch.randn(8, 4, 64)
    with torch.no_grad():
        theirs = ao.quantize_dynamic(net, {kind})(x)
        assert sqnr(net(x), bs.quantize_dynamic(net)(x)) > sqnr(net(x), theirs)


def test_the_users_model_is_untouched_and_shared_layers_stay_shared() -> None:
    shared = nn.Linear(8, 8)
    net = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, nn.Conv1d(4, 4, 1))})
    net.forward = lambda x: net["b"](net["a"](x))  # type: ignore[method-assign]
    before = {name: value.clone() for name, value in net.state_dict().items()}
    q = bs.quantize_dynamic(net)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert type(net["a"]) is nn.Linear
    assert q.model["a"] is q.model["b"][0]
    assert isinstance(q.model["a"], DynamicLayer)
    assert [layer.name for layer in q.report.layers] == ["a"]
