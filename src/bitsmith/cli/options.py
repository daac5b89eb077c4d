"""The options that several commands share, those of data and of the work in groups."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from ..evaluate.images import Preprocess

_FORMS = "a folder of images, one sub-folder per class; .npz or .safetensors with x and y; or file.py:factory"
_DATA = "Data"
_IMAGES = "Images"

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="torchvision:NAME, timm:NAME, package.module:factory, file.py:factory or a .pt2 file",
    ),
]
Weights = Annotated[
    str | None,
    typer.Option(
        help="Weights: .safetensors, .pt or .pth, of which nothing is executed; or 'pretrained': the model's own, from "
        "torchvision or timm",
        metavar="FILE",
    ),
]
Calibration = Annotated[
    str | None,
    typer.Option(
        "--calibration-dir",
        "--calibration",
        metavar="DATA",
        help=f"Data to find ranges with: {_FORMS}. Dynamic recipes need none",
        show_default=False,
        rich_help_panel=_DATA,
    ),
]
Validation = Annotated[
    str | None,
    typer.Option(
        "--validation-dir",
        "--validation",
        metavar="DATA",
        help="Data to judge with, in the same forms; samples that calibrate are never judged",
        rich_help_panel=_DATA,
    ),
]
CalibrationSamples = Annotated[
    int, typer.Option(min=1, help="How many calibrate, evenly from all classes", rich_help_panel=_DATA)
]
ValidationSamples = Annotated[
    int | None,
    typer.Option(
        min=1, help="How many judge, drawn likewise [default: all]", show_default=False, rich_help_panel=_DATA
    ),
]
CalibrationBatch = Annotated[
    int | None,
    typer.Option(
        "--batch-size-calibration", min=1, show_default=False, rich_help_panel=_DATA,
        help="Samples of a batch; another number moves sums by a rounding, and GPTQ with them [default: 50]",
    ),
]  # fmt: skip
ValidationBatch = Annotated[
    int | None,
    typer.Option(
        "--batch-size-validation", min=1, show_default=False, rich_help_panel=_DATA,
        help="Samples read and run at a time; the result is the same [default: 50]",
    ),
]  # fmt: skip
Workers = Annotated[
    int | None,
    typer.Option(
        min=0, show_default=False, rich_help_panel=_DATA,
        help="Threads that read images; 0: none of their own [default: one for each core]",
    ),
]  # fmt: skip
LabelMap = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", rich_help_panel=_DATA,
        help="Which class each folder is, as .json, .yaml or lines of 'folder class' [default: the folders' sorted "
        "names]",
    ),
]  # fmt: skip
Seed = Annotated[
    int | None,
    typer.Option(show_default=False, rich_help_panel=_DATA, help="Of the drawing of samples [default: 0]"),
]
Recipe = Annotated[
    str | None,
    typer.Option(
        help="int8, int8-tensor, int8-po2, w8a16, int16, fp8, ai8x, w4a8-fast, int8-dynamic, fp16-dynamic ... or a "
        "YAML file [default: the target's, mostly int8]",
        show_default=False,
    ),
]
Target = Annotated[str, typer.Option(help="What runs the file: see 'bitsmith targets'")]
Placement = Annotated[
    Literal["runtime", "fx", "flexml", "layerwise"] | None,
    typer.Option(help="Where quantizers stand [default: as in the recipe]", show_default=False),
]
Device = Annotated[
    str | None,
    typer.Option(
        help="Where to calibrate and evaluate, such as cuda:0; files are made on the CPU [default: cpu]",
        show_default=False,
    ),
]
Gpu = Annotated[int | None, typer.Option(min=0, help="N: the same as --device cuda:N", show_default=False)]
Resume = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Keep here what rounding and learning have finished, layer by layer, and go on from it",
    ),
]
Style = Annotated[
    Literal["auto", "qdq", "qcdq"],
    typer.Option(help="How the ONNX file says what is quantized; auto: qcdq where the recipe's bits need it, else qdq"),
]
Opset = Annotated[
    int | None,
    typer.Option(
        "--opset", "--onnx-opset-version", help="ONNX opset [default: the newest that runs]", show_default=False
    ),
]
Memory = Annotated[str, typer.Option(help="Memory for activations; what exceeds it goes to disk")]
_STATED = "[default: as the model's weights state, else {}]"
Resize = Annotated[
    int | None,
    typer.Option(
        min=0, show_default=False, rich_help_panel=_IMAGES,
        help=f"The shorter side becomes this; 0: as it is {_STATED.format(256)}",
    ),
]  # fmt: skip
Crop = Annotated[
    int | None,
    typer.Option(
        min=0, show_default=False, rich_help_panel=_IMAGES,
        help=f"Side of the centre crop; 0: none {_STATED.format(224)}",
    ),
]  # fmt: skip
Mean = Annotated[
    str | None,
    typer.Option(
        show_default=False, rich_help_panel=_IMAGES,
        help=f"Mean of each channel, for pixels of 0 to 1 {_STATED.format('0.485,0.456,0.406')}",
    ),
]  # fmt: skip
Std = Annotated[
    str | None,
    typer.Option(
        show_default=False, rich_help_panel=_IMAGES,
        help=f"Standard deviation of each channel {_STATED.format('0.229,0.224,0.225')}",
    ),
]  # fmt: skip
Interpolation = Annotated[
    Literal["nearest", "bilinear", "bicubic", "lanczos"] | None,
    typer.Option(
        show_default=False, rich_help_panel=_IMAGES, help=f"How images are resized {_STATED.format('bilinear')}"
    ),
]
UserMetric = Annotated[
    str | None,
    typer.Option("--metric", metavar="FILE.PY:FUNCTION", help="Your own measure, function(outputs, targets) -> float"),
]
Latency = Annotated[bool, typer.Option("--latency/--no-latency", help="Measure speed of both files")]
Sensitivity = Annotated[
    bool, typer.Option("--sensitivity", help="Also measure what each layer costs, and propose which to keep finer")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing of the work, only its result")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, as report.json has it")]


@dataclass(frozen=True)
class DataOptions:
    """What calibrates and what judges."""

    calibration: Calibration = None
    validation: Validation = None
    calibration_samples: CalibrationSamples = 1000
    validation_samples: ValidationSamples = None
    calibration_batch: CalibrationBatch = None
    validation_batch: ValidationBatch = None
    workers: Workers = None
    label_map: LabelMap = None
    seed: Seed = None


@dataclass(frozen=True)
class ImageOptions:
    """How images become inputs; None is as the model states."""

    resize: Resize = None
    crop: Crop = None
    mean: Mean = None
    std: Std = None
    interpolation: Interpolation = None

    def given(self) -> dict[str, str]:
        """The options that were given, as the user wrote them."""
        return {f"--{name}": str(value) for name, value in vars(self).items() if value is not None}

    def applied(self, stated: Preprocess) -> Preprocess:
        """What the model states, with the options in its place."""
        from pydantic import ValidationError

        changes = {name: value for name, value in vars(self).items() if value is not None}
        for name in changes.keys() & {"mean", "std"}:
            changes[name] = _numbers(changes[name], f"--{name}")
        if "resize" in changes:
            changes["squash"] = False
        try:
            return type(stated).model_validate({**stated.model_dump(), **changes})
        except ValidationError as error:
            raise typer.BadParameter(str(error.errors()[0]["msg"]).removeprefix("Value error, ")) from error


def _numbers(text: str, option: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        example = "such as 0.5,0.5,0.5"
        raise typer.BadParameter(f"{option} {text!r} must be numbers with commas, {example}") from None
