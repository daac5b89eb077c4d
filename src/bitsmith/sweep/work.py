"""What a worker does: one configuration at a time, with all that configurations share kept from the last one."""

from __future__ import annotations

import inspect
import json
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..calibrate.remembered import FloatStatistics
from ..capture import capture, copy_graph, evaluation_mode, read_batches
from ..capture.inputs import Arguments, tensors_of
from ..eager import has_stubs, with_module_recipes
from ..errors import BitsmithError, CaptureError, DataError
from ..evaluate import Metrics, Recorder, evaluate, load_data, load_model, model_size, stated_preprocess
from ..evaluate.data import Data
from ..flow import quantize, quantize_graph
from ..recipe import Recipe
from ..targets import get_target
from .grid import ModelData, prepared

_KEPT_BYTES = 1 << 30  # of validation data for each worker; more than that is read again for every configuration


@dataclass
class _Float:
    """A model; its graph is captured when the first batch is at hand."""

    model: nn.Module
    graph: fx.GraphModule | None = None
    captured: bool = False  # where it was and there is no graph, capture fails, which only some placements survive

    def capture(self, batch: Arguments) -> None:
        """Capture once, whatever the data."""
        if not self.captured and not has_stubs(self.model):
            with suppress(CaptureError), evaluation_mode(self.model):
                self.graph = capture(self.model, batch)
        self.captured = True


@dataclass
class _Shared:
    """What all configurations of one model, data and seed have in common."""

    float: _Float
    calibration: list[Any]
    batches: list[Arguments]
    validation: Data
    reference: Any
    float_metrics: Metrics
    statistics: FloatStatistics = field(default_factory=FloatStatistics)


class _Kept:
    """Batches on the model's device, read once if they are not too many."""

    def __init__(self, data: Data, device: str) -> None:
        self.name, self._data, self._device = data.name, data, device
        self._batches: list[Any] | None = []
        left = _KEPT_BYTES
        for batch in self._read():
            left -= sum(t.numel() * t.element_size() for t in tensors_of(batch))
            if left < 0:
                self._batches = None
                return
            self._batches.append(batch)

    def __len__(self) -> int:
        return len(self._data)

    def __iter__(self) -> Iterator[Any]:
        return self._read() if self._batches is None else iter(self._batches)

    def _read(self) -> Iterator[Any]:
        return (_on(self._device, batch) for batch in self._data)


def _on(device: str, value: Any) -> Any:
    return torch.utils._pytree.tree_map_only(Tensor, lambda t: t.to(device), value)


@lru_cache(maxsize=1)
def _float(model: str, weights: str | None, device: str) -> _Float:
    return _Float(load_model(model, weights).to(device))


@lru_cache(maxsize=1)
def _shared(spec: str, seed: int, device: str) -> _Shared:
    given = ModelData.model_validate_json(spec)
    float = _float(given.model, given.weights, device)
    stated, _ = stated_preprocess(given.model, float.model, given.weights)
    load = partial(load_data, preprocess=prepared(stated, given.preprocess), seed=seed, workers=1)
    folders = [source for source in (given.calibration, given.validation) if Path(source).is_dir()]
    if given.label_map is not None and not folders:
        raise DataError(
            f"label_map {given.label_map!r} is about folders of images, but the data are none: leave it out"
        )
    maps = dict.fromkeys(folders, given.label_map)
    calibration = load(given.calibration, samples=given.calibration_samples, label_map=maps.get(given.calibration))
    judged = load(
        given.validation, samples=given.validation_samples, exclude=calibration, label_map=maps.get(given.validation)
    )
    validation = _Kept(judged, device)
    kept = [_on(device, batch) for batch in calibration]
    recorder = Recorder(float.model)
    metrics = evaluate(recorder, validation)
    with evaluation_mode(float.model):
        batches = read_batches(float.model, kept)
    float.capture(batches[0])
    return _Shared(float, kept, batches, validation, recorder.reference, metrics)


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
    shared = _shared(json.dumps(work["model"]), work["seed"], work.get("device", "cpu"))
    model, graph = shared.float.model, shared.float.graph
    recipe, target = Recipe.model_validate(work["recipe"]), get_target(work["target"])
    if graph is None:
        quantized = quantize(model, shared.calibration, recipe, target)
    else:
        graph = copy_graph(graph)
        recipe = with_module_recipes(recipe, model, graph)
        signature = inspect.signature(model.forward)
        quantized = quantize_graph(graph, shared.batches, recipe, target, signature, remembered=shared.statistics)
    metrics = evaluate(quantized, shared.validation, reference=shared.reference)
    report = quantized.report
    measured = {"float_top1": shared.float_metrics.top1, **metrics.model_dump(exclude={"seconds", "metric"})}
    return {
        **{name: round(value, 6) if isinstance(value, float) else value for name, value in measured.items()},
        "integer_share": report.coverage.fraction if report.coverage else None,
        "bytes": model_size(quantized),
        "notes": "; ".join([*report.notes]),
    }
