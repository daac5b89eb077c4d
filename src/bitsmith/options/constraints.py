"""What does not go together: options with one another, or with what the recipe is; and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

Draft = dict[str, Any]  # a Recipe as plain data
Given = Mapping[str, Any]  # all options that were given, by name

ANY = "*"
_COLUMNS = ("gptq", "gpfq", "qronos")
_LEARNED = ("learned_rounding", "reconstruct")


@dataclass(frozen=True)
class Constraint:
    """Options that cannot be followed, and the ``reason``.

    All options of ``forbid`` are given with that value, or one of that list; ``"*"`` is any value. Where features are
    named, the recipe that results has all of ``having`` and none of ``lacking`` (see ``features``).

    >>> Constraint({"gptq": True, "gpfq": "*"}, "both round").forbids({"gptq": True, "gpfq": False})
    True
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}  # where a sweep's file has one

    forbid: dict[str, Any]
    reason: str
    having: tuple[str, ...] = field(default=())
    lacking: tuple[str, ...] = field(default=())

    def forbids(self, options: Given) -> bool:
        """Whether these options are meant, whatever the recipe is."""
        return all(
            name in options and (value == ANY or options[name] in (value if isinstance(value, list) else [value]))
            for name, value in self.forbid.items()
        )

    def refuses(self, options: Given, found: set[str]) -> bool:
        """Whether these options are meant, and a recipe with these features."""
        return self.forbids(options) and found.issuperset(self.having) and found.isdisjoint(self.lacking)

    def __str__(self) -> str:
        return f"{' with '.join(_shown(*pair) for pair in self.forbid.items())}: {self.reason}"


def features(draft: Draft) -> set[str]:
    """What constraints may ask of a recipe: its placement, its steps, and which sides are in which numbers.

    >>> weights = {"format": {"kind": "int"}, "symmetric": True}
    >>> sorted(features({"placement": "fx", "steps": [], "weights": weights, "activations": None}))
    ['fx', 'integer weights', 'symmetric weights', 'weights']
    """
    found = {draft["placement"], *(step["name"] for step in draft["steps"])}
    for role in ("weights", "activations"):
        if draft[role] is not None:
            kind = "integer" if draft[role]["format"]["kind"] == "int" else "small-float"
            symmetry = "symmetric" if draft[role]["symmetric"] else "asymmetric"
            found |= {role, f"{kind} {role}", f"{symmetry} {role}"}
            found |= {f"unclipped {role}"} if _reaches_all(draft[role]) else set()
    return found


def _reaches_all(spec: Draft) -> bool:
    """Whether a range reaches to the greatest value, and no further than a scale above rounds it."""
    rule = spec.get("range", {"name": None})
    rounded_down = spec.get("scale") == "po2" and spec.get("po2_rounding") == "nearest"
    return rule["name"] == "minmax" and rule.get("limit") is None and not rounded_down


def _shown(name: str, value: Any) -> str:
    if value == ANY or value is True:
        return name
    if value is False:
        return f"no-{name}"
    return f"{name} {' or '.join(map(str, value)) if isinstance(value, list) else value}"


def _each(names: tuple[str, ...], reason: str, **where: tuple[str, ...]) -> tuple[Constraint, ...]:
    return tuple(Constraint({name: ANY}, reason, **where) for name in names)


_WEIGHTS = ("weight-bit-width", "weight-quant-type", "weight-quant-granularity", "weight-narrow-range",
            "weight-quant-calibration-type", *_COLUMNS, "learned-round")  # fmt: skip
_ACTIVATIONS = ("act-quant-type", "act-quant-calibration-type", "act-quant-percentile",
                "uint-sym-act-for-unsigned-values")  # fmt: skip
_CALIBRATED = (*_ACTIVATIONS, "act-bit-width", "scale-factor-type", "bias-bit-width", "quant-format",
               "layerwise-first-last-bit-width", "merge-bn", "graph-eq-iterations", "act-equalization",
               "channel-splitting-ratio", *_COLUMNS, "learned-round", "bias-corr", "calibrate-bn",
               "target-backend")  # fmt: skip
_LEARNING = ("learned-round-loss", "learned-round-iters", "learned-round-lr", "learned-round-batch-size",
             "learned-round-lr-scheduler")  # fmt: skip
_ONE_ROUNDS = "both round the weights of a layer, so the second would undo the first: keep one"

CONSTRAINTS: tuple[Constraint, ...] = (
    *_each(_CALIBRATED, "the recipe finds its scales at run time and has no calibration to change",
           having=("dynamic",)),
    *_each(_WEIGHTS, "the recipe leaves weights in float", lacking=("weights",)),
    *_each(_ACTIVATIONS, "the recipe leaves activations in float", lacking=("activations",)),
    Constraint({"bias-bit-width": ["32", "16"]}, "the bias' scale comes from that of the activations, which are float",
               lacking=("activations",)),
    Constraint({"weight-bit-width": ANY}, "small floats have exponent and mantissa bits: use weight-exponent-bit-width "
               "and weight-mantissa-bit-width", having=("small-float weights",)),
    Constraint({"act-bit-width": ANY}, "small floats have exponent and mantissa bits: use act-exponent-bit-width and "
               "act-mantissa-bit-width", having=("small-float activations",)),
    *_each(("weight-exponent-bit-width", "weight-mantissa-bit-width"), "goes with quant-format float or float_ocp: "
           "integers have a bit width", lacking=("small-float weights",)),
    *_each(("act-exponent-bit-width", "act-mantissa-bit-width"), "goes with quant-format float or float_ocp: integers "
           "have a bit width", lacking=("small-float activations",)),
    Constraint({"weight-quant-type": "asym"}, "small floats have a sign and no zero point",
               having=("small-float weights",)),
    Constraint({"act-quant-type": "asym"}, "small floats have a sign and no zero point",
               having=("small-float activations",)),
    Constraint({"weight-narrow-range": True}, "the range reaches to the greatest weight on either side, so that the "
               "most negative code is left out anyway: goes with weight-quant-calibration-type mse or hqo, "
               "weight-quant-type asym, gptq, gpfq or qronos",
               having=("symmetric weights", "integer weights", "unclipped weights"), lacking=_COLUMNS),
    Constraint({"weight-narrow-range": ANY}, "small floats are symmetric: there is no code to leave out",
               having=("small-float weights",)),
    Constraint({"uint-sym-act-for-unsigned-values": ANY}, "small floats always have a sign",
               having=("small-float activations",)),
    Constraint({"bias-bit-width": ["32", "16"]}, "biases beside small floats stay float",
               having=("small-float weights",)),
    Constraint({"layerwise-first-last-bit-width": ANY}, "small floats have exponent and mantissa bits",
               having=("small-float weights",)),
    Constraint({"act-quant-percentile": ANY, "act-quant-calibration-type": "mse"},
               "ranges of least squared error look at no percentile"),
    Constraint({"uint-sym-act-for-unsigned-values": ANY}, "it is about symmetric activations (act-quant-type sym): "
               "with a zero point all codes are used anyway", having=("asymmetric activations",)),
    Constraint({"gptq": True, "gpfq": True}, _ONE_ROUNDS),
    Constraint({"gptq": True, "qronos": True}, _ONE_ROUNDS),
    Constraint({"gpfq": True, "qronos": True}, _ONE_ROUNDS),
    *(Constraint({name: True, "learned-round": ["identity", "hard_sigmoid", "sigmoid"]}, f"{_ONE_ROUNDS}, or let "
                 "blocks learn behind it (learned-round-mode blockwise)", having=("learned_rounding",))
      for name in _COLUMNS),
    *_each(("gpxq-act-order", "gpxq-accumulator-bit-width"), "goes with gptq, gpfq or qronos", lacking=_COLUMNS),
    Constraint({"gptq-use-quant-activations": ANY}, "goes with gptq", lacking=("gptq",)),
    *_each(_LEARNING, "goes with learned-round", lacking=_LEARNED),
    Constraint({"learned-round-mode": ANY}, "goes with learned-round", lacking=_LEARNED),
    Constraint({"learned-round-lr-scheduler": "linear", "learned-round": ["hard_sigmoid", "sigmoid"]},
               "the sigmoids keep their rate; identity falls linearly"),
    Constraint({"learned-round-lr-scheduler": "None", "learned-round": "identity"},
               "identity falls linearly; the sigmoids keep their rate"),
    Constraint({"bias-corr": True, "calibrate-bn": True}, "both correct the mean of a layer's output: keep one"),
    Constraint({"graph-eq-merge-bias": ANY}, "goes with graph-eq-iterations", lacking=("equalize",)),
    Constraint({"channel-splitting-split-input": ANY}, "goes with channel-splitting-ratio",
               lacking=("split_channels",)),
)  # fmt: skip
