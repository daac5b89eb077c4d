"""Accuracy, agreement, error, latency and progress."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bitsmith.errors import DataError
from bitsmith.evaluate import ArrayData, Recorder, evaluate, evaluate_many, interleaved_latency, load_metric
from bitsmith.evaluate.progress import progress, progress_callback


def scores_for(answers: list[int], classes: int = 10) -> Tensor:
    """One-hot scores with the given winners, the rest falling with the class index."""
    scores = -torch.arange(classes, dtype=torch.float32).repeat(len(answers), 1)
    scores[torch.arange(len(answers)), torch.tensor(answers)] = 1.0
    return scores


def test_top1_and_top5_are_the_definition() -> None:
    # the winner is 9; then follow 0, 1, 2, 3
    data = ArrayData(scores_for([9, 9, 9, 9]), torch.tensor([9, 0, 3, 4]), batch=3)
    found = evaluate(lambda x: x, data)
    assert (found.top1, found.top5, found.samples) == (25.0, 75.0, 4)


def test_few_classes_have_no_top5() -> None:
    found = evaluate(lambda x: x, ArrayData(torch.eye(3), torch.arange(3)))
    assert (found.top1, found.top5) == (100.0, None)


def test_agreement_and_sqnr_compare_with_the_reference() -> None:
    data = ArrayData(scores_for([1, 2, 3, 4]), None, batch=2)
    noisy = scores_for([1, 2, 3, 5])
    outputs = iter(noisy.split(2))
    found = evaluate(lambda x: next(outputs), data, reference=lambda x: x)
    assert found.agreement == 75.0
    assert found.top1 is None
    signal, error = scores_for([1, 2, 3, 4]).double(), (noisy - scores_for([1, 2, 3, 4])).double()
    assert found.sqnr_db == pytest.approx(10 * torch.log10(signal.square().sum() / error.square().sum()).item())
    assert found.mse == pytest.approx(error.square().mean().item())


def test_equal_outputs_have_no_finite_sqnr() -> None:
    found = evaluate(lambda x: x, ArrayData(torch.ones(2, 3)), reference=lambda x: x)
    assert (found.mse, found.sqnr_db, found.agreement) == (0.0, None, 100.0)


def test_recorded_outputs_replace_running_the_reference_again() -> None:
    calls = 0

    def model(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return x

    data = ArrayData(torch.eye(4), torch.arange(4), batch=2)
    recorder = Recorder(model)
    evaluate(recorder, data)
    found = evaluate_many({"a": lambda x: x, "b": lambda x: x + 1}, data, recorder.reference)
    assert calls == 2
    assert found["a"].mse == 0.0
    assert found["b"].mse == 1.0


def test_a_full_recorder_falls_back_to_the_model() -> None:
    data = ArrayData(torch.eye(4), batch=2)
    recorder = Recorder(lambda x: x, limit=40)
    evaluate(recorder, data)
    assert callable(recorder.reference)
    assert evaluate(lambda x: x, data, reference=recorder.reference).mse == 0.0


def test_the_users_metric_is_averaged_over_samples(tmp_path: Path) -> None:
    (tmp_path / "m.py").write_text("def mae(outputs, targets):\n    return (outputs - targets).abs().mean()\n")
    data = ArrayData(torch.tensor([[1.0], [2.0], [6.0]]), torch.zeros(3, 1), batch=2)
    found = evaluate(lambda x: x, data, metric=load_metric(f"{tmp_path / 'm.py'}:mae"))
    assert found.metric == pytest.approx(3.0)
    assert found.top1 is None


def test_a_failing_metric_is_named_with_its_shapes() -> None:
    def metric(outputs: Tensor, targets: Tensor) -> float:
        raise KeyError("oops")

    with pytest.raises(DataError, match=r"metric failed on outputs \(2, 3\).*oops"):
        evaluate(lambda x: x, ArrayData(torch.ones(2, 3), torch.zeros(2)), metric=metric)


@pytest.mark.parametrize("parameters", ["", "outputs", "outputs, targets, more", "outputs, *, targets"])
def test_a_metric_that_cannot_be_called_is_refused_when_it_is_loaded(tmp_path: Path, parameters: str) -> None:
    (tmp_path / "fac.py").write_text(f"def make({parameters}):\n    return 0.5\n")
    with pytest.raises(DataError, match=r"fac.py:make' takes \(.*\), but a metric is called as function\(outputs"):
        load_metric(f"{tmp_path / 'fac.py'}:make")


@pytest.mark.parametrize("parameters", ["outputs, targets", "*arrays", "outputs, targets, more=1", "o, t, /"])
def test_a_metric_may_take_more_than_it_is_given(tmp_path: Path, parameters: str) -> None:
    (tmp_path / "fac.py").write_text(f"def make({parameters}):\n    return 0.5\n")
    assert load_metric(f"{tmp_path / 'fac.py'}:make")(torch.ones(1), torch.ones(1)) == 0.5


@pytest.mark.parametrize("result", [1, 1.0, True, np.float32(1), np.ones((1, 1)), torch.tensor(1), torch.ones(1)])
def test_a_metric_may_return_any_kind_of_real_number(result: Any) -> None:
    assert evaluate(lambda x: x, ArrayData(torch.ones(2, 3), torch.zeros(2)), metric=lambda *_: result).metric == 1.0


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (None, "returned None"),
        ("0.5", "returned a str"),
        (torch.ones(2), "returned a float32 tensor of shape"),
        (1j, "returned a complex"),
        (np.array(["0.5"]), "returned a ndarray"),
        (float("nan"), "finite"),
        (torch.tensor(float("inf")), "finite"),
    ],
)
def test_a_metric_that_returns_no_number_is_refused(result: Any, words: str) -> None:
    with pytest.raises(DataError, match=rf"your metric .*{words}"):
        evaluate(lambda x: x, ArrayData(torch.ones(2, 3), torch.zeros(2)), metric=lambda *_: result)


def test_a_metric_without_targets_is_refused_and_not_zero() -> None:
    with pytest.raises(DataError, match="no targets"):
        evaluate(lambda x: x, ArrayData(torch.ones(2, 3)), metric=lambda *_: 1.0)


def test_labels_beyond_the_scores_are_explained() -> None:
    with pytest.raises(DataError, match=r"from 0 to 7, but the model has 3 scores"):
        evaluate(lambda x: x, ArrayData(torch.ones(2, 3), torch.tensor([0, 7])))


def test_nested_outputs_are_judged_by_their_first_tensor() -> None:
    found = evaluate(lambda x: {"scores": x, "aux": x * 0}, ArrayData(torch.eye(3), torch.arange(3)))
    assert found.top1 == 100.0


def test_latency_ranks_and_alternates() -> None:
    order: list[str] = []

    def slow() -> None:
        order.append("slow")
        time.sleep(0.004)

    found = interleaved_latency({"slow": slow, "fast": lambda: order.append("fast")}, seconds=0.05, warmup=0)
    assert found["slow"].median_ms >= 4.0
    assert found["fast"].ratio > 2
    assert found["slow"].ratio == 1.0
    assert order[:4] == ["slow", "fast", "fast", "slow"]
    assert found["slow"].rounds == found["fast"].rounds >= 5


def test_progress_is_silent_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress(range(3), "work")) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


def test_progress_says_what_is_done(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert list(progress(range(3), "calibrating", enabled=True)) == [0, 1, 2]
    assert "calibrating" in capsys.readouterr().err


def test_work_that_reports_by_itself_moves_a_bar(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with progress_callback(enabled=False) as show:
        assert show is None
    with progress_callback(enabled=True) as show:
        assert show is not None
        show(1, 2, "layer1.0.conv1")
    assert "layer1.0.conv1" in capsys.readouterr().err
