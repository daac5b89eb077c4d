"""prepare_qat, training and convert: what trains is what will run."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bitsmith as bs
from bitsmith.qat import QATGraph


class Net(nn.Module):
    """Convolutions with batch norms, a residual, dropout, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.dropout = nn.Dropout(0.5)
        self.linear = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)) + x)
        return self.linear(self.dropout(x.mean((2, 3))))


def data(count: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 3, 8, 8, generator=generator)
    return x, (x.mean((2, 3)) @ torch.randn(3, 5, generator=generator)).argmax(1)


def train(p: nn.Module, steps: int = 4, lr: float = 0.002) -> None:
    x, y = data()
    optimizer = torch.optim.Adam(p.parameters(), lr=lr)
    for step in range(steps):
        index = slice(16 * step % 64, 16 * step % 64 + 16)
        optimizer.zero_grad()
        F.cross_entropy(p(x[index]), y[index]).backward()
        optimizer.step()


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    net = Net()
    with torch.no_grad():
        for _ in range(20):
            net(data()[0])
    return net.eval()


@pytest.mark.parametrize("recipe", ["int8", "w4a4-fast", "int8-po2", "int8-tensor-po2", "fp8", "w8a16"])
@pytest.mark.parametrize("kind", ["auto", "lsq", "moving-average"])
def test_eval_mode_is_the_converted_model(net: nn.Module, recipe: str, kind: str) -> None:
    x, _ = data()
    p = bs.prepare_qat(net, recipe, x[:4], calibration=[x], kind=kind)
    for _ in range(2):
        q = bs.convert(p)
        simulated, trained = q(x), p.eval()(x)
        assert (simulated - trained).abs().max() < 0.02 * simulated.abs().max()
        assert (simulated.argmax(1) == trained.argmax(1)).float().mean() > 0.98
        p.train()
        train(p)


@pytest.mark.parametrize("target", ["openvino", "torch", "tda4vm", "am62a"])
def test_other_targets(net: nn.Module, target: str) -> None:
    x, _ = data()
    p = bs.prepare_qat(net, None, target=target, calibration=[x])
    assert p.recipe.name == bs.get_target(target).default_recipe
    train(p)
    q = bs.convert(p)
    assert (q(x) - p.eval()(x)).abs().max() < 0.02 * q(x).abs().max()
    assert (q(x).argmax(1) == p(x).argmax(1)).float().mean() > 0.98


@pytest.mark.parametrize("placement", ["runtime", "fx", "layerwise", "flexml"])
def test_start_is_that_of_quantize(net: nn.Module, placement: str) -> None:
    x, _ = data()
    recipe = bs.load_recipe("int8").model_copy(update={"steps": bs.load_recipe("int8").steps[:1]})
    q = bs.quantize(net, [x], recipe, placement=placement)
    p = bs.prepare_qat(net, recipe, calibration=[x], placement=placement, kind="lsq")
    assert torch.equal(bs.convert(p)(x), q(x))
    p = bs.prepare_qat(net, recipe, calibration=[x], placement=placement, kind="moving-average")
    assert torch.allclose(bs.convert(p)(x), q(x), atol=1e-6)  # from the ends of a range to its scale and back


class Branches(nn.Module):
    """A concat of what is signed and what is not."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.left, self.right = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.linear = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.conv(x))
        x = torch.cat([F.relu(self.left(x)), self.right(x)], 1)
        return self.linear(x.mean((2, 3)))


@pytest.mark.parametrize("kind", ["auto", "moving-average", "lsq+", "pact"])
@pytest.mark.parametrize("placement", ["fx", "runtime"])
def test_a_concat_keeps_one_grid(placement: str, kind: str) -> None:
    torch.manual_seed(0)
    x, _ = data()
    p = bs.prepare_qat(Branches(), "w4a4-fast", calibration=[x], placement=placement, kind=kind)
    train(p, 8, 0.01)
    q = bs.convert(p)
    assert (q(x) - p.eval()(x)).abs().max() < 0.02 * q(x).abs().max()
    grids = [m.grid for name, m in q.graph.named_modules() if name in ("quantizers.relu_1", "quantizers.right")]
    if placement == "fx":
        assert grids[0].scale == grids[1].scale
        assert grids[0].zero_point == grids[1].zero_point


@pytest.mark.parametrize("placement", ["fx", "flexml"])
def test_shared_scales_stay_shared(net: nn.Module, placement: str) -> None:
    x, _ = data()
    p = bs.prepare_qat(net, "w4a4-fast", calibration=[x], placement=placement)
    train(p)
    q = bs.convert(p)
    assert any(len(group.members) > 1 for group in p.template.placed.groups)
    assert (q(x) - p.eval()(x)).abs().max() < 0.02 * q(x).abs().max()


def test_dropout_acts_in_train_mode_only(net: nn.Module) -> None:
    x, _ = data()
    p = bs.prepare_qat(net, "int8", calibration=[x])
    p.freeze_norms()
    assert not torch.equal(p(x), p(x))
    p.eval()
    assert torch.equal(p(x), p(x))


def test_trained_file_gives_the_same_classes(net: nn.Module, tmp_path: Path) -> None:
    x, _ = data()
    p = bs.prepare_qat(net, "int8", x[:2])
    train(p, 8)
    q = bs.convert(p)
    path = bs.export_onnx(q, tmp_path / "m.onnx")
    assert bs.verify(q, path, x[:16]).passed
    assert torch.equal(bs.deploy(path)(x).argmax(1), p.eval()(x).argmax(1))


def test_starts_from_a_quantized_model(net: nn.Module) -> None:
    x, y = data()
    q = bs.quantize(net, [x], "w4a4-fast")
    p = bs.prepare_qat(q)
    assert isinstance(p, QATGraph)
    assert torch.equal(bs.convert(p)(x), q(x))
    before = F.cross_entropy(p.eval()(x), y)
    p.train()
    train(p, 40)
    assert F.cross_entropy(bs.convert(p)(x), y) < before


def test_says_what_it_cannot_do(net: nn.Module) -> None:
    x, _ = data()
    with pytest.raises(bs.BitsmithError, match="no ranges yet"):
        bs.prepare_qat(net, "int8", x[:2]).eval()(x)
    with pytest.raises(bs.BitsmithError, match="no batch has been run"):
        bs.convert(bs.prepare_qat(net, "int8", x[:2]))
    with pytest.raises(bs.BitsmithError, match="example_inputs"):
        bs.prepare_qat(net)
    with pytest.raises(bs.BitsmithError, match="only shifts"):
        bs.prepare_qat(net, None, x[:2], target="max78000")
    with pytest.raises(bs.BitsmithError, match="give it alone"):
        bs.prepare_qat(bs.quantize(net, [x]), "int8")
    with pytest.raises(bs.BitsmithError, match="quantized by hand"):
        bs.prepare_qat(nn.Sequential(bs.QuantStub(), net), "int8", x[:2])


def test_copies_and_state_dicts(net: nn.Module) -> None:
    x, _ = data()
    p = bs.prepare_qat(net, "w4a4-fast", calibration=[x])
    train(p)
    p.freeze_norms()
    other = bs.prepare_qat(net, "w4a4-fast", x[:2])
    other.load_state_dict(p.state_dict(), strict=True)
    assert torch.equal(other.eval()(x), p.eval()(x))
    assert torch.equal(copy.deepcopy(p)(x), p(x))
    assert torch.equal(bs.convert(other)(x), bs.convert(p)(x))


def test_frozen_parameters_stay_frozen(net: nn.Module) -> None:
    x, _ = data()
    net.conv1.requires_grad_(False)
    p = bs.prepare_qat(net, "int8", calibration=[x])
    train(p)
    assert torch.equal(p.graph.get_submodule("conv1.layer").weight, net.conv1.weight)
    assert not torch.equal(p.graph.get_submodule("conv2.layer").weight, net.conv2.weight)


def test_says_that_parametrizations_are_worked_in() -> None:
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.ReLU(), nn.Linear(4, 2))
    p = bs.prepare_qat(net, "int8", torch.randn(2, 4))
    assert any(note.startswith("0 ") and "parametrization" in note for note in p.notes)


def test_a_prepared_model_is_not_prepared_again(net: nn.Module) -> None:
    p = bs.prepare_qat(net, "int8", data()[0])
    with pytest.raises(bs.BitsmithError, match="prepared for training already"):
        bs.prepare_qat(p, "int8", data()[0])


def test_ranges_start_from_the_weights_of_that_moment(net: nn.Module) -> None:
    """A checkpoint that is loaded between preparing and the first batch is what ranges are found on."""
    x, other = data()[0], copy.deepcopy(net)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(3.0)
    p, expected = bs.prepare_qat(net, "int8", x[:2]), bs.prepare_qat(other, "int8", x[:2])
    p.graph.load_state_dict(expected.graph.state_dict())
    p.eval().calibrate([((x,), {})])
    expected.eval().calibrate([((x,), {})])
    with torch.no_grad():
        assert torch.equal(p(x), expected(x))
        assert not torch.equal(p(x), bs.prepare_qat(net, "int8", calibration=[x]).eval()(x))
