"""quantize_dynamic: recipes, overrides, refusals, what is kept and what it says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import bitsmith as bs
from bitsmith.errors import CheckpointError, DataError, NonFiniteError, PlacementError, RecipeError
from bitsmith.grid import IntFormat, TensorSpec


class Tagger(nn.Module):
    """Embedding, LSTM, linear: what dynamic quantization is for."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(30, 12)
        self.lstm = nn.LSTM(12, 16, batch_first=True, bidirectional=True)
        self.head = nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(self.table(x))[0])


def test_a_model_in_which_nothing_would_change_is_an_error_that_says_what_it_holds() -> None:
    with pytest.raises(PlacementError, match=r"1 Conv2d, 2 ReLU.*Linear, LSTM.*bitsmith.quantize"):
        bs.quantize_dynamic(nn.Sequential(nn.ReLU(), nn.Conv2d(3, 4, 3), nn.ReLU()))
    with pytest.raises(PlacementError, match="the model stays float: with one output"):
        bs.quantize_dynamic(nn.Linear(8, 1))
    with pytest.raises(RecipeError, match=r"not a set of layer types.*type:LSTM"):
        bs.quantize_dynamic(nn.Linear(8, 8), {nn.Linear})  # type: ignore[arg-type]
    with pytest.raises(PlacementError, match="excluded"):
        bs.quantize_dynamic(nn.Linear(3, 4), overrides=[bs.Override(match="*", exclude=True)])


def test_overrides_exclude_and_change_layers() -> None:
    weights = TensorSpec(format=IntFormat(8), granularity="tensor")
    overrides = [bs.Override(match="type:LSTM", exclude=True), bs.Override(match="last", weights=weights)]
    q = bs.quantize_dynamic(Tagger(), overrides=overrides)
    assert type(q.model.lstm) is nn.LSTM
    assert q.model.head.weight_scale.ndim == 0
    assert [layer.name for layer in q.report.layers] == ["table", "head"]
    with pytest.raises(PlacementError, match=r"'nothing' matches no layer; layers are table, lstm, head"):
        bs.quantize_dynamic(Tagger(), overrides=[bs.Override(match="nothing", exclude=True)])


def test_the_report_says_what_runs_in_integers() -> None:
    q = bs.quantize_dynamic(nn.Sequential(nn.Linear(8, 8), nn.GRU(8, 8)), overrides=())
    linear, gru = q.report.layers
    assert (linear.weight_bits, linear.input_bits, linear.integer) == (8, 8, True)
    assert (gru.weight_bits, gru.input_bits, gru.integer) == (8, None, False)
    assert q.report.coverage.float_layers == ["1"]
    assert linear.weight_sqnr_db is not None
    assert 38 < linear.weight_sqnr_db < 55
    assert "dynamic" in str(q.report)


REFUSED = {
    "static recipe": ("int8", "static activations"),
    "16 bits": (
        bs.Recipe(weights=TensorSpec(format=IntFormat(16)), placement="dynamic", steps=(), bias=None),
        "8 bits, signed and symmetric",
    ),
    "signed affine": (
        bs.Recipe(
            weights=TensorSpec(format=IntFormat(8)),
            activations=TensorSpec(format=IntFormat(8), symmetric=False, dynamic=True),
            placement="dynamic", steps=(), bias=None,
        ),
        "unsigned and affine per tensor",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("recipe", "message"), REFUSED.values(), ids=REFUSED)
def test_recipes_that_no_kernel_takes_are_refused(recipe: str | bs.Recipe, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        bs.quantize_dynamic(nn.Linear(3, 4), recipe)


def test_what_is_wrong_is_said() -> None:
    with pytest.raises(RecipeError, match="quantize_dynamic"):
        bs.quantize(nn.Linear(3, 4), [torch.randn(4, 3)], "int8-dynamic")
    with pytest.raises(RecipeError, match="onnxruntime and torch"):
        bs.quantize_dynamic(nn.Linear(3, 4), target="generic")
    with pytest.raises(PlacementError, match="already"):
        bs.quantize_dynamic(bs.quantize_dynamic(nn.Linear(3, 4)))
    with pytest.raises(DataError, match=r"run the model once, or pass\s+example_inputs"):
        bs.export_onnx(bs.quantize_dynamic(nn.Linear(3, 4)), "never.onnx")
    with pytest.raises(DataError, match="max_norm"):
        bs.quantize_dynamic(nn.Embedding(4, 4, max_norm=1.0))
    broken = nn.Linear(3, 4)
    broken.weight.data[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="weight"):
        bs.quantize_dynamic(broken)


def test_an_lstm_with_a_projection_stays_float_and_is_named() -> None:
    q = bs.quantize_dynamic(nn.Sequential(nn.Linear(8, 8), nn.LSTM(8, 8, proj_size=4)))
    assert any("1 stays float" in note and "proj_size" in note for note in q.report.notes)


@pytest.mark.parametrize("recipe", ["int8-dynamic", "int8-dynamic-token", "fp16-dynamic"])
def test_saved_and_loaded_models_compute_the_same(recipe: str, tmp_path: Path) -> None:
    q, x = bs.quantize_dynamic(Tagger(), recipe), torch.randint(0, 30, (2, 7))
    bs.save(q, tmp_path / "kept")
    loaded = bs.load(tmp_path / "kept", Tagger())
    assert torch.equal(loaded(x), q(x))
    assert loaded.recipe == q.recipe
    assert loaded.report == q.report
    with pytest.raises(CheckpointError, match=r"does not fit.*missing"):
        bs.load(tmp_path / "kept", nn.Sequential(nn.Linear(3, 4)))


def test_recipes_survive_yaml() -> None:
    for name in ("int8-dynamic", "int8-dynamic-tensor", "int8-dynamic-token", "fp16-dynamic"):
        recipe = bs.load_recipe(name)
        assert bs.Recipe.from_yaml(recipe.to_yaml()) == recipe


_FACTORY = """
from torch import nn
def net():
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
"""


def test_the_command_line_needs_no_calibration_data(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from bitsmith.cli import app

    (tmp_path / "model.py").write_text(_FACTORY)
    x = np.random.default_rng(0).standard_normal((40, 6)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=x, y=np.arange(40) % 3)
    arguments = ["quantize", f"{tmp_path}/model.py:net", "--recipe", "int8-dynamic", "-o", f"{tmp_path}/out"]
    refused = CliRunner().invoke(app, arguments)
    assert refused.exit_code
    done = CliRunner().invoke(app, [*arguments, "--validation-dir", f"{tmp_path}/data.npz", "--no-latency"])
    assert not done.exit_code, done.output
    assert (tmp_path / "out" / "model.onnx").is_file()
    assert "PASSED" in done.output
    again = CliRunner().invoke(app, ["verify", f"{tmp_path}/out"])
    assert not again.exit_code, again.output


def test_one_output_stays_float_unless_asked_for() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1))
    q = bs.quantize_dynamic(net)
    assert type(q.model[1]) is nn.Linear
    assert any(note.startswith("1 stays float") for note in q.report.notes)
    asked = bs.Override(match="1", weights=bs.load_recipe("int8-dynamic").weights)
    assert type(bs.quantize_dynamic(net, overrides=[asked]).model[1]) is not nn.Linear


def _lstm(spread: float, *, bidirectional: bool = True) -> nn.LSTM:
    """Rows of each state matrix are alike in range, but the first, which is ``spread`` times as large."""
    torch.manual_seed(0)
    layer = nn.LSTM(8, 16, bidirectional=bidirectional)
    with torch.no_grad():
        for weight in (w for name, w in layer.named_parameters() if name.startswith("weight_hh")):
            weight.copy_(torch.stack([torch.linspace(-0.3, 0.3, 16).roll(i) for i in range(64)]))
            weight[0] *= spread
    return layer


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(("spread", "scales"), [(1.0, 1), (8.0, 2)])
def test_a_states_rows_share_a_scale_where_that_loses_little(
    spread: float, scales: int, bidirectional: bool, tmp_path: Path
) -> None:
    layer, x = _lstm(spread, bidirectional=bidirectional), torch.randn(5, 1, 8)
    directions = 1 + bidirectional
    q = bs.quantize_dynamic(layer, example_inputs=x)
    assert [len(scale.unique()) for scale in q.model.weight_hh_l0_scale] == [scales] * directions
    path = bs.export_onnx(q, tmp_path / "m.onnx")
    sizes = {tuple(i.dims) for i in onnx.load(path).graph.initializer if i.name.endswith("w_hh.scale")}
    assert sizes == {(directions,) if scales == 1 else (directions, 64)}
    assert bs.verify(q, path, x).passed
    torch.testing.assert_close(bs.deploy(q, engine="torch")(x)[0], q(x)[0], rtol=0, atol=0.02)


def test_an_lstm_is_loaded_into_one_whose_weights_lie_otherwise(tmp_path: Path) -> None:
    q, x = bs.quantize_dynamic(_lstm(8.0)), torch.randn(5, 1, 8)
    bs.save(q, tmp_path / "kept")
    assert torch.equal(bs.load(tmp_path / "kept", _lstm(1.0))(x)[0], q(x)[0])
