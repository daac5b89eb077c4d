"""How a job is done, and what of it cannot end in a file."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..calibrate import parse_memory
from ..errors import ExportError, RecipeError
from ..grid import FloatFormat, IntFormat, TensorSpec
from ..options import apply_options
from ..recipe import PlacementName, Recipe, load_recipe
from ..targets import get_target


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


def check_settings(settings: JobSettings) -> JobSettings:
    """The settings with the style decided; what cannot end in a file is refused, before any data is read.

    Checked are the recipe, its options, the target and whether it takes the recipe, resuming, style, opset and memory.

    >>> check_settings(JobSettings()).style
    'qdq'
    """
    target = get_target(settings.target)
    if settings.recipe is None:
        settings = settings.model_copy(update={"recipe": target.default_recipe})
    recipe = settings.load_recipe()
    target.check(recipe)
    if settings.resume is not None and not any(step.stage in ("weights", "blocks") for step in recipe.steps):
        raise RecipeError(
            f"--resume: recipe {recipe.name!r} neither rounds by layer nor learns (gptq, learned-round ...), so there "
            "is nothing to keep and to go on from"
        )
    parse_memory(settings.memory)
    if settings.torchscript and any(
        isinstance(s.format, FloatFormat) for s in _specs(recipe, "weights", "activations")
    ):
        raise ExportError("--export-torch-qcdq: TorchScript files hold integers, but the recipe has small floats")
    if settings.opset is not None:
        _check_opset(settings.opset, recipe)
    odd = [spec.format for spec in _specs(recipe, "activations") if _needs_clip(spec)]
    if settings.style == "qdq" and odd:
        kind = "narrow" if odd[0].bits in (8, 16) else f"{odd[0].bits}-bit"
        raise ExportError(
            f"style 'qdq' has no Clip for the {kind} activations of recipe {recipe.name!r}, which are narrower "
            f"than their storage type: use style 'qcdq' or 'auto'"
        )
    if settings.style != "auto":
        return settings
    return settings.model_copy(update={"style": "qcdq" if odd else "qdq"})


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
        if not isinstance(spec.format, IntFormat):
            needed, what = 19, "small floats"
        elif 8 < spec.format.bits <= 16:
            needed, what = 21, f"{spec.format.bits}-bit integers"
        else:
            continue
        if opset < needed:
            raise ExportError(f"opset {opset}: the recipe has {what}, which ONNX has from opset {needed} on")
