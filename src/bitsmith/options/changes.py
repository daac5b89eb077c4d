"""What each option does to a recipe's plain data; whether it may, ``constraints.py`` says when all are done."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ..recipe import BY_EFFORT, FEW_BITS
from .constraints import Draft, Given

Change = Callable[[Draft, Any, Given], None]

STEP_ORDER = (
    "fold_batch_norm", "equalize", "equalize_activations", "split_channels", "gptq", "gpfq", "qronos",
    "learned_rounding", "reconstruct", "bias_correction", "reestimate_batch_norm",
)  # fmt: skip
COLUMNS = ("gptq", "gpfq", "qronos")
LEARNED = ("learned_rounding", "reconstruct")
_ROUNDING = (*COLUMNS, "learned_rounding")
_CORRECTIONS = ("bias_correction", "reestimate_batch_norm")
_PREFIX = {"weights": "weight", "activations": "act"}


def _specs(draft: Draft, *roles: str) -> Iterator[Draft]:
    """The recipe's specs of these roles, those of its overrides too."""
    for part in (draft, *draft["overrides"]):
        yield from (part[role] for role in roles if part.get(role) is not None)


def bits(role: str) -> Change:
    """The width of integers; overrides keep theirs. 0 leaves activations, and then biases, in float."""

    def change(draft: Draft, width: int, given: Given) -> None:
        if width == 0 and role == "activations":
            draft["activations"], draft["bias"] = None, None
            kept = [{**override, "activations": None} for override in draft["overrides"]]
            draft["overrides"] = [override for override in kept if override["exclude"] or override["weights"]]
        elif draft[role] is not None and draft[role]["format"]["kind"] == "int":
            draft[role] = _of_width(draft, role, width, given)

    return change


def _of_width(draft: Draft, role: str, width: int, given: Given) -> Draft:
    """A role's spec at another width. Zero points that a named recipe has for weights of few bits end with these."""
    spec = {**draft[role], "format": {**draft[role]["format"], "bits": width}}
    named = role == "weights" and draft["name"] in BY_EFFORT and "weight-quant-type" not in given
    if named and width > FEW_BITS:
        spec["symmetric"] = True
    return spec


def field(role: str, name: str, values: Mapping[Any, Any] | None = None) -> Change:
    """One field of all specs of a role."""

    def change(draft: Draft, value: Any, given: Given) -> None:
        for spec in _specs(draft, role):
            spec[name] = value if values is None else values[value]

    return change


def scale(draft: Draft, value: str, given: Given) -> None:
    """Float scales, or powers of two, on both sides."""
    for spec in _specs(draft, "weights", "activations"):
        spec["scale"] = "po2" if value == "po2_scale" else "float32"


def symmetry(role: str) -> Change:
    """With a zero point codes are unsigned, without one they are signed."""

    def change(draft: Draft, value: str, given: Given) -> None:
        for spec in _specs(draft, role):
            spec["symmetric"] = value == "sym"
            if spec["format"]["kind"] == "int":
                spec["format"]["signed"] = value == "sym"

    return change


def granularity(draft: Draft, value: str, given: Given) -> None:
    """Of weights."""
    for spec in _specs(draft, "weights"):
        spec["granularity"] = value.removeprefix("per_")
        spec["group_size"] = 32 if value == "per_group" else None


def narrow(draft: Draft, value: bool, given: Given) -> None:
    """Of integer weights."""
    for spec in _specs(draft, "weights"):
        if spec["format"]["kind"] == "int":
            spec["format"]["narrow"] = value


def rule(role: str, names: Mapping[str, str]) -> Change:
    """The range rule."""

    def change(draft: Draft, value: str, given: Given) -> None:
        for spec in _specs(draft, role):
            spec["range"]["name"] = names[value]

    return change


def percentile(draft: Draft, value: float, given: Given) -> None:
    """Ranges of activations by percentile, whatever the rule was."""
    for spec in _specs(draft, "activations"):
        spec["range"]["name"], spec["range"]["percentile"] = "percentile", value


def bias_bits(draft: Draft, value: str, given: Given) -> None:
    """Biases of that width; None leaves them in float."""
    draft["bias"] = None if value == "None" else {"format": {"kind": "int", "bits": int(value)}}


def quant_format(draft: Draft, value: str, given: Given) -> None:
    """Integers, or small floats, whose biases stay float and whose ranges are of least squared error."""
    for role, prefix in _PREFIX.items():
        for spec in _specs(draft, role):
            if value == "int":
                if spec["format"]["kind"] != "int":
                    spec["format"] = {"kind": "int", "bits": 8, "signed": spec["symmetric"]}
                continue
            exponent = given.get(f"{prefix}-exponent-bit-width", 4)
            mantissa = given.get(f"{prefix}-mantissa-bit-width", 3)
            reserved = "none" if value == "float" else "ieee" if (exponent, mantissa) == (5, 2) else "nan"
            spec["format"] = {
                "kind": "float", "exponent_bits": exponent, "mantissa_bits": mantissa, "reserved": reserved
            }  # fmt: skip
            spec["symmetric"] = True
            if role == "activations":
                spec["range"]["name"] = "mse"
    if value != "int":
        draft["bias"] = None


def float_bits(role: str, name: str) -> Change:
    """Exponent or mantissa bits of small floats."""

    def change(draft: Draft, value: int, given: Given) -> None:
        for spec in _specs(draft, role):
            if spec["format"]["kind"] == "float":
                spec["format"][name] = value

    return change


def ends(draft: Draft, width: int, given: Given) -> None:
    """The first and the last layer's own width, in place of what the recipe has for them."""
    kept = [override for override in draft["overrides"] if override["match"] not in ("first", "last")]
    for match in ("first", "last"):
        roles = [role for role in ("weights", "activations") if draft[role] is not None]
        specs = {role: _of_width(draft, role, width, given) for role in roles}
        kept.append({"match": match, "exclude": False, "weights": None, "activations": None, "bias": None, **specs})
    draft["overrides"] = kept


def step(name: str, instead_of: tuple[str, ...] = ()) -> Change:
    """Put a step in, in place of the recipe's own of the same purpose, or take it out."""

    def change(draft: Draft, value: Any, given: Given) -> None:
        out = {name, *(instead_of if value else ())}
        draft["steps"] = [step for step in draft["steps"] if step["name"] not in out]
        if value:
            draft["steps"].append({"name": name})

    return change


def column_step(name: str) -> Change:
    """GPTQ, GPFQ or Qronos: in place of another that the recipe has, but not of one that was asked for too."""

    def change(draft: Draft, value: bool, given: Given) -> None:
        step(name, tuple(other for other in _ROUNDING if not given.get(other)))(draft, value, given)

    return change


def bias_correction(draft: Draft, value: bool, given: Given) -> None:
    """Off means no correction of any kind, on takes the place of the recipe's other one."""
    step("bias_correction", () if given.get("calibrate-bn") else _CORRECTIONS)(draft, value, given)
    if not value and not given.get("calibrate-bn"):
        step("reestimate_batch_norm")(draft, False, given)


def calibrate_bn(draft: Draft, value: bool, given: Given) -> None:
    """In place of bias correction, unless that was asked for too."""
    step("reestimate_batch_norm", () if given.get("bias-corr") else _CORRECTIONS)(draft, value, given)


def step_option(names: tuple[str, ...], name: str, values: Mapping[Any, Any] | None = None) -> Change:
    """An option of those steps that the recipe has."""

    def change(draft: Draft, value: Any, given: Given) -> None:
        for step in draft["steps"]:
            if step["name"] in names:
                step[name] = value if values is None else values[value]

    return change


def equalize(draft: Draft, iterations: int, given: Given) -> None:
    """So many sweeps; 0 leaves the step out."""
    step("equalize")(draft, iterations, given)
    step_option(("equalize",), "iterations")(draft, iterations, given)


def activation_equalization(draft: Draft, value: str, given: Given) -> None:
    """Under 'layerwise' layers are multiplied for where nothing before them can be scaled."""
    step("equalize_activations")(draft, value != "None", given)
    step_option(("equalize_activations",), "insert", {"fx": False, "layerwise": True, "None": None})(
        draft, value, given
    )


def split(draft: Draft, ratio: float, given: Given) -> None:
    """That share of the channels, on the side of the outputs unless another option says otherwise."""
    step("split_channels")(draft, ratio, given)
    step_option(("split_channels",), "ratio")(draft, ratio, given)
    step_option(("split_channels",), "side")(draft, "output", given)


def learned(draft: Draft, form: str, given: Given) -> None:
    """By layer, in place of another step that rounds; or by block, behind it."""
    wanted = "reconstruct" if given.get("learned-round-mode") == "blockwise" else "learned_rounding"
    for name in LEARNED:
        step(name)(draft, False, given)
    if form != "None":
        others = tuple(name for name in COLUMNS if not given.get(name)) if wanted == "learned_rounding" else ()
        step(wanted, others)(draft, True, given)
        step_option((wanted,), "form", {"identity": "linear", "hard_sigmoid": "hard_sigmoid", "sigmoid": "sigmoid"})(
            draft, form, given
        )


def learned_batch(draft: Draft, value: int, given: Given) -> None:
    """Minibatches; by layer these are of what the activation function makes of the output."""
    step_option(LEARNED, "batch_size")(draft, value, given)
    step_option(("learned_rounding",), "target")(draft, "activation", given)


def nothing(draft: Draft, value: Any, given: Given) -> None:
    """Another option's change has read it, or it says what is so already."""
