"""Models that nothing can trace: layerwise quantization by module hooks, and a plain word where that ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bitsmith as bs
from bitsmith.calibrate.streaming import quantize_hooked
from bitsmith.capture import capture, read_batches
from bitsmith.capture.hooked import HookedModel
from bitsmith.errors import CaptureError, ExportError, NonFiniteError, PlacementError
from bitsmith.recipe import Override, load_recipe
from bitsmith.targets import get_target

LAYERWISE = load_recipe("int8").model_copy(update={"placement": "layerwise"})


class Branching(nn.Module):
    """Which layer runs depends on the values."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.dim, self.bright = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3)
        self.unused, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = self.bright(x) if x.mean() > 0.4 else self.dim(x)
        return self.head(x.mean((2, 3))) * self.head.in_features


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return Branching()


def data(batches: int = 6) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(8, 3, 8, 8) * (0.5 + index % 3) for index in range(batches)]


def hooked(model: nn.Module, batches: list[Any], recipe: Any = LAYERWISE) -> HookedModel:
    arguments = read_batches(model.eval(), batches)
    return quantize_hooked(model, arguments, recipe, get_target("onnxruntime"), reason="because")


def test_capture_names_the_line_and_what_to_change(net: nn.Module) -> None:
    with pytest.raises(CaptureError) as caught:
        capture(net, (torch.randn(2, 3, 8, 8),))
    message = str(caught.value)
    assert "test_hooked.py" in message
    assert "if x.mean() > 0.4" in message
    assert "torch.where" in message
    assert "placement='layerwise'" in message


def test_quantize_falls_back_to_hooks_for_layerwise_alone(net: nn.Module) -> None:
    q = bs.quantize(net.train(), data(), placement="layerwise")
    assert isinstance(q, HookedModel)
    assert "was in train mode" in q.report.notes[0]
    assert net.training
    with pytest.raises(ExportError, match="data-dependent"):
        bs.deploy(q)
    with pytest.raises(CaptureError):
        bs.quantize(net, data())


def test_each_layer_quantizes_its_own_input_and_weight(net: nn.Module) -> None:
    state = {name: value.clone() for name, value in net.state_dict().items()}
    q = hooked(net, data())
    x = data()[1]
    with torch.no_grad():
        exact = net(x)
    assert 10 * torch.log10(exact.square().sum() / (exact - q(x)).square().sum()) > 25.0
    wrapped = q.module.stem
    grid = wrapped.input_quantizer.require_grid()
    assert wrapped.input_quantizer(x).unique().numel() <= 256
    low, high = min(float(b.min()) for b in data()), max(float(b.max()) for b in data())
    assert float(grid.scale) == pytest.approx((high - low) / 255, rel=1e-3)  # so few values: no tail is cut
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert isinstance(net.stem, nn.Conv2d)


def test_the_report_counts_what_ran(net: nn.Module) -> None:
    q = hooked(net, data())
    rows = {layer.name: layer for layer in q.report.layers}
    assert rows["stem"].macs == 8 * 6 * 6 * 27
    assert rows["stem"].weight_bits == rows["stem"].input_bits == 8
    assert rows["stem"].sqnr_db > 30
    assert rows["unused"].note == "float: never called in calibration"
    assert rows["bright"].weight_bits == rows["dim"].weight_bits == 8  # both branches were taken
    assert q.report.output_sqnr_db > 25
    assert q.report.coverage.quantized_fraction == 1.0


def test_functional_work_counts_against_coverage() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.weight = nn.Linear(4, 4), nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.linear(x), self.weight)

    q = hooked(Half(), [torch.randn(8, 4)])
    assert q.report.coverage.quantized_fraction == 0.5
    with pytest.raises(PlacementError, match=r"only 50\.0%"):
        hooked(Half(), [torch.randn(8, 4)], LAYERWISE.model_copy(update={"min_coverage": 0.9}))


def test_overrides_hold_by_name_and_place(net: nn.Module) -> None:
    overrides = (Override(match="first", exclude=True), Override(match="head", exclude=True))
    q = hooked(net, data(), LAYERWISE.model_copy(update={"overrides": overrides}))
    notes = {layer.name: layer.note for layer in q.report.layers}
    assert notes["stem"] == notes["head"] == "float: excluded by an override"
    overrides = (Override(match="nothing", exclude=True),)
    with pytest.raises(PlacementError, match="'nothing' matches no layer; layers are stem"):
        hooked(net, data(), LAYERWISE.model_copy(update={"overrides": overrides}))


def test_what_needs_a_graph_is_refused(net: nn.Module, tmp_path: Path) -> None:
    q = hooked(net, data())
    (tmp_path / "m.onnx").write_bytes(b"")
    for action in (
        lambda: bs.export_onnx(q, tmp_path / "new.onnx"), lambda: bs.deploy(q), lambda: q.integer_executor(),
        lambda: bs.save(q, tmp_path / "saved"),
    ):  # fmt: skip
        with pytest.raises(ExportError, match=r"captured by module hooks: no graph to export.*because"):
            action()
    assert not (tmp_path / "new.onnx").exists()


def test_nan_names_layer_and_batch(net: nn.Module) -> None:
    batches = data()
    batches[2][0, 0, 0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"input of 'stem'.*calibration batch 2"):
        hooked(net, batches)
