"""The main job in one call: capture, prepare, place, calibrate."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, fx, nn

from .calibrate import calibrate, parse_memory
from .calibrate.blocks import batch_size
from .calibrate.remembered import FloatStatistics
from .calibrate.streaming import quantize_hooked
from .calibrate.walk import Progress, WalkLog
from .capture import ForwardFunction, capture, copy_graph, evaluation_mode, read_batches
from .capture.inputs import Arguments, first_samples, last_samples, sample_count, tensors_of
from .errors import CaptureError, CollapseError, DataError, PlacementError, RecipeError
from .model import QuantizedModel
from .place.chip_limits import refuse_float
from .place.place import Placed, place
from .prepare.gate import Trial
from .prepare.prepare import prepare
from .recipe import Override, PlacementName, Recipe, load_recipe
from .report.build import build_report
from .report.diagnosis import diagnose
from .steps import ColumnByColumn
from .targets import Target, get_target

_TRIAL_SAMPLES, _TRIAL_MEMORY = 128, 1 << 30
_TRAIN_MODE = "the model was in train mode: it was quantized in eval mode, and its mode was restored"


def quantize(
    model: nn.Module, calibration: Iterable[Any], recipe: str | Path | Recipe | None = None,
    target: str | Target = "onnxruntime", *, placement: PlacementName | None = None,
    overrides: Iterable[Override] = (), example_inputs: Any = None, forward: ForwardFunction | None = None,
    memory: str | int = "4GB", noise_samples: int | None = None, progress: Progress | None = None,
    resume: str | Path | None = None,
) -> QuantizedModel:  # fmt: skip
    """Static post-training quantization of a trained model.

    ``calibration`` is any iterable of batches (some hundred samples): a tensor, or a tuple or list whose leading
    elements are the model's inputs, or a dict by forward's parameter names; ``forward=lambda model, batch: ...``
    overrides that. ``recipe`` is a name, a Recipe or a YAML file (default: the target's own, mostly ``int8``),
    ``target`` a name or a Target; ``placement`` and
    ``overrides`` change the recipe's own. ``memory`` bounds the activations kept at a time, beyond which they go to
    a temporary file. ``noise_samples`` is how many samples the quantized stream follows, for per-layer noise and
    the recipe's steps (default 128; 512 with GPTQ, 1024 where rounding is learned); ranges see all samples.
    ``resume`` names a folder in which steps that learn keep each layer or block they have finished: a run that was
    killed goes on from there, to the same result.

    The caller's model is not changed; in train mode it is run in eval mode and put back. Raises a subclass of
    BitsmithError that names the layer or the batch.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    >>> q = quantize(net, [torch.randn(16, 3, 8, 8)])
    >>> q(torch.randn(2, 3, 8, 8)).shape
    torch.Size([2, 8, 6, 6])
    >>> q.report.coverage.fraction
    1.0
    """
    from .eager import has_stubs, quantize_by_hand, with_module_recipes

    check_arguments(model, noise_samples)
    target = get_target(target)
    recipe = resolve(target.default_recipe if recipe is None else recipe, placement, overrides)
    samples = noise_samples or recipe.samples
    seconds: dict[str, float] = {}
    clock = _Clock(seconds)
    with evaluation_mode(model) as was_training:
        batches = read_batches(model, calibration, forward)
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        batches = torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), batches)
        example = batches[0] if example_inputs is None else read_batches(model, [example_inputs], forward)[0]
        clock.lap("read")
        if has_stubs(model):
            return quantize_by_hand(model, batches, recipe, target, example)
        try:
            graph = capture(model, example)
            recipe = with_module_recipes(recipe, model, graph)
        except CaptureError as error:
            if recipe.placement != "layerwise":
                raise
            hooked = quantize_hooked(model, batches, recipe, target, noise_samples=samples, reason=str(error))
            if undone := [step.name for step in recipe.steps]:
                hooked.report.notes.append(f"not done, since there is no graph: {', '.join(undone)}")
            hooked.report.notes[:0] = [_TRAIN_MODE] if was_training else []
            return hooked
    clock.lap("capture")
    return quantize_graph(
        graph, batches, recipe, target, inspect.signature(model.forward), memory=memory, noise_samples=samples,
        progress=progress, resume=resume, notes=[_TRAIN_MODE] if was_training else [], seconds=seconds,
    )  # fmt: skip


def quantize_graph(
    graph: fx.GraphModule, batches: list[Arguments], recipe: Recipe, target: Target, signature: inspect.Signature, *,
    memory: str | int = "4GB", noise_samples: int | None = None, progress: Progress | None = None,
    resume: str | Path | None = None, notes: Iterable[str] = (), seconds: dict[str, float] | None = None,
    remembered: FloatStatistics | None = None,
) -> QuantizedModel:  # fmt: skip
    """The part of ``quantize`` behind capture; ``graph`` is changed, so give a copy to keep it for other recipes.

    ``remembered`` spares recipes for the same graph and ``batches`` most of the float stream, after the first.
    """
    seconds = {} if seconds is None else seconds
    clock = _Clock(seconds)
    samples = noise_samples or recipe.samples
    notes = [*notes, *graph.meta.get("notes", [])]
    graph, prepared = prepare(graph, recipe, batches, partial(held_out, batches, recipe, target))
    notes += prepared
    clock.lap("prepare")
    seen = None if remembered is None else remembered.of(graph)
    placed = place(graph, recipe, target)
    clock.lap("place")
    channels_last(graph)
    log = calibrate(
        graph, placed, batches, target, memory=parse_memory(memory), noise_samples=samples,
        steps=recipe.steps, progress=progress, resume=None if resume is None else Path(resume), seen=seen,
    )  # fmt: skip
    clock.lap("calibrate")
    return finish(graph, recipe, target, placed, log, notes, seconds, signature)


def held_out(
    batches: list[Arguments], recipe: Recipe, target: Target, graph: fx.GraphModule, exact: fx.GraphModule
) -> Trial:
    """Noise at the outputs of a graph against those of another, from a short walk with a copy of it.

    The first samples calibrate, the last ones judge: rounding fits what it is calibrated with. Of few samples each half
    judges in its turn.
    """
    count = sum(map(sample_count, batches))
    half = max(1, min(_TRIAL_SAMPLES, count // 2))
    if batch_size(graph) is None:  # then batches cannot be cut
        first, last, parts = batches[:1], batches[-1:], len(batches)
    else:
        first, last = _samples(batches, half, first_samples), _samples(batches[::-1], half, last_samples)
        parts = count
    turns = [(first, last), (last, first)][: 2 if parts > 1 and half < _TRIAL_SAMPLES else 1]
    trials = [_try(copy_graph(graph), few, judged, recipe, target, exact) for few, judged in turns]
    return Trial(torch.cat([t.errors for t in trials]), torch.cat([t.signals for t in trials]))


def _try(
    trial: fx.GraphModule, few: list[Arguments], judged: list[Arguments], recipe: Recipe, target: Target,
    exact: fx.GraphModule,
) -> Trial:  # fmt: skip
    """``trial`` is calibrated with ``few`` samples, by the recipe's quick steps, and held against ``exact``."""
    steps = tuple(step for step in recipe.steps if step.stage == "bias" or isinstance(step, ColumnByColumn))
    placed = place(trial, recipe, target)
    samples = sum(map(sample_count, few))
    calibrate(trial, placed, few, target, memory=_TRIAL_MEMORY, noise_samples=samples, steps=steps)
    errors, signals = [], []
    with torch.no_grad():
        for args, kwargs in judged:
            count = sample_count((args, kwargs))
            outputs = zip(tensors_of(exact(*args, **kwargs)), tensors_of(trial(*args, **kwargs)), strict=True)
            pairs = [(x, found) for x, found in outputs if x.is_floating_point()]
            errors.append(sum((_by_sample(found - x, count) for x, found in pairs), torch.zeros(count)))
            signals.append(sum((_by_sample(x, count) for x, _ in pairs), torch.zeros(count)))
    return Trial(torch.cat(errors), torch.cat(signals))


def _by_sample(x: Tensor, count: int) -> Tensor:
    """The sum of squares of each sample's values; of a value that all of a batch share, its part."""
    if x.ndim and x.shape[0] == count:
        return x.double().square().reshape(count, -1).sum(1).cpu()
    return x.double().square().sum().cpu().expand(count) / count


def _samples(batches: list[Arguments], count: int, cut: Callable[[Arguments, int], Arguments]) -> list[Arguments]:
    """``count`` samples from the batches in this order, of the last of them what ``cut`` leaves."""
    few: list[Arguments] = []
    for batch in batches:
        if (left := count - sum(map(sample_count, few))) <= 0:
            break
        few.append(cut(batch, left))
    return few


def finish(
    graph: fx.GraphModule, recipe: Recipe, target: Target, placed: Placed, log: WalkLog | None, notes: list[str],
    seconds: dict[str, float], signature: inspect.Signature,
) -> QuantizedModel:  # fmt: skip
    """The QuantizedModel of a calibrated graph, its program compiled and its report written."""
    for parameter in graph.parameters():
        parameter.requires_grad_(False)
    q = QuantizedModel(graph, recipe, target, build_report(recipe, target), signature)
    clock = _Clock(seconds)
    q.report = build_report(recipe, target, q.program, placed, log, [*notes, *placed.notes], seconds)
    clock.lap("compile")
    q.report.seconds = dict(seconds)
    if target.limits is not None:
        refuse_float(q.program.kernels, target)
    coverage = q.report.coverage
    if coverage.fraction < recipe.min_coverage:
        raise PlacementError(
            f"{coverage.fraction:.1%} of the multiply-accumulates run in integers on {target.runtime}, less than "
            f"min_coverage {recipe.min_coverage:.1%}; in float run {', '.join(coverage.float_layers[:8])}"
        )
    if recipe.weights and recipe.activations and not coverage.integer_macs:
        q.report.notes.append(
            f"no multiply-accumulate runs in integers on {target.runtime}: the file is smaller, but not faster. It "
            f"computes in integers with {' or '.join(map(str, target.integer_bits))} bits and placement 'runtime'"
        )
    if recipe.weights and recipe.activations and coverage.total_macs and not coverage.quantized_macs:
        raise PlacementError(
            "no multiply-accumulate of the model has both operands quantized: nothing was gained. Layers need a grid "
            "on their inputs too; by hand it comes from a QuantStub, a bitsmith.nn.QuantIdentity or inputs='int8'"
        )
    if q.report.chance_level:
        if recipe.on_collapse == "stop":
            raise CollapseError(f"{diagnose(q.report)}. on_collapse: warn in the recipe gives the model all the same")
        q.report.notes.append(diagnose(q.report))
    return q


def check_arguments(model: Any, noise_samples: int | None = None) -> None:
    """Refuse what cannot be quantized: no module, a quantized one, or weights other than float32."""
    if isinstance(model, type) or not isinstance(model, nn.Module):
        kind = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise DataError(f"model must be a torch.nn.Module with trained weights, not {kind}")
    if isinstance(model, QuantizedModel):
        raise DataError("this model is quantized already: quantize the float model that it came from")
    if noise_samples is not None and noise_samples < 1:
        raise DataError(f"noise_samples={noise_samples}: at least one sample is needed")
    wrong = {p.dtype for p in model.parameters() if p.is_floating_point()} - {torch.float32}
    if wrong:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in wrong))
        raise DataError(f"the model has {names} parameters; quantization starts from float32: call model.float() first")


def channels_last(graph: fx.GraphModule) -> None:
    """Lay 4-dimensional weights out as CPUs and GPUs like them best; the function is the same."""
    for module in graph.modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Conv2d) and isinstance(weight, nn.Parameter):
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)


def resolve(recipe: str | Path | Recipe, placement: PlacementName | None, overrides: Iterable[Override]) -> Recipe:
    """The Recipe with another placement and more overrides."""
    resolved = load_recipe(recipe)
    if "dynamic" in (resolved.placement, placement):
        raise RecipeError(
            f"recipe {resolved.name!r} finds its scales at run time: use bitsmith.quantize_dynamic(model, recipe)"
        )
    changes: dict[str, Any] = {}
    if placement is not None:
        changes["placement"] = placement
    if more := tuple(overrides):
        changes["overrides"] = (*resolved.overrides, *more)
    try:
        return Recipe.model_validate({**resolved.model_dump(), **changes}) if changes else resolved
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise RecipeError(f"placement and overrides do not fit the recipe: {problems}") from error


class _Clock:
    """Seconds between laps, by name."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds = seconds
        self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Book the time since the last lap under ``name``."""
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.last
        self.last = now
