"""The command line: it parses, calls and prints, and its exit status tells what happened.

The library behind it is replaced by stand-ins here; ``test_cli_demo.py`` runs the real thing.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import bitsmith.verify  # noqa: F401  (its attributes are replaced)
from bitsmith.cli import app
from bitsmith.demo import digits, digits_net, one_thread
from bitsmith.errors import CalibrationError
from bitsmith.evaluate import job
from bitsmith.evaluate.float_file import export_float_onnx
from bitsmith.evaluate.latency import onnxruntime_session
from bitsmith.report.model import Coverage, LayerReport, Report


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tests share their cores with others."""
    with one_thread():
        yield


REPORT = Report(
    recipe="int8",
    target="onnxruntime",
    placement="runtime",
    samples=20,
    coverage=Coverage(total_macs=1000, quantized_macs=1000, integer_macs=900, float_layers=["linear"]),
    layers=[
        LayerReport(name="conv1", type="Conv2d", weight_bits=8, input_bits=8, macs=900, integer=True, sqnr_db=41.5),
        LayerReport(name="linear", type="Linear", macs=100, sqnr_db=12.25, note="left in float"),
    ],
)


class Certificate(SimpleNamespace):
    """What verify returns, as far as the command line looks at it."""

    def model_dump(self, mode: str) -> dict[str, Any]:
        return {"max_lsb": self.lsb, "passed": self.passed, "verdict": self.verdict}


class Quantized(nn.Module):
    """A quantized model that computes what the float one does, plus a little."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.report = REPORT
        self.recipe = SimpleNamespace(to_yaml=lambda: "name: int8\n")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x) + 0.01


@pytest.fixture(scope="module")
def float_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's net as ONNX."""
    return export_float_onnx(digits_net(), (torch.zeros(2, 1, 8, 8),), tmp_path_factory.mktemp("f") / "f.onnx")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, float_file: Path) -> dict[str, Any]:
    """Stand-ins for the library; what they were called with, and ``lsb``, which the certificate finds."""
    seen: dict[str, Any] = {"lsb": 0}

    def quantize(model: nn.Module, calibration: Any, **options: Any) -> Quantized:
        seen["samples"] = sum(len(x) for x, _ in calibration)
        seen.update(options)
        return Quantized(model)

    def deploy(path: Path, engine: str) -> Any:
        session = onnxruntime_session(path, 1)
        return lambda x: torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])

    def certificate(*_: Any, **__: Any) -> Certificate:
        passed = seen["lsb"] == 0
        return Certificate(
            lsb=seen["lsb"], passed=passed, verdict="PASSED: 0 LSB" if passed else "FAILED: differs by 3 LSB"
        )

    def export(q: Any, path: Path, style: str, opset: int | None) -> None:
        seen.update(style=style, opset=opset)
        shutil.copy(float_file, path)

    stubs = {
        "quantize": quantize,
        "save": lambda q, folder: (Path(folder) / "state.safetensors").write_text("state"),
        "export_onnx": export,
        "verify": certificate,
        "deploy": deploy,
        "save_evidence": lambda folder, *_: (Path(folder) / "certificate.json").write_text("{}"),
    }
    for name, stub in stubs.items():
        monkeypatch.setattr(job, name, stub)
    monkeypatch.setattr(job, "export_float_onnx", lambda model, inputs, path: shutil.copy(float_file, path))
    monkeypatch.setattr(sys.modules["bitsmith.verify"], "verify_folder", certificate)
    return seen


@pytest.fixture
def arrays(tmp_path: Path) -> str:
    """Digits as a file that calibrates and validates."""
    _, (x, y) = digits()
    np.savez(tmp_path / "digits.npz", x=x[:60].numpy(), y=y[:60].numpy())
    return str(tmp_path / "digits.npz")


def run(*arguments: str, width: int = 100) -> Any:
    """``bitsmith arguments`` on a terminal of that width."""
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": str(width)})


def flat(text: str) -> str:
    """Text without line breaks and table rules."""
    return re.sub(r"[\s│┃]+", " ", text)


def test_quantize_writes_everything_and_prints_the_table(calls: dict[str, Any], arrays: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run(
        *(
            "quantize",
            "bitsmith.demo:digits_net",
            "--calibration",
            arrays,
            "--validation",
            arrays,
            "-o",
            str(out),
        ),
        *(
            "--calibration-samples",
            "20",
            "--memory",
            "2GB",
            "--style",
            "qcdq",
            "--opset",
            "17",
            "--placement",
            "fx",
        ),
    )
    assert result.exit_code == 0, result.output
    assert calls["samples"] == 20
    assert (calls["memory"], calls["style"], calls["opset"], calls["placement"]) == ("2GB", "qcdq", 17, "fx")
    assert sorted(p.name for p in out.iterdir()) == [
        "certificate.json",
        "model.onnx",
        "recipe.yaml",
        "report.html",
        "report.json",
        "state.safetensors",
    ]
    data = json.loads((out / "report.json").read_text())
    assert {"report", "metrics", "certificate", "latency", "sizes", "files"} <= data.keys()
    assert data["metrics"]["deployed"]["samples"] == 40  # the 60 less the 20 that calibrate
    assert data["metrics"]["deployed"]["agreement"] == 100.0
    assert data["certificate"]["passed"] is True
    assert data["sizes"]["quantized"] == (out / "model.onnx").stat().st_size
    assert all(Path(path).exists() for path in data["files"].values())
    shown = flat(result.stdout)
    for words in ("float model", "deployed file", "top-1", "latency", "certificate: PASSED", "model.onnx"):
        assert words in shown
    assert "quantizing: recipe int8" in result.stderr


def test_a_failed_certificate_is_exit_status_3(calls: dict[str, Any], arrays: str, tmp_path: Path) -> None:
    calls["lsb"] = 3
    arguments = ("--calibration", arrays, "-o", str(tmp_path / "out"), "--no-latency")
    result = run("quantize", "bitsmith.demo:digits_net", *arguments)
    assert result.exit_code == 3
    assert "FAILED: differs by 3 LSB" in result.stdout
    assert (tmp_path / "out" / "report.json").exists()
    verified = run("verify", str(tmp_path / "out"))
    assert verified.exit_code == 3
    assert "FAILED" in verified.stdout


def test_without_validation_data_the_labels_prove_nothing(calls: dict[str, Any], arrays: str, tmp_path: Path) -> None:
    result = run(
        *(
            "quantize",
            "bitsmith.demo:digits_net",
            "--calibration",
            arrays,
            "-o",
            str(tmp_path / "o"),
            "--no-latency",
        )
    )
    assert result.exit_code == 0, result.output
    metrics = json.loads((tmp_path / "o" / "report.json").read_text())["metrics"]
    assert metrics["deployed"]["top1"] is None
    assert metrics["deployed"]["agreement"] == 100.0
    assert "no validation data" in flat(result.stdout)


def test_evaluate_writes_nothing_and_shows_every_layer(calls: dict[str, Any], arrays: str, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    result = run("evaluate", "bitsmith.demo:digits_net", "--calibration", arrays, "--validation", arrays,
                 "--calibration-samples", "20")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert sorted(tmp_path.iterdir()) == before
    shown = flat(result.stdout)
    assert "12.2 weakest, float" in shown
    assert "conv1 Conv2d 8 8 → - 900 41.5" in shown
    assert "90.0 % of 1.00 k multiply-accumulates run in integers" in shown
    assert "in float: linear" in shown


@pytest.mark.parametrize("width", [80, 120])
def test_the_tables_fit_the_terminal(calls: dict[str, Any], arrays: str, tmp_path: Path, width: int) -> None:
    result = run(
        *(
            "quantize",
            "bitsmith.demo:digits_net",
            "--calibration",
            arrays,
            "-o",
            str(tmp_path / "o"),
            "--no-latency",
        ),
        width=width,
    )
    assert max(map(len, result.stdout.splitlines())) <= width


def test_an_error_is_one_message_and_status_1(calls: dict[str, Any], arrays: str, tmp_path: Path) -> None:
    result = run("quantize", "no_such_package:f", "--calibration", arrays, "-o", str(tmp_path / "out"))
    assert result.exit_code == 1
    assert result.stderr.startswith("error: there is no module 'no_such_package'")
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


def test_debug_lets_the_error_through(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BITSMITH_DEBUG", "1")
    result = run("quantize", "bitsmith.demo:digits_net", "--calibration", str(tmp_path), "-o", str(tmp_path / "out"))
    assert type(result.exception).__name__ == "DataError"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--mean", "a,b"), "must be numbers with commas"),
        (("--mean", "0.5,0.5"), "one number for grey or three"),
        (("--std", "0,1,1"), "must be positive"),
        (("--style", "odd"), "qcdq"),
        (("--calibration-samples", "0"), "calibration-samples"),
    ],
)
def test_wrong_usage_is_status_2(arrays: str, tmp_path: Path, options: tuple[str, str], words: str) -> None:
    arguments = ("--calibration", arrays, "-o", str(tmp_path / "out"), *options)
    result = run("quantize", "bitsmith.demo:digits_net", *arguments)
    assert result.exit_code == 2
    assert words in flat(result.output)


def test_a_failure_in_the_middle_leaves_no_output(
    calls: dict[str, Any], arrays: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise CalibrationError("conv1: its activations hold NaN")

    monkeypatch.setattr(job, "verify", fail)
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.onnx").write_text("old")
    result = run("quantize", "bitsmith.demo:digits_net", "--calibration", arrays, "-o", str(out), "--no-latency")
    assert result.exit_code == 1
    assert [p.name for p in out.iterdir()] == ["model.onnx"]
    assert (out / "model.onnx").read_text() == "old"


def test_an_output_folder_that_is_a_file_stops_before_any_work(
    calls: dict[str, Any], arrays: str, tmp_path: Path
) -> None:
    (tmp_path / "out").write_text("mine")
    result = run("quantize", "bitsmith.demo:digits_net", "--calibration", arrays, "-o", str(tmp_path / "out"))
    assert result.exit_code == 1
    assert "is a file" in result.stderr
    assert "samples" not in calls


def test_the_users_metric_reaches_the_table(calls: dict[str, Any], arrays: str, tmp_path: Path) -> None:
    (tmp_path / "m.py").write_text("def half(outputs, targets):\n    return 0.5\n")
    result = run("evaluate", "bitsmith.demo:digits_net", "--calibration", arrays, "--validation", arrays,
                 "--calibration-samples", "20", "--metric", f"{tmp_path / 'm.py'}:half")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "your metric 0.5000 0.5000" in flat(result.stdout)


W4A4 = "weights: {format: {bits: 4}}\nactivations: {format: {bits: 4}}\n"
W8A8 = "weights: {format: {bits: 8}}\nactivations: {format: {bits: 8}}\n"
OVERRIDDEN = W8A8 + "overrides: [{match: first, activations: {format: {bits: 6}}}]\n"
NARROW = "weights: {format: {bits: 8}}\nactivations: {format: {bits: 8, narrow: true}}\n"


@pytest.mark.parametrize(
    ("recipe", "style"),
    [(W4A4, "qcdq"), (OVERRIDDEN, "qcdq"), (NARROW, "qcdq"), (W8A8, "qdq"), ("w8a16", "qdq"), ("fp8", "qdq")],
)
def test_the_style_follows_the_recipe(
    calls: dict[str, Any], arrays: str, tmp_path: Path, recipe: str, style: str
) -> None:
    if "\n" in recipe:
        (tmp_path / "r.yaml").write_text(recipe)
        recipe = str(tmp_path / "r.yaml")
    out = tmp_path / "o"
    arguments = ("--calibration", arrays, "--recipe", recipe, "-o", str(out), "--no-latency")
    result = run("quantize", "bitsmith.demo:digits_net", *arguments)
    assert result.exit_code == 0, result.output
    assert calls["style"] == style
    assert json.loads((out / "report.json").read_text())["job"]["style"] == style


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--recipe", W4A4, "--style", "qdq"), "4-bit activations"),
        (("--recipe", OVERRIDDEN, "--style", "qdq"), "6-bit activations"),
        (("--recipe", NARROW, "--style", "qdq"), "narrow activations"),
        (("--recipe", "int9"), "no recipe is called 'int9'"),
        (("--target", "toaster"), "'toaster'"),
        (("--recipe", W8A8.replace("8", "20")), "bits"),
        (("--opset", "12"), "opset 12: ONNX export writes opsets 13 to"),
        (("--opset", "99"), "opset 99"),
        (("--recipe", "w8a16", "--opset", "20"), "16-bit integers, which ONNX has from opset 21"),
        (("--recipe", "fp8", "--opset", "18"), "small floats, which ONNX has from opset 19"),
        (("--memory", "much"), "is not a size"),
        (("--memory", "0GB"), "leaves no room"),
        (("--metric", "no_such_file.py:f"), "is not a file"),
    ],
)
def test_settings_are_checked_before_any_data_is_read(tmp_path: Path, options: tuple[str, ...], words: str) -> None:
    (tmp_path / "r.yaml").write_text(next((o for o in options if "\n" in o), ""))
    chosen = [str(tmp_path / "r.yaml") if "\n" in option else option for option in options]
    data = str(tmp_path / "no_such_data.npz")  # reading it would be another error
    result = run("quantize", "bitsmith.demo:digits_net", "--calibration", data, "-o", str(tmp_path / "o"), *chosen)
    assert result.exit_code == 1
    assert words in flat(result.stderr)


def test_opsets_that_suffice_are_taken() -> None:
    for recipe, opset in (("w8a16", 21), ("fp8", 19), ("int8", 13)):
        assert job.check_settings(job.JobSettings(recipe=recipe, opset=opset)).opset == opset


def test_a_metric_without_validation_data_is_an_error(calls: dict[str, Any], arrays: str, tmp_path: Path) -> None:
    (tmp_path / "m.py").write_text("def half(outputs, targets):\n    return 0.5\n")
    arguments = ("--calibration", arrays, "--metric", f"{tmp_path / 'm.py'}:half")
    result = run("evaluate", "bitsmith.demo:digits_net", *arguments)
    assert result.exit_code == 1
    assert "give validation data" in flat(result.stderr)
    assert "samples" not in calls


def test_conversions_of_the_data_are_noted_once(calls: dict[str, Any], tmp_path: Path) -> None:
    _, (x, y) = digits()
    np.savez(tmp_path / "double.npz", x=x[:60].double().numpy(), y=y[:60].numpy())
    np.savez(tmp_path / "bytes.npz", x=(x[:60] * 255).to(torch.uint8).numpy(), y=y[:60].numpy())
    for name, words in (("double", "is float64, converted to float32"), ("bytes", "is uint8 and taken for images")):
        data, out = str(tmp_path / f"{name}.npz"), tmp_path / name
        extra = ("--mean", "0", "--std", "1") if name == "bytes" else ()
        result = run("quantize", "bitsmith.demo:digits_net", "--calibration", data, "--validation", data, *extra,
                     "--calibration-samples", "20", "-o", str(out), "--no-latency")  # fmt: skip
        assert result.exit_code == 0, result.output
        notes = json.loads((out / "report.json").read_text())["notes"]
        assert len([note for note in notes if words in note]) == 1
        assert words in flat(result.stdout)


def test_verify_takes_the_file_for_its_folder(calls: dict[str, Any], tmp_path: Path, monkeypatch: Any) -> None:
    def verify_folder(folder: Path) -> Certificate:
        assert folder == tmp_path
        return Certificate(lsb=0, passed=True, verdict="PASSED", file="model.onnx")

    monkeypatch.setattr(sys.modules["bitsmith.verify"], "verify_folder", verify_folder)
    for name in ("model.onnx", "other.onnx"):
        (tmp_path / name).write_bytes(b"")
    assert run("verify", str(tmp_path / "model.onnx")).exit_code == 0
    other = run("verify", str(tmp_path / "other.onnx"))
    assert other.exit_code == 1
    assert "is about model.onnx" in other.stderr


def test_verify_prints_the_certificate_as_text_and_json(calls: dict[str, Any], tmp_path: Path) -> None:
    assert "max lsb 0" in flat(run("verify", str(tmp_path)).stdout)
    data = json.loads(run("verify", str(tmp_path), "--json").stdout)
    assert data["passed"] is True
    assert data["verdict"] == "PASSED: 0 LSB"


def test_targets_are_listed_as_data() -> None:
    assert "onnxruntime" in run("targets", width=80).stdout
    (data,) = json.loads(run("targets", "onnxruntime", "--json").stdout)
    assert data["name"] == "onnxruntime"
    assert "engine" in run("targets", "onnxruntime").stdout
    unknown = run("targets", "toaster")
    assert unknown.exit_code == 1
    assert "'toaster'" in unknown.stderr


def test_help_needs_no_torch() -> None:
    code = (
        "import sys\nfrom bitsmith.cli import app\n"
        "from typer.testing import CliRunner\n"
        "print(CliRunner().invoke(app, ['quantize', '--help']).exit_code)\n"
        "print(sorted({'torch', 'onnx', 'onnxruntime', 'numpy'} & sys.modules.keys()))\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split("\n")[0] == "0"
    if "torch" not in out:  # `import bitsmith` itself may load torch
        assert "[]" in out
    assert "onnxruntime" not in out
