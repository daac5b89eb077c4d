"""A model that lost its signal is refused, with the layer where it happened; on request it is given all the same."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import bitsmith as bs
from bitsmith.errors import CollapseError
from bitsmith.recipe import Recipe, bits_recipe
from bitsmith.report.diagnosis import diagnose
from bitsmith.report.model import LayerReport, Report


def _net() -> nn.Sequential:
    """Its second weight has one channel so large that the others vanish on a grid per tensor."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    with torch.no_grad():
        net[2].weight[0] *= 1e5
        net[2].bias[0] = -1e9
    return net


def _recipe(**fields: object) -> Recipe:
    return bits_recipe(8, 8, granularity="tensor", steps=()).model_copy(update=fields)


def test_a_collapsed_model_is_refused_and_the_layer_named() -> None:
    with pytest.raises(CollapseError, match=r"at chance level: .* dB at layer '[24]'"):
        bs.quantize(_net(), [torch.randn(64, 8)], _recipe(on_collapse="stop"))


def test_otherwise_it_is_given_with_the_diagnosis_as_a_note() -> None:
    q = bs.quantize(_net(), [torch.randn(64, 8)], _recipe())
    assert any(note.startswith("the quantized model is at chance level") for note in q.report.notes)


@pytest.mark.parametrize(
    ("layer", "remedy"),
    [
        ({"weight_bits": 4, "weight_sqnr_db": 5.0, "input_bits": 8}, "4-bit weight alone has 5.0 dB"),
        ({"weight_bits": 8, "weight_sqnr_db": 40.0, "input_bits": 3}, "What it reads has 3 bits"),
        ({"weight_bits": 8, "weight_sqnr_db": 40.0, "input_bits": 8}, "Its weight is fine"),
    ],
)
def test_the_remedy_fits_the_cause(layer: dict[str, float], remedy: str) -> None:
    report = Report(output_sqnr_db=-2.0, layers=[LayerReport(name="a", type="Linear", sqnr_db=-2.0, **layer)])  # type: ignore[arg-type]
    assert remedy in diagnose(report)
    assert "layer 'a', the first one" in diagnose(report)


def test_a_loss_behind_the_last_layer_is_told_apart() -> None:
    report = Report(output_sqnr_db=-2.0, layers=[LayerReport(name="a", type="Linear", sqnr_db=20.0)])
    assert "behind the last one" in diagnose(report)
