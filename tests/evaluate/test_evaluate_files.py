"""Options, targets and kinds of file: what is taken ends in a verified file, all else is refused before the work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bitsmith as bs
from bitsmith.errors import BitsmithError, ExportError
from bitsmith.evaluate import ArrayData
from bitsmith.evaluate import job as jobs
from bitsmith.evaluate.job import Job, JobSettings, check_settings, run_job
from bitsmith.verify import verify_folder


def small_floats(kind: str, exponent: int, mantissa: int) -> dict[str, Any]:
    widths = {"exponent": exponent, "mantissa": mantissa}
    named = {f"{role}-{part}-bit-width": width for role in ("weight", "act") for part, width in widths.items()}
    return {"quant-format": kind, **named}


GROUPS = {"weight-quant-granularity": "per_group"}
OPTIONS: list[dict[str, Any]] = [
    {}, {"weight-bit-width": 2}, {"weight-bit-width": 9}, {"weight-bit-width": 16}, {"act-bit-width": 4},
    {"act-bit-width": 12}, {"act-bit-width": 16}, {"weight-bit-width": 16, "act-bit-width": 16}, {"act-bit-width": 0},
    GROUPS, {**GROUPS, "weight-bit-width": 4}, {"weight-quant-granularity": "per_tensor"},
    {"weight-quant-type": "asym"}, {"weight-quant-type": "asym", "weight-bit-width": 4}, {"act-quant-type": "sym"},
    {"weight-narrow-range": True, "weight-quant-calibration-type": "mse"},
    {"scale-factor-type": "po2_scale"}, {"bias-bit-width": "16"},
    {"bias-bit-width": "None"}, {"layerwise-first-last-bit-width": 16}, {"target-backend": "layerwise"},
    small_floats("float", 4, 3), small_floats("float_ocp", 4, 3), small_floats("float_ocp", 5, 2),
    small_floats("float_ocp", 3, 4), {**small_floats("float_ocp", 4, 3), **GROUPS},
]  # fmt: skip
FILES: list[dict[str, Any]] = [{}, {"opset": 13}, {"opset": 20}, {"style": "qdq"}, {"style": "qcdq"}]
X = torch.randn(16, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """An add, a pool and a linear end; no layer's inputs divide into groups of 32."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.body = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.body(x))
        return self.last(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))


def passes(settings: JobSettings, folder: Path) -> bool:
    """Quantize and write as a job does, and verify all files."""
    net = Net().eval()
    job = Job(net, ArrayData(X), settings=settings)
    q = bs.quantize(net, [X], settings.load_recipe(), settings.target)
    jobs._write(job, q, folder)
    first = bs.verify(q, jobs._file(job, folder), X).passed
    return first and (not settings.torchscript or jobs._write_torchscript(job, q, folder, [(X,)])["passed"])


@pytest.mark.parametrize("target", ["onnxruntime", "openvino", "torch", "max78000", "tda4vm", "am68a"])
@pytest.mark.parametrize("torchscript", [False, True])
def test_what_the_settings_take_ends_in_a_verified_file(target: str, torchscript: bool, tmp_path: Path) -> None:
    if target == "openvino":
        pytest.importorskip("openvino")
    if torchscript and target == "openvino":
        pytest.skip("the file is that of onnxruntime")
    taken = 0
    for number, options in enumerate(OPTIONS):
        try:
            settings = JobSettings(options=options, target=target, torchscript=torchscript)
            settings = check_settings(settings, files=True)
        except BitsmithError:
            continue
        taken += 1
        assert passes(settings, tmp_path / str(number)), options
    assert (taken == 0) == (torchscript and target in ("torch", "max78000"))


@pytest.mark.parametrize("target", ["onnxruntime", "torch", "max78000", "tda4vm"])
@pytest.mark.parametrize("options", [{}, {"act-bit-width": 16}, {"act-bit-width": 6}, small_floats("float_ocp", 4, 3)])
def test_what_is_taken_of_styles_and_opsets_ends_in_a_verified_file(
    target: str, options: dict[str, Any], tmp_path: Path
) -> None:
    for number, about_files in enumerate(FILES):
        try:
            settings = check_settings(JobSettings(options=options, target=target, **about_files), files=True)
        except BitsmithError:
            continue
        assert passes(settings, tmp_path / str(number)), about_files


@pytest.mark.parametrize("recipe", ["int8-dynamic", "int8-dynamic-token", "fp16-dynamic"])
def test_dynamic_recipes_are_taken_where_they_have_files(recipe: str, tmp_path: Path) -> None:
    for about_files in FILES:
        settings = check_settings(JobSettings(recipe=recipe, latency=False, **about_files), files=True)
        if about_files == {"opset": 13}:
            net = nn.Sequential(nn.Flatten(), nn.Linear(108, 4)).eval()
            assert run_job(Job(net, ArrayData(X), settings=settings), tmp_path / "out").passed
    with pytest.raises(BitsmithError, match="knows the targets onnxruntime and torch, not 'openvino'"):
        check_settings(JobSettings(recipe=recipe, target="openvino"))
    with pytest.raises(BitsmithError, match=r"hold fixed scales.*--target torch"):
        check_settings(JobSettings(recipe=recipe, torchscript=True), files=True)
    net = nn.Sequential(nn.Flatten(), nn.Linear(108, 4)).eval()
    settings = JobSettings(recipe=recipe, target="torch", latency=False)
    result = run_job(Job(net, ArrayData(X), settings=settings), tmp_path / "torch")
    assert result.passed
    assert result.files["model.pt"] == str(tmp_path / "torch" / "model.pt")


@pytest.mark.parametrize(
    ("target", "options", "about_files", "words"),
    [
        ("onnxruntime", small_floats("float", 4, 3), {}, "ONNX has no FloatFormat.*float_ocp.*without --output"),
        ("torch", {}, {"style": "qcdq"}, "--style is about ONNX files, but target torch gets TorchScript"),
        ("max78000", {}, {"opset": 17}, "--opset is about ONNX files, but target max78000 gets a checkpoint"),
        ("torch", {}, {"torchscript": True}, "target torch gets TorchScript"),
        ("torch", {"weight-bit-width": 16}, {}, "no layer would run on torch's int8 kernels"),
        ("torch", small_floats("float_ocp", 4, 3), {}, "TorchScript files hold integers.*--target onnxruntime"),
        ("onnxruntime", small_floats("float_ocp", 4, 3), {"torchscript": True}, "leave out --export-torch-qcdq"),
        ("tda4vm", {"act-bit-width": 16}, {}, "export_tidl hands it over"),
        ("tda4vm", {"bias-bit-width": "16"}, {}, "biases of 32 bits"),
        ("am68a", {}, {"style": "qcdq"}, "imports style 'qdq' only"),
        ("am68a", {}, {"opset": 17}, "imports opsets up to 16"),
        ("am68a", {"weight-quant-type": "asym"}, {}, "no zero points of weights"),
        ("max78000", {"bias-bit-width": "None"}, {}, "leaves biases in float"),
        ("max78000", {"target-backend": "layerwise"}, {}, "leaves results of layers in float"),
        ("max78000", {"weight-quant-granularity": "per_channel"}, {}, "takes weight scales per tensor"),
    ],
)  # fmt: skip
def test_what_has_no_file_is_refused_with_a_remedy(
    target: str, options: dict[str, Any], about_files: dict[str, Any], words: str
) -> None:
    with pytest.raises(BitsmithError, match=words):
        check_settings(JobSettings(options=options, target=target, **about_files), files=True)


def test_a_placement_beside_the_recipe_is_checked_too() -> None:
    with pytest.raises(BitsmithError, match="placement 'layerwise'"):
        check_settings(JobSettings(target="tda4vm", placement="layerwise"))


class Branching(Net):
    """No tracer follows a branch on a value."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if float(x.sum()) > 0 else -x)


def test_a_model_without_a_graph_is_refused_before_the_work_where_it_should_have_a_file(tmp_path: Path) -> None:
    said: list[str] = []
    job = Job(Branching().eval(), ArrayData(X), settings=JobSettings(placement="layerwise"), say=said.append)
    with pytest.raises(ExportError, match=r"module hooks.*without --output measures it"):
        run_job(job, tmp_path / "out")
    assert said == []
    assert not (tmp_path / "out").exists()
    assert jobs.simulate(job)[0].metrics["simulated"].samples == 16


def test_without_files_all_numbers_can_be_simulated() -> None:
    settings = JobSettings(options=small_floats("float", 2, 1))
    assert check_settings(settings).load_recipe().weights is not None


def test_target_torch_gets_torchscript_that_is_verified_weighed_and_timed(tmp_path: Path) -> None:
    settings = JobSettings(target="torch", latency_seconds=0.05)
    result = run_job(Job(Net().eval(), ArrayData(X), ArrayData(X, torch.arange(16) % 4), settings), tmp_path / "out")
    assert result.passed
    assert result.certificate is not None
    assert result.certificate["file"] == "model.pt"
    assert result.sizes.keys() == {"float", "quantized"}
    assert result.latency["1"].keys() == {"float", "quantized"}
    scripted = torch.jit.load(str(tmp_path / "out" / "model.pt"))
    assert scripted(X[:3]).shape == (3, 4)
    assert verify_folder(tmp_path / "out").passed
