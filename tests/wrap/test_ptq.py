"""PTQModel: calibrated by running it, in any order of train() and eval()."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import bitsmith as bs
from bitsmith.errors import CalibrationError, DataError, ExportError, RecipeError
from bitsmith.place.layers import QuantLayer
from bitsmith.recipe import Recipe, bits_recipe
from bitsmith.steps import BiasCorrection, FoldBatchNorm


class Net(nn.Module):
    """Batch norm, a residual add, dropout, a layer that is called twice, a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.deep, self.drop, self.head = nn.Conv2d(12, 12, 3, padding=1), nn.Dropout(0.5), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(x + self.deep(torch.relu(self.deep(x))))
        return self.head(self.drop(x.mean((2, 3))))  # type: ignore[no-any-return]


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


def images(count: int, seed: int) -> Tensor:
    return torch.randn(count, 3, 10, 10, generator=torch.Generator().manual_seed(seed)) + 0.2


BATCHES = [images(30, seed) for seed in range(7)]
# Bias correction alone, on a graph of 3 bits: errors are large, and their means too.
COARSE = bits_recipe(3, 4, name="coarse", steps=(FoldBatchNorm(), BiasCorrection()))


def run(model: bs.PTQModel, batches: list[Tensor]) -> bs.PTQModel:
    for batch in batches:
        model(batch)
    return model


def assert_same(left: bs.QuantizedModel, right: bs.QuantizedModel) -> None:
    ours, theirs = left.graph.state_dict(), right.graph.state_dict()
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []


def test_without_bias_calibration_it_is_quantize_to_the_bit(net: nn.Module) -> None:
    model = run(bs.PTQModel(net, "WC8_AT8", BATCHES[0][:2]), BATCHES)
    assert_same(model.convert(), bs.quantize(net, BATCHES, "WC8_AT8"))


def test_train_mode_computes_the_float_model_and_eval_mode_what_convert_gives(net: nn.Module) -> None:
    model, x = bs.PTQModel(net, "WC4_AT8", BATCHES[0][:2]), images(8, 99)
    assert torch.allclose(model(BATCHES[0]), net(BATCHES[0]), atol=1e-5)
    judged = model.eval()(x)
    assert not torch.allclose(judged, net(x), atol=1e-4)
    assert torch.equal(judged, model.convert()(x))


@pytest.mark.parametrize("factor", [None, 0.1])
def test_nothing_counts_the_calls_of_train_and_eval(net: nn.Module, factor: float | None) -> None:
    """Loops that call train() before every batch, judge in between, or switch the module within."""
    plain, fidgety = (bs.PTQModel(net, COARSE, BATCHES[0][:2], bias_calibration=factor) for _ in range(2))
    run(plain, BATCHES)
    for batch in BATCHES:
        fidgety.train()
        fidgety.module.train()
        fidgety(batch)
        fidgety.eval()
        fidgety.module.eval()
        fidgety(batch[:2])
    assert_same(plain.convert(), fidgety.convert())


def test_the_first_batch_moves_biases_as_bias_correction_does(net: nn.Module) -> None:
    """One batch counts whole (1 / n): the recipe's own step, from other code, gives the same biases."""
    running = run(bs.PTQModel(net, COARSE, BATCHES[0][:2], bias_calibration=0.01), BATCHES[:1]).convert()
    stepped = bs.quantize(net, BATCHES[:1], COARSE)
    shifted = 0
    for left, right in zip(running.graph.modules(), stepped.graph.modules(), strict=True):
        if isinstance(left, QuantLayer) and isinstance(right, QuantLayer):
            assert left.bias is not None
            assert right.bias is not None
            assert torch.allclose(left.bias, right.bias, atol=2e-5)
            shifted += 1
    assert shifted == 4


def test_biases_of_all_batches_take_the_mean_error_away(net: nn.Module) -> None:
    everything, exact = torch.cat(BATCHES), net(torch.cat(BATCHES))
    uncorrected = bs.quantize(net, BATCHES, COARSE.model_copy(update={"steps": (FoldBatchNorm(),)}))
    calibrated = run(bs.PTQModel(net, COARSE, BATCHES[0][:2], bias_calibration=0.1), BATCHES * 3).convert()
    before, after = ((exact - q(everything)).mean(0).abs().max() for q in (uncorrected, calibrated))
    assert after < 0.2 * before


def test_a_factor_of_one_follows_the_last_batch(net: nn.Module) -> None:
    """The moving average's limit; at 0.1 the same batches leave another bias."""
    quick, slow = (run(bs.PTQModel(net, COARSE, BATCHES[0][:2], bias_calibration=f), BATCHES) for f in (1.0, 0.1))
    assert quick.biases is not None
    assert slow.biases is not None
    assert quick.biases.shifts.keys() == slow.biases.shifts.keys()
    assert all(not torch.equal(quick.biases.shifts[key], slow.biases.shifts[key]) for key in quick.biases.shifts)


@pytest.mark.parametrize("factor", [None, 0.1])
@pytest.mark.parametrize("recipe", ["WC8_AT8", "MSA_WC8_AT8", "int8-mse"])
def test_an_interrupted_calibration_goes_on(net: nn.Module, recipe: str, factor: float | None, tmp_path: Path) -> None:
    """All statistics survive a state_dict on disk, read without running code."""
    named: str | Recipe = recipe
    if recipe == "int8-mse":
        named = Recipe.from_yaml(
            "{weights: {format: {bits: 8}}, activations: {format: {bits: 8, signed: false}, symmetric: false, "
            "range: {name: mse}}, steps: [fold_batch_norm]}"
        )
    whole, first = (bs.PTQModel(net, named, BATCHES[0][:2], bias_calibration=factor) for _ in range(2))
    run(whole, BATCHES[:5])
    torch.save(run(first, BATCHES[:5]).state_dict(), tmp_path / "half.pt")
    second = bs.PTQModel(net, named, BATCHES[0][:2], bias_calibration=factor)
    second.load_state_dict(torch.load(tmp_path / "half.pt", weights_only=True))
    assert second.module.samples == 150
    assert_same(run(whole, BATCHES[5:]).convert(), run(second, BATCHES[5:]).convert())


def test_a_state_of_another_recipe_is_refused(net: nn.Module) -> None:
    state = run(bs.PTQModel(net, "WC8_AT8", BATCHES[0][:2]), BATCHES[:1]).state_dict()
    with pytest.raises(CalibrationError, match="not the statistic of this range rule"):
        bs.PTQModel(net, "MSA_WC8_AT8", BATCHES[0][:2]).load_state_dict(state)
    with pytest.raises(CalibrationError, match="without bias_calibration"):
        bs.PTQModel(net, "WC8_AT8", BATCHES[0][:2], bias_calibration=0.1).load_state_dict(state)


def test_copies_go_on_apart(net: nn.Module) -> None:
    model = run(bs.PTQModel(net, COARSE, BATCHES[0][:2], bias_calibration=0.1), BATCHES[:3])
    twin = copy.deepcopy(model)
    assert_same(model.convert(), twin.convert())
    before = {key: shift.clone() for key, shift in model.biases.shifts.items()}  # type: ignore[union-attr]
    run(twin, BATCHES[3:])
    assert all(torch.equal(before[key], model.biases.shifts[key]) for key in before)  # type: ignore[union-attr]
    assert_same(run(model, BATCHES[3:]).convert(), twin.convert())


def test_the_users_model_is_left_alone(net: nn.Module) -> None:
    net.train()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    run(bs.PTQModel(net, "WC8_AT8", BATCHES[0][:2], bias_calibration=0.1), BATCHES[:2]).convert()
    assert net.training
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_a_file_computes_what_eval_mode_does(net: nn.Module, tmp_path: Path) -> None:
    model = run(bs.PTQModel(net, "WC8_AT8", BATCHES[0][:2], bias_calibration=0.05), BATCHES).eval()
    path = model.export(tmp_path / "m.onnx")
    assert bs.verify(model.convert(), path, images(16, 5)).passed
    assert model.export(tmp_path / "m.pt2").exists()
    with pytest.raises(ExportError, match=r"does not end in \.onnx or \.pt2"):
        model.export(tmp_path / "m.tflite")


def test_what_cannot_be_is_refused(net: nn.Module) -> None:
    with pytest.raises(CalibrationError, match="no batch was run"):
        bs.PTQModel(net, "int8", BATCHES[0][:2]).eval()(BATCHES[0])
    for factor in (0, 0.0, -0.1, 1.5):
        with pytest.raises(DataError, match=f"bias_calibration={factor}"):
            bs.PTQModel(net, "int8", BATCHES[0][:2], bias_calibration=factor)
    with pytest.raises(RecipeError, match=r"'tidl' rounds them at the end \(gptq\)"):
        bs.PTQModel(net, "tidl", BATCHES[0][:2], target="tda4vm", bias_calibration=0.1)
    with pytest.raises(DataError, match="quantized by hand"):
        bs.PTQModel(nn.Sequential(bs.QuantStub(), nn.Linear(2, 2), bs.DeQuantStub()), "int8", torch.randn(2, 2))
