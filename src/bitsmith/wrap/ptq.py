"""``PTQModel``: a model that is calibrated by running it."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import fx, nn

from ..capture import ForwardFunction
from ..capture.inputs import positional
from ..eager import prepare
from ..eager.captured import PreparedGraph
from ..errors import CalibrationError, DataError, RecipeError
from ..model import QuantizedModel
from ..recipe import Override, PlacementName, Recipe
from ..targets import Target
from .bias import BiasCalibration
from .export import export

_MEMORY = 4_000_000_000


class PTQModel(nn.Module):
    """Run it on calibration batches in train mode, judge it in eval mode, then ``convert`` or ``export`` it.

    In train mode a call returns what the float model computes, while the ranges of values are watched; no gradient
    flows and no weight changes. In eval mode it computes what ``convert()`` would give at this moment. Either mode may
    follow the other as often as you like, and no count depends on that.

    ``bias_calibration``: None leaves biases to the recipe's own steps, when it is converted. A factor moves them while
    batches run instead, by ``max(factor, 1 / n)`` of the difference between the mean output in float and quantized,
    channel by channel (``bitsmith.wrap.bias``). It needs weights that are known before the end, so that recipes with
    steps which round them (GPTQ ...) are refused.

    The other arguments are those of ``bitsmith.prepare``. The state_dict holds all that was seen: an interrupted
    calibration goes on where it was.

    >>> import torch
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    >>> model = PTQModel(net, "WC8_AT8", torch.randn(2, 3, 8, 8), bias_calibration=0.05)
    >>> for _ in range(4):
    ...     _ = model(torch.randn(16, 3, 8, 8))
    >>> model.eval()(torch.randn(2, 3, 8, 8)).shape
    torch.Size([2, 8, 6, 6])
    >>> model.convert().report.samples
    64
    """

    def __init__(
        self, model: nn.Module, recipe: str | Path | Recipe = "int8", example_inputs: Any = None,
        target: str | Target = "onnxruntime", *, bias_calibration: float | None = None,
        placement: PlacementName | None = None, overrides: Iterable[Override] = (),
        forward: ForwardFunction | None = None, noise_samples: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        prepared = prepare(
            model, recipe, example_inputs, target, placement=placement, overrides=overrides, forward=forward,
            noise_samples=noise_samples,
        )  # fmt: skip
        if not isinstance(prepared, PreparedGraph):
            raise DataError(
                "PTQModel reads a model as a graph; this one is quantized by hand (it has stubs, or no tracer can "
                "follow it): use bitsmith.prepare, run it, and bitsmith.convert"
            )
        self.module = prepared
        self.biases = None if bias_calibration is None else _biases(bias_calibration, prepared.recipe)
        self._cache = _Cache()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """In train mode the float model's outputs, watched; in eval mode those of the quantized model."""
        if not self.training:
            return self._converted()(*args, **kwargs)
        result = self.module(*args, **kwargs)
        self._cache.quantized = None
        if self.biases is not None:
            self._calibrate_biases(self.biases, *args, **kwargs)
        return result

    def train(self, mode: bool = True) -> PTQModel:
        """Watch (True) or compute what the quantized model computes (False); the model within stays as it is."""
        self.training = mode
        return self

    def convert(self) -> QuantizedModel:
        """The quantized model of what was seen so far; more batches may follow."""
        q, self._cache.quantized = self._converted(), None  # it is the caller's from here on
        return q

    def export(self, path: str | Path, **options: Any) -> Path:
        """Convert and write ``.onnx`` or ``.pt2``, by ``bitsmith.export_onnx`` or ``export_pt2`` with ``options``."""
        return export(self._converted(), path, **options)

    def _converted(self) -> QuantizedModel:
        if self._cache.quantized is None:
            if not self.module.samples:
                raise CalibrationError(
                    "no batch was run in train mode: call model.train(), run calibration batches, then model.eval()"
                )
            twin = copy.deepcopy(self.module)
            if self.biases is not None:
                twin.notes.append(f"biases calibrated while {self.biases.batches} batches ran")
            self._cache.quantized = twin.convert(_MEMORY, None if self.biases is None else self.biases.shifts)
        return self._cache.quantized

    def _calibrate_biases(self, biases: BiasCalibration, *args: Any, **kwargs: Any) -> None:
        seen, cache = biases.batches, self._cache
        if cache.running is None or not seen & (seen - 1):  # ranges are renewed when batches have doubled
            twin = copy.deepcopy(self.module)
            twin.recipe = twin.recipe.model_copy(update={"steps": ()})
            twin.kept, twin.noise_samples = twin.kept[:1], 1
            cache.running = twin.convert(_MEMORY).graph
            biases.apply(cache.running)
            if cache.saved and seen & (seen - 1):
                cache.running.load_state_dict(cache.saved, strict=False)
            cache.saved = {}
        biases.update(self.module.graph, cache.running, positional(self.module.signature, args, kwargs))

    def get_extra_state(self) -> dict[str, Any]:
        """How far bias calibration is."""
        if self.biases is None:
            return {}
        running = {} if self._cache.running is None else self._cache.running.state_dict()
        kept = {key: value for key, value in running.items() if not key.endswith(".weight")}
        return {"batches": self.biases.batches, "shifts": dict(self.biases.shifts), "running": kept}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        if bool(state) != (self.biases is not None):
            raise CalibrationError(
                f"the state was saved {'with' if state else 'without'} bias_calibration, this PTQModel is "
                f"{'without' if state else 'with'} it"
            )
        self._cache = _Cache()
        if self.biases is not None:
            self.biases.batches, self.biases.shifts = int(state["batches"]), dict(state["shifts"])
            self._cache.saved = dict(state["running"])

    def _apply(self, fn: Any, recurse: bool = True) -> PTQModel:
        self._cache = _Cache()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


@dataclass
class _Cache:
    """What can be made again: not part of the module's state.

    ``quantized`` is what eval mode runs; ``running`` the quantized stream in which biases are calibrated, and ``saved``
    the grids and biases that it had when the state was saved.
    """

    quantized: QuantizedModel | None = None
    running: fx.GraphModule | None = None
    saved: dict[str, Any] = field(default_factory=dict)


def _biases(factor: float, recipe: Recipe) -> BiasCalibration:
    if not 0.0 < factor <= 1.0:
        raise DataError(f"bias_calibration={factor}: a factor between 0 and 1 (0.05 for a hundred batches), or None")
    if rounding := [step.name for step in recipe.steps if step.stage in ("weights", "blocks")]:
        raise RecipeError(
            f"bias_calibration moves biases to make up for weights as they are, but recipe {recipe.name!r} rounds them "
            f"at the end ({', '.join(rounding)}): leave bias_calibration out, its own steps see to the biases"
        )
    return BiasCalibration(factor)
