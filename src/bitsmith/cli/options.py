"""The options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from ..evaluate.images import Preprocess

_DATA = "a folder of images, one sub-folder per class; .npz or .safetensors with x and y; or file.py:factory"

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="torchvision:NAME, timm:NAME, package.module:factory, file.py:factory or a .pt2 file",
    ),
]
Weights = Annotated[
    Path | None,
    typer.Option(help="Weights: .safetensors, .pt or .pth; nothing in them is executed", metavar="FILE"),
]
Calibration = Annotated[
    str | None,
    typer.Option(
        "--calibration-dir",
        "--calibration",
        metavar="DATA",
        help=f"Data to find ranges with: {_DATA}. Dynamic recipes need none",
        show_default=False,
    ),
]
Validation = Annotated[
    str | None,
    typer.Option(
        "--validation-dir",
        "--validation",
        metavar="DATA",
        help="Data to judge with, in the same forms; samples that calibrate are never judged",
    ),
]
CalibrationSamples = Annotated[int, typer.Option(min=1, help="How many calibrate, evenly from all classes")]
ValidationSamples = Annotated[
    int | None, typer.Option(min=1, help="How many judge, drawn likewise [default: all]", show_default=False)
]
Recipe = Annotated[
    str | None,
    typer.Option(
        help="int8, int8-tensor, int8-po2, w8a16, int16, fp8, ai8x, int8-dynamic, fp16-dynamic or a YAML file "
        "[default: the target's, mostly int8]",
        show_default=False,
    ),
]
Target = Annotated[str, typer.Option(help="What runs the file: see 'bitsmith targets'")]
Placement = Annotated[
    Literal["runtime", "fx", "flexml", "layerwise"] | None,
    typer.Option(help="Where quantizers stand [default: as in the recipe]", show_default=False),
]
Style = Annotated[
    Literal["auto", "qdq", "qcdq"],
    typer.Option(help="How the ONNX file says what is quantized; auto: qcdq where the recipe's bits need it, else qdq"),
]
Opset = Annotated[int | None, typer.Option(help="ONNX opset [default: the newest that runs]", show_default=False)]
Memory = Annotated[str, typer.Option(help="Memory for activations; what exceeds it goes to disk")]
Resize = Annotated[int, typer.Option(min=0, help="Images: the shorter side becomes this; 0: as it is")]
Crop = Annotated[int, typer.Option(min=0, help="Images: side of the centre crop; 0: none")]
Mean = Annotated[str, typer.Option(help="Images: mean of each channel, for pixels of 0 to 1")]
Std = Annotated[str, typer.Option(help="Images: standard deviation of each channel")]
UserMetric = Annotated[
    str | None,
    typer.Option("--metric", metavar="FILE.PY:FUNCTION", help="Your own measure, function(outputs, targets) -> float"),
]
Seed = Annotated[int, typer.Option(help="Of the drawing of samples")]
Latency = Annotated[bool, typer.Option("--latency/--no-latency", help="Measure speed of both files")]

Sensitivity = Annotated[
    bool, typer.Option("--sensitivity", help="Also measure what each layer costs, and propose which to keep finer")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing of the work, only its result")]

IMAGENET_MEAN = "0.485,0.456,0.406"
IMAGENET_STD = "0.229,0.224,0.225"


def preprocess(resize: int, crop: int, mean: str, std: str) -> Preprocess:
    """The preparation of images that the options describe."""
    from pydantic import ValidationError

    from ..evaluate.images import Preprocess

    try:
        return Preprocess(resize=resize, crop=crop, mean=_numbers(mean, "--mean"), std=_numbers(std, "--std"))
    except ValidationError as error:
        raise typer.BadParameter(str(error.errors()[0]["msg"]).removeprefix("Value error, ")) from error


def _numbers(text: str, option: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        example = "such as 0.5,0.5,0.5"
        raise typer.BadParameter(f"{option} {text!r} must be numbers with commas, {example}") from None
