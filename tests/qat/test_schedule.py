"""QATSchedule: what it freezes, and when."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import bitsmith as bs
from bitsmith.errors import BitsmithError, CalibrationError
from bitsmith.qat import QATGraph


def prepared(recipe: str = "int8", **options: object) -> QATGraph:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    net.append(nn.Flatten()).append(nn.Linear(64, 5))
    return bs.prepare_qat(net, recipe, calibration=[torch.randn(32, 3, 8, 8)], **options)  # type: ignore[arg-type]


def frozen(p: QATGraph) -> tuple[bool, bool]:
    norms = {layer.norm_frozen for layer in p.layers().values() if layer.norm is not None}
    ranges = {bool(q.frozen) for q in p.quantizers()}
    assert len(norms) == len(ranges) == 1
    return norms.pop(), ranges.pop()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [(False, False), (False, False), (True, False), (True, True), (True, True)]),
        ({"freeze_bn": 0}, [(True, False), *[(True, True)] * 4]),
        ({"freeze_bn": 0, "freeze_ranges": 0}, [(True, True)] * 5),
        ({"freeze_bn": 4, "freeze_ranges": 1}, [(False, False), *[(False, True)] * 3, (True, True)]),
    ],
)
def test_freezes_after_so_many_epochs(options: dict[str, int], expected: list[tuple[bool, bool]]) -> None:
    schedule = bs.QATSchedule(4, **options)
    p = prepared(schedule=schedule)
    seen = [frozen(p)]
    for _ in range(4):
        for _ in range(3):
            p.train(), p.eval()  # what is not counted
        schedule.step()
        seen.append(frozen(p))
    assert seen == expected


def test_learned_scales_learn_on_unless_told_otherwise() -> None:
    for options, wanted in (({}, False), ({"freeze_ranges": 1}, True)):
        schedule = bs.QATSchedule(2, **options)
        p = prepared("w4a4-fast", kind="lsq", schedule=schedule)
        schedule.step(), schedule.step()
        assert frozen(p) == (True, wanted)


def test_counts_the_steps_of_an_optimizer() -> None:
    schedule = bs.QATSchedule(total_steps=4, freeze_bn=1)
    p = prepared(schedule=schedule)
    optimizer = torch.optim.SGD(p.parameters(), lr=0.01)
    schedule.follow(optimizer)
    for count in range(3):
        assert schedule.count == count
        assert p.layers()["0"].norm_frozen == (count >= 1)
        p(torch.randn(4, 3, 8, 8)).sum().backward()
        optimizer.step()


def test_frozen_norms_keep_their_statistics() -> None:
    p = prepared(schedule=bs.QATSchedule(2, freeze_bn=0))
    before = [b.clone() for n, b in p.named_buffers() if "running" in n]
    p(torch.randn(8, 3, 8, 8))
    assert all(torch.equal(a, b) for a, b in zip(before, (b for n, b in p.named_buffers() if "running" in n)))


def test_resumes_where_it_was() -> None:
    schedule = bs.QATSchedule(4)
    schedule.attach(prepared())
    for _ in range(3):
        schedule.step()
    other, p = bs.QATSchedule(4), prepared()
    other.attach(p)
    other.load_state_dict(schedule.state_dict())
    assert (other.count, frozen(p)) == (3, (True, True))


def test_gradual_bit_widths_end_at_the_recipes() -> None:
    schedule = bs.QATSchedule(4, bits={0: 8, 1: 6, 2: 4})
    p = prepared("w4a4-fast", schedule=schedule)
    conv, ends = p.layers()["3"].weight_quantizer, p.layers()["0"].weight_quantizer
    widths = []
    for _ in range(3):
        widths.append((conv.grid.format.bits, ends.grid.format.bits))
        if widths[-1][0] > 4:
            with pytest.raises(CalibrationError, match="bit widths"):
                p.convert()
        p(torch.randn(8, 3, 8, 8)).sum().backward()
        schedule.step()
    assert widths == [(8, 8), (6, 8), (4, 8)]  # the first layer has 8 bits in this recipe
    assert {layer.weight_bits for layer in p.convert().report.layers} == {4, 8}


@pytest.mark.parametrize("arguments", [{}, {"total_epochs": 3, "total_steps": 3}, {"total_epochs": -1},
                                       {"total_epochs": 3, "freeze_bn": -1}, {"total_epochs": 3, "bits": {1: 4}},
                                       {"total_epochs": 3, "bits": {0: 1}}])  # fmt: skip
def test_refuses_what_it_cannot_mean(arguments: dict[str, object]) -> None:
    with pytest.raises(BitsmithError, match="QATSchedule"):
        bs.QATSchedule(**arguments)  # type: ignore[arg-type]


def test_refuses_to_step_without_a_model() -> None:
    with pytest.raises(BitsmithError, match="governs no model"):
        bs.QATSchedule(3).step()
