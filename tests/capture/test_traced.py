"""The fallback: calls that torch.export cannot follow stay float operators; all around them is quantized."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import bitsmith as bs
from bitsmith.capture import capture
from bitsmith.errors import UnsupportedOperatorError


@torch.library.custom_op("bitsmith_tests::wobble", mutates_args=())
def wobble(x: Tensor, amount: float) -> Tensor:
    return torch.from_numpy(x.detach().numpy() * amount).sin()


@torch.library.custom_op("bitsmith_tests::halves", mutates_args=())
def halves(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    return x[:, :size].clone(), x[:, size:].clone()


@fx.wrap
def through_numpy(x: Tensor, rows: int) -> Tensor:
    """Plain Python on the user's side."""
    return torch.from_numpy(x.detach().numpy().reshape(rows, -1) ** 2)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3)
        self.pool, self.relu, self.drop = nn.MaxPool2d(2), nn.ReLU(inplace=True), nn.Dropout()
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.norm(self.conv1(x))))
        x = torch.ops.bitsmith_tests.wobble(x, 0.7)
        left, right = halves(x, x.shape[1] // 2)
        x = self.relu(self.conv2(torch.cat([right, left], 1)))
        x = F.adaptive_avg_pool2d(x, 1)
        squares = through_numpy(x, x.size(0))
        return self.head(self.drop(torch.cat([x.view(x.size(0), -1), squares], 1)))


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    model = Net().eval()
    model.norm.running_mean.normal_(0, 0.2)
    return model


def test_the_graph_computes_the_model_at_any_batch_size(net: nn.Module) -> None:
    graph = capture(net, (torch.randn(4, 3, 8, 8),))
    for samples in (1, 3, 7):
        x = torch.randn(samples, 3, 8, 8)
        torch.testing.assert_close(graph(x), net(x))


def test_it_is_quantized_and_simulated_with_the_call_in_float(net: nn.Module) -> None:
    x = torch.randn(32, 3, 8, 8)
    q = bs.quantize(net, [x])
    with torch.no_grad():
        exact = net(x[:5])
        assert 10 * torch.log10(exact.square().sum() / (exact - q(x[:5])).square().sum()) > 20.0
    assert [layer.name for layer in q.report.layers] == ["conv1", "conv2", "head"]
    assert q.report.coverage.quantized_fraction == 1.0
    assert not hasattr(q.graph, "norm")  # folded as ever


def test_export_refuses_the_call_by_its_name(net: nn.Module, tmp_path: Path) -> None:
    q = bs.quantize(net, [torch.randn(16, 3, 8, 8)])
    with pytest.raises(UnsupportedOperatorError, match=r"bitsmith_tests\.wobble"):
        bs.export_onnx(q, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_a_failed_capture_leaves_no_stand_ins(net: nn.Module) -> None:
    from bitsmith.capture import traced

    def never(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no")

    original, traced.export_graph = traced.export_graph, never  # type: ignore[assignment]
    try:
        with pytest.raises(RuntimeError):
            traced.trace_graph(net, ((torch.randn(4, 3, 8, 8),), {}))
    finally:
        traced.export_graph = original
    assert not traced._stand_ins
