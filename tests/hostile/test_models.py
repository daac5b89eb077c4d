"""Damaged models and bad calibration: an error that names layer, samples or line, and a remedy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bitsmith as bs
from bitsmith.errors import (
    BitsmithError,
    CalibrationError,
    CaptureError,
    DataError,
    NonFiniteError,
    PlacementError,
    UnsupportedOperatorError,
)
from bitsmith.recipe import Override


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)
    return nn.Sequential(*layers).eval()


def data(batches: int = 3) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(4, 3, 8, 8) for _ in range(batches)]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["0.weight", "1.running_var", "4.bias"])
def test_a_weight_that_is_not_finite_is_named_and_counted(name: str, value: float) -> None:
    model = net()
    model.state_dict()[name].view(-1)[:2] = value
    with pytest.raises(NonFiniteError, match=rf"^{name} holds 2 NaN or infinite value"):
        bs.quantize(model, data())


class Overflowing(nn.Module):
    """Finite weights and inputs, an infinite activation for some batches."""

    def __init__(self, make: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.make = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), make

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.make(self.first(x)))


@pytest.mark.parametrize("placement", ["runtime", "fx", "layerwise", "flexml"])
@pytest.mark.parametrize(("make", "name"), [(torch.exp, "exp"), (torch.sqrt, "sqrt")])
def test_an_activation_that_is_not_finite_is_located(placement: Any, make: Any, name: str) -> None:
    batches = data()
    batches[2] = batches[2] * 1e4
    model = Overflowing(make)
    nn.init.constant_(model.first.bias, 50.0)
    # Layerwise, the operator is part of the stage of the layer before it, whose name stands for both.
    with pytest.raises(NonFiniteError, match=rf"'({name}|first).*samples 8 to 11 of the calibration set"):
        bs.quantize(model, batches, placement=placement)


def test_an_input_that_is_not_finite_names_the_samples() -> None:
    batches = data()
    batches[1][0, 0, 0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"calibration input 'input(_1)?' .*samples 4 to 7"):
        bs.quantize(net(), batches)


def test_a_dead_layer_is_named() -> None:
    model = net()
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.fill_(-1.0)
        model[1].running_mean.zero_()
    with pytest.raises(CalibrationError, match=r"weight of '0'|output of '0'"):
        bs.quantize(model, data())


@pytest.mark.parametrize("empty", [[], (), iter([]), torch.utils.data.DataLoader([])])
def test_no_calibration_data(empty: Any) -> None:
    with pytest.raises(DataError, match="calibration is empty: give at least one batch"):
        bs.quantize(net(), empty)


def test_a_batch_without_samples_is_named() -> None:
    with pytest.raises(DataError, match="calibration batch 1 holds no samples"):
        bs.quantize(net(), [data()[0], data()[0][:0]])


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (3, "calibration must be an iterable of batches, not int"),
        (["image.png"], r"batch of type builtins\.str is not understood.*pass forward=lambda model, batch"),
        ([{"image": torch.zeros(2, 3, 8, 8)}], r"dict with keys \['image'\].*also needs \['input'\]"),
        ([()], r"the batch holds 0 elements, but forward of Sequential requires 1: \['input'\]"),
    ],
)
def test_batches_of_a_wrong_type(calibration: Any, message: str) -> None:
    with pytest.raises(DataError, match=f"(?s){message}"):
        bs.quantize(net(), calibration)


@pytest.mark.parametrize(
    ("batch", "given"),
    [
        (torch.randn(4, 1, 8, 8), r"float32\[4, 1, 8, 8\]"),  # grey images for a colour model
        (torch.randn(4, 3, 9, 9), r"float32\[4, 3, 9, 9\]"),  # another size than the linear layer takes
        (torch.randint(0, 255, (4, 3, 8, 8), dtype=torch.uint8), r"uint8\[4, 3, 8, 8\]"),  # not normalized
        (torch.randn(4, 3, 8, 8, dtype=torch.float64), r"float64\[4, 3, 8, 8\]"),
    ],
)
def test_a_batch_that_the_model_itself_refuses(batch: Tensor, given: str) -> None:
    with pytest.raises(DataError, match=rf"Sequential itself fails on the first .* batch, inputs {given}"):
        bs.quantize(net(), [batch])


def test_batches_that_disagree() -> None:
    with pytest.raises(DataError, match=r"batch 2 has inputs \['float32\[3, 9, 9\]'\], but the first"):
        bs.quantize(net(), [*data(2), torch.randn(4, 3, 9, 9)])
    with pytest.raises(DataError, match=r"batch 1 has inputs \['float64\[3, 8, 8\]'\]"):
        bs.quantize(net(), [data()[0], data()[0].double()])


def test_a_wrong_input_at_run_time_is_told_in_the_models_words() -> None:
    q = bs.quantize(net(), data())
    with pytest.raises(DataError, match=r"shape \[4, 3, 9, 9\], but the model takes \['any', 3, 8, 8\]"):
        q(torch.randn(4, 3, 9, 9))


def test_train_mode_is_noted_and_restored_module_by_module() -> None:
    model = net()
    model.train()
    model[1].eval()  # a frozen norm
    statistics = model[1].running_mean.clone()
    q = bs.quantize(model, data())
    assert "was in train mode: it was quantized in eval mode" in q.report.notes[0]
    assert [module.training for module in model] == [True, False, True, True, True]
    assert torch.equal(model[1].running_mean, statistics)
    assert not any("train mode" in note for note in bs.quantize(net(), data()).report.notes)


def test_train_mode_is_restored_after_a_failure() -> None:
    model = net().train()
    with pytest.raises(DataError):
        bs.quantize(model, [torch.randn(4, 1, 8, 8)])
    assert all(module.training for module in model.modules())


class Deciding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if x.abs().max() > 2.0:
            return self.a(x)
        return self.b(x)


def test_a_model_that_cannot_be_traced_names_the_line() -> None:
    with pytest.raises(CaptureError) as caught:
        bs.quantize(Deciding(), [torch.randn(8, 4)])
    message = str(caught.value)
    assert "Deciding cannot be read as a graph" in message
    assert "test_models.py" in message
    assert "if x.abs().max() > 2.0:" in message
    assert "depends on a tensor's values" in message


def test_a_lazy_layer_without_a_shape_is_named() -> None:
    with pytest.raises(CaptureError, match=r"1\.weight of a lazy layer has no shape yet"):
        bs.quantize(nn.Sequential(nn.Flatten(), nn.LazyLinear(3)), data())


def test_nothing_to_quantize_is_an_error_not_a_silent_success() -> None:
    with pytest.raises(PlacementError, match=r"nothing would be quantized.*it holds only relu"):
        bs.quantize(nn.Sequential(nn.ReLU()), data())
    with pytest.raises(PlacementError, match=r"every compute layer is excluded"):
        bs.quantize(net(), data(), overrides=[Override(match="*", exclude=True)])


@pytest.mark.parametrize("match", ["layer9.*", "type:Conv3d"])
def test_an_override_that_matches_nothing_lists_the_layers(match: str) -> None:
    with pytest.raises(PlacementError, match=r"override '.*' matches no layer; layers are 0, 4"):
        bs.quantize(net(), data(), overrides=[Override(match=match, exclude=True)])


class WeightsFromInputs(nn.Module):
    """A convolution whose weights another layer computes."""

    def __init__(self) -> None:
        super().__init__()
        self.make, self.conv = nn.Linear(3, 108), nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.make(x.mean((0, 2, 3))).view(4, 3, 3, 3)
        return self.conv(x) + F.conv2d(x, weight)


@pytest.mark.parametrize("placement", ["runtime", "fx", "layerwise", "flexml"])
def test_an_operator_that_a_policy_cannot_quantize_is_named_with_what_would_help(placement: Any) -> None:
    with pytest.raises(UnsupportedOperatorError, match=r"conv2d.*computed at run time.*exclude: true"):
        bs.quantize(WeightsFromInputs(), data(), placement=placement)


def test_every_refusal_leaves_the_model_as_it_was() -> None:
    model = net()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for calibration in ([], [torch.randn(4, 1, 8, 8)], [torch.full((4, 3, 8, 8), float("nan"))]):
        with pytest.raises(BitsmithError):
            bs.quantize(model, calibration)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
