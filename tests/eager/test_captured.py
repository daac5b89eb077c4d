"""prepare, run, convert: the same model that quantize gives, from statistics that streamed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import bitsmith as bs
from bitsmith.errors import BitsmithError, CalibrationError, DataError, NonFiniteError


class Net(nn.Module):
    """Batch norm, a residual add, pooling, a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.deep, self.head = nn.Conv2d(12, 12, 3, padding=1), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        return self.head((x + self.deep(x)).mean((2, 3)))  # type: ignore[no-any-return]


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


def images(count: int, seed: int) -> Tensor:
    return torch.randn(count, 3, 10, 10, generator=torch.Generator().manual_seed(seed))


def in_steps(net: nn.Module, recipe: str, batches: list[Tensor]) -> bs.QuantizedModel:
    prepared = bs.prepare(net, recipe, batches[0][:2])
    for batch in batches:
        prepared(batch)
    return bs.convert(prepared)


def assert_same(left: bs.QuantizedModel, right: bs.QuantizedModel) -> None:
    ours, theirs = left.graph.state_dict(), right.graph.state_dict()
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []
    x = images(8, 99)
    assert torch.equal(left(x), right(x))


@pytest.mark.parametrize("recipe", ["int8", "int8-sym", "w8a16", "fp8"])
def test_steps_give_the_grids_weights_and_outputs_of_quantize(net: nn.Module, recipe: str) -> None:
    """Bias correction and GPTQ included: they follow leading samples, which are kept."""
    batches = [images(90, 1), images(70, 2), images(33, 3)]
    q = in_steps(net, recipe, batches)
    whole = bs.quantize(net, batches, recipe)
    assert_same(q, whole)
    assert q.report.samples == whole.report.samples == 193
    assert q.report.output_sqnr_db == whole.report.output_sqnr_db


def test_a_prepared_model_computes_what_the_float_model_computes(net: nn.Module) -> None:
    prepared, x = bs.prepare(net, "int8", images(2, 0)), images(40, 1)
    assert torch.allclose(prepared(x), net(x), atol=1e-5)


def test_only_leading_inputs_are_kept(net: nn.Module) -> None:
    prepared = bs.prepare(net, "int8", images(2, 0), noise_samples=32)
    for seed in range(6):
        prepared(images(50, seed))
    assert prepared.samples == 300
    assert sum(len(args[0]) for args, _ in prepared.kept) < 64


def test_merged_statistics_are_those_of_one_process(net: nn.Module) -> None:
    batches = [images(130, 1), images(60, 2)]
    parts = []
    for batch in batches:
        prepared = bs.prepare(net, "int8", batch[:2])
        prepared(batch)
        parts.append(prepared)
    parts[0].merge(parts[1])
    assert_same(bs.convert(parts[0]), in_steps(net, "int8", batches))


def test_the_model_and_its_mode_are_left_alone(net: nn.Module) -> None:
    net.train()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    in_steps(net, "int8", [images(16, 0)])
    assert net.training
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_what_went_wrong_is_said(net: nn.Module) -> None:
    with pytest.raises(DataError, match="example_inputs"):
        bs.prepare(net)
    prepared = bs.prepare(net, "int8", images(2, 0))
    with pytest.raises(CalibrationError, match="no batch was run"):
        bs.convert(prepared)
    with pytest.raises(NonFiniteError, match="samples 0"):
        prepared(images(4, 0) / 0)
    with pytest.raises(BitsmithError, match="prepare"):
        bs.convert(net)  # type: ignore[arg-type]
