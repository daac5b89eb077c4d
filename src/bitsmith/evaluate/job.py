"""The main job from end to end: a model and data in; a verified file, and what it is worth, out."""

from __future__ import annotations

import copy
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn

from ..capture import capture, evaluation_mode, read_batches
from ..deployment import deploy
from ..eager import has_stubs
from ..errors import BitsmithError, CaptureError, DataError, ExportError, MissingExtraError, VerificationError
from ..export import export_ai8x, export_onnx, export_torchscript
from ..files import staged_dir, write_text
from ..flow import quantize
from ..report.model import Report
from ..report.page import write_page
from ..report.pictures import Pictures
from ..report.write import look_at
from ..sensitivity import Sensitivity, sensitivity
from ..storage import save
from ..targets import get_target
from ..verify import save_evidence, verify
from ..verify.engines import EngineName, engine_for
from .data import Data, FolderData
from .float_file import export_float_onnx, export_float_script
from .latency import Latency, latency_of_files
from .metrics import Metric, Metrics, Recorder, device_of, evaluate, split_batch
from .progress import progress_callback
from .settings import JobSettings, check_settings

__all__ = ["Job", "JobResult", "JobSettings", "check_settings", "run_job", "simulate"]

MODEL_FILE = "model.onnx"
CHIP_FILE = "model.pth.tar"
TORCH_FILE = "model.pt"
RECIPE_FILE = "recipe.yaml"
REPORT_FILE = "report.json"
PAGE_FILE = "report.html"
VERIFIED_SAMPLES = 100
KEPT_BYTES = 4 << 20  # of inputs, for 'bitsmith verify'
KEPT_SAMPLES = 16


class JobResult(BaseModel):
    """All numbers of one job; ``report.json`` is this, and its keys are part of Bitsmith's interface.

    ``report``: what was done, layer by layer. ``metrics``: ``float``, ``simulated`` and ``deployed`` (the
    file in its runtime). ``certificate``: the file against simulation and integer executor; ``other_certificates``:
    further files, by name. ``latency``: by batch size, of the ``float`` and the ``quantized`` file. ``sizes``: bytes
    of both. ``files``: what the folder holds. ``job``: settings, data, torch's threads. ``notes``: what the reader
    should know. ``recipe_yaml``, ``pictures``, ``sensitivity``: what the page shows beside. docs/report.md describes
    every key.
    """

    model_config = ConfigDict(extra="forbid")

    report: Report
    metrics: dict[str, Metrics] = {}
    certificate: dict[str, Any] | None = None
    other_certificates: dict[str, dict[str, Any]] = {}
    latency: dict[str, dict[str, Latency]] = {}
    sizes: dict[str, int] = {}
    files: dict[str, str] = {}
    job: dict[str, Any] = {}
    notes: list[str] = []
    recipe_yaml: str = ""
    pictures: Pictures | None = None
    sensitivity: Sensitivity | None = None

    @property
    def passed(self) -> bool:
        """Whether the certificates, if there are any, say that the files are right."""
        certificates = [self.certificate or {"passed": True}, *self.other_certificates.values()]
        return all(bool(certificate.get("passed")) for certificate in certificates)


@dataclass(frozen=True)
class Job:
    """A model, its data, and how to quantize it; without ``validation``, calibration data are judged on.

    The model is calibrated and evaluated on the device where it is. ``notes`` go into the result.
    """

    model: nn.Module
    calibration: Data
    validation: Data | None = None
    settings: JobSettings = field(default_factory=JobSettings)
    metric: Metric | None = None
    show_progress: bool | None = False
    say: Callable[[str], None] = lambda _: None
    notes: tuple[str, ...] = ()

    @property
    def judged(self) -> Data:
        """The data that accuracy is measured on."""
        return self.validation or _Unlabelled(self.calibration)


def simulate(job: Job) -> tuple[JobResult, nn.Module, Recorder]:
    """Float accuracy, quantization, and the simulation's accuracy: everything short of a file."""
    job = replace(job, settings=check_settings(job.settings))
    notes = []
    if isinstance(job.judged, _Unlabelled):
        if job.metric is not None:
            raise DataError("your metric takes outputs and targets: give validation data with targets (y) to judge on")
        notes.append("no validation data: the models are compared on the calibration samples, which flatters")
    notes += [*job.notes, *_conversions(job)]
    recorder = Recorder(job.model)
    # First, so that data that cannot be read, or the wrong preprocessing, shows before any work is done.
    metrics = {"float": _measure(job, recorder, "float model")}
    job.say(f"float model: {_headline(metrics['float'])}")
    notes += _doubts(job.judged, metrics["float"], recorder)
    quantized = _quantize(job)
    metrics["simulated"] = _measure(job, quantized, "simulation", recorder)
    job.say(f"simulation: {_headline(metrics['simulated'])}")
    report = quantized.report
    assert isinstance(report, Report)
    result = JobResult(
        report=report, metrics=metrics, job=_circumstances(job), notes=notes, recipe_yaml=quantized.recipe.to_yaml()
    )
    return result, quantized, recorder


def run_job(job: Job, output: str | Path) -> JobResult:
    """Quantize, write, verify and measure. ``output`` gets all files at the end, or, on an error, none."""
    job = replace(job, settings=check_settings(job.settings, files=True))
    with staged_dir(output) as folder:
        _check_graph(job)
        result, quantized, recorder = simulate(job)
        if device_of(job.model).type != "cpu":  # files are made, verified and timed where they run
            job, quantized = replace(job, model=copy.deepcopy(job.model).cpu()), quantized.cpu()
        batches = _sample_inputs(job.judged)
        inputs = batches[0]
        _write(job, quantized, folder)
        job.say("verifying the file against the integer executor and the simulation")
        result.certificate = _certify(job, quantized, _file(job, folder), batches)
        engine = _engine(job.settings.target)
        deployed = deploy(_file(job, folder), engine=engine)
        result.metrics["deployed"] = _measure(job, deployed, f"file in {engine}", recorder)
        job.say(f"file in {engine}: {_headline(result.metrics['deployed'])}")
        if job.settings.torchscript:
            result.other_certificates[TORCH_FILE] = _write_torchscript(job, quantized, folder, batches)
        _weigh(job, folder, inputs, result)
        if job.settings.sensitivity:
            _sensitivity(job, result)
        _draw(job, quantized, inputs, result, folder)
        final = Path(output)
        names = [*sorted(entry.name for entry in folder.iterdir()), REPORT_FILE]
        result.files = {name: str(final / name) for name in names}
        write_text(folder / REPORT_FILE, result.model_dump_json(indent=2) + "\n")
    return result


def _check_graph(job: Job) -> None:
    """A model that only module hooks can follow has no file: placement 'layerwise' would find out at the end."""
    recipe = job.settings.load_recipe()
    if (job.settings.placement or recipe.placement) != "layerwise" or has_stubs(job.model):
        return
    with evaluation_mode(job.model), progress_callback(job.show_progress, "capturing the model"):
        (example,) = read_batches(job.model, itertools.islice(job.calibration, 1))
        device = device_of(job.model)
        try:
            capture(job.model, torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), example))
        except CaptureError as error:
            raise ExportError(
                "placement 'layerwise' would quantize this model by module hooks, without a graph that a file could be "
                f"made of; 'bitsmith evaluate' without --output measures it. What keeps it from a graph: {error}"
            ) from error


def _conversions(job: Job) -> list[str]:
    """What was done to the data's values when they were read; once where both are of one source."""
    found = [getattr(data, "note", None) for data in (job.calibration, job.validation)]
    return list(dict.fromkeys(note for note in found if note))


class _Unlabelled:
    """Calibration data standing in for validation data: its labels, if any, prove nothing and are dropped."""

    def __init__(self, data: Data) -> None:
        self._data = data
        self.name = data.name

    def __len__(self) -> int:
        return len(self._data)

    def __iter__(self) -> Iterator[Any]:
        for batch in self._data:
            yield batch[0] if isinstance(batch, tuple | list) and len(batch) <= 2 else batch


def _doubts(data: Data, metrics: Metrics, recorder: Recorder) -> list[str]:
    """What makes the float accuracy doubtful: classes that are numbered otherwise, or no better than guessing."""
    scores, notes = recorder.scores or 0, []
    if isinstance(data, FolderData) and not data.mapped and metrics.top1 is not None and scores != len(data.classes):
        notes.append(
            f"{data.name} has {len(data.classes):,} class folders, but the model {scores:,} scores: the folders are "
            f"taken for its classes 0 to {len(data.classes) - 1} in the order of their names, which --label-map changes"
        )
    if metrics.top1 is not None and scores > 1 and metrics.samples >= 50 and metrics.top1 < 150.0 / scores:
        notes.append(
            f"the float model is right on {metrics.top1:.2f} %, no better than guessing among {scores:,} classes: look "
            "at the weights, the preparation of the images and the order of the classes"
        )
    return notes


def _quantize(job: Job) -> Any:
    settings = job.settings
    recipe = settings.load_recipe()
    if recipe.placement == "dynamic":
        from ..dynamic import quantize_dynamic

        job.say(f"quantizing: recipe {recipe.name}, target {settings.target}, scales at run time")
        return quantize_dynamic(job.model, recipe, settings.target, example_inputs=(_sample_inputs(job.judged)[0], {}))
    job.say(f"quantizing: recipe {recipe.name}, target {settings.target}, data {job.calibration.name}")
    start = time.perf_counter()
    with progress_callback(job.show_progress, "capturing the model") as show:
        quantized = quantize(
            job.model,
            job.calibration,
            recipe=recipe,
            target=settings.target,
            placement=settings.placement,
            memory=settings.memory,
            progress=show,
            resume=settings.resume,
        )
    job.say(f"quantized in {time.perf_counter() - start:.1f} s")
    return quantized


def _measure(job: Job, model: Any, what: str, recorder: Recorder | None = None) -> Metrics:
    reference = None if recorder is None else recorder.reference
    return evaluate(
        model, job.judged, reference=reference, metric=job.metric, what=what, show_progress=job.show_progress
    )


def _write(job: Job, quantized: Any, folder: Path) -> None:
    save(quantized, folder)
    if _engine(job.settings.target) == "ai8x":
        job.say(f"exporting {CHIP_FILE} and its network description")
        export_ai8x(quantized, folder / CHIP_FILE)
        return
    name, style = _file(job, folder).name, job.settings.style
    job.say(f"exporting {name} ({'TorchScript' if name == TORCH_FILE else f'style {style}'})")
    with progress_callback(job.show_progress, f"exporting {name}"):
        if name == TORCH_FILE:
            export_torchscript(quantized, folder / name)
        else:  # auto was decided by check_settings
            export_onnx(quantized, folder / name, style="qcdq" if style == "qcdq" else "qdq", opset=job.settings.opset)
    recipe = folder / RECIPE_FILE
    if not recipe.exists():
        write_text(recipe, quantized.recipe.to_yaml())


def _write_torchscript(job: Job, quantized: Any, folder: Path, batches: list[tuple[Any, ...]]) -> dict[str, Any]:
    """The TorchScript file, and its certificate."""
    job.say(f"exporting {TORCH_FILE} (TorchScript, style qcdq)")
    with progress_callback(job.show_progress, f"exporting {TORCH_FILE}") as show:
        file = export_torchscript(quantized, folder / TORCH_FILE, style="qcdq")
        return verify(quantized, file, batches, progress=show).model_dump(mode="json")


def _sensitivity(job: Job, result: JobResult) -> None:
    """What each layer costs, and a proposal of which to keep at more bits; where that cannot be seen, a note."""
    settings = job.settings
    job.say("measuring what each layer costs")
    with progress_callback(job.show_progress, "capturing the model") as show:
        try:
            result.sensitivity = sensitivity(
                job.model, job.calibration, settings.load_recipe(), settings.target, placement=settings.placement,
                memory=settings.memory, progress=show,
            )  # fmt: skip
        except BitsmithError as error:
            result.notes.append(f"sensitivity was not measured: {error}")


def _draw(job: Job, quantized: Any, inputs: tuple[Any, ...], result: JobResult, folder: Path) -> None:
    """What the plots show, and the page, where what draws it is installed."""
    with progress_callback(job.show_progress, "looking at layers for the report"):
        result.pictures = look_at(quantized, [inputs], job.model)
    try:
        write_page(result, folder / PAGE_FILE)
    except MissingExtraError as error:
        job.say(f"note: {error}")


def _certify(job: Job, quantized: Any, file: Path, batches: list[tuple[Any, ...]]) -> dict[str, Any]:
    """Verify the file on ``batches`` and keep some samples, so that it can be verified again anywhere."""
    with progress_callback(job.show_progress, "opening the file") as show:
        certificate = verify(quantized, file, batches, progress=show)
    sample_bytes = sum(value[0].numel() * value.element_size() for value in batches[0])
    kept = max(1, min(KEPT_SAMPLES, KEPT_BYTES // max(sample_bytes, 1)))
    save_evidence(file.parent, quantized, certificate, (tuple(value[:kept] for value in batches[0]), {}))
    return certificate.model_dump(mode="json")


def _engine(target: str) -> EngineName:
    """What runs the file: the target's own engine where it has one."""
    return engine_for(get_target(target).engine)


def _file(job: Job, folder: Path) -> Path:
    return folder / {"ai8x": CHIP_FILE, "torch": TORCH_FILE}.get(_engine(job.settings.target), MODEL_FILE)


def _weigh(job: Job, folder: Path, inputs: tuple[Any, ...], result: JobResult) -> None:
    """Sizes and times of the float and the quantized file; a float file that cannot be made is noted."""
    if _engine(job.settings.target) == "ai8x":
        return  # its numbers lie in the chip's memories, which the report's notes weigh
    file = _file(job, folder)
    result.sizes["quantized"] = _size(file)
    with tempfile.TemporaryDirectory(prefix="bitsmith-") as scratch:
        float_file = Path(scratch, "float").with_suffix(file.suffix)
        try:
            with progress_callback(job.show_progress, "exporting the float model"):
                (export_float_script if file.name == TORCH_FILE else export_float_onnx)(job.model, inputs, float_file)
            result.sizes["float"] = _size(float_file)
            if job.settings.latency:
                job.say(f"measuring latency of both files, about {job.settings.latency_seconds:.0f} s")
                result.latency = latency_of_files(
                    {"float": float_file, "quantized": file}, inputs, batches=job.settings.latency_batches,
                    seconds=job.settings.latency_seconds,
                )  # fmt: skip
        except (ExportError, VerificationError) as error:
            result.notes.append(str(error))


def _sample_inputs(data: Data) -> list[tuple[Any, ...]]:
    """Batches of inputs to verify with, from the first samples."""
    batches: list[tuple[Any, ...]] = []
    left = VERIFIED_SAMPLES
    for batch in data:
        inputs, _ = split_batch(batch)
        batches.append(tuple(value[:left] for value in inputs))
        left -= len(batches[-1][0])
        if left <= 0:
            break
    if not batches:
        raise DataError(f"{data.name} holds no samples: there is nothing to verify with")
    return batches


def _size(path: Path) -> int:
    """Bytes of a file with its external data, if any."""
    return sum(file.stat().st_size for file in path.parent.glob(path.name + "*"))


def _circumstances(job: Job) -> dict[str, Any]:
    validation = None if job.validation is None else job.validation.name
    return {
        **job.settings.model_dump(),
        "calibration": job.calibration.name,
        "validation": validation,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _headline(metrics: Metrics) -> str:
    parts = []
    if metrics.top1 is not None:
        parts.append(f"top-1 {metrics.top1:.2f} %")
    if metrics.metric is not None:
        parts.append(f"metric {metrics.metric:.4f}")
    if metrics.agreement is not None:
        parts.append(f"agrees with float on {metrics.agreement:.2f} %")
    if metrics.sqnr_db is not None and metrics.top1 is None:
        parts.append(f"SQNR {metrics.sqnr_db:.1f} dB")
    return ", ".join([*parts, f"{metrics.samples:,} samples"])
