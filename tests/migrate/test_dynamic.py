"""Dynamic models of torch.ao: the same integers; outputs apart by what its 7-bit inputs lose."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.ao.quantization as ao
from torch import Tensor, nn

import bitsmith as bs
from bitsmith.errors import MigrationError

pytestmark = pytest.mark.filterwarnings("ignore")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru = nn.LSTM(12, 16, 2, bidirectional=True, batch_first=True), nn.GRU(32, 8, batch_first=True)
        self.cell, self.head = nn.LSTMCell(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.gru(self.lstm(x)[0])
        return self.head(self.cell(y[:, -1])[0])


KINDS = {nn.Linear, nn.LSTM, nn.GRU, nn.LSTMCell, nn.GRUCell, nn.RNNCell}


def dynamic(model: nn.Module, **options: object) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        old: nn.Module = ao.quantize_dynamic(model.eval(), KINDS, **options)
    return old


def sqnr(signal: Tensor, other: Tensor) -> float:
    return float(10 * torch.log10(signal.square().sum() / (signal - other).square().sum()))


@pytest.mark.parametrize("target", ["onnxruntime", "torch"])
def test_integers_and_outputs(target: str, tmp_path) -> None:
    torch.manual_seed(0)
    model, x = Net(), torch.randn(8, 20, 12)
    old = dynamic(model)
    q = bs.migrate(old, x, target)
    for name, weight in old.lstm.get_weight().items():  # type: ignore[operator, union-attr]
        layer, direction = q.model.lstm, int(name.endswith("_reverse"))
        part = name.removesuffix("_reverse")
        assert torch.equal(getattr(layer, part)[direction], weight.int_repr())
        assert float(getattr(layer, f"{part}_scale")[direction]) == float(torch.tensor(weight.q_scale()))
    assert torch.equal(q.model.head.weight, old.head.weight().int_repr())  # type: ignore[operator, union-attr]
    assert torch.equal(q.model.cell.state.weight, old.cell.get_weight()["weight_hh"].int_repr())  # type: ignore
    with torch.no_grad():
        wanted, theirs = model(x), old(x)
    assert sqnr(wanted, q(x)) > sqnr(wanted, theirs) - 1.0
    assert sqnr(theirs, q(x)) > 30
    bs.save(q, tmp_path / "q")
    for structure in (old, model):
        assert torch.equal(bs.load(tmp_path / "q", structure)(x), q(x))


def test_a_linear_layer_within_what_its_input_is_rounded_by() -> None:
    """Each side rounds an input by at most half a step: 1/255 of its range here, 1/127 in torch.ao."""
    torch.manual_seed(1)
    old, x = dynamic(nn.Sequential(nn.Linear(40, 10))), torch.randn(32, 40)
    q = bs.migrate(old)
    spread = float(x.max() - x.min())
    bound = old[0].weight().dequantize().abs().sum(1) * spread * (0.5 / 255 + 0.5 / 127 + 1e-6)  # type: ignore
    assert bool(((q(x) - old(x)).abs() <= bound).all())


def test_the_file(tmp_path) -> None:
    torch.manual_seed(2)
    old, x = dynamic(nn.Sequential(nn.Linear(40, 10), nn.ReLU(), nn.Linear(10, 4))), torch.randn(32, 40)
    q = bs.migrate(old, x, "onnxruntime")
    bs.export_onnx(q, tmp_path / "m.onnx")
    assert bs.verify(q, tmp_path / "m.onnx", x).passed


def test_float16_weights() -> None:
    torch.manual_seed(3)
    model, x = nn.Sequential(nn.Linear(40, 10)), torch.randn(32, 40)
    old = dynamic(model, dtype=torch.float16)
    q = bs.migrate(old)
    assert q.model[0].weight.dtype == torch.float16
    torch.testing.assert_close(q(x), old(x), rtol=1e-3, atol=1e-3)


def test_per_channel_weights_beside_per_tensor_ones(tmp_path) -> None:
    torch.manual_seed(4)
    model, x = nn.Sequential(nn.Linear(40, 10), nn.Linear(10, 4)), torch.randn(32, 40)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        old = ao.quantize_dynamic(model, {"0": ao.per_channel_dynamic_qconfig, "1": ao.default_dynamic_qconfig})
    q = bs.migrate(old)
    assert q.model[0].weight_scale.shape == (10,)
    assert q.model[1].weight_scale.shape == ()
    bs.save(q, tmp_path)
    assert torch.equal(bs.load(tmp_path, model)(x), q(x))


def test_an_unknown_layer_is_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Embedding(10, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        configs = {nn.Linear: ao.default_dynamic_qconfig, nn.Embedding: ao.float_qparams_weight_only_qconfig}
        old = ao.quantize_dynamic(model, configs)
    with pytest.raises(MigrationError, match=r"1: torch.ao's quantized Embedding"):
        bs.migrate(old)
