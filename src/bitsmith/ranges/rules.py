"""Activation ranges: which statistic a rule needs, and the range it takes from it. One row per rule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import CalibrationError, RecipeError
from ..grid.grid import Grid
from ..grid.spec import RANGE_RULES, TensorSpec
from .clipping import histogram_l2, kl, mse
from .histogram import Histogram
from .solve import solve_grid
from .statistics import MinMax, MovingAverage, Statistic, Summary
from .tails import Tails


@dataclass(frozen=True)
class Rule:
    """A range rule for activations: how to watch, and how to choose ``(lo, hi)`` from what was seen.

    ``statistic(spec, expected_count)`` makes an empty statistic; ``range(summary, spec, non_negative)``
    returns the ends. ``channels`` says whether the statistic knows channels.
    """

    statistic: Callable[[TensorSpec, int | None], Any]
    range: Callable[[Summary, TensorSpec, bool], tuple[Tensor, Tensor]]
    channels: bool = False


def _ends(summary: Summary, spec: TensorSpec, non_negative: bool) -> tuple[Tensor, Tensor]:
    return summary.lo, summary.hi


def _axis(spec: TensorSpec) -> int | None:
    return (1 if spec.axis is None else spec.axis) if spec.granularity == "channel" else None


RULES: dict[str, Rule] = {
    "minmax": Rule(lambda spec, _: MinMax(_axis(spec)), _ends, channels=True),
    "moving_average": Rule(lambda spec, _: MovingAverage(spec.range.momentum, _axis(spec)), _ends, channels=True),
    "percentile": Rule(lambda spec, count: Tails(spec.range.percentile, count), _ends),
    "mse": Rule(lambda spec, _: Histogram(spec.range.bins), mse),
    "histogram_l2": Rule(lambda spec, _: Histogram(spec.range.bins), histogram_l2),
    "kl": Rule(lambda spec, _: Histogram(spec.range.bins), kl),
}


def register_range_rule(name: str, rule: Rule) -> None:
    """Let recipes name a range rule of your own for activations: ``range: {name: ...}``.

    ``bitsmith.testing.check_range_rule`` says whether it keeps the contract. A name that another rule has is refused.

    >>> from bitsmith.grid import RangeRule
    >>> register_range_rule("all", RULES["minmax"])
    >>> RangeRule(name="all").name
    'all'
    >>> RANGE_RULES.remove(name := "all"), RULES.pop(name) is RULES["minmax"]
    (None, True)
    """
    if not name or RULES.get(name, rule) is not rule or (name in RANGE_RULES and name not in RULES):
        raise RecipeError(f"the name {name!r} is taken, or empty: give the range rule another one")
    RULES[name] = rule
    RANGE_RULES.add(name)


def activation_statistic(spec: TensorSpec, expected_count: int | None = None) -> Statistic:
    """An empty statistic for ``spec``'s range rule.

    ``expected_count`` is the number of values that will be seen in all, if known; percentiles use it. Per
    channel (along ``spec.axis``, else axis 1) there are ``minmax`` and ``moving_average``. Raises
    ``RecipeError`` for a rule that is not one for activations or has no channels.

    >>> from bitsmith.grid import IntFormat, TensorSpec
    >>> type(activation_statistic(TensorSpec(format=IntFormat(8)))).__name__
    'MinMax'
    """
    rule = _rule(spec)
    if spec.granularity == "group" or (spec.granularity == "channel" and not rule.channels):
        raise RecipeError(
            f"activations have no range rule {spec.range.name!r} per {spec.granularity}: use granularity "
            "'tensor', or 'channel' with minmax or moving_average"
        )
    statistic: Statistic = rule.statistic(spec, expected_count)
    return statistic


def activation_grid(
    statistic: Statistic, spec: TensorSpec, *, non_negative: bool = False, unsigned_codes: bool = False
) -> Grid:
    """The grid that ``spec``'s rule chooses from a finished ``statistic``.

    ``non_negative`` and ``unsigned_codes`` are those of ``solve_grid``. Raises ``CalibrationError`` when
    nothing was seen or all that was seen is zero.

    >>> from bitsmith.grid import IntFormat, TensorSpec
    >>> import torch
    >>> spec = TensorSpec(format=IntFormat(8))
    >>> statistic = activation_statistic(spec)
    >>> statistic.update(torch.tensor([0.0, 5.1]))
    >>> activation_grid(statistic, spec, non_negative=True).scale
    tensor(0.0200)
    """
    summary = statistic.finish()
    if not bool((summary.lo != 0).any() | (summary.hi != 0).any()):
        raise CalibrationError(
            f"the range is zero: every value seen, or all that the rule {spec.range.name!r} keeps, is 0. "
            "Check that the calibration data reaches this point, try minmax, or leave this tensor unquantized"
        )
    device = summary.lo.device
    lo, hi = (end.to(device) for end in _rule(spec).range(summary, spec, non_negative))
    return solve_grid(lo, hi, spec, non_negative=non_negative, unsigned_codes=unsigned_codes, axis=_axis(spec))


def _rule(spec: TensorSpec) -> Rule:
    if spec.range.name == "auto":
        raise RecipeError(
            "range 'auto' compares the outputs of layers, which only bitsmith.quantize's walk has at hand: give the "
            "activations another rule here"
        )
    if spec.range.name not in RULES:
        raise RecipeError(f"{spec.range.name!r} is no range rule for activations: choose one of {', '.join(RULES)}")
    return RULES[spec.range.name]
