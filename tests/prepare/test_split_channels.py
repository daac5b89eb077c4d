"""Channel splitting: the function stays, outliers are halved, and the wider model quantizes, saves and exports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bitsmith as bs
from bitsmith.capture import capture, read_batches
from bitsmith.prepare.split_channels import split_channels
from bitsmith.prepare.weights import in_range, out_range
from bitsmith.recipe import bits_recipe, load_recipe
from bitsmith.steps import SplitChannels

INT8 = load_recipe("int8")


class _Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Any:
        y = torch.relu(self.a(x))
        y = torch.relu(y + self.b(y))
        return self.c(y.mean((2, 3)))


MODELS: dict[str, tuple[Any, tuple[int, ...], int]] = {  # the model, its input, and how many spaces can be widened
    "chain": (lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 4, 3)),
              (4, 3, 10, 10), 1),
    "flattened": (lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 4)),
                  (4, 3, 8, 8), 1),
    "linear": (lambda: nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 7), nn.ReLU(), nn.Linear(7, 3)),
               (16, 6), 2),
    "residual": (_Residual, (4, 3, 8, 8), 1),
    "depthwise": (lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6)),
                  (4, 3, 8, 8), 0),
}  # fmt: skip


def _model(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, shape, _ = MODELS[name]
    model = make().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.weight[:, 1 % module.weight.shape[1]] *= 8
                module.weight[2] *= 8
    return model, torch.randn(shape)


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("name", MODELS)
def test_the_function_stays(name: str, side: Any) -> None:
    model, x = _model(name)
    batches = read_batches(model, [x])
    graph = capture(model, batches[0])
    with torch.no_grad():
        before = graph(x)
        note = split_channels(graph, batches, SplitChannels(ratio=0.3, side=side), INT8)
        torch.testing.assert_close(graph(x), before, rtol=1e-5, atol=1e-5 * float(before.abs().max()))
    assert f"in {MODELS[name][2]} places" in note


@pytest.mark.parametrize("side", ["input", "output"])
def test_the_largest_channel_is_halved(side: Any) -> None:
    model, x = _model("linear")
    batches = read_batches(model, [x])
    graph = capture(model, batches[0])

    def ranges() -> Tensor:
        return in_range(graph.get_submodule("2")) if side == "input" else out_range(graph.get_submodule("0"))

    before = ranges()
    with torch.no_grad():
        split_channels(graph, batches, SplitChannels(ratio=0.1, side=side), INT8)
    after = ranges()
    largest = int(before.argmax())
    assert len(after) == len(before) + 1
    assert float(after[largest]) == float(after[-1]) == float(before[largest]) / 2
    first, second = graph.get_submodule("0"), graph.get_submodule("2")
    assert isinstance(first, nn.Linear)
    assert isinstance(second, nn.Linear)
    assert first.out_features == second.in_features == 11


def test_wider_models_are_quantized_saved_and_exported(tmp_path: Path) -> None:
    model, x = _model("residual")
    x = torch.randn(64, 3, 8, 8)
    steps = ("fold_batch_norm", {"split_channels": {"ratio": 0.25}})
    q = bs.quantize(model, [x], bits_recipe(8, 8, granularity="tensor", steps=steps))
    assert any(note.startswith("split_channels: split 2 channels") for note in q.report.notes), q.report.notes
    bs.save(q, tmp_path / "saved")
    torch.testing.assert_close(bs.load(tmp_path / "saved", _model("residual")[0])(x), q(x), rtol=0, atol=0)
    path = bs.export_onnx(q, tmp_path / "m.onnx")
    certificate = bs.verify(q, path, [x])
    assert certificate.passed
    assert certificate.max_lsb == 0
