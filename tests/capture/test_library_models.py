"""Networks of torchvision and timm as they ship: captured, their norms folded, the same function."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from bitsmith.capture import capture
from bitsmith.prepare import fold_batch_norm

sys.path.insert(0, str(Path(__file__).parents[2]))


def _library(name: str) -> object:
    """torchvision's models or timm; torchvision's compiled operators, which no classifier calls, may fail."""
    try:
        from benchmarks.nets.torchvision_nets import import_torchvision_models

        models = import_torchvision_models()
        return models if name == "torchvision" else importlib.import_module(name)
    except Exception as error:  # an ImportError or what a mismatched binary raises
        pytest.skip(f"{name} cannot be imported here: {type(error).__name__}: {str(error)[:80]}")


def _settled(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model.eval()


@pytest.mark.parametrize(
    ("library", "name", "left"),
    [
        ("torchvision", "mobilenet_v3_small", 0),
        ("torchvision", "shufflenet_v2_x0_5", 0),
        ("torchvision", "efficientnet_b0", 0),  # in-place SiLU in front of pointwise convolutions
        ("timm", "resnet18", 0),
        ("timm", "efficientvit_b0", 0),  # an autocast region
        ("timm", "repvgg_a0", 17),  # identity branches that are a norm alone
    ],
)
def test_captured_and_folded(library: str, name: str, left: int) -> None:
    models = _library(library)
    torch.manual_seed(0)
    model = getattr(models, name)(weights=None) if library == "torchvision" else models.create_model(name)
    model = _settled(model)
    graph = capture(model, (torch.randn(2, 3, 64, 64),))
    x = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        exact = model(x)
        torch.testing.assert_close(graph(x), exact)
        fold_batch_norm(graph)
        torch.testing.assert_close(graph(x), exact, rtol=1e-3, atol=1e-5 * float(exact.abs().max()))
    norms = [m for m in graph.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == left
    layers = {str(node.target) for node in graph.graph.nodes if node.op == "call_module"}
    assert layers <= set(dict(model.named_modules()))
