"""Walks that take over what earlier ones saw: the same bits, and most of the float stream is not run."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import bitsmith as bs
from bitsmith.calibrate.remembered import FloatStatistics, RememberingWalk
from bitsmith.capture import capture, copy_graph, read_batches
from bitsmith.errors import NonFiniteError
from bitsmith.flow import quantize_graph
from bitsmith.grid.spec import RANGE_RULES
from bitsmith.model import QuantizedModel
from bitsmith.options import apply_options
from bitsmith.ranges import MinMax, Rule, register_range_rule
from bitsmith.ranges.rules import RULES
from bitsmith.targets import get_target

SAMPLES, FOLLOWED = 96, 16


class Net(nn.Module):
    """Branches that share a scale under ``fx``, an activation, a pool."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.first(x)).relu()
        return self.last((self.second(x) + x).relu().mean((2, 3)))


class Calibration:
    """A captured net with its batches, to be quantized again and again."""

    def __init__(self, batches: list[torch.Tensor] | None = None) -> None:
        torch.manual_seed(0)
        self.net = Net().eval()
        self.batches = read_batches(self.net, batches or list(torch.randn(SAMPLES, 3, 8, 8).split(8)))
        self.graph = capture(self.net, self.batches[0])

    def quantize(self, remembered: FloatStatistics | None = None, **options: Any) -> QuantizedModel:
        recipe = apply_options(bs.load_recipe("int8"), {k.replace("_", "-"): v for k, v in options.items()})
        return quantize_graph(
            copy_graph(self.graph),
            self.batches,
            recipe,
            get_target("onnxruntime"),
            inspect.signature(self.net.forward),
            remembered=remembered,
            noise_samples=FOLLOWED,
        )


@pytest.fixture
def float_samples(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many samples the float stream of each walk followed."""
    followed: list[int] = []
    run = RememberingWalk.run

    def watched(walk: RememberingWalk) -> Any:
        followed.append(sum(walk.counts))
        return run(walk)

    monkeypatch.setattr(RememberingWalk, "run", watched)
    return followed


def test_the_result_is_the_same_to_the_bit(float_samples: list[int]) -> None:
    calibration, remembered = Calibration(), FloatStatistics()
    x = torch.randn(4, 3, 8, 8)
    for backend in ("runtime", "fx", "layerwise", "flexml"):
        for bits in (8, 4):
            kind = "sym" if bits == 4 else "asym"
            options = {"target_backend": backend, "weight_bit_width": bits, "act_quant_type": kind}
            ours, alone = calibration.quantize(remembered, **options), calibration.quantize(**options)
            assert torch.equal(ours(x), alone(x))
            assert ours.report.samples == alone.report.samples == SAMPLES
            assert ours.report.output_sqnr_db == alone.report.output_sqnr_db
        assert float_samples[-1] == FOLLOWED  # the second of the two had all that it needs


def test_what_was_not_watched_before_is_watched(float_samples: list[int]) -> None:
    calibration, remembered = Calibration(), FloatStatistics()
    for options in ({}, {"act_quant_calibration_type": "mse"}, {"act_quant_percentile": 99.0}, {"merge_bn": False}):
        calibration.quantize(remembered, **options)
    assert float_samples == [SAMPLES] * 4


@pytest.fixture
def own_rule() -> Iterator[str]:
    """A range rule that somebody registered."""
    register_range_rule("own", Rule(lambda spec, _: MinMax(), RULES["minmax"].range))
    yield "own"
    RULES.pop("own")
    RANGE_RULES.discard("own")


def test_a_rule_of_the_users_own_is_never_taken_over(float_samples: list[int], own_rule: str) -> None:
    calibration, remembered = Calibration(), FloatStatistics()
    recipe = bs.load_recipe("int8").model_dump(mode="json")
    recipe["activations"]["range"] = {"name": own_rule}
    for _ in range(2):
        quantize_graph(
            copy_graph(calibration.graph), calibration.batches, bs.Recipe.model_validate(recipe),
            get_target("onnxruntime"), inspect.signature(calibration.net.forward), remembered=remembered,
        )  # fmt: skip
    assert float_samples == [SAMPLES] * 2


def test_a_walk_that_fails_leaves_nothing_behind() -> None:
    batches = list(torch.randn(SAMPLES, 3, 8, 8).split(8))
    batches[-1][0, 0, 0, 0] = torch.inf
    calibration, remembered = Calibration(batches), FloatStatistics()
    for _ in range(2):
        with pytest.raises(NonFiniteError, match="samples 88 to 95"):
            calibration.quantize(remembered)
