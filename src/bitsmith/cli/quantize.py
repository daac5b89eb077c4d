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

if TYPE_CHECKING:
    from ..evaluate.images import Preprocess
    from ..evaluate.job import Job, JobResult, JobSettings


@app.command()
def quantize(
    model: o.Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder for all results")],
    calibration: o.Calibration = None,
    validation: o.Validation = None,
    weights: o.Weights = None,
    recipe: o.Recipe = None,
    target: o.Target = "onnxruntime",
    placement: o.Placement = None,
    calibration_samples: o.CalibrationSamples = 1000,
    validation_samples: o.ValidationSamples = None,
    style: o.Style = "auto",
    opset: o.Opset = None,
    memory: o.Memory = "4GB",
    resize: o.Resize = 256,
    crop: o.Crop = 224,
    mean: o.Mean = o.IMAGENET_MEAN,
    std: o.Std = o.IMAGENET_STD,
    metric: o.UserMetric = None,
    latency: o.Latency = True,
    sensitivity: o.Sensitivity = False,
    seed: o.Seed = 0,
    quiet: o.Quiet = False,
) -> None:
    """Quantize MODEL into a verified file.

    OUTPUT gets model.onnx (for MAX78000 model.pth.tar and model.yaml), recipe.yaml, report.json, the same as a
    page, report.html, and what 'bitsmith verify' needs: all of it, or nothing. A table of accuracy, size and speed ends
    the work.
    """
    from ..evaluate.job import JobSettings, run_job

    settings = JobSettings(
        recipe=recipe,
        target=target,
        placement=placement,
        style=style,
        opset=opset,
        memory=memory,
        latency=latency,
        sensitivity=sensitivity,
    )
    images = o.preprocess(resize, crop, mean, std)
    drawing = Drawing(calibration_samples, validation_samples, seed)
    job = make_job(model, weights, calibration, validation, drawing, images, metric, settings)
    finish(run_job(hushed(job, quiet), output))


@app.command()
def evaluate(
    model: o.Model,
    calibration: o.Calibration = None,
    validation: o.Validation = None,
    weights: o.Weights = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Also write what 'bitsmith quantize' writes")
    ] = None,
    recipe: o.Recipe = None,
    target: o.Target = "onnxruntime",
    placement: o.Placement = None,
    calibration_samples: o.CalibrationSamples = 1000,
    validation_samples: o.ValidationSamples = None,
    memory: o.Memory = "4GB",
    resize: o.Resize = 256,
    crop: o.Crop = 224,
    mean: o.Mean = o.IMAGENET_MEAN,
    std: o.Std = o.IMAGENET_STD,
    metric: o.UserMetric = None,
    seed: o.Seed = 0,
    quiet: o.Quiet = False,
) -> None:
    """Try a recipe on MODEL: accuracy and every layer's SQNR.

    The float model is held against the simulation of the quantized one.

    Nothing is written without --output.
    """
    from ..evaluate.job import JobSettings, run_job, simulate

    settings = JobSettings(recipe=recipe, target=target, placement=placement, memory=memory)
    images = o.preprocess(resize, crop, mean, std)
    drawing = Drawing(calibration_samples, validation_samples, seed)
    job = make_job(model, weights, calibration, validation, drawing, images, metric, settings)
    job = hushed(job, quiet)
    finish(simulate(job)[0] if output is None else run_job(job, output), layers=True)


@dataclass(frozen=True)
class Drawing:
    """How many samples are drawn, and by which seed."""

    calibration: int
    validation: int | None
    seed: int


def make_job(
    model: str,
    weights: Path | None,
    calibration: str | None,
    validation: str | None,
    drawing: Drawing,
    images: Preprocess,
    metric: str | None,
    settings: JobSettings,
) -> Job:
    """Load what the options name; the job is then ready to run."""
    from ..evaluate import load_data, load_metric, load_model, weights_note
    from ..evaluate.job import Job, check_settings

    # What costs least comes first: settings, the metric, the data, and the model, which may take a while to build.
    settings = check_settings(settings)
    measure = None if metric is None else load_metric(metric)
    if calibration is None:
        _check_dynamic(settings, validation)
        found = judged = load_data(str(validation), samples=drawing.validation, preprocess=images, seed=drawing.seed)
    else:
        found, judged = load_data(calibration, samples=drawing.calibration, preprocess=images, seed=drawing.seed), None
    if calibration is not None and validation is not None:
        judged = load_data(validation, samples=drawing.validation, preprocess=images, seed=drawing.seed, exclude=found)
    loaded = load_model(model, weights)
    if (note := weights_note(model, weights)) is not None:
        say(f"note: {note}")
    return Job(loaded, found, judged, settings, measure, show_progress=None, say=say)


def _check_dynamic(settings: JobSettings, validation: str | None) -> None:
    """Only recipes that find their scales at run time do without calibration data."""
    from ..recipe import load_recipe

    if settings.recipe is None or load_recipe(settings.recipe).placement != "dynamic":
        raise typer.BadParameter("the recipe needs data to find ranges with", param_hint="--calibration-dir")
    if validation is None:
        raise typer.BadParameter("a file is made and judged with data: give some", param_hint="--validation-dir")


def hushed(job: Job, quiet: bool) -> Job:
    """The job, without a word or a bar while it works if ``quiet``."""
    return replace(job, show_progress=False, say=lambda _: None) if quiet else job


def say(line: str) -> None:
    """A step of the work, on standard error: standard output holds results only."""
    Console(stderr=True, soft_wrap=True).print(Text(line, style="dim"))


def finish(result: JobResult, *, layers: bool = False) -> None:
    """Print the result; a failed certificate sets the exit status."""
    from ..report.render import result_view

    console = Console()
    console.print(result_view(result, layers=layers))
    if not result.passed:
        raise typer.Exit(NOT_CERTIFIED)
