"""The job in steps: prepare a model, run batches through it, convert it."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from ..calibrate import parse_memory
from ..calibrate.watching import WatchingQuantizer
from ..capture import ForwardFunction, capture, evaluation_mode, read_batches
from ..errors import DataError
from ..flow import channels_last, check_arguments, resolve
from ..model import QuantizedModel
from ..place.place import place
from ..prepare import fold_batch_norm
from ..recipe import Override, PlacementName, Recipe
from ..targets import Target, get_target
from .captured import PreparedGraph


def prepare(
    model: nn.Module, recipe: str | Path | Recipe = "int8", example_inputs: Any = None,
    target: str | Target = "onnxruntime", *, placement: PlacementName | None = None,
    overrides: Iterable[Override] = (), forward: ForwardFunction | None = None, noise_samples: int | None = None,
    quantizer: type[WatchingQuantizer] = WatchingQuantizer,
) -> PreparedGraph:  # fmt: skip
    """A copy of ``model`` that watches what it computes: run calibration batches through it, then ``convert`` it."""
    check_arguments(model, noise_samples)
    if example_inputs is None:
        raise DataError("prepare needs example_inputs: one batch, as the model takes it")
    recipe, target = resolve(recipe, placement, overrides), get_target(target)
    with evaluation_mode(model):
        example = read_batches(model, [example_inputs], forward)[0]
        graph = capture(model, example)
    notes = list(graph.meta.get("notes", []))
    notes += fold_batch_norm(graph) if recipe.step("fold_batch_norm") else []
    placed = place(graph, recipe, target)
    channels_last(graph)
    return PreparedGraph(
        graph, placed, recipe, target, signature=inspect.signature(model.forward), notes=notes, seconds={},
        noise_samples=noise_samples or recipe.samples, quantizer=quantizer,
    )  # fmt: skip


def convert(prepared: PreparedGraph, *, memory: str | int = "4GB") -> QuantizedModel:
    """The quantized model of a prepared one that has seen its calibration batches.

    Of a model that could be captured it is, to the bit, what ``bitsmith.quantize`` gives for the same batches, the
    recipe's steps included. The prepared model is used up.
    """
    if not isinstance(prepared, PreparedGraph):
        raise DataError(f"convert takes what bitsmith.prepare returned, not a {type(prepared).__name__}")
    return prepared.convert(parse_memory(memory))
