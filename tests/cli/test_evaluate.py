"""``bitsmith evaluate``: every option of its signature does what its help says, or is refused.

The work itself is replaced by a stand-in that keeps the Job, except in the last tests, which run it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

from bitsmith import load_recipe
from bitsmith.cli import app
from bitsmith.evaluate import balanced_indices, job
from bitsmith.evaluate.job import Job, JobResult
from bitsmith.evaluate.metrics import Metrics
from bitsmith.options import RECIPE_OPTIONS, apply_options
from bitsmith.report.model import Report

NET = """
import torch
from torch import nn


def build():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                        nn.Linear(8, 3))
    return net


def one(outputs, targets):
    return 0.25
"""
CLASSES = ("ant", "bee", "cat")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a net, its weights, and images of three classes, as the current one."""
    rng = np.random.default_rng(0)
    for part, count in (("calibration", 5), ("validation", 20)):
        for label, name in enumerate(CLASSES):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(80 * label, 80 * label + 90, (12, 10, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "map.txt").write_text("cat 0\nbee 1\nant 2\n")
    torch.save(torch.nn.Sequential().state_dict(), tmp_path / "empty.pt")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What the stand-ins were given: ``job``, and the ``output`` folder."""
    seen = SimpleNamespace(job=None, output=None)
    result = JobResult(report=Report(), metrics={"float": Metrics(samples=1), "simulated": Metrics(samples=1)})

    def simulate(given: Job) -> tuple[JobResult, None, None]:
        seen.job = given
        return result, None, None

    def run_job(given: Job, output: Path) -> JobResult:
        seen.job, seen.output = given, output
        return result

    monkeypatch.setattr(job, "simulate", simulate)
    monkeypatch.setattr(job, "run_job", run_job)
    return seen


BASE = ("evaluate", "net.py:build", "--calibration-dir", "calibration", "--validation-dir", "validation", "--crop", "8",
        "--resize", "0")  # fmt: skip


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, [*BASE, *arguments], env={"COLUMNS": "200"})


def flat(text: str) -> str:
    return re.sub(r"[\s│]+", " ", text)


def batches(data: Any) -> list[int]:
    return [len(x) for x, _ in data]


def command() -> Any:
    return typer.main.get_command(app).commands["evaluate"]  # type: ignore[attr-defined]


Seen = SimpleNamespace
# Parameter: what is typed, and what must then hold of the job.
EFFECTS: dict[str, tuple[tuple[str, ...], Callable[[Seen], bool]]] = {
    "calibration": (("--calibration", "validation", "--calibration-samples", "6"),
                    lambda s: s.job.calibration.name == "validation"),
    "validation": (("--validation", "calibration", "--calibration-samples", "6"),
                   lambda s: sum(batches(s.job.validation)) == 9),
    "calibration_samples": (("--calibration-samples", "6"), lambda s: sum(batches(s.job.calibration)) == 6),
    "validation_samples": (("--validation-samples", "7"), lambda s: sum(batches(s.job.validation)) == 7),
    "calibration_batch": (("--batch-size-calibration", "4"), lambda s: batches(s.job.calibration) == [4, 4, 4, 3]),
    "validation_batch": (("--batch-size-validation", "32"), lambda s: batches(s.job.validation) == [32, 28]),
    "workers": (("--workers", "0"), lambda s: s.job.validation.workers == 0 and len(batches(s.job.validation)) == 2),
    "label_map": (("--label-map", "map.txt"), lambda s: next(iter(s.job.validation))[1][0] == 2),
    "seed": (("--seed", "1", "--calibration-samples", "3"),
             lambda s: s.job.calibration.indices == tuple(balanced_indices(s.job.calibration.labels, 3, 1))),
    "resize": (("--resize", "9"), lambda s: s.job.validation.preprocess.resize == 9),
    "crop": (("--crop", "7"), lambda s: next(iter(s.job.validation))[0].shape[2:] == (7, 7)),
    "mean": (("--mean", "0.5,0.5,0.5"), lambda s: s.job.validation.preprocess.mean == (0.5, 0.5, 0.5)),
    "std": (("--std", "0.5,0.5,0.5"), lambda s: s.job.calibration.preprocess.std == (0.5, 0.5, 0.5)),
    "interpolation": (("--interpolation", "bicubic"), lambda s: s.job.validation.preprocess.interpolation == "bicubic"),
    "recipe": (("--recipe", "w4a8-fast"), lambda s: s.job.settings.load_recipe() == load_recipe("w4a8-fast")),
    "target": (("--target", "openvino"), lambda s: s.job.settings.target == "openvino"),
    "memory": (("--memory", "1GB"), lambda s: s.job.settings.memory == "1GB"),
    "metric": (("--metric", "net.py:one"), lambda s: s.job.metric is not None and s.job.metric(None, None) == 0.25),
    "quiet": (("-q",), lambda s: s.job.show_progress is False),
    "device": (("--device", "cpu"), lambda s: next(s.job.model.parameters()).device.type == "cpu"),
    "resume": (("--resume", "kept", "--gptq"), lambda s: s.job.settings.resume == "kept"),
    "output": (("-o", "out"), lambda s: s.output == Path("out")),
    "export_onnx_qcdq": (("-o", "out", "--export-onnx-qcdq"), lambda s: s.job.settings.style == "qcdq"),
    "export_torch_qcdq": (("-o", "out", "--export-torch-qcdq"), lambda s: s.job.settings.torchscript),
    "opset": (("-o", "out", "--onnx-opset-version", "17"), lambda s: s.job.settings.opset == 17),
    "latency": (("-o", "out", "--no-latency"), lambda s: not s.job.settings.latency),
}  # fmt: skip
# Parameter: what is typed, and why it cannot be done.
REFUSALS: list[tuple[str, tuple[str, ...], str]] = [
    ("model", ("resnet18",), "unexpected extra argument"),
    ("weights", ("--weights", "empty.pt"), "no tensors"),
    ("weights", ("--weights", "pretrained"), "goes with torchvision:NAME and timm:NAME"),
    ("device", ("--device", "cuda:99"), "'cuda:99' cannot be used"),
    ("device", ("--device", "gpu"), "'gpu' cannot be used"),
    ("gpu", ("--gpu", "99"), "'cuda:99' cannot be used"),
    ("gpu", ("--gpu", "0", "--device", "cpu"), "not both"),
    ("resume", ("--resume", "kept"), "recipe 'int8' neither rounds by layer nor learns"),
    ("opset", ("--opset", "17"), "give --output DIR"),
    ("latency", ("--latency",), "give --output DIR"),
    ("export_onnx_qcdq", ("--export-onnx-qcdq",), "give --output DIR"),
    ("export_torch_qcdq", ("--export-torch-qcdq",), "give --output DIR"),
    ("export_torch_qcdq", ("-o", "out", "--export-torch-qcdq", "--recipe", "fp8"), "recipe has small floats"),
    ("calibration", ("--calibration", "nowhere"), "'nowhere' does not exist"),
    ("label_map", ("--label-map", "nowhere.txt"), "'nowhere.txt' does not exist"),
    ("calibration_batch", ("--calibration", "net.py:data", "--batch-size-calibration", "4"), "own function decides"),
    ("validation_batch", ("--validation", "net.py:data", "--batch-size-validation", "4"), "own function decides"),
    ("seed", ("--calibration", "net.py:data", "--validation", "net.py:data", "--seed", "1"), "own function decides"),
    ("mean", ("--mean", "half"), "must be numbers with commas"),
    ("target", ("--target", "tda4vm", "--weight-bit-width", "4"), "tda4vm"),
    ("recipe", ("--recipe", "int8-dynamic", "--gptq"), "finds its scales at run time"),
]


def test_every_parameter_has_a_case() -> None:
    recipe_options = {name.replace("-", "_") for name in RECIPE_OPTIONS}
    mine = EFFECTS.keys() | {name for name, _, _ in REFUSALS} | {"as_json", "help"}
    assert {parameter.name for parameter in command().params} | {"help"} == mine | recipe_options


@pytest.mark.parametrize("name", EFFECTS)
def test_an_option_changes_the_job_as_documented(place: Path, ran: Seen, name: str) -> None:
    arguments, holds = EFFECTS[name]
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert holds(ran)
    if name not in ("device", "quiet"):
        run()
        assert not holds(ran) or name == "output"


@pytest.mark.parametrize(("name", "arguments", "words"), REFUSALS, ids=lambda value: str(value)[:40])
def test_what_cannot_be_done_is_refused_with_the_reason(
    place: Path, ran: Seen, name: str, arguments: tuple[str, ...], words: str
) -> None:
    result = run(*arguments)
    assert result.exit_code in (1, 2)
    assert words in flat(result.stderr)
    assert "Traceback" not in result.output
    assert ran.job is None


@pytest.mark.parametrize("name", RECIPE_OPTIONS)
def test_recipe_options_reach_the_recipe(place: Path, ran: Seen, name: str) -> None:
    option = RECIPE_OPTIONS[name]
    words = {
        "layerwise-first-last-bit-width": "4",
        "gpxq-accumulator-bit-width": "20",
        "act-quant-percentile": "99.5",
        "gpfq-p": "0.5",
    }
    value = option.kind[-1] if isinstance(option.kind, tuple) else words.get(name, "1")
    together = {
        "gpxq": ["--gptq"], "gptq-": ["--gptq"], "learned-round-": ["--learned-round", "hard_sigmoid"],
        "graph-eq-m": ["--graph-eq-iterations", "5"], "channel-splitting-s": ["--channel-splitting-ratio", "0.1"],
        "uint": ["--act-quant-type", "sym"], "weight-e": ["--quant-format", "float"],
        "weight-m": ["--quant-format", "float"], "act-e": ["--quant-format", "float"],
        "act-m": ["--quant-format", "float"], "weight-n": ["--weight-quant-calibration-type", "mse"],
    }  # fmt: skip
    before = next((typed for prefix, typed in together.items() if name.startswith(prefix)), [])
    if name in ("act-equalization", "weight-bit-width", "act-bit-width", "weight-mantissa-bit-width"):
        value = "3" if name != "act-equalization" else "fx"
    if name.endswith("exponent-bit-width"):
        value = "3"
    typed = [f"--{name}"] if option.kind is bool else [f"--{name}", value]
    if name == "learned-round-lr-scheduler":
        before, typed = ["--learned-round", "identity"], [f"--{name}", "linear"]
    plain = run(*before)
    assert plain.exit_code == 0, plain.output
    recipe = ran.job.settings.load_recipe()
    result = run(*before, *typed)
    if option.refused is not None and value != str(option.kept):
        assert result.exit_code == 1
        assert str(option.refused)[:30] in flat(result.stderr)
        return
    assert result.exit_code == 0, result.output
    assert name in ran.job.settings.options
    changed = ran.job.settings.load_recipe()
    assert changed == apply_options(load_recipe("int8"), ran.job.settings.options)
    assert (changed != recipe) or option.refused is not None


def test_json_is_the_whole_result(place: Path, ran: Seen) -> None:
    data = json.loads(run("--json").stdout)
    assert {"report", "metrics", "notes", "recipe_yaml"} <= data.keys()


def test_help_shows_groups_and_hides_what_is_always_refused() -> None:
    shown = CliRunner().invoke(app, ["evaluate", "--help"], env={"COLUMNS": "100"}).output
    for title in ("Options:", "Data:", "Images:", "Numbers:", "Scales and ranges:", "Files:"):
        assert title in shown
    assert "--gpfq-p" not in shown


def test_images_options_without_images_are_refused(place: Path, ran: Seen) -> None:
    np.savez("arrays.npz", x=np.zeros((4, 3, 8, 8), np.float32), y=np.zeros(4, np.int64))
    base = ("evaluate", "net.py:build", "--calibration-dir", "arrays.npz")
    for arguments, words in (
        (("--mean", "0,0,0"), "--mean: the data are no images"),
        (("--workers", "2"), "--workers: it is about image folders"),
        (("--label-map", "map.txt"), "--label-map: it is about image folders"),
    ):
        result = CliRunner().invoke(app, [*base, *arguments])
        assert result.exit_code == 2
        assert words in flat(result.stderr)
    np.savez("arrays.npz", x=np.zeros((4, 3, 8, 8), np.uint8), y=np.zeros(4, np.int64))
    assert CliRunner().invoke(app, [*base, "--mean", "0,0,0"]).exit_code == 0
    assert "--crop: the data are no image folders" in flat(CliRunner().invoke(app, [*base, "--crop", "4"]).stderr)


def test_small_images_that_would_be_enlarged_are_told(place: Path, ran: Seen) -> None:
    assert run("--resize", "256").exit_code == 0
    assert ran.job.notes[1].startswith("images of 10 x 12 are enlarged to 256")


def test_data_that_are_missing_are_named(place: Path) -> None:
    result = CliRunner().invoke(app, ["evaluate", "net.py:build"])
    assert result.exit_code == 2
    assert "--calibration-dir is missing: recipe 'int8'" in flat(result.stderr)


def test_the_images_preparation_is_told(place: Path, ran: Seen) -> None:
    run()
    (note,) = ran.job.notes
    assert note == (
        "images: centre 8 x 8, mean (0.485, 0.456, 0.406), standard deviation (0.229, 0.224, 0.225) "
        "(usual for ImageNet, but --resize 0, --crop 8)"
    )


def test_the_whole_way_with_both_files_and_resuming(place: Path) -> None:
    arguments = ("--gptq", "--resume", "kept", "-o", "out", "--export-onnx-qcdq", "--export-torch-qcdq", "--no-latency")
    first = run(*arguments)
    assert first.exit_code == 0, first.output
    kept = {path.name: path.read_bytes() for path in (place / "kept").iterdir()}
    assert len([name for name in kept if name.endswith(".safetensors")]) == 2  # the convolution and the linear layer
    assert "model.pt certificate: PASSED" in flat(first.stdout)
    data = json.loads((place / "out" / "report.json").read_text())
    assert data["other_certificates"]["model.pt"]["passed"]
    assert data["job"]["style"] == "qcdq"
    scripted = torch.jit.load(str(place / "out" / "model.pt"))
    assert scripted(torch.zeros(2, 3, 8, 8)).shape == (2, 3)
    again = run(*arguments)
    assert again.exit_code == 0, again.output
    assert {path.name: path.read_bytes() for path in (place / "kept").iterdir()} == kept
    changed = run("--gptq", "--weight-bit-width", "4", "--resume", "kept")
    assert changed.exit_code == 1
    assert "holds a run with another model, recipe" in flat(changed.stderr)


def test_doubtful_accuracy_is_said(place: Path) -> None:
    (place / "map.txt").write_text("ant\nbee\ncat\n")
    result = run("--json", "--label-map", "map.txt")
    assert not any("class folders" in note for note in json.loads(result.stdout)["notes"])
    for part in ("calibration", "validation"):
        (place / part / "dog").mkdir()
    notes = json.loads(run("--json").stdout)["notes"]
    assert any("has 4 class folders, but the model 3 scores" in note for note in notes)
    assert any("1 of the 4 class folders in 'validation' hold no images ('dog')" in note for note in notes)
