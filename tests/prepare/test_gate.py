"""The gate of rewrites: gains must be clear over samples, large enough to matter, and against the user's model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx, nn

import bitsmith as bs
from bitsmith.calibrate import calibrate
from bitsmith.capture import capture, copy_graph
from bitsmith.flow import held_out
from bitsmith.prepare.gate import Trial, objection
from bitsmith.prepare.prepare import _REWRITES as rewrites
from bitsmith.recipe import bits_recipe
from bitsmith.targets import get_target


def _trial(*errors: float) -> Trial:
    return Trial(torch.tensor(errors, dtype=torch.float64), torch.ones(len(errors), dtype=torch.float64))


@pytest.mark.parametrize(("before", "after", "expected"), [
    ([0.1] * 9, [0.1] * 9, "no gain"),
    ([0.1] * 9, [float("nan")] * 9, "no gain"),
    ([0.1] * 9, [0.05] * 9, ""),
    ([0.1] * 9, [0.092] * 9, "too little to matter"),  # less than a tenth of the noise
    ([0.02] * 9, [0.0151] * 9, "too little to matter"),  # less than half a percent of the signal
    ([0.02] * 9, [0.0149] * 9, ""),
    ([0.006] * 9, [0.0041] * 9, "too little to matter"),  # less than a third of the noise
    ([0.006] * 9, [0.0039] * 9, ""),
    ([0.0009] * 9, [0.0] * 9, "too little to matter"),  # nothing is lost to begin with
    ([0.1] * 8 + [9.0], [0.11] * 8 + [0.1], "not clear from 9 samples"),  # one sample gains, the others lose
    ([0.1], [0.05], ""),  # nothing is known of how it varies
])  # fmt: skip
def test_what_stands_against_a_change(before: list[float], after: list[float], expected: str) -> None:
    assert objection(_trial(*before), _trial(*after)) == expected


errors = st.lists(st.floats(1e-6, 10.0), min_size=2, max_size=20)


@given(errors, errors, st.floats(1e-3, 1e3))
def test_of_two_one_at_most_is_preferred_whatever_the_unit(a: list[float], b: list[float], unit: float) -> None:
    count = min(len(a), len(b))
    one, other = _trial(*a[:count]), _trial(*b[:count])
    assert objection(one, other) or objection(other, one)
    scaled = [Trial(t.errors * unit, t.signals * unit) for t in (one, other)]
    assert scaled[0].db == pytest.approx(one.db, abs=1e-6)


def test_decibels() -> None:
    assert _trial(0.1, 0.1).db == pytest.approx(10.0)
    assert _trial(0.0).db == float("inf")
    assert Trial(torch.ones(2), torch.zeros(2)).db == -float("inf")


@pytest.mark.parametrize(("samples", "batch", "judged"), [
    (40, 16, 40), (41, 16, 40), (1, 1, 1), (255, 64, 254), (256, 64, 128), (400, 100, 128),
])  # fmt: skip
def test_of_few_samples_each_half_judges_what_the_other_calibrated(
    samples: int, batch: int, judged: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[float]] = []

    def watched(graph: fx.GraphModule, placed: Any, batches: list[Any], *rest: Any, **options: Any) -> Any:
        seen.append([float(v) for (x,), _ in batches for v in x[:, 0]])
        return calibrate(graph, placed, batches, *rest, **options)

    monkeypatch.setattr("bitsmith.flow.calibrate", watched)
    x = torch.arange(1.0, samples + 1).unsqueeze(1) / samples
    batches = [((part,), {}) for part in x.split(batch)]
    graph = capture(nn.Linear(1, 2), batches[0])
    recipe = bits_recipe(4, 8, steps=("fold_batch_norm",))
    trial = held_out(batches, recipe, get_target("onnxruntime"), graph, copy_graph(graph))
    assert len(trial.errors) == len(trial.signals) == judged
    assert len(seen) == (2 if 1 < samples < 256 else 1)
    if len(seen) == 2:
        assert not set(seen[0]) & set(seen[1])
        exact = [graph(torch.tensor([[v]])).square().sum() for v in sorted([*seen[0], *seen[1]])]
        assert sorted(trial.signals.tolist()) == pytest.approx(sorted(map(float, exact)), rel=1e-5)


def test_a_rewrite_is_held_against_the_model_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth of the outputs has as little noise of its own as before, and is another function."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    x = torch.randn(16, 3, 8, 8)

    def hush(graph: fx.GraphModule, *_: Any) -> str:
        graph.get_submodule("2").weight.data.mul_(0.1)
        graph.get_submodule("2").bias.data.mul_(0.1)
        return "hushed"

    monkeypatch.setitem(rewrites, "equalize", hush)
    q = bs.quantize(model, [x], bits_recipe(4, 8, steps=("fold_batch_norm", "equalize")))
    assert any(n.startswith("equalize: undone") and n.endswith("0.9 dB with it: no gain") for n in q.report.notes)
