"""``bitsmith doctor``: a model examined before it is quantized."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from . import options as o
from .app import FAILED, app

if TYPE_CHECKING:
    from torch import nn

    from ..evaluate.data import Data

_EXAMPLE_BATCH = 2


@app.command()
def doctor(
    model: o.Model,
    calibration: Annotated[
        str | None,
        typer.Option("--calibration-dir", "--calibration", metavar="DATA", help="Data for ranges, as for 'quantize'"),
    ] = None,
    validation: o.Validation = None,
    weights: o.Weights = None,
    target: o.Target = "onnxruntime",
    shape: Annotated[
        str | None, typer.Option(help="One input without data, such as 3,224,224 [default: 3 x CROP x CROP]")
    ] = None,
    file: Annotated[
        Path | None, typer.Option(help="An ONNX file to hold against the rules of TI's import", metavar="FILE")
    ] = None,
    operations: Annotated[
        list[str] | None,
        typer.Option(
            "--fix",
            metavar="NAME",
            help="relu6, activations, tables, large_kernels, squeeze_excite, layer_norm or all; may be given again",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The .pt2 file for the model that --fix makes")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the diagnosis as JSON")] = False,
    calibration_samples: o.CalibrationSamples = 200,
    validation_samples: o.ValidationSamples = None,
    resize: o.Resize = None,
    crop: o.Crop = None,
    mean: o.Mean = None,
    std: o.Std = None,
    seed: o.Seed = None,
    quiet: o.Quiet = False,
) -> None:
    """Examine MODEL before it is quantized: thirty rules, each with place, reason and remedy.

    With calibration and validation data also float, 16-bit and 8-bit accuracy, and what a loss is due to. Exit status
    1 on a finding that will break something.
    """
    from ..doctor import doctor as examine
    from ..doctor.view import diagnosis_view
    from ..evaluate import load_data, load_model, stated_preprocess, weights_note
    from .quantize import say

    if (operations is None) != (output is None):
        raise typer.BadParameter("--fix and --output go together: a fixed model needs a .pt2 file to go to")
    if output is not None and output.suffix != ".pt2":
        raise typer.BadParameter(f"--output {output}: name it .pt2, which 'bitsmith quantize' takes as MODEL")
    if validation is not None and calibration is None:
        raise typer.BadParameter(
            "--validation needs --calibration: ranges come from other samples than the judged ones"
        )
    tell = (lambda _: None) if quiet else say
    loaded = load_model(model, weights)
    if (note := weights_note(model, weights)) is not None:
        tell(f"note: {note}")
    stated, _ = stated_preprocess(model, loaded, weights)
    images = o.ImageOptions(resize, crop, mean, std).applied(stated)
    found = judged = None
    if calibration is not None:
        found = load_data(calibration, samples=calibration_samples, preprocess=images, seed=seed or 0)
    if validation is not None:
        judged = load_data(validation, samples=validation_samples, preprocess=images, seed=seed or 0, exclude=found)
    example = _example(found, shape, images.crop)
    diagnosis = examine(loaded, example, target=target, calibration=found, validation=judged, file=file)
    if as_json:
        typer.echo(diagnosis.model_dump_json(indent=2))
    else:
        Console().print(diagnosis_view(diagnosis))
    if operations is not None and output is not None:
        _operate(loaded, example, operations, output, tell)
    if not diagnosis.healthy:
        raise typer.Exit(FAILED)


def _example(data: Data | None, shape: str | None, crop: int) -> Any:
    import torch

    if data is not None:
        return next(iter(data))
    try:
        sizes = [int(part) for part in shape.split(",")] if shape else [3, crop, crop]
    except ValueError:
        raise typer.BadParameter(f"--shape {shape!r} must be numbers with commas, such as 3,224,224") from None
    return torch.randn(_EXAMPLE_BATCH, *sizes, generator=torch.Generator().manual_seed(0))


def _operate(model: nn.Module, example: Any, operations: list[str], output: Path, tell: Callable[[str], None]) -> None:
    """Write the model that surgery makes, and say on standard error what was changed."""
    from ..doctor import fix
    from ..doctor.surgery import DEFAULT
    from ..export.files import save_float_pt2

    names = DEFAULT if "all" in operations else tuple(operations)
    surgery = fix(model, example, *names)
    for change in surgery.changes:
        train = "; train again" if change.trains else ""
        tell(f"{change.operation}: {change.where}: {change.before} -> {change.after}{train}")
    for line in surgery.left:
        tell(f"left: {line}")
    save_float_pt2(surgery.model, example, output)
    need = "its function changed: train it before it is quantized" if surgery.needs_training else "the same function"
    tell(f"{output}: {len(surgery.changes)} changes, {need}")
