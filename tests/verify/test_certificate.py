"""The verdict and the numbers under it, by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bitsmith.errors import VerificationError
from bitsmith.verify.certificate import Certificate, OutputComparison, judge
from bitsmith.verify.verify import compare_output


def comparison(file: float = 0.0, drift: float = 0.0) -> OutputComparison:
    return OutputComparison(
        name="y",
        lsb=0.1,
        elements=10,
        max_file_vs_integer=file,
        mean_file_vs_integer=file / 10,
        max_file_vs_simulation=file + drift,
        mean_file_vs_simulation=0.0,
        max_integer_vs_simulation=drift,
        equal_fraction=1.0,
    )


def test_differences_are_counted_in_steps_of_the_output_grid() -> None:
    integer = torch.tensor([0.0, 0.5, 1.0, 1.5], dtype=torch.float64)
    file = integer + torch.tensor([0.0, 0.25, 0.0, -0.5])
    simulation = integer + torch.tensor([0.25, 0.0, 0.0, 0.0])
    found = compare_output("y", 0.25, file, integer, simulation)
    assert (found.elements, found.lsb) == (4, 0.25)
    assert (found.max_file_vs_integer, found.mean_file_vs_integer) == (2.0, 0.75)
    assert (found.max_file_vs_simulation, found.mean_file_vs_simulation) == (2.0, 1.0)
    assert (found.max_integer_vs_simulation, found.equal_fraction) == (1.0, 0.5)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_file_that_yields_no_numbers_is_an_error(value: float) -> None:
    x = torch.zeros(3, dtype=torch.float64)
    with pytest.raises(VerificationError, match="'y' of the file holds NaN or infinite"):
        compare_output("y", 1.0, torch.tensor([0.0, value, 0.0]).double(), x, x)


@pytest.mark.parametrize("sizes", [(1, 3, 3), (3, 1, 3), (4, 3, 3)])
def test_outputs_of_other_sizes_are_an_error(sizes: tuple[int, int, int]) -> None:
    """One element would broadcast and be compared all the same."""
    with pytest.raises(VerificationError, match="elements"):
        compare_output("y", 1.0, *(torch.zeros(size).double() for size in sizes))


@pytest.mark.parametrize(
    ("outputs", "exact", "allowed", "passed", "words"),
    [
        ([comparison()], True, 0.0, True, "bit for bit"),
        ([comparison()], False, 8.0, True, "bit for bit"),
        ([comparison(file=1e-6)], True, 0.0, False, "differs by up to 1e-06 LSB"),
        ([comparison(), comparison(file=1.0)], True, 0.0, False, "FAILED"),
        ([comparison(file=0.5)], False, 8.0, True, "within 0.5 LSB"),
        ([comparison(file=8.5)], False, 8.0, False, "allowed are 8"),
        ([comparison(drift=1.0)], True, 0.0, False, "simulation and integer executor differ"),
        ([comparison(drift=9.0)], False, 8.0, False, "simulation and integer executor differ"),
    ],
)
def test_verdicts(outputs: list[OutputComparison], exact: bool, allowed: float, passed: bool, words: str) -> None:
    found, verdict = judge(outputs, ["softmax"], exact, allowed)
    assert found is passed
    assert words in verdict
    assert verdict.startswith("PASSED" if passed else "FAILED")


def test_a_verdict_names_what_the_runtime_computes_in_float() -> None:
    _, verdict = judge([comparison(file=0.5)], [f"layer{i}" for i in range(9)], False, 8.0)
    assert "layer0, layer1" in verdict
    assert "..." in verdict
    assert "layer6" not in verdict


def test_certificates_are_data() -> None:
    fields: dict[str, Any] = {
        "file": "m.onnx",
        "sha256": "0" * 64,
        "engine": "onnxruntime",
        "engine_version": "1",
        "target": "onnxruntime",
        "recipe": "int8",
        "samples": 4,
        "outputs": [comparison(file=2.0), comparison()],
        "coverage": 1.0,
        "file_bytes": 25,
        "float_bytes": 100,
        "allowed_max_lsb": 0.0,
        "passed": False,
        "verdict": "FAILED",
    }
    certificate = Certificate(**fields)
    assert certificate.max_lsb == 2.0
    assert certificate.size_ratio == 0.25
    assert Certificate.model_validate_json(certificate.model_dump_json()) == certificate
