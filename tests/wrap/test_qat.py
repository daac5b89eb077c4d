"""QATModel: any loop trains it; each defect that TI's wrapper had is a test."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bitsmith as bs
from bitsmith.errors import CheckpointError, DataError, RecipeError
from bitsmith.grid import Quantizer, RangeRule
from bitsmith.qat import TrainingQuantizer
from bitsmith.qat.layers import TrainedLayer


class Net(nn.Module):
    """Batch norm, a residual add, dropout, a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.deep, self.drop, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Dropout(0.2), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(x + self.deep(x))
        return self.head(self.drop(x.mean((2, 3))))  # type: ignore[no-any-return]


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


def batches(count: int = 4) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        x = torch.randn(16, 3, 8, 8, generator=generator)
        yield x, x.mean((2, 3)).argmax(1)


X = next(batches())[0]


def epoch(model: nn.Module, optimizer: torch.optim.Optimizer, *, before: Callable[[], Any] = lambda: None) -> None:
    for x, y in batches():
        before()
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def wrapped(net: nn.Module, recipe: str = "WC8_AT8", **options: Any) -> tuple[bs.QATModel, torch.optim.Optimizer]:
    model = bs.QATModel(net, recipe=recipe, total_epochs=4, example_inputs=X[:2], **options)
    return model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def frozen_norms(model: bs.QATModel) -> bool:
    return all(m.norm_frozen for m in model.modules() if isinstance(m, TrainedLayer))


def frozen_ranges(model: bs.QATModel) -> bool:
    return all(bool(q.frozen) for q in model.module.quantizers())


def activation_grids(q: bs.QuantizedModel) -> list[Quantizer]:
    named = q.graph.named_modules()
    return [m for name, m in named if isinstance(m, Quantizer) and not name.endswith("_quantizer")]


def assert_same(left: dict[str, Any], right: dict[str, Any]) -> None:
    assert left.keys() == right.keys()
    assert [k for k in left if isinstance(left[k], Tensor) and not torch.equal(left[k], right[k])] == []


def test_the_loop_of_its_users(net: nn.Module, tmp_path: Path) -> None:
    model, optimizer = wrapped(net)
    for _ in range(4):
        model.train()
        epoch(model, optimizer)
        model.eval()
        model(X)
        model.step()
    q = model.convert()
    assert torch.equal(q(X).argmax(1), model.eval()(X).argmax(1))
    assert bs.verify(q, model.export(tmp_path / "m.onnx"), X).passed
    assert not [note for note in q.report.notes if "never counted" in note]


# The ten defects of TI's wrapper, by their numbers


def test_defect_1_msa_is_not_the_plain_setting(net: nn.Module) -> None:
    """Where ranges start; in training both follow the ends of batches."""
    x = torch.cat([X, 0.1 * torch.randn(300, 3, 8, 8)])
    plain, msa = (wrapped(net, name, calibration=[x])[0].convert() for name in ("WC8_AT8", "MSA_WC8_AT8"))
    assert activation_grids(plain)[0].scale != activation_grids(msa)[0].scale


def test_defect_2_a_fixed_range_is_fixed(net: nn.Module) -> None:
    model, optimizer = wrapped(net, "WC8SYMP2_AT8SYMP2R4", target="generic")
    epoch(model, optimizer)
    scales = {float(q.require_grid().scale) for q in activation_grids(model.convert())}
    assert scales == {2.0**-5, 2.0**-6}


def test_defect_2_a_fixed_range_is_fixed_without_powers_of_two(net: nn.Module) -> None:
    recipe = bs.load_recipe("int8-sym")
    assert recipe.activations is not None
    fixed = recipe.activations.model_copy(update={"range": RangeRule(limit=4.0, fixed=True)})
    model = bs.QATModel(net, recipe.model_copy(update={"activations": fixed}), 4, X[:2], "generic")
    epoch(model, torch.optim.SGD(model.parameters(), lr=0.01))
    found = {round(float(q.require_grid().scale), 6) for q in activation_grids(model.convert())}
    assert found == {round(4 / 127, 6), round(4 / 255, 6)}


def test_defect_3_two_names_in_one_are_refused_and_overrides_mix(net: nn.Module) -> None:
    with pytest.raises(RecipeError, match=r"no recipe is called 'WC8_AT8\+WC4_AT8'"):
        wrapped(net, "WC8_AT8+WC4_AT8")
    four = bs.Override(match="deep", weights=bs.load_recipe("WC4_AT8").weights)
    model, optimizer = wrapped(net, overrides=[four])
    epoch(model, optimizer)
    assert [layer.weight_bits for layer in model.convert().report.layers] == [8, 4, 8]


def test_defect_4_relu_outputs_of_symmetric_recipes_begin_at_zero(net: nn.Module) -> None:
    model, optimizer = wrapped(net, "WT8SYMP2_AT8SYMP2", target="tda4vm")
    epoch(model, optimizer)
    grids = [q.require_grid() for q in activation_grids(model.convert())]
    unsigned = [grid for grid in grids if not grid.format.signed]  # type: ignore[union-attr]
    assert len(unsigned) >= 2
    assert all(grid.zero_point is None or int(grid.zero_point) == 0 for grid in grids)


def test_defect_5_weights_are_loaded_from_a_file(net: nn.Module, tmp_path: Path) -> None:
    other = Net().eval()
    torch.save({"state_dict": other.state_dict()}, tmp_path / "float.pth")
    loaded = wrapped(net)[0].load_weights(tmp_path / "float.pth")
    assert_same(loaded.state_dict(), wrapped(other)[0].state_dict())
    torch.save(loaded.state_dict(), tmp_path / "qat.pt")
    assert_same(wrapped(net)[0].load_weights(tmp_path / "qat.pt").state_dict(), loaded.state_dict())


def test_defect_6_train_and_eval_mean_the_same_at_any_depth(net: nn.Module) -> None:
    model, optimizer = wrapped(net)
    epoch(model, optimizer)
    judged = model.eval()(X)
    model.train()
    model.module.eval()
    assert not any(m.training for m in model.module.modules())
    assert torch.equal(model(X), judged)
    model.module.train()
    assert all(m.training for m in model.module.modules())


def test_defect_7_zero_means_zero(net: nn.Module) -> None:
    model, optimizer = wrapped(net, freeze_bn=0, freeze_ranges=0)
    assert frozen_norms(model)
    mean = model.state_dict()["module.graph.stem.norm.running_mean"].clone()
    epoch(model, optimizer)
    assert torch.equal(model.state_dict()["module.graph.stem.norm.running_mean"], mean)
    assert frozen_ranges(model)


def test_defect_8_only_step_counts(net: nn.Module) -> None:
    """A loop that calls train() before every batch freezes nothing early, and computes the same."""
    calm, calm_optimizer = wrapped(net)
    busy, busy_optimizer = wrapped(net)
    for index in range(4):
        torch.manual_seed(index)
        epoch(calm, calm_optimizer)
        calm.step()
        torch.manual_seed(index)
        epoch(busy, busy_optimizer, before=busy.train)
        assert busy.schedule.count == index
        assert frozen_norms(busy) is (index >= 2)
        busy.step()
    assert_same(calm.state_dict(), busy.state_dict())
    assert "never counted" not in " ".join(busy.convert().report.notes)


def test_defect_8_a_schedule_that_was_forgotten_is_told(net: nn.Module) -> None:
    model, optimizer = wrapped(net)
    epoch(model, optimizer)
    assert any("the schedule never counted" in note for note in model.convert().report.notes)


class Attention(nn.Module):
    """A softmax along an axis of its own, behind a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.softmax(self.q(x) @ self.k(x).transpose(1, 2), -1)
        return self.out(weights @ self.v(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize(("target", "recipe"), [("tda4vm", "WT8SYMP2_AT8SYMP2"), ("am68a", "WC8_AT8")])
@pytest.mark.parametrize("kind", ["convolutions", "attention"])
def test_defects_9_and_10_files_keep_the_rules_of_the_import(
    net: nn.Module, target: str, recipe: str, kind: str, tmp_path: Path
) -> None:
    """No Cast, ConstantOfShape or Identity; a softmax says its axis; batch norms are folded."""
    x = X if kind == "convolutions" else torch.randn(16, 6, 8)
    model = bs.QATModel(net if kind == "convolutions" else Attention(), recipe, 4, x[:2], target)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(3):
        model(x).square().mean().backward()
        optimizer.step()
    q, path = model.convert(), model.export(tmp_path / "m.onnx")
    certificate = bs.verify(q, path, x[:4])
    assert certificate.passed
    assert not certificate.contract
    nodes = onnx.load(path).graph.node
    assert not {"Cast", "ConstantOfShape", "Identity", "BatchNormalization"} & {node.op_type for node in nodes}
    for node in nodes:
        assert node.op_type != "Softmax" or "axis" in {a.name for a in node.attribute}


# State


def test_training_goes_on_after_a_restart_to_the_bit(net: nn.Module, tmp_path: Path) -> None:
    """Model and optimizer on disk, read without running code; the schedule's count is in the model's state."""
    whole, optimizer = wrapped(net)
    for index in range(4):
        torch.manual_seed(index)
        epoch(whole, optimizer)
        whole.step()
        if index == 1:
            torch.save({"model": whole.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "half.pt")
    again, optimizer = wrapped(Net().eval())
    saved = torch.load(tmp_path / "half.pt", weights_only=True)
    again.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    assert again.schedule.count == 2
    assert frozen_norms(again)
    for index in (2, 3):
        torch.manual_seed(index)
        epoch(again, optimizer)
        again.step()
    assert_same(again.state_dict(), whole.state_dict())


def test_a_state_of_the_module_within_is_taken(net: nn.Module) -> None:
    model, optimizer = wrapped(net)
    epoch(model, optimizer)
    other = wrapped(Net().eval())[0]
    other.load_state_dict(model.module.state_dict())
    assert_same(other.module.state_dict(), model.module.state_dict())


def test_weights_of_the_float_model_go_into_the_parameters_that_the_optimizer_holds(net: nn.Module) -> None:
    """Also with the prefix of data-parallel training; ranges that were found for other weights start anew."""
    model, optimizer = wrapped(net)
    epoch(model, optimizer)
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    better = Net().eval()
    model.load_state_dict({f"module.{key}": value for key, value in better.state_dict().items()})
    assert [id(p) for p in model.parameters()] == held
    fresh = wrapped(better)[0]
    assert_same(model.state_dict(), fresh.state_dict())
    for m in (model, fresh):
        torch.manual_seed(0)
        m.train()(X)
    assert torch.equal(model.eval()(X), fresh.eval()(X))


def test_states_of_something_else_are_refused(net: nn.Module) -> None:
    model, _ = wrapped(net)
    with pytest.raises(CheckpointError, match=r"float model Net or of this QATModel: it has 0\.weight"):
        model.load_state_dict(nn.Sequential(nn.Linear(2, 2)).state_dict())
    quantized = bs.QATModel(bs.quantize(net, [X]), total_epochs=4)
    with pytest.raises(DataError, match="came from a quantized model"):
        quantized.load_state_dict(net.state_dict())


def test_copies_train_apart(net: nn.Module) -> None:
    model, optimizer = wrapped(net)
    epoch(model, optimizer)
    twin = copy.deepcopy(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for _ in range(3):
        epoch(twin, torch.optim.SGD(twin.parameters(), lr=0.01))
        twin.step()
    assert_same(model.state_dict(), before)
    assert (model.schedule.count, twin.schedule.count) == (0, 3)
    assert frozen_norms(twin)
    assert not frozen_norms(model)


def test_a_model_is_kept_by_its_state(net: nn.Module, tmp_path: Path) -> None:
    for model in (wrapped(net)[0], bs.PTQModel(net, "int8", X[:2])):
        with pytest.raises(DataError, match="cannot be pickled whole"):
            torch.save(model, tmp_path / "whole.pt")


def test_an_average_of_weights_converts(net: nn.Module) -> None:
    model, optimizer = wrapped(net)
    model(X)  # ranges are there before the copy is made
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=False)
    for _ in range(2):
        epoch(model, optimizer)
        average.update_parameters(model)
    assert average.module.convert().report.coverage.fraction == 1.0


# What prepare_qat gives is at hand


def test_it_is_prepare_qat_and_a_schedule(net: nn.Module) -> None:
    """No second implementation: the same numbers, step by step."""
    model, optimizer = wrapped(net, calibration=[X])
    schedule = bs.QATSchedule(4)
    p = bs.prepare_qat(net, "WC8_AT8", X[:2], calibration=[X], schedule=schedule)
    other = torch.optim.SGD(p.parameters(), lr=0.01, momentum=0.9)
    for index in range(4):
        torch.manual_seed(index)
        epoch(model, optimizer)
        model.step()
        torch.manual_seed(index)
        epoch(p, other)
        schedule.step()
    assert_same(model.module.state_dict(), p.state_dict())


def test_a_teacher_a_kind_and_steps(net: nn.Module) -> None:
    model = bs.QATModel(net, "WC4_AT8", None, X[:2], total_steps=8, teacher=net, kind="lsq", freeze_bn=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model.schedule.follow(optimizer)
    for _ in range(2):
        for x, y in batches():
            optimizer.zero_grad()
            (F.cross_entropy(model(x), y) + model.penalty()).backward()
            optimizer.step()
    assert model.schedule.count == 8
    assert {q.kind for q in model.modules() if isinstance(q, TrainingQuantizer)} == {"lsq"}


def test_an_epoch_count_is_asked_for(net: nn.Module) -> None:
    with pytest.raises(DataError, match="total_epochs or total_steps"):
        bs.QATModel(net, "int8", example_inputs=X[:2])
