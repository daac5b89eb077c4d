"""What export_pt2 and deploy hand over computes what the model computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bitsmith as bs
from bitsmith.deployment import open_engine
from bitsmith.errors import DataError, ExportError, PlacementError, RecipeError
from bitsmith.recipe import bits_recipe


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, left: Tensor, right: Tensor) -> dict[str, Tensor]:
        a, b = self.a(left), self.b(right)
        return {"difference": a - b, "sum": a + b}


@pytest.fixture
def conv() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(4, 8, 3), nn.ReLU(), nn.MaxPool1d(2), nn.Conv1d(8, 2, 1)), torch.randn(32, 4, 12)


@pytest.mark.parametrize("recipe", ["int8", "fp8", "int8-po2"])
def test_a_pt2_file_loads_without_bitsmith_s_model_and_computes_the_same(
    conv: tuple[nn.Module, Tensor], recipe: str, tmp_path: Path
) -> None:
    net, x = conv
    q = bs.quantize(net, [x], recipe)
    loaded = torch.export.load(str(bs.export_pt2(q, tmp_path / "m.pt2"))).module()
    for batch in (x[:1], x[:5]):
        torch.testing.assert_close(loaded(batch), q(batch), rtol=1e-4, atol=1e-4)


def test_a_pt2_file_takes_any_batch_of_large_images(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1)).eval(), torch.randn(7, 3, 64, 64)
    q = bs.quantize(net, [x])
    loaded = torch.export.load(str(bs.export_pt2(q, tmp_path / "m.pt2"))).module()
    for batch in (x[:1], x):
        torch.testing.assert_close(loaded(batch), q(batch), rtol=0, atol=0.02)


def test_a_one_dimensional_pool_runs_in_integers(conv: tuple[nn.Module, Tensor]) -> None:
    net, x = conv
    q = bs.quantize(net, [x])
    assert torch.equal(q.integer_executor()(x), q(x))
    assert torch.equal(bs.deploy(q)(x), q(x))


@pytest.mark.parametrize("symmetric", [True, False])
def test_weights_of_few_bits_are_deployed_in_bytes_and_multiplied_as_integers(
    symmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval(), torch.randn(32, 3, 10, 10)
    recipe = bits_recipe(4, 8)
    assert recipe.weights is not None
    weights = recipe.weights.model_copy(update={"symmetric": symmetric})
    q = bs.quantize(net, [x], recipe.model_copy(update={"weights": weights}))
    seen = []

    def watched(path: Path, *rest: Any) -> Any:
        seen.append(bs.verify(q, path, [x]))
        return open_engine(path, *rest)

    monkeypatch.setattr("bitsmith.deployment.open_engine", watched)
    differs = (bs.deploy(q)(x) - q(x)).abs() > 0.5 * seen[0].outputs[0].lsb
    assert seen[0].integer_kernels["QLinearConv"] == 2
    assert float(differs.float().mean()) < 0.01


def test_deployed_takes_keywords_in_any_order_and_returns_the_model_s_structure(tmp_path: Path) -> None:
    torch.manual_seed(0)
    left, right = torch.randn(32, 4), torch.randn(32, 4)
    q = bs.quantize(TwoInputs(), [{"left": left, "right": right}])
    expected = q(left, right)
    for run in (bs.deploy(q), bs.deploy(bs.export_onnx(q, tmp_path / "m.onnx"))):
        outputs = run(right=right, left=left)
        outputs = dict(zip(expected, outputs)) if isinstance(outputs, tuple) else outputs
        assert outputs.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(outputs[name], expected[name], rtol=1e-6, atol=1e-6)


def test_what_cannot_be_quantized_is_said_in_words(conv: tuple[nn.Module, Tensor]) -> None:
    net, x = conv
    q = bs.quantize(net, [x])
    cases = [
        (lambda: bs.quantize(nn.Linear, [x]), DataError, "the class Linear"),  # type: ignore[arg-type]
        (lambda: bs.quantize(net.double(), [x.double()]), DataError, "float64"),
        (lambda: bs.quantize(q, [x]), DataError, "quantized already"),
        (lambda: bs.quantize(net.float(), [x], noise_samples=0), DataError, "noise_samples=0"),
        (lambda: bs.quantize(net, [x], placement="foo"), RecipeError, "placement"),  # type: ignore[arg-type]
        (lambda: bs.quantize(net, [x], 8), RecipeError, "not a int"),  # type: ignore[arg-type]
        (lambda: q(x.double()), DataError, "float64"),
        (lambda: bs.export_onnx(bs.quantize(net, [x], bits_recipe(4, 4)), "m.onnx"), ExportError, "qcdq"),
        (lambda: bs.quantize(net, [x], bits_recipe(16, 16, min_coverage=0.5)), PlacementError, "min_coverage"),
    ]
    for call, error, words in cases:
        with pytest.raises(error, match=words):
            call()


def test_a_file_that_gains_no_speed_says_so(conv: tuple[nn.Module, Tensor]) -> None:
    net, x = conv
    assert any("not faster" in note for note in bs.quantize(net, [x], "int16").report.notes)
