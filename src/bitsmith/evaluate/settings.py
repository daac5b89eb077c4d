"""How a job is done, and what of it cannot end in a file."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..calibrate import parse_memory
from ..errors import ExportError, RecipeError
from ..grid import FP8_E4M3, FP8_E5M2, FloatFormat, IntFormat, TensorSpec
from ..options import apply_options
from ..recipe import Override, PlacementName, Recipe, load_recipe
from ..targets import Target, get_target


class JobSettings(BaseModel):
    """How the job is done; named as in ``bitsmith.quantize`` and ``bitsmith.export_onnx``; no recipe: the target's own.

    ``options`` change the recipe (``bitsmith.options``). ``style`` ``"auto"`` is ``"qcdq"`` where the recipe has
    activations that need its Clip, else ``"qdq"``. ``torchscript`` writes that kind of file too, in style ``"qcdq"``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    recipe: str | None = None
    options: dict[str, Any] = {}
    target: str = "onnxruntime"
    placement: PlacementName | None = None
    resume: str | None = None
    style: Literal["auto", "qdq", "qcdq"] = "auto"
    opset: int | None = None
    torchscript: bool = False
    memory: str = "4GB"
    latency: bool = True
    sensitivity: bool = False
    latency_seconds: float = Field(default=4.0, gt=0)
    latency_batches: tuple[int, ...] = (1, 8)

    def load_recipe(self) -> Recipe:
        """The recipe, or the target's own, with the options."""
        return apply_options(load_recipe(self.recipe or get_target(self.target).default_recipe), self.options)


def check_settings(settings: JobSettings, *, files: bool = False) -> JobSettings:
    """The settings with the style decided; what is known to fail is refused, before any data is read.

    Checked are the recipe, its options, the target and whether it takes the recipe, resuming, style, opset and memory;
    with ``files``, also whether the target's file can hold the recipe's numbers.

    >>> check_settings(JobSettings()).style
    'qdq'
    """
    target = get_target(settings.target)
    if settings.recipe is None:
        settings = settings.model_copy(update={"recipe": target.default_recipe})
    recipe = settings.load_recipe()
    if settings.placement is not None:
        recipe = recipe.model_copy(update={"placement": settings.placement})
    target.check(recipe)
    if recipe.placement == "dynamic":
        from ..dynamic.quantize import check_dynamic

        check_dynamic(recipe, target)
    if settings.resume is not None and not any(step.stage in ("weights", "blocks") for step in recipe.steps):
        raise RecipeError(
            f"--resume: recipe {recipe.name!r} neither rounds by layer nor learns (gptq, learned-round ...), so there "
            "is nothing to keep and to go on from"
        )
    parse_memory(settings.memory)
    if settings.opset is not None:
        _check_opset(settings.opset, recipe)
    odd = [spec.format for spec in _specs(recipe, "activations") if _needs_clip(spec)]
    if settings.style == "qdq" and odd:
        kind = "narrow" if odd[0].bits in (8, 16) else f"{odd[0].bits}-bit"
        raise ExportError(
            f"style 'qdq' has no Clip for the {kind} activations of recipe {recipe.name!r}, which are narrower "
            f"than their storage type: use style 'qcdq' or 'auto'"
        )
    if settings.style == "auto" and target.engine not in _NOT_ONNX:
        settings = settings.model_copy(update={"style": "qcdq" if odd else "qdq"})
    if files:
        _check_file(settings, recipe, target)
    return settings


_ONNX_FLOATS = (FP8_E4M3, FP8_E5M2)
_NOT_ONNX = {"torch": "TorchScript", "ai8x": "a checkpoint for the chip's network loader"}


def _check_file(settings: JobSettings, recipe: Recipe, target: Target) -> None:
    """Refuse numbers that the target's kind of file has no form for, and options that it has no use for."""
    floats = [spec.format for spec in _specs(recipe, "weights", "activations") if isinstance(spec.format, FloatFormat)]
    scripts = settings.torchscript or target.engine == "torch"
    if kind := _NOT_ONNX.get(target.engine):
        for name, given in (("--style", settings.style != "auto"), ("--opset", settings.opset is not None)):
            if given:
                raise ExportError(f"{name} is about ONNX files, but target {target.name} gets {kind}: leave it out")
        if settings.torchscript:
            raise ExportError(f"--export-torch-qcdq: target {target.name} gets {kind}: leave it out")
    if recipe.placement == "dynamic":  # half-precision weights are FLOAT16 there
        if settings.torchscript:
            raise ExportError(
                "--export-torch-qcdq: such files hold fixed scales, but the recipe finds its own at run time: --target "
                "torch writes it on torch's dynamic kernels"
            )
        return
    if scripts and floats:
        raise ExportError(
            "TorchScript files hold integers, but the recipe has small floats: "
            + ("use --target onnxruntime" if target.engine == "torch" else "leave out --export-torch-qcdq")
        )
    parts: list[Recipe | Override] = [recipe, *recipe.overrides]
    if target.engine == "torch" and not any(_on_torch_kernels(recipe, part) for part in parts):
        raise ExportError(
            "no layer would run on torch's int8 kernels, which take weights and activations of up to 8 bits, weights "
            f"per tensor or channel and at 8 bits without zero points: recipe {recipe.name!r} has others, which "
            "--target onnxruntime writes"
        )
    if odd := [fmt for fmt in floats if fmt not in _ONNX_FLOATS]:
        raise ExportError(
            f"ONNX has no {odd[0]}: files hold OCP's E4M3 and E5M2 (reserved 'nan' and 'ieee'; 'bitsmith evaluate "
            "--quant-format float_ocp' with 4 and 3, or 5 and 2 exponent and mantissa bits). Other small floats can be "
            "simulated: 'bitsmith evaluate' without --output, or bitsmith.quantize"
        )
    if target.tidl is not None:
        _check_tidl(settings, recipe, target)


def _on_torch_kernels(recipe: Recipe, part: Recipe | Override) -> bool:
    """Whether torch has int8 kernels for layers of these numbers; what an override does not say is the recipe's."""
    weights, activations = part.weights or recipe.weights, part.activations or recipe.activations
    return (
        weights is not None
        and activations is not None
        and (weights.symmetric or weights.format.bits < 8)  # centred, seven bits fit into eight
        and weights.granularity != "group"
        and all(isinstance(s.format, IntFormat) and s.format.bits <= 8 for s in (weights, activations))
    )


def _check_tidl(settings: JobSettings, recipe: Recipe, target: Target) -> None:
    """What TI's import of quantized files takes is less than what the device runs."""
    from ..export.tidl import OPSET

    if settings.style == "qcdq":
        raise ExportError(f"style 'qcdq': target {target.name} imports style 'qdq' only")
    if settings.opset is not None and settings.opset > OPSET:
        raise ExportError(f"opset {settings.opset}: target {target.name} imports opsets up to {OPSET}")
    if any(isinstance(s.format, IntFormat) and s.format.bits > 8 for s in _specs(recipe, "weights", "activations")):
        raise ExportError(
            f"TIDL imports 8 bits from a quantized file, but recipe {recipe.name!r} has 16: 'bitsmith evaluate' "
            "without --output measures it, bitsmith.export_tidl hands it over as ranges beside the float model"
        )
    if recipe.bias is not None and recipe.bias.format.bits != 32:
        raise ExportError(f"TIDL imports biases of 32 bits, but recipe {recipe.name!r} has {recipe.bias.format.bits}")


def _specs(recipe: Recipe, *roles: Literal["weights", "activations", "bias"]) -> list[TensorSpec]:
    """The recipe's specs for these roles, those of its overrides included."""
    parts = [recipe, *(override for override in recipe.overrides if not override.exclude)]
    return [spec for part in parts for role in roles if (spec := getattr(part, role)) is not None]


def _needs_clip(spec: TensorSpec) -> bool:
    """Whether codes end before their storage type does, where QuantizeLinear alone would not clip them."""
    return isinstance(spec.format, IntFormat) and (spec.format.bits not in (8, 16) or spec.format.narrow)


def _check_opset(opset: int, recipe: Recipe) -> None:
    """Refuse an opset that is not written, or that has no type for the recipe's numbers."""
    from ..export.onnx import NEWEST_OPSET, OLDEST_OPSET

    if not OLDEST_OPSET <= opset <= NEWEST_OPSET:
        raise ExportError(f"opset {opset}: ONNX export writes opsets {OLDEST_OPSET} to {NEWEST_OPSET}")
    for spec in _specs(recipe, "weights", "activations", "bias"):
        if isinstance(spec.format, FloatFormat):
            if recipe.placement == "dynamic":  # half precision, which is no small float
                continue
            needed, what = 19, "small floats"
        elif 8 < spec.format.bits <= 16:
            needed, what = 21, f"{spec.format.bits}-bit integers"
        else:
            continue
        if opset < needed:
            raise ExportError(f"opset {opset}: the recipe has {what}, which ONNX has from opset {needed} on")
