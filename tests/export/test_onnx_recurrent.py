"""Float recurrent layers and cells as ONNX, against torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from bitsmith.capture import capture
from bitsmith.export.onnx import build_onnx


class Steps(nn.Module):
    """A cell on each step of a sequence, from a state that is given."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        state: Any = (h, h + 1) if isinstance(self.cell, nn.LSTMCell) else h
        for step in x.unbind(1):
            state = self.cell(step, state)
        return state[0] + state[1] if isinstance(state, tuple) else state


class WithState(nn.Module):
    """A layer that starts from given states."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, h: Tensor) -> Any:
        h = h.transpose(0, 1).contiguous()
        return self.layer(x, (h, h * 2) if isinstance(self.layer, nn.LSTM) else h)


SEQUENCE, STATE = torch.randn(4, 6, 10), torch.randn(4, 12)
CASES: dict[str, tuple[nn.Module, tuple[Tensor, ...]]] = {
    "lstm": (nn.LSTM(10, 12, batch_first=True), (SEQUENCE,)),
    "lstm stacked": (nn.LSTM(10, 12, 2, bidirectional=True, bias=False), (SEQUENCE,)),
    "lstm states": (WithState(nn.LSTM(10, 12, 2, batch_first=True)), (SEQUENCE, torch.randn(4, 2, 12))),
    "gru": (nn.GRU(10, 12, batch_first=True), (SEQUENCE,)),
    "gru stacked": (nn.GRU(10, 12, 2, bidirectional=True), (SEQUENCE,)),
    "gru states": (WithState(nn.GRU(10, 12, bidirectional=True, batch_first=True)), (SEQUENCE, torch.randn(4, 2, 12))),
    "rnn tanh": (nn.RNN(10, 12, bidirectional=True), (SEQUENCE,)),
    "rnn relu": (nn.RNN(10, 12, 2, nonlinearity="relu"), (SEQUENCE,)),
    "lstm cell": (Steps(nn.LSTMCell(10, 12)), (SEQUENCE, STATE)),
    "gru cell": (Steps(nn.GRUCell(10, 12)), (SEQUENCE, STATE)),
    "rnn cell": (Steps(nn.RNNCell(10, 12)), (SEQUENCE, STATE)),
    "relu cell": (Steps(nn.RNNCell(10, 12, bias=False, nonlinearity="relu")), (SEQUENCE, STATE)),
}


@pytest.mark.parametrize(("net", "inputs"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("opset", [13, None])
def test_recurrent_layers_in_the_file(net: nn.Module, inputs: tuple[Tensor, ...], opset: int | None) -> None:
    model = build_onnx(capture(net.eval(), inputs), opset=opset)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    found = session.run(None, {n: t.numpy() for n, t in zip(names, inputs, strict=True)})
    with torch.no_grad():
        expected = tree_leaves(net(*inputs))
    for a, b in zip(found, expected, strict=True):
        assert np.allclose(a, b.numpy(), atol=1e-5)
