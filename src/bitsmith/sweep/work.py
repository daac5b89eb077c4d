"""What a worker does: one configuration at a time, with all that configurations share kept from the last one."""

from __future__ import annotations

import copy
import inspect
import json
import time
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import fx, nn

from ..capture import capture, evaluation_mode, read_batches
from ..capture.inputs import Arguments
from ..eager import has_stubs, with_module_recipes
from ..errors import BitsmithError, CaptureError
from ..evaluate import Metrics, Recorder, evaluate, load_data, load_model, model_size
from ..evaluate.data import Data
from ..flow import quantize, quantize_graph
from ..recipe import Recipe
from ..targets import get_target
from .grid import ModelData


@dataclass
class _Shared:
    """What all configurations of one model, data and seed have in common."""

    model: nn.Module
    graph: fx.GraphModule | None  # None: capture fails, which only some placements survive
    calibration: list[Any]
    batches: list[Arguments]
    validation: Data
    reference: Any
    float_metrics: Metrics


class _Kept:
    """Batches that were read once."""

    def __init__(self, data: Data) -> None:
        self.name = data.name
        self._batches = list(data)

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Any:
        return iter(self._batches)


@lru_cache(maxsize=1)
def _shared(spec: str, seed: int) -> _Shared:
    given = ModelData.model_validate_json(spec)
    load = partial(load_data, preprocess=given.preprocess, seed=seed)
    calibration = load(given.calibration, samples=given.calibration_samples)
    validation = _Kept(load(given.validation, samples=given.validation_samples, exclude=calibration))
    model = load_model(given.model, given.weights)
    kept = list(calibration)
    recorder = Recorder(model)
    float_metrics = evaluate(recorder, validation)
    graph, batches = None, []
    if not has_stubs(model):
        with evaluation_mode(model):
            batches = read_batches(model, kept, None)
            try:
                graph = capture(model, batches[0])
            except CaptureError:
                graph = None
    return _Shared(model, graph, kept, batches, validation, recorder.reference, float_metrics)


def run_configuration(work: dict[str, Any]) -> dict[str, Any]:
    """The outcome of one row: ``result`` or ``error``, and ``seconds``. On one thread, so that digits never differ."""
    start = time.perf_counter()
    torch.set_num_threads(1)
    torch.manual_seed(work["seed"])
    try:
        outcome: dict[str, Any] = {"result": _measure(work)}
    except BitsmithError as error:
        outcome = {"error": f"{type(error).__name__}: {error}"}
    except Exception as error:  # a row says what failed, whatever it was; the sweep goes on
        where = error.__traceback__
        while where is not None and where.tb_next is not None:
            where = where.tb_next
        place = "" if where is None else f" ({where.tb_frame.f_code.co_filename}, line {where.tb_lineno})"
        outcome = {"error": f"{type(error).__name__}: {error}{place}"}
    return {**outcome, "seconds": round(time.perf_counter() - start, 3)}


def _measure(work: dict[str, Any]) -> dict[str, Any]:
    shared = _shared(json.dumps(work["model"]), work["seed"])
    recipe = Recipe.model_validate(work["recipe"])
    if shared.graph is None:
        quantized = quantize(shared.model, shared.calibration, recipe, work["target"])
    else:
        graph = copy.deepcopy(shared.graph)
        recipe = with_module_recipes(recipe, shared.model, graph)
        quantized = quantize_graph(
            graph, shared.batches, recipe, get_target(work["target"]), inspect.signature(shared.model.forward)
        )
    metrics = evaluate(quantized, shared.validation, reference=shared.reference)
    report = quantized.report
    return {
        "float_top1": shared.float_metrics.top1,
        **metrics.model_dump(exclude={"seconds", "metric"}),
        "integer_share": report.coverage.fraction if report.coverage else None,
        "bytes": model_size(quantized),
        "notes": "; ".join([*report.notes]),
    }
