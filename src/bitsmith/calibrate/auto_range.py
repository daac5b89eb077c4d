"""``range: auto``: try several range rules for a tensor and keep the one that costs the layers' outputs least."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.func import functional_call

from ..capture.ops import module_of
from ..errors import CalibrationError
from ..grid import Grid, RangeRule, TensorSpec, fake_quantize
from ..place.layers import QuantLayer
from ..ranges import activation_grid, activation_statistic, weight_grid
from .stages import Stage

_ACTIVATIONS = {
    "minmax": RangeRule(name="minmax"),
    "percentile 99.999": RangeRule(name="percentile", percentile=99.999),
    "percentile 99.99": RangeRule(name="percentile", percentile=99.99),
    "percentile 99.9": RangeRule(name="percentile", percentile=99.9),
    "mse": RangeRule(name="mse"),
}
_WEIGHTS = {
    "minmax": RangeRule(name="minmax"),
    "mse": RangeRule(name="mse"),
    "percentile 99.9": RangeRule(name="percentile", percentile=99.9),
    "hqo": RangeRule(name="hqo"),
}


@dataclass
class RangeChoice:
    """Which rule won for a tensor: squared output errors by rule, relative to the output's signal."""

    tensor: str
    rule: str
    errors: dict[str, float] = field(default_factory=dict)


class AutoStatistic:
    """The statistics of all rules that are tried, fed together; a monoid as each of them is."""

    def __init__(self, spec: TensorSpec, expected_count: int | None) -> None:
        self.grid: Grid
        self.specs = {name: _with_rule(spec, rule) for name, rule in _ACTIVATIONS.items()}
        self.statistics: dict[str, Any] = {
            name: activation_statistic(one, expected_count) for name, one in self.specs.items()
        }

    def update(self, x: Tensor) -> None:
        """Take in ``x``; the rules see it one after the other."""
        for statistic in self.statistics.values():
            statistic.update(x)

    def choose(self, name: str, node: fx.Node, x: Tensor, **options: bool) -> RangeChoice:
        """Set ``grid`` to the one with the least error at the outputs of the layers that read ``node``.

        ``x`` are values of ``node``. A layer's output is linear in its input, so that its error is the layer applied
        to the error of ``x``; where no layer reads the tensor, its own error counts.
        """
        grids = self._grids(**options)
        layers = [module for user in node.users if isinstance(module := module_of(user), QuantLayer)]

        def output(change: Tensor) -> float:
            if not layers:
                return float(change.square().sum())
            return sum(float(_without_bias(layer, change).square().sum()) for layer in layers)

        signal = output(x) or 1.0
        choice = _least(name, {rule: output(fake_quantize(x, grid) - x) / signal for rule, grid in grids.items()})
        self.grid = grids[choice.rule]
        return choice

    def _grids(self, **options: bool) -> dict[str, Grid]:
        """The grid of every rule that finds one."""
        found, refused = {}, None
        for name, statistic in self.statistics.items():
            try:
                found[name] = activation_grid(statistic, self.specs[name], **options)
            except CalibrationError as error:  # a percentile that leaves nothing
                refused = error
        if not found and refused is not None:
            raise refused
        return found


def auto_weights(stages: list[Stage]) -> dict[fx.Node, tuple[QuantLayer, int]]:
    """The layers whose weight asks for it, by their call, with the output-channel axis of the weight."""
    found = {}
    for stage in stages:
        layer, node = stage.layer, stage.compute
        if layer is not None and node is not None and layer.weight_quantizer is not None:
            spec = layer.weight_quantizer.spec
            if spec.range.name == "auto":
                found[node] = layer, weight_axis(layer, spec)
    return found


def weight_axis(layer: QuantLayer, spec: TensorSpec) -> int:
    """The output-channel axis of a layer's weight."""
    if spec.axis is not None:
        return spec.axis
    return 1 if type(layer.layer).__name__.startswith("ConvTranspose") else 0


def choose_weight_grid(name: str, layer: QuantLayer, axis: int, x: Tensor) -> RangeChoice:
    """Give a layer's weight the grid with the least error at the layer's output, for ``x`` that it reads."""
    assert layer.weight_quantizer is not None
    spec, weight = layer.weight_quantizer.spec, layer.weight.detach()
    grids = {r: weight_grid(weight, _with_rule(spec, rule), axis) for r, rule in _WEIGHTS.items()}

    def output(change: Tensor) -> float:
        return float(_without_bias(layer, x, change).square().sum())

    signal = output(weight) or 1.0
    choice = _least(name, {rule: output(fake_quantize(weight, grid) - weight) / signal for rule, grid in grids.items()})
    layer.weight_quantizer.set_grid(grids[choice.rule])
    return choice


def _with_rule(spec: TensorSpec, rule: RangeRule) -> TensorSpec:
    return spec.model_copy(
        update={"range": rule.model_copy(update={"limit": spec.range.limit, "fixed": spec.range.fixed})}
    )


def _least(name: str, errors: dict[str, float]) -> RangeChoice:
    return RangeChoice(name, min(errors, key=lambda rule: errors[rule]), errors)


def _without_bias(layer: QuantLayer, x: Tensor, weight: Tensor | None = None) -> Tensor:
    """The linear part of a layer."""
    parameters = {"weight": layer.weight if weight is None else weight}
    if layer.bias is not None:
        parameters["bias"] = torch.zeros_like(layer.bias)
    result: Tensor = functional_call(layer.layer, parameters, (x,))
    return result


def describe(choices: list[RangeChoice]) -> list[str]:
    """For the report: how many tensors each rule won, and by how much it beat min-max at most."""
    gains: dict[str, list[float]] = {}
    for choice in choices:
        base = choice.errors.get("minmax", 0.0)
        gains.setdefault(choice.rule, []).append(1 - choice.errors[choice.rule] / base if base else 0.0)
    won = [
        f"{rule} {len(found)}" + (f" (up to {max(found):.0%} less error than minmax)" if max(found) > 0 else "")
        for rule, found in sorted(gains.items())
    ]
    return [f"range auto: {', '.join(won)}"] if won else []
