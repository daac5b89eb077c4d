"""The demo's scripts run as they are written."""

from __future__ import annotations

import re
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest

from bitsmith.demo import digits, one_thread

EXAMPLES = Path(__file__).parents[2] / "examples" / "demo"


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tests share their cores with others."""
    with one_thread():
        yield


def test_the_training_script_learns() -> None:
    script = runpy.run_path(str(EXAMPLES / "train.py"))
    script["train"].__globals__["EPOCHS"] = 2
    _, test = digits()
    assert script["accuracy"](script["train"](), *test) > 50


def test_training_brings_back_what_two_bits_lose(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = runpy.run_path(str(EXAMPLES.parent / "qat.py"))
    script["main"](str(tmp_path / "digits.onnx"), epochs=3)
    printed = capsys.readouterr().out
    before, after = (float(re.search(rf"{name} +([\d.]+) %", printed)[1]) for name in ("training", "after training"))  # type: ignore[index]
    assert after > before + 3
    assert "certificate passed" in printed


def test_the_main_job_in_python(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = runpy.run_path(str(EXAMPLES / "quantize.py"))
    script["main"](str(tmp_path / "digits.onnx"))
    assert (tmp_path / "digits.onnx").exists()
    assert "deployed  top-1 9" in capsys.readouterr().out
