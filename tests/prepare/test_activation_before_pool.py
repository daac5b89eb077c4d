"""Activations move in front of max pooling, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bitsmith.capture import capture
from bitsmith.capture.ops import op_of
from bitsmith.prepare.activation_before_pool import activation_before_pool


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU6(), nn.Hardtanh(-0.5, 0.5)])
def test_the_function_stays(activation: nn.Module) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.MaxPool2d(2), nn.MaxPool2d(2), activation, nn.Conv2d(3, 2, 1)).eval()
    x = torch.randn(4, 2, 14, 14) * 8
    graph = capture(net, ((x,), {}))
    activation_before_pool(graph)
    roles = [op_of(node).name for node in graph.graph.nodes if node.op.startswith("call")]
    assert roles[1] in ("relu", "clamp")
    assert roles[2:4] == ["max_pool", "max_pool"]
    assert torch.equal(graph(x), net(x))
    graph.graph.lint()


def test_averages_do_not_commute() -> None:
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.AvgPool2d(2), nn.ReLU()).eval()
    graph = capture(net, ((torch.randn(4, 2, 8, 8),), {}))
    before = [node.name for node in graph.graph.nodes]
    activation_before_pool(graph)
    assert [node.name for node in graph.graph.nodes] == before
