"""The real thing from end to end: ``bitsmith demo``, then ``bitsmith verify`` on what it wrote."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from pathlib import Path

import onnx
import pytest
from onnx import numpy_helper
from typer.testing import CliRunner

from bitsmith.cli import app


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the demo writes."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    start = time.monotonic()
    result = CliRunner().invoke(app, ["demo", "-o", str(folder)], env={"COLUMNS": "100"})
    assert result.exit_code == 0, result.output
    assert time.monotonic() - start < 60
    assert "certificate: PASSED" in result.stdout
    assert "model.onnx" in result.stdout
    return folder


def test_the_demos_file_is_as_good_as_the_float_model(out: Path) -> None:
    data = json.loads((out / "report.json").read_text())
    metrics = data["metrics"]
    assert metrics["float"]["samples"] == 797
    assert metrics["float"]["top1"] >= 98.5
    assert metrics["deployed"]["top1"] >= metrics["float"]["top1"] - 0.5
    assert metrics["deployed"]["agreement"] >= 99.0
    assert data["certificate"]["passed"] is True
    assert data["sizes"]["quantized"] < data["sizes"]["float"]
    assert data["report"]["coverage"]["integer_macs"] == data["report"]["coverage"]["total_macs"] > 0
    assert {"float", "quantized"} == data["latency"]["1"].keys()
    assert all(Path(path).exists() for path in data["files"].values())


def test_verify_passes_on_what_the_demo_wrote(out: Path) -> None:
    result = CliRunner().invoke(app, ["verify", str(out)])
    assert result.exit_code == 0, result.output


def test_verify_refuses_another_file_than_the_certified_one(out: Path, tmp_path: Path) -> None:
    shutil.copytree(out, tmp_path / "swapped")
    model = onnx.load(tmp_path / "swapped" / "model.onnx")
    model.doc_string = "touched"
    onnx.save(model, tmp_path / "swapped" / "model.onnx")
    result = CliRunner().invoke(app, ["verify", str(tmp_path / "swapped")])
    assert result.exit_code == 1, result.output
    assert "SHA-256 differs" in result.stderr


def test_verify_on_a_damaged_file_is_an_error(out: Path, tmp_path: Path) -> None:
    shutil.copytree(out, tmp_path / "damaged")
    with (tmp_path / "damaged" / "model.onnx").open("ab") as file:
        file.write(b"\0")
    result = CliRunner().invoke(app, ["verify", str(tmp_path / "damaged")])
    assert "error:" in result.stderr


def test_verify_fails_where_the_file_computes_something_else(out: Path, tmp_path: Path) -> None:
    """Weights turned round, and the checksum forged to match."""
    shutil.copytree(out, tmp_path / "changed")
    path = tmp_path / "changed" / "model.onnx"
    model = onnx.load(path)
    weight = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    codes = numpy_helper.to_array(weight).copy()
    codes.flat[:] = codes.flat[::-1]
    weight.CopyFrom(numpy_helper.from_array(codes, weight.name))
    onnx.save(model, path)
    certificate = json.loads((tmp_path / "changed" / "certificate.json").read_text())
    certificate["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (tmp_path / "changed" / "certificate.json").write_text(json.dumps(certificate))
    result = CliRunner().invoke(app, ["verify", str(tmp_path / "changed")])
    assert result.exit_code == 3, result.output
    assert "FAILED" in result.stdout


def test_verify_on_a_folder_without_results_is_an_error(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["verify", str(tmp_path)])
    assert result.exit_code == 1
    assert "error:" in result.output
