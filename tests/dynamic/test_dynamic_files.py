"""Files and torch's kernels against the simulation."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._pytree import tree_leaves

import bitsmith as bs
from bitsmith.errors import DataError
from bitsmith.verify.engines import open_engine


class Cells(nn.Module):
    """A cell stepped by hand, as streaming models do."""

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.cell, self.head = kind(12, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.head(state[0] if isinstance(state, tuple) else state)


class Stateful(nn.Module):
    """An LSTM whose states go in and out."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(12, 16, 2, batch_first=True)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, (h, c) = self.lstm(x, (h.transpose(0, 1), c.transpose(0, 1)))
        return y, h.transpose(0, 1), c.transpose(0, 1)


def _ids() -> Tensor:
    return torch.randint(0, 30, (3, 5))


def _x() -> Tensor:
    return torch.randn(3, 5, 12)


CASES: dict[str, tuple[Any, Any, dict[str, int]]] = {
    "linear": (
        lambda: nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 4)), _x, {"DynamicQuantizeMatMul": 2},
    ),
    "lstm": (lambda: nn.LSTM(12, 16, batch_first=True), _x, {"DynamicQuantizeLSTM": 1}),
    "bidirectional": (lambda: nn.LSTM(12, 16, 2, bidirectional=True), _x, {"DynamicQuantizeLSTM": 2}),
    "gru": (lambda: nn.GRU(12, 16, 2, bidirectional=True, bias=False), _x, {"GRU": 2}),
    "rnn": (lambda: nn.RNN(12, 16, nonlinearity="relu"), _x, {"RNN": 1}),
    "lstm cell": (lambda: Cells(nn.LSTMCell), _x, {"DynamicQuantizeMatMul": 11}),
    "gru cell": (lambda: Cells(nn.GRUCell), _x, {"DynamicQuantizeMatMul": 11}),
    "states": (Stateful, lambda: (_x(), torch.randn(3, 2, 16), torch.randn(3, 2, 16)), {"DynamicQuantizeLSTM": 2}),
    "embedding": (lambda: nn.Sequential(nn.Embedding(30, 12), nn.Linear(12, 4)), _ids, {"DynamicQuantizeMatMul": 1}),
    "bag": (lambda: nn.EmbeddingBag(30, 12, mode="mean", padding_idx=2), _ids, {}),
    "encoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(12, 2, 24, batch_first=True), 1), _x,
        {"DynamicQuantizeMatMul": 3, "QAttention": 1, "LayerNormalization": 2, "SkipLayerNormalization": 0},
    ),
}  # fmt: skip


def _inputs(make: Any) -> tuple[Tensor, ...]:
    value = make()
    return value if isinstance(value, tuple) else (value,)


@pytest.mark.parametrize("recipe", ["int8-dynamic", "int8-dynamic-tensor", "int8-dynamic-token", "fp16-dynamic"])
@pytest.mark.parametrize(("build", "make", "kernels"), CASES.values(), ids=CASES)
def test_files_compute_what_the_simulation_does(
    build: Any, make: Any, kernels: dict[str, int], recipe: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    example = _inputs(make)
    q = bs.quantize_dynamic(build().eval(), recipe, example_inputs=example)
    path = bs.export_onnx(q, tmp_path / "m.onnx")
    # One thread: onnxruntime's LSTM gives each thread some rows, and each a scale of its own.
    engine = open_engine(path, threads=1)
    if recipe in ("int8-dynamic", "int8-dynamic-tensor"):
        assert {name: engine.kernels[name] for name in kernels} == kernels
    for _ in range(3):
        x = _inputs(make)
        outputs = engine.run({n: t.numpy() for n, t in zip(engine.inputs, x, strict=True)})
        for found, expected in zip(outputs, tree_leaves(q(*x)), strict=True):
            lsb = float(expected.max() - expected.min()) / 255
            assert np.abs(found - expected.numpy()).max() < 0.02 * lsb
    certificate = bs.verify(q, path, [example])
    assert certificate.passed, certificate.verdict


@pytest.mark.parametrize("opset", [13, 17, 18])
@pytest.mark.parametrize("recipe", ["int8-dynamic", "int8-dynamic-token"])
def test_older_opsets(opset: int, recipe: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 12), nn.LayerNorm(12), nn.LSTM(12, 8))
    x = torch.randn(5, 3, 12)
    q = bs.quantize_dynamic(net, recipe, example_inputs=x)
    path = bs.export_onnx(q, tmp_path / "m.onnx", opset=opset)
    assert bs.verify(q, path, x).passed


def test_batch_and_length_are_free_in_the_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(30, 12), nn.TransformerEncoderLayer(12, 2, 24, batch_first=True)).eval()
    q = bs.quantize_dynamic(net, example_inputs=_ids())
    engine = open_engine(bs.export_onnx(q, tmp_path / "m.onnx"))
    for shape in ((1, 9), (4, 2), (1, 1)):
        x = torch.randint(0, 30, shape)
        (found,) = engine.run({engine.inputs[0]: x.numpy()})
        assert np.allclose(found, q(x).numpy(), atol=1e-3)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("padding", [None, 3])
def test_bags_by_offsets_have_a_file(mode: str, padding: int | None) -> None:
    torch.manual_seed(0)
    last = mode == "mean"
    q = bs.quantize_dynamic(nn.EmbeddingBag(20, 6, mode=mode, padding_idx=padding, include_last_offset=last))
    q(torch.randint(0, 20, (12,)), torch.tensor([0, 3, 3, 12]))
    run = bs.deploy(q, threads=1)
    for count, offsets in ((12, [0, 3, 3, 12]), (30, [0, 0, 4, 20, 29, 30])):
        args = torch.randint(0, 20, (count,)), torch.tensor(offsets)
        torch.testing.assert_close(run(*args), q(*args), rtol=0, atol=1e-6)


def test_a_quantized_input_is_quantized_once_for_all_its_readers(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(12, 8), nn.Linear(12, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) * self.b(x)

    q = bs.quantize_dynamic(Two(), example_inputs=torch.randn(3, 12))
    path = bs.export_onnx(q, tmp_path / "m.onnx")
    counts = Counter(node.op_type for node in onnx.load(path).graph.node)
    assert (counts["DynamicQuantizeLinear"], counts["MatMulInteger"]) == (1, 2)


def test_a_wrong_file_fails_its_certificate(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 12)
    q, other = (bs.quantize_dynamic(nn.Linear(12, 4), example_inputs=x) for _ in range(2))
    certificate = bs.verify(q, bs.export_onnx(other, tmp_path / "m.onnx"), x)
    assert not certificate.passed
    assert certificate.float_bytes == (12 * 4 + 4) * 4


@pytest.mark.parametrize("recipe", ["int8-dynamic", "int8-dynamic-tensor", "int8-dynamic-token", "fp16-dynamic"])
@pytest.mark.parametrize(("build", "make", "kernels"), CASES.values(), ids=CASES)
def test_torch_kernels_agree_with_the_simulation(build: Any, make: Any, kernels: dict[str, int], recipe: str) -> None:
    torch.manual_seed(0)
    q, x = bs.quantize_dynamic(build().eval(), recipe, target="torch"), _inputs(make)
    deployed = bs.deploy(q, engine="torch")
    for found, expected in zip(tree_leaves(deployed(*x)), tree_leaves(q(*x)), strict=True):
        lsb = float(expected.max() - expected.min()) / 255
        assert float((found - expected).abs().max()) < 2 * lsb


def test_torch_kernels_take_packed_sequences() -> None:
    torch.manual_seed(0)
    for kind in (nn.LSTM, nn.GRU, nn.RNN):
        q = bs.quantize_dynamic(kind(12, 16, 2, bidirectional=True), target="torch")
        packed = pack_padded_sequence(torch.randn(6, 3, 12), [2, 6, 3], enforce_sorted=False)
        found, expected = bs.deploy(q, engine="torch")(packed), q(packed)
        assert torch.allclose(found[0].data, expected[0].data, atol=0.03)
        for a, b in zip(tree_leaves(found[1]), tree_leaves(expected[1]), strict=True):
            assert torch.allclose(a, b, atol=0.03)


def test_deploy_answers_in_the_models_own_structure() -> None:
    torch.manual_seed(0)
    q = bs.quantize_dynamic(nn.LSTM(12, 16))
    x = torch.randn(5, 1, 12)
    y, (h, c) = q(x)
    found, (found_h, found_c) = bs.deploy(q, threads=1)(x)
    for a, b in ((y, found), (h, found_h), (c, found_c)):
        assert torch.allclose(a, b, atol=1e-4)


def test_auto_takes_the_fastest_engine_of_a_dynamic_model() -> None:
    net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    q, x = bs.quantize_dynamic(net), torch.randn(3, 16)
    with pytest.raises(DataError, match="run it once"):
        bs.deploy(q, "auto")
    expected = q(x)
    deployed = bs.deploy(q, "auto")
    assert {"onnxruntime", "torch"} <= set(deployed.timings)
    assert deployed.engine.name == min(deployed.timings, key=lambda name: deployed.timings[name].median_ms)
    torch.testing.assert_close(deployed(x), expected, rtol=0, atol=1e-5)
