"""Calibration without a graph: range statistics stream while the user's own code runs the model."""

from __future__ import annotations

import inspect
import math
from collections import defaultdict
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from ..capture.hooked import HookedModel, OwnInputLayer, clone, compute_layers, replace_layer, run, watching
from ..capture.inputs import Arguments, sample_count
from ..errors import CalibrationError, NonFiniteError, PlacementError
from ..grid import Quantizer, TensorSpec
from ..ranges import Statistic, activation_grid, activation_statistic, weight_grid
from ..recipe import Override, Recipe
from ..report.model import Coverage, LayerReport, Report
from ..targets import Target
from .auto_range import weight_axis
from .noise import Noise

_MEASURED = 32  # samples of a batch that noise is measured on; the outputs of all layers are kept for them
_MARGIN = 2  # over the values expected of a layer; a branch may be taken more often than in the first batch


class _Survey:
    """What the first batch shows: the order of the layers, their work, and the work of all."""

    def __init__(self, model: nn.Module, layers: dict[str, nn.Module], batch: Arguments) -> None:
        self.samples = max(sample_count(batch), 1)
        self.elements: dict[str, int] = defaultdict(int)
        self.macs: dict[str, int] = defaultdict(int)
        counter = FlopCounterMode(display=False)
        with watching(layers, self._see), counter:
            run(model, batch)
        seen = sum(self.macs.values())
        everything = counter.get_total_flops() // (2 * self.samples)  # functional calls included
        self.total_macs = max(everything, seen)
        self.order = [*self.macs, *(name for name in layers if name not in self.macs)]

    def _see(self, name: str, layer: nn.Module, x: Tensor, y: Tensor) -> None:
        weight = layer.weight
        assert isinstance(weight, Tensor)
        of = x if type(layer).__name__.startswith("ConvTranspose") else y
        self.elements[name] += x.numel()
        self.macs[name] += of.numel() * math.prod(weight.shape[1:]) // self.samples


def quantize_hooked(
    model: nn.Module, batches: list[Arguments], recipe: Recipe, target: Target, *, noise_samples: int = 128,
    reason: str = "",
) -> HookedModel:  # fmt: skip
    """Quantize the inputs and weights of a model's convolutions and linears without a graph of it.

    The ``layerwise`` placement for models whose Python code no tracer can follow. ``reason`` is why, for the
    error of an export. Raises CalibrationError and PlacementError as the walk and ``place`` do.
    """
    target.check(recipe)
    module = clone(model)
    layers = compute_layers(module)
    survey = _Survey(module, layers, batches[0])
    overrides = _match_overrides(survey.order, layers, recipe)
    kept = {name: layers[name] for name in survey.order if not any(o.exclude for o in overrides[name])}
    specs = {name: _pick("activations", overrides[name], recipe) for name in kept}
    statistics = _watch_inputs(module, batches, kept, specs, survey)
    placed = {name: layer for name, layer in kept.items() if name in statistics}
    for name, layer in placed.items():
        wrapped = _wrap(name, layer, statistics[name], specs[name], overrides[name], recipe, target)
        replace_layer(module, layer, wrapped)
        placed[name] = wrapped
    report = _report(recipe, target, survey, layers, placed, kept, batches)
    _measure(report, clone(model), module, layers, batches, noise_samples)
    return HookedModel(module, recipe, target, report, inspect.signature(model.forward), reason)


def _match_overrides(order: list[str], layers: dict[str, nn.Module], recipe: Recipe) -> dict[str, list[Override]]:
    matched: dict[str, list[Override]] = {}
    for index, name in enumerate(order):
        ends = {index == 0: "first", index == len(order) - 1: "last"}
        position: Any = "only" if len(order) == 1 else ends.get(True, "middle")
        kind = type(layers[name]).__name__
        matched[name] = [o for o in recipe.overrides if o.applies(name, kind, position)]
    used = {o.match for found in matched.values() for o in found}
    for override in recipe.overrides:
        if override.match not in used:
            raise PlacementError(
                f"override {override.match!r} matches no layer; layers are {', '.join(order[:8])}"
                f"{' ...' if len(order) > 8 else ''}"
            )
    return matched


def _pick(role: str, overrides: list[Override], recipe: Recipe) -> TensorSpec | None:
    """A layer's own spec, or the recipe's."""
    spec: TensorSpec | None = getattr(recipe, role)
    for override in overrides:
        spec = getattr(override, role) or spec
    return spec


def _watch_inputs(
    module: nn.Module, batches: list[Arguments], layers: dict[str, nn.Module],
    specs: dict[str, TensorSpec | None], survey: _Survey,
) -> dict[str, Statistic | None]:  # fmt: skip
    """The statistic of each layer's input over all batches; layers that were never called are left out."""
    statistics: dict[str, Statistic | None] = {}
    samples = sum(map(sample_count, batches))
    current = 0

    def see(name: str, layer: nn.Module, x: Tensor, y: Tensor) -> None:
        spec = specs[name]
        if name not in statistics:
            expected = _MARGIN * survey.elements[name] * samples // survey.samples or None
            statistics[name] = activation_statistic(spec, expected) if spec is not None else None
        statistic = statistics[name]
        try:
            if statistic is not None:
                statistic.update(x)
        except NonFiniteError as error:
            raise NonFiniteError(
                f"the input of {name!r} holds NaN or infinite values in calibration batch {current}: look at "
                "the float model on this batch; a division, a log or an overflow there makes them"
            ) from error

    with watching(layers, see):
        for index, batch in enumerate(batches):
            current = index
            run(module, batch)
    return statistics


def _wrap(
    name: str, layer: nn.Module, statistic: Statistic | None, spec: TensorSpec | None,
    overrides: list[Override], recipe: Recipe, target: Target,
) -> OwnInputLayer:  # fmt: skip
    weights = _pick("weights", overrides, recipe)
    wrapped = OwnInputLayer(
        layer, Quantizer(spec) if spec is not None else None, Quantizer(weights) if weights else None
    )
    try:
        if wrapped.input_quantizer is not None and statistic is not None and spec is not None:
            grid = activation_grid(statistic, spec, unsigned_codes=target.unsigned_codes)
            wrapped.input_quantizer.set_grid(grid)
        if wrapped.weight_quantizer is not None and weights is not None:
            wrapped.weight_quantizer.set_grid(
                weight_grid(wrapped.weight.detach(), weights, weight_axis(wrapped, weights))
            )
    except CalibrationError as error:
        raise type(error)(f"layer {name!r}: {error}") from error
    return wrapped


def _report(
    recipe: Recipe, target: Target, survey: _Survey, layers: dict[str, nn.Module],
    placed: dict[str, nn.Module], kept: dict[str, nn.Module], batches: list[Arguments],
) -> Report:  # fmt: skip
    rows = [_row(name, layers[name], placed.get(name), name in kept, survey) for name in survey.order]
    covered = sum(row.macs for row in rows if row.weight_bits or row.input_bits)
    total = survey.total_macs
    if not covered or covered / total < recipe.min_coverage:
        floats = ", ".join(row.name for row in rows if row.note)
        raise PlacementError(
            f"only {covered / max(total, 1):.1%} of the multiply-accumulates would be quantized, "
            f"min_coverage is {recipe.min_coverage:.1%}; in float stay functional calls (F.conv2d, matmul) "
            f"and {floats or 'no layer'}"
        )
    note = (
        "read by module hooks, without a graph: batch norms are not folded, functional calls (F.conv2d, "
        "matmul) stay in float, and there is no file to export"
    )
    return Report(
        recipe=recipe.name, target=target.name, placement="layerwise", layers=rows, notes=[note],
        samples=sum(map(sample_count, batches)),
        coverage=Coverage(
            total_macs=total, quantized_macs=sum(r.macs for r in rows if r.weight_bits and r.input_bits),
            float_layers=[row.name for row in rows if row.note],
        ),
    )  # fmt: skip


def _row(name: str, layer: nn.Module, wrapped: nn.Module | None, kept: bool, survey: _Survey) -> LayerReport:
    row = LayerReport(name=name, type=type(layer).__name__, macs=survey.macs.get(name, 0))
    if not isinstance(wrapped, OwnInputLayer):
        row.note = "float: never called in calibration" if kept else "float: excluded by an override"
        return row
    row.weight_bits = wrapped.weight_quantizer.format.bits if wrapped.weight_quantizer else None
    row.input_bits = wrapped.input_quantizer.format.bits if wrapped.input_quantizer else None
    if wrapped.weight_quantizer is not None:
        noise, weight = Noise(), wrapped.weight.detach().contiguous()
        noise.update(weight, wrapped.weight_quantizer(weight))
        row.weight_sqnr_db = _finite(noise.db)
    return row


def _measure(
    report: Report, exact: nn.Module, quantized: nn.Module, layers: dict[str, nn.Module],
    batches: list[Arguments], samples: int,
) -> None:  # fmt: skip
    """Noise of each layer's output and of the model's, on leading samples, where both take the same path."""
    own, seen = compute_layers(exact), 0
    wrapped = {name: m for name, m in quantized.named_modules() if name in layers}
    noise: dict[str, Noise] = defaultdict(Noise)
    end = Noise()
    for batch in (_leading(batch, _MEASURED) for batch in batches):
        streams: list[dict[str, list[Tensor]]] = []
        outputs = []
        for model, watched in ((exact, own), (quantized, wrapped)):
            calls: dict[str, list[Tensor]] = defaultdict(list)
            with watching(watched, lambda name, layer, x, y, calls=calls: calls[name].append(y)):  # type: ignore[misc]
                outputs.append(run(model, batch))
            streams.append(calls)
        for name, values in streams[0].items():
            _compare(noise[name], values, streams[1][name])
        _compare(end, *map(tree_leaves, outputs))
        if (seen := seen + sample_count(batch)) >= samples:
            break
    for row in report.layers:
        row.sqnr_db = _finite(noise[row.name].db) if row.name in noise else None
    report.output_sqnr_db = _finite(end.db)


def _leading(batch: Arguments, samples: int) -> Arguments:
    """The first samples of a batch, where all its tensors have one row per sample."""
    tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
    if any(not t.ndim or t.shape[0] != tensors[0].shape[0] for t in tensors):
        return batch
    return tree_map_only(Tensor, lambda t: t[:samples], batch)  # type: ignore[no-any-return]


def _compare(noise: Noise, exact: list[Any], quantized: list[Any]) -> None:
    if len(exact) != len(quantized):
        return
    for a, b in zip(exact, quantized):
        if isinstance(a, Tensor) and a.is_floating_point() and a.shape == b.shape:
            noise.update(a.contiguous(), b.contiguous())


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
