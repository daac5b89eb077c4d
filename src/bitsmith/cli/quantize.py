"""``bitsmith quantize`` and ``bitsmith evaluate``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from . import options as o
from .app import NOT_CERTIFIED, app
from .flat import GroupedCommand, RecipeChanges, flattened

if TYPE_CHECKING:
    from torch import nn

    from ..evaluate.data import Data, FolderData
    from ..evaluate.images import Preprocess
    from ..evaluate.job import Job, JobResult, JobSettings


@dataclass(frozen=True)
class WorkOptions:
    """Where the work is done, and what is kept of it on the way."""

    device: o.Device = None
    gpu: o.Gpu = None
    resume: o.Resume = None
    memory: o.Memory = "4GB"
    quiet: o.Quiet = False


@app.command(cls=GroupedCommand)
@flattened
def quantize(
    model: o.Model,
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder for all results")],
    weights: o.Weights = None,
    recipe: o.Recipe = None,
    target: o.Target = "onnxruntime",
    placement: o.Placement = None,
    style: o.Style = "auto",
    opset: o.Opset = None,
    metric: o.UserMetric = None,
    latency: o.Latency = True,
    sensitivity: o.Sensitivity = False,
    work: WorkOptions,
    data: o.DataOptions,
    images: o.ImageOptions,
) -> None:
    """Quantize MODEL into a verified file.

    OUTPUT gets model.onnx (for PyTorch model.pt, for MAX78000 model.pth.tar and model.yaml), recipe.yaml, report.json,
    the same as a page, report.html, and what 'bitsmith verify' needs: all of it, or nothing. A table of accuracy, size
    and speed ends the work.
    """
    from ..evaluate.job import JobSettings, run_job

    settings = JobSettings(
        recipe=recipe,
        target=target,
        placement=placement,
        resume=None if work.resume is None else str(work.resume),
        style=style,
        opset=opset,
        memory=work.memory,
        latency=latency,
        sensitivity=sensitivity,
    )
    job = make_job(model, weights, data, images, work, metric, settings, files=True)
    finish(run_job(job, output))


@app.command(cls=GroupedCommand)
@flattened
def evaluate(
    model: o.Model,
    *,
    weights: o.Weights = None,
    recipe: o.Recipe = None,
    target: o.Target = "onnxruntime",
    metric: o.UserMetric = None,
    as_json: o.Json = False,
    work: WorkOptions,
    data: o.DataOptions,
    images: o.ImageOptions,
    changes: RecipeChanges,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", "--export-dir", metavar="DIR", rich_help_panel="Files",
                     help="Also write what 'bitsmith quantize' writes"),
    ] = None,
    export_onnx_qcdq: Annotated[
        bool,
        typer.Option("--export-onnx-qcdq", rich_help_panel="Files", help="With --output: the ONNX file in style qcdq"),
    ] = False,
    export_torch_qcdq: Annotated[
        bool,
        typer.Option("--export-torch-qcdq", rich_help_panel="Files",
                     help="With --output: also model.pt, TorchScript in style qcdq"),
    ] = False,
    opset: Annotated[
        int | None,
        typer.Option("--opset", "--onnx-opset-version", rich_help_panel="Files", show_default=False,
                     help="With --output: the ONNX opset [default: the newest that runs]"),
    ] = None,
    latency: Annotated[
        bool | None,
        typer.Option("--latency/--no-latency", rich_help_panel="Files", show_default=False,
                     help="With --output: measure the speed of both files [default: yes]"),
    ] = None,
) -> None:  # fmt: skip
    """Try numbers on MODEL: accuracy of the float model and of the simulated quantized one, and every layer's SQNR.

    The recipe is where it starts; the options of "Numbers" to "Rounding and correction" change it one by one. What
    cannot be followed is refused with the reason. Nothing is written without --output.
    """
    from ..evaluate.job import JobSettings, run_job, simulate

    of_files = {"--export-onnx-qcdq": export_onnx_qcdq, "--export-torch-qcdq": export_torch_qcdq, "--opset": opset,
                "--latency": latency is not None}  # fmt: skip
    if output is None and (named := [name for name, value in of_files.items() if value]):
        raise typer.BadParameter("it is about files: give --output DIR to have them written", param_hint=named[0])
    settings = JobSettings(
        recipe=recipe,
        options=changes,
        target=target,
        resume=None if work.resume is None else str(work.resume),
        style="qcdq" if export_onnx_qcdq else "auto",
        opset=opset,
        torchscript=export_torch_qcdq,
        memory=work.memory,
        latency=latency is not False,
    )
    job = make_job(model, weights, data, images, work, metric, settings, files=output is not None)
    finish(simulate(job)[0] if output is None else run_job(job, output), layers=True, as_json=as_json)


def make_job(
    model: str,
    weights: str | None,
    data: o.DataOptions,
    images: o.ImageOptions,
    work: WorkOptions,
    metric: str | None,
    settings: JobSettings,
    *,
    files: bool,
) -> Job:
    """Load what the options name; the job, which writes ``files`` or not, is then ready to run."""
    from ..evaluate import load_metric, load_model, weights_note
    from ..evaluate.data import check_source
    from ..evaluate.images import Preprocess
    from ..evaluate.job import Job, check_settings

    # What costs least comes first: settings, the metric, whether there are data, and the model, which takes a while.
    settings = check_settings(settings, files=files)
    device = _device(work)
    images.applied(Preprocess())
    measure = None if metric is None else load_metric(metric)
    sources = [source for source in (data.calibration, data.validation) if source is not None]
    for source in sources:
        check_source(source)
    if data.calibration is None:
        _check_dynamic(settings, data.validation)
    _check_data(data, sources)
    loaded = load_model(model, weights)
    if (note := weights_note(model, weights)) is not None and not work.quiet:
        say(f"note: {note}")
    found, judged, notes = _load(data, images, model, loaded, weights)
    job = Job(loaded.to(device), found, judged, settings, measure, show_progress=None, say=say, notes=notes)
    return hushed(job, work.quiet)


def _load(
    data: o.DataOptions, images: o.ImageOptions, model: str, loaded: nn.Module, weights: str | None
) -> tuple[Data, Data | None, tuple[str, ...]]:
    """What calibrates, what judges, and what was done to the images."""
    from ..evaluate import load_data, stated_preprocess
    from ..evaluate.data import BATCH, ArrayData, FolderData

    stated, whose = stated_preprocess(model, loaded, weights)
    preprocess = images.applied(stated)

    def load(source: str, samples: int | None, batch: int | None, exclude: Data | None = None) -> Data:
        return load_data(
            source, samples=samples, preprocess=preprocess, batch=batch or BATCH, seed=data.seed or 0, exclude=exclude,
            workers=data.workers, label_map=data.label_map if Path(source).is_dir() else None,
        )  # fmt: skip

    if data.calibration is None:
        found = judged = load(str(data.validation), data.validation_samples, data.validation_batch)
    else:
        found, judged = load(data.calibration, data.calibration_samples, data.calibration_batch), None
        if data.validation is not None:
            judged = load(data.validation, data.validation_samples, data.validation_batch, found)
    folders = any(isinstance(source, FolderData) for source in (found, judged))
    pixels = folders or any(isinstance(s, ArrayData) and s.preprocess is not None for s in (found, judged))
    given = images.given()
    needed = given if not pixels else {} if folders else given.keys() - {"--mean", "--std"}
    if needed:
        wants = "image folders" if pixels else "images (folders, or uint8 arrays)"
        raise typer.BadParameter(f"the data are no {wants}, so there is nothing to do", param_hint=min(needed))
    if not folders:
        return found, judged, ()
    enlarged = _enlarged([source for source in (found, judged) if isinstance(source, FolderData)], preprocess)
    whose += f", but {', '.join(f'{name} {value}' for name, value in given.items())}" if given else ""
    return found, judged, (f"images: {preprocess} ({whose})", *enlarged)


def _enlarged(folders: list[FolderData], preprocess: Preprocess) -> list[str]:
    """A doubt where images are resized to more than twice their size, as small ones are by ImageNet's preparation."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(folders[0].paths[0]) as image:
            width, height = image.size
    except (OSError, UnidentifiedImageError):  # reading all of them says more
        return []
    if preprocess.resize <= 2 * min(width, height):
        return []
    return [
        f"images of {width} x {height} are enlarged to {preprocess.resize}: --resize 0 --crop 0 takes them as they are"
    ]


def _check_data(data: o.DataOptions, sources: list[str]) -> None:
    """Options of image folders need one, and a factory's batches are its own."""
    from ..evaluate.data import check_source

    own = {source for source in sources if check_source(source) is None}
    of_batches: tuple[tuple[str, int | None, set[str | None]], ...] = (
        ("--batch-size-calibration", data.calibration_batch, {data.calibration}),
        ("--batch-size-validation", data.validation_batch, {data.validation}),
        ("--seed", data.seed, {*sources}),
    )
    for name, chosen, asked in of_batches:
        if chosen is not None and asked <= own:
            raise typer.BadParameter("the data's own function decides this: nothing is drawn here", param_hint=name)
    for name, value in (("--label-map", data.label_map), ("--workers", data.workers)):
        if value is not None and not any(Path(source).is_dir() for source in sources):
            raise typer.BadParameter("it is about image folders, but the data are none", param_hint=name)
    if data.validation is None and (data.validation_samples or data.validation_batch):
        name = "--validation-samples" if data.validation_samples else "--batch-size-validation"
        raise typer.BadParameter("it goes with --validation-dir", param_hint=name)


def _check_dynamic(settings: JobSettings, validation: str | None) -> None:
    """Only recipes that find their scales at run time do without calibration data."""
    recipe = settings.load_recipe()
    if recipe.placement != "dynamic":
        raise typer.BadParameter(f"--calibration-dir is missing: recipe {recipe.name!r} finds its ranges on data")
    if validation is None:
        raise typer.BadParameter("--validation-dir is missing: a file is made and judged with data")


def _device(work: WorkOptions) -> str:
    """The device as torch names it; one that is not there is wrong usage."""
    import torch

    if work.device is not None and work.gpu is not None:
        raise typer.BadParameter("give --device or --gpu, not both", param_hint="--gpu")
    name = work.device or ("cpu" if work.gpu is None else f"cuda:{work.gpu}")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        there = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
        raise typer.BadParameter(
            f"{name!r} cannot be used: {reason} (there is {', '.join(['cpu', *there])})", param_hint="--device"
        ) from error
    return name


def hushed(job: Job, quiet: bool) -> Job:
    """The job, without a word or a bar while it works if ``quiet``."""
    return replace(job, show_progress=False, say=lambda _: None) if quiet else job


def say(line: str) -> None:
    """A step of the work, on standard error: standard output holds results only."""
    Console(stderr=True, soft_wrap=True).print(Text(line, style="dim"))


def finish(result: JobResult, *, layers: bool = False, as_json: bool = False) -> None:
    """Print the result; a failed certificate sets the exit status."""
    from ..report.render import result_view

    if as_json:
        typer.echo(result.model_dump_json(indent=2))
    else:
        Console().print(result_view(result, layers=layers))
    if not result.passed:
        raise typer.Exit(NOT_CERTIFIED)
