"""One walk finds the grids; then runs of a few samples with some layers in float say what each layer costs.

Only what depends on a switched layer is run again: ``n`` layers cost about as much as ``n`` runs of the model.
"""

from __future__ import annotations

import glob
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from ..calibrate import calibrate, parse_memory
from ..calibrate.calibrate import rechunk
from ..calibrate.noise import Noise
from ..calibrate.switched import (
    ACTIVATIONS_ONLY,
    ALONE,
    FLOAT,
    LEFT_OUT,
    QUANTIZED,
    WEIGHTS_ONLY,
    Switched,
    Values,
    decibels,
)
from ..calibrate.walk import Progress
from ..capture import ForwardFunction, capture, evaluation_mode, read_batches
from ..capture.inputs import Arguments, first_samples, sample_count
from ..capture.ops import layer_of, module_of, op_of, quantizer_of
from ..eager import has_stubs, with_module_recipes
from ..errors import DataError
from ..flow import channels_last, check_arguments, held_out, resolve
from ..grid import IntFormat
from ..model import QuantizedModel
from ..place.layers import QuantLayer
from ..place.macs import macs_of
from ..place.place import place
from ..place.plan import layer_name
from ..prepare.prepare import prepare
from ..recipe import Override, PlacementName, Recipe
from ..targets import Target, get_target
from .model import LayerSensitivity, Proposal, Sensitivity

_MOST_KEPT = 8  # layers that a proposal names at most, and no more than a third of all
_LEAST_GAIN_DB = 0.2  # of one more layer


def sensitivity(
    model: nn.Module, calibration: Iterable[Any], recipe: str | Path | Recipe | None = None,
    target: str | Target | None = None, *, placement: PlacementName | None = None, overrides: Iterable[Override] = (),
    forward: ForwardFunction | None = None, samples: int = 64, goal_db: float = 3.0, memory: str | int = "4GB",
    progress: Progress | None = None,
) -> Sensitivity:  # fmt: skip
    """What quantizing each layer costs, and which few are worth 16 bits or float.

    Arguments are those of ``bitsmith.quantize``. A quantized model is taken in place of the float one as long as no
    step of its recipe has changed its weights or biases (the float ones are gone then). ``samples`` are compared.
    Weights are rounded to nearest: steps that round one layer so that it makes up for others, or correct what their
    errors add up to, are left out, so that each error is seen by itself (a step such as gptq then leaves less of it).
    ``proposal`` keeps layers in float, the best first, until the SQNR at the outputs has risen by ``goal_db``, measured
    for every number of layers; its overrides fit the recipe, with 16 bits where the target runs these in integers.

    Each layer is quantized alone (its weight and what it reads), and left out of a model that is quantized otherwise.
    Its ``local`` noise is what it adds by itself, its ``propagated`` one includes what arrives.

    >>> import bitsmith as bs
    >>> net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> found = bs.sensitivity(net, [torch.randn(64, 8)])
    >>> [layer.name for layer in found.layers], found.all_db < min(layer.left_out_db for layer in found.layers)
    (['0', '2'], True)
    """
    start = time.perf_counter()
    if samples < 1:
        raise DataError(f"samples={samples}: at least one sample is needed")
    with torch.no_grad(), evaluation_mode(model):
        if isinstance(model, QuantizedModel):
            graph, recipe, target, batches = _from_quantized(model, calibration, recipe, target)
        else:
            check_arguments(model)
            target = get_target(target or "onnxruntime")
            recipe = resolve(target.default_recipe if recipe is None else recipe, placement, overrides)
            batches = read_batches(model, calibration, forward)
            graph, recipe = prepared_graph(model, batches, recipe, target)
            placed = place(graph, recipe, target)
            calibrate(graph, placed, batches, target, memory=parse_memory(memory), noise_samples=1, progress=progress)
        found = _Measurement(Switched(graph), _leading(graph, batches, samples), progress)
        result = Sensitivity(recipe=recipe.name, target=target.name, samples=found.samples)
        found.measure(result)
        result.proposal = _propose(found, result, recipe, target, goal_db)
    result.seconds = time.perf_counter() - start
    return result


def prepared_graph(
    model: nn.Module, batches: list[Arguments], recipe: Recipe, target: Target
) -> tuple[fx.GraphModule, Recipe]:
    """The captured model after the recipe's steps of stage ``prepare``, and the recipe with the modules' own."""
    if has_stubs(model):
        raise DataError("the model has stubs that say where it is quantized: layers cannot be switched one by one")
    graph = capture(model, batches[0])
    recipe = with_module_recipes(recipe, model, graph)
    graph, _ = prepare(graph, recipe, batches, partial(held_out, batches, recipe, target))
    channels_last(graph)
    return graph, recipe


def _from_quantized(
    q: QuantizedModel, calibration: Iterable[Any], recipe: Any, target: Any
) -> tuple[fx.GraphModule, Recipe, Target, list[Arguments]]:
    if recipe is not None or target is not None:
        raise DataError("a quantized model has its recipe and target: leave them out, or pass the float model")
    if changing := [step.name for step in q.recipe.steps if step.stage != "prepare"]:
        raise DataError(
            f"{', '.join(changing)} changed parameters of this quantized model, so that its float layers are gone: "
            "pass the float model with recipe=q.recipe and target=q.target"
        )
    batches = [q.arguments(args, kwargs) for args, kwargs in read_batches(q, calibration, None)]
    return q.graph, q.recipe, q.target, batches


def _leading(graph: fx.GraphModule, batches: list[Arguments], samples: int) -> list[Arguments]:
    """The first samples, in chunks."""
    few, left = [], samples
    for batch in batches:
        if left <= 0:
            break
        few.append(first_samples(batch, left))
        left -= sample_count(few[-1])
    return rechunk(graph, few)


class _Measurement:
    """Runs with some layers in float, and the noise of each."""

    def __init__(self, switched: Switched, chunks: list[Arguments], progress: Progress | None) -> None:
        self.switched, self.chunks, self.progress = switched, chunks, progress
        self.samples = sum(map(sample_count, chunks))

    def measure(self, result: Sensitivity) -> None:
        """Fill in everything but the proposal."""
        layers, switched = self.switched.layers, self.switched
        whole = [Noise() for _ in range(3)]
        noises = [[Noise() for _ in range(4)] for _ in layers]
        for index, chunk in enumerate(self.chunks):
            exact, quantized = switched.run(chunk, FLOAT), switched.run(chunk, QUANTIZED)
            sides = [quantized, switched.run(chunk, WEIGHTS_ONLY), switched.run(chunk, ACTIVATIONS_ONLY)]
            for noise, values in zip(whole, sides):
                switched.compare(noise, exact, values)
            del sides
            for position, node in enumerate(layers):
                self._report(index * len(layers) + position, layer_name(node))
                self._measure_layer(node, noises[position], exact, quantized)
        self._report(len(self.chunks) * len(layers), "done")
        result.all_db, result.weights_only_db, result.activations_only_db = decibels(whole)
        result.layers = [_describe(node, found) for node, found in zip(layers, noises)]

    def _measure_layer(self, node: fx.Node, noises: list[Noise], exact: Values, quantized: Values) -> None:
        local, propagated, alone, left_out = noises
        changed = self.switched.rerun(exact, [node], FLOAT, ALONE)
        local.update(exact[node], changed[node])
        propagated.update(exact[node], quantized[node])
        self.switched.compare(alone, exact, changed)
        self.switched.compare(left_out, exact, self.switched.rerun(quantized, [node], QUANTIZED, LEFT_OUT))

    def without(self, kept: list[fx.Node]) -> float | None:
        """SQNR at the outputs with these layers in float."""
        noise = Noise()
        for chunk in self.chunks:
            exact, quantized = self.switched.run(chunk, FLOAT), self.switched.run(chunk, QUANTIZED)
            self.switched.compare(noise, exact, self.switched.rerun(quantized, kept, QUANTIZED, LEFT_OUT))
        return decibels([noise])[0]

    def _report(self, done: int, what: str) -> None:
        if self.progress is not None:
            self.progress(done, len(self.chunks) * len(self.switched.layers), f"sensitivity: {what}")


def _describe(node: fx.Node, noises: list[Noise]) -> LayerSensitivity:
    layer, module = layer_of(node), module_of(node)
    local, propagated, alone, left_out = decibels(noises)
    weight = module.weight_quantizer if isinstance(module, QuantLayer) else None
    readers = [q for source in node.all_input_nodes if (q := quantizer_of(source)) is not None]
    return LayerSensitivity(
        name=layer_name(node), type=op_of(node).name if layer is None else type(layer).__name__, macs=macs_of(node),
        weight_bits=None if weight is None else weight.format.bits,
        input_bits=readers[0].format.bits if readers else None,
        local_db=local, propagated_db=propagated, alone_db=alone, left_out_db=left_out,
    )  # fmt: skip


def _propose(found: _Measurement, result: Sensitivity, recipe: Recipe, target: Target, goal_db: float) -> Proposal:
    """Layers to keep, by what the outputs gain when each is left out, as far as each of them adds something."""
    if result.all_db is None:
        return Proposal(reason="the outputs have no quantization noise")
    if target.limits is not None:
        return Proposal(reason=f"{target.name} runs no layer in float or at 16 bits: learn the rounding, or train")
    nodes = {layer_name(node): node for node in found.switched.layers}
    gains = {
        layer.name: float("inf") if layer.left_out_db is None else layer.left_out_db - result.all_db
        for layer in result.layers
    }
    ranked = sorted(gains, key=lambda name: -gains[name])[: max(1, min(_MOST_KEPT, len(gains) // 3))]
    proposal, reached = Proposal(keep="16 bits" if 16 in target.integer_bits else "float"), result.all_db
    for name in ranked:
        sqnr = found.without([nodes[kept] for kept in [*proposal.layers, name]])
        if sqnr is None or sqnr - reached < _LEAST_GAIN_DB:
            break
        proposal.layers.append(name)
        proposal.sqnr_db.append(sqnr)
        reached = sqnr
        if reached - result.all_db >= goal_db:
            break
    total = sum(layer.macs for layer in result.layers)
    kept = sum(layer.macs for layer in result.layers if layer.name in proposal.layers)
    proposal.macs_fraction = kept / total if total else 0.0
    proposal.overrides = [_override(name, proposal.keep, recipe) for name in proposal.layers]
    proposal.reason = _reason(proposal, result.all_db, goal_db)
    return proposal


def _override(name: str, keep: str, recipe: Recipe) -> Override:
    match = glob.escape(name)
    if keep == "float":
        return Override(match=match, exclude=True)
    wide = {
        role: spec.model_copy(update={"format": IntFormat(16), "symmetric": True})
        for role in ("weights", "activations")
        if (spec := getattr(recipe, role)) is not None
    }
    return Override(match=match, **wide)


def _reason(proposal: Proposal, before: float, goal_db: float) -> str:
    if not proposal.layers:
        return (
            f"no layer stands out: leaving any one out raises the outputs' {before:.1f} dB by less than "
            f"{_LEAST_GAIN_DB} dB. Use more bits for all, or a recipe with learned rounding"
        )
    count, gained = len(proposal.layers), proposal.sqnr_db[-1] - before
    layers = f"{count} layer{'s' if count > 1 else ''} with {proposal.macs_fraction:.1%} of the multiply-accumulates"
    missed = "" if gained >= goal_db else f"; the {goal_db:g} dB asked for are spread over more layers"
    return (
        f"{layers} in {proposal.keep}: the outputs gain {gained:.1f} dB ({before:.1f} to {before + gained:.1f}){missed}"
    )
