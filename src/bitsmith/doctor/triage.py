"""Is it quantization at all? Float, 16 bits and 8 bits on the same data (D28)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Literal

from torch import nn

from ..errors import RecipeError
from ..flow import quantize
from ..grid import IntFormat, TensorSpec
from ..recipe import Recipe, load_recipe
from ..targets import Target, get_target
from .model import Finding, Triage

_POINTS = 1.0  # of accuracy or agreement
_CLEAN_DB, _NOISY_DB = 40.0, 20.0
_WEAKEST = 5
Measure = Literal["top1", "agreement", "sqnr_db"]


class _Batches:
    """Any iterable of batches under the name that messages use."""

    name = "the validation data"

    def __init__(self, batches: Iterable[Any]) -> None:
        self._batches = list(batches)

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._batches)


def triage(
    model: nn.Module, calibration: Iterable[Any], target: str | Target, validation: Iterable[Any] | None = None
) -> Triage:
    """Run ``model`` in float, with 16 bits and with 8 bits, and say where a loss comes from.

    ``validation`` holds (inputs, labels) batches; without it, or without labels, both are held against the float
    model's answers on the calibration data. If 16 bits lose as much as 8, quantization is not the cause.
    """
    from ..evaluate.metrics import Recorder, evaluate

    target = get_target(target)
    calibration = list(calibration)
    data: Any = _Batches(calibration if validation is None else validation)
    recorder = Recorder(model.eval())
    before = evaluate(recorder, data)
    narrow = quantize(model, calibration, target=target)
    wide_recipe = widened(load_recipe(target.default_recipe))
    wide = quantize(model, calibration, wide_recipe, target=_taking(target, wide_recipe))
    after = {bits: evaluate(q, data, reference=recorder.reference) for bits, q in ((16, wide), (8, narrow))}
    measure: Measure = "sqnr_db"
    if before.top1 is not None and validation is not None:
        measure = "top1"
    elif after[8].agreement is not None:
        measure = "agreement"
    values = {bits: float(getattr(metrics, measure)) for bits, metrics in after.items()}
    float_value = before.top1 if measure == "top1" else 100.0 if measure == "agreement" else None
    known = [(layer.name, layer.sqnr_db) for layer in narrow.report.layers if layer.sqnr_db is not None]
    weakest = dict(sorted(known, key=lambda item: item[1])[:_WEAKEST])
    remedies = better_recipe(target), training_call(target)
    cause, verdict = judge(measure, float_value, values[16], values[8], weakest, *remedies)
    return Triage(
        measure=measure, samples=before.samples, float_model=float_value, bits_16=values[16], bits_8=values[8],
        weakest=weakest, cause=cause, verdict=verdict,
    )  # fmt: skip


def judge(
    measure: Measure,
    float_value: float | None,
    bits_16: float,
    bits_8: float,
    weakest: dict[str, float],
    better: str,
    train: str,
) -> tuple[Literal["none", "quantization", "elsewhere"], str]:
    """Where the loss comes from, and what to do; ``better`` names the recipe to try first, ``train`` how to train."""
    if float_value is None:
        lost_16, lost_8 = bits_16 < _CLEAN_DB, bits_8 < _NOISY_DB
        numbers = f"{bits_16:.1f} dB at 16 bits, {bits_8:.1f} dB at 8"
    else:
        lost_16, lost_8 = float_value - bits_16 > _POINTS, float_value - bits_8 > _POINTS
        numbers = f"{float_value:.2f} % in float, {bits_16:.2f} % at 16 bits, {bits_8:.2f} % at 8"
    if lost_16:
        return "elsewhere", (
            f"{numbers}: 16 bits lose too, and they round too finely for that. Look for calibration data unlike the "
            "validation data, another preprocessing, or an operator that depends on exact values"
        )
    if lost_8:
        names = ", ".join(list(weakest)[:3])
        return "quantization", (
            f"{numbers}: it is the 8 bits. The weakest layers are {names}: try {better}, then 16 bits for these, "
            f"then training: {train}"
        )
    return "none", f"{numbers}: there is no loss to speak of"


def as_finding(result: Triage) -> Finding:
    """The triage as rule D28."""
    severity: Literal["error", "warning", "note"] = "note"
    if result.cause != "none":
        severity = "error" if result.cause == "elsewhere" else "warning"
    return Finding(
        rule="D28", title="a loss is due to 8 bits, not to something else", severity=severity, where="outputs",
        why=result.verdict, todo="see the page 'when accuracy drops'" if result.cause != "none" else "nothing",
    )  # fmt: skip


def widened(recipe: Recipe) -> Recipe:
    """The recipe with 16 bits for weights and activations, and without the steps that round 8 bits with more care."""

    def wide(spec: TensorSpec | None) -> TensorSpec | None:
        if spec is None or not isinstance(spec.format, IntFormat):
            return spec
        signed = {"format": IntFormat(16, signed=True), "symmetric": True}
        return TensorSpec.model_validate({**spec.model_dump(), **signed, "range": {"name": "minmax"}})

    steps = tuple(step for step in recipe.steps if step.stage not in ("weights", "blocks"))
    changes = {"weights": wide(recipe.weights), "activations": wide(recipe.activations), "steps": steps}
    return recipe.model_copy(update={**changes, "name": f"{recipe.name}-16"})


def better_recipe(target: Target) -> str:
    """The next recipe to try on a target, in words."""
    try:
        target.check(load_recipe("w8a8-best"))
    except RecipeError:
        step = (
            "'equalize' (objective: noise, clips: trade)"
            if load_recipe(target.default_recipe).step("gptq") is None
            else "'reconstruct'"
        )
        return f"step {step} in recipe {target.default_recipe!r}"
    return "recipe 'w8a8-best'"


def training_call(target: Target) -> str:
    """How quantization-aware training starts for a target, as code."""
    if target.shifts is not None:
        return "bitsmith.nn layers in the model, bitsmith.nn.calibrate, your own loop"
    return f"bitsmith.prepare_qat(model, example_inputs=x, target={target.name!r})"


def _taking(target: Target, recipe: Recipe) -> Target:
    """The target, or one that is simulated alone where it has no 16 bits."""
    try:
        target.check(recipe)
    except RecipeError:
        return get_target("generic")
    return target
