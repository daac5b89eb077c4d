"""Single options that change a recipe, as 'bitsmith evaluate' and sweeps take them: one table, one row for each.

The names are those of Brevitas' post-training evaluation, so that its command lines carry over. An option that is not
given leaves the recipe as it is. One that cannot be followed is refused with the reason, never ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from ..errors import RecipeError
from ..recipe import Recipe

Draft = dict[str, Any]  # a Recipe as plain data
Given = Mapping[str, Any]  # all options that were given, by name
Change = Callable[[Draft, Any, Given], None]
_EIGHT_BITS = {"format": {"kind": "int", "bits": 8}}


@dataclass(frozen=True)
class RecipeOption:
    """One option: ``kind`` is ``bool``, ``int``, ``float``, or the tuple of words it may have.

    ``change`` edits the recipe's plain data; ``refused`` says why there is nothing to change.
    """

    name: str
    kind: type | tuple[str, ...]
    help: str
    change: Change | None = None
    refused: str | None = None

    def parse(self, value: Any) -> Any:
        """``value`` in the option's type; RecipeError says what it may be."""
        if isinstance(self.kind, tuple):
            text = "None" if value is None else str(value)
            if text in self.kind:
                return text
            raise RecipeError(f"{self.name}: {value!r} is not one of {', '.join(self.kind)}")
        if self.kind is bool:
            if isinstance(value, bool):
                return value
        elif isinstance(value, int | float) and not isinstance(value, bool) and value == self.kind(value):
            return self.kind(value)
        raise RecipeError(f"{self.name}: {value!r} is no {_KINDS[self.kind]}")


_KINDS = {bool: "true or false", int: "whole number", float: "number"}


def apply_options(recipe: Recipe, options: Given) -> Recipe:
    """The recipe with ``options`` applied, in the table's order; RecipeError where one has no meaning.

    >>> from bitsmith import load_recipe
    >>> changed = apply_options(load_recipe("int8"), {"weight-bit-width": 4, "gptq": True})
    >>> changed.weights.format.bits, changed.step("gptq") is not None
    (4, True)
    >>> apply_options(load_recipe("int8"), {"gpfq-p": 0.25})
    Traceback (most recent call last):
    ...
    bitsmith.errors.RecipeError: gpfq-p: GPFQ reads all samples and all positions here, in linear time
    """
    if unknown := sorted(set(options) - set(RECIPE_OPTIONS)):
        raise RecipeError(f"there is no option {unknown[0]!r}: known are {', '.join(RECIPE_OPTIONS)}")
    given = {name: RECIPE_OPTIONS[name].parse(value) for name, value in options.items()}
    if not given:
        return recipe
    draft = recipe.model_dump(mode="json")
    draft["steps"] = [step.model_dump(mode="json") for step in recipe.steps]
    for name, option in RECIPE_OPTIONS.items():
        if name not in given:
            continue
        if option.refused is not None:
            raise RecipeError(f"{name}: {option.refused}")
        assert option.change is not None
        option.change(draft, given[name], given)
    draft["steps"].sort(key=lambda step: _STEP_ORDER.index(step["name"]))
    draft["name"] = "-".join([recipe.name, *(f"{name}={value}" for name, value in given.items())])
    try:
        return Recipe.model_validate(draft)
    except ValidationError as error:
        said = "; ".join(str(e["msg"]).removeprefix("Value error, ") for e in error.errors())
        raise RecipeError(f"{', '.join(given)} do not go together: {said}") from error


def _spec(draft: Draft, role: str, option: str) -> Draft:
    if draft[role] is None:
        raise RecipeError(f"{option}: the recipe leaves {role} in float, so there is nothing to set")
    spec: Draft = draft[role]
    return spec


def _bits(role: str) -> Change:
    def change(draft: Draft, bits: int, given: Given) -> None:
        if bits == 0 and role == "activations":
            draft[role], draft["bias"] = None, None
            return
        spec = _spec(draft, role, "bit width")
        if spec["format"]["kind"] != "int":
            raise RecipeError(f"{role}: small floats have exponent and mantissa bits, not a bit width")
        if not 2 <= bits <= 16:
            raise RecipeError(f"{role}: {bits} bits: integers of 2 to 16 bits are quantized to")
        spec["format"]["bits"] = bits

    return change


def _set(role: str, field: str, values: Mapping[Any, Any]) -> Change:
    def change(draft: Draft, value: Any, given: Given) -> None:
        _spec(draft, role, field)[field] = values[value]

    return change


def _scale(draft: Draft, value: str, given: Given) -> None:
    for role in ("weights", "activations"):
        if draft[role] is not None:
            draft[role]["scale"] = "po2" if value == "po2_scale" else "float32"


def _symmetry(role: str) -> Change:
    def change(draft: Draft, value: str, given: Given) -> None:
        spec = _spec(draft, role, "quant type")
        spec["symmetric"] = value == "sym"
        if spec["format"]["kind"] == "int":
            spec["format"]["signed"] = value == "sym"

    return change


def _granularity(draft: Draft, value: str, given: Given) -> None:
    spec = _spec(draft, "weights", "weight-quant-granularity")
    spec["granularity"] = value.removeprefix("per_")
    spec["group_size"] = 32 if value == "per_group" else None


def _rule(role: str, names: Mapping[str, str]) -> Change:
    def change(draft: Draft, value: str, given: Given) -> None:
        _spec(draft, role, "calibration type")["range"]["name"] = names[value]

    return change


def _percentile(draft: Draft, value: float, given: Given) -> None:
    if given.get("act-quant-calibration-type", "stats") != "stats":
        raise RecipeError("act-quant-percentile: only act-quant-calibration-type stats looks at percentiles")
    rule = _spec(draft, "activations", "act-quant-percentile")["range"]
    rule["name"], rule["percentile"] = "percentile", value


def _bias_bits(draft: Draft, value: str, given: Given) -> None:
    if value != "None" and draft["activations"] is None:
        raise RecipeError(f"bias-bit-width: {value} bits need quantized activations, from which the bias' scale comes")
    draft["bias"] = None if value == "None" else {"format": {"kind": "int", "bits": int(value)}}


def _float_format(draft: Draft, value: str, given: Given) -> None:
    if value == "int":
        if named := [name for name in given if "mantissa" in name or "exponent" in name]:
            raise RecipeError(f"{named[0]}: goes with quant-format float or float_ocp")
        for role in ("weights", "activations"):
            if draft[role] is not None and draft[role]["format"]["kind"] != "int":
                draft[role]["format"] = dict(_EIGHT_BITS["format"])
        return
    for role, prefix in (("weights", "weight"), ("activations", "act")):
        if draft[role] is None:
            continue
        if f"{prefix}-bit-width" in given:
            raise RecipeError(f"{prefix}-bit-width: quant-format {value} has exponent and mantissa bits instead")
        exponent = given.get(f"{prefix}-exponent-bit-width", 4)
        mantissa = given.get(f"{prefix}-mantissa-bit-width", 3)
        reserved = "none" if value == "float" else "ieee" if (exponent, mantissa) == (5, 2) else "nan"
        draft[role]["format"] = {
            "kind": "float", "exponent_bits": exponent, "mantissa_bits": mantissa, "reserved": reserved
        }  # fmt: skip
        draft[role]["symmetric"] = True
        if role == "activations" and given.get("act-quant-calibration-type") is None:
            draft[role]["range"]["name"] = "mse"
    draft["bias"] = None


def _float_bits(draft: Draft, value: int, given: Given) -> None:
    if given.get("quant-format", "int") == "int":
        raise RecipeError("exponent and mantissa bits go with quant-format float or float_ocp")


def _narrow(draft: Draft, value: bool, given: Given) -> None:
    format = _spec(draft, "weights", "weight-narrow-range")["format"]
    if format["kind"] != "int":
        raise RecipeError("weight-narrow-range: small floats are symmetric: there is no code to drop")
    format["narrow"] = value


def _ends(draft: Draft, bits: int, given: Given) -> None:
    if given.get("quant-format", "int") != "int":
        raise RecipeError("layerwise-first-last-bit-width: quant-format is not int")
    for match in ("first", "last"):
        override: Draft = {"match": match}
        for role in ("weights", "activations"):
            if draft[role] is not None:
                override[role] = {**draft[role], "format": {**draft[role]["format"], "bits": bits}}
        draft["overrides"] = [*draft["overrides"], override]


_STEP_ORDER = (
    "fold_batch_norm", "equalize", "equalize_activations", "split_channels", "gptq", "gpfq", "qronos",
    "learned_rounding", "reconstruct", "bias_correction", "reestimate_batch_norm",
)  # fmt: skip


def _step(name: str) -> Change:
    """Put a step in, or take it out."""

    def change(draft: Draft, value: Any, given: Given) -> None:
        draft["steps"] = [step for step in draft["steps"] if step["name"] != name]
        if value:
            draft["steps"].append({"name": name})

    return change


def _step_option(names: tuple[str, ...], field: str, values: Mapping[Any, Any] | None = None) -> Change:
    def change(draft: Draft, value: Any, given: Given) -> None:
        steps = [step for step in draft["steps"] if step["name"] in names]
        if not steps:
            raise RecipeError(f"{field} = {value}: goes with {' or '.join(names)}, which the recipe does not have")
        for step in steps:
            step[field] = value if values is None else values[value]

    return change


def _equalize(draft: Draft, iterations: int, given: Given) -> None:
    _step("equalize")(draft, iterations, given)
    if iterations:
        _step_option(("equalize",), "iterations")(draft, iterations, given)


def _activation_equalization(draft: Draft, value: str, given: Given) -> None:
    _step("equalize_activations")(draft, value != "None", given)
    if value != "None":
        _step_option(("equalize_activations",), "insert", {"fx": False, "layerwise": True})(draft, value, given)


def _split(draft: Draft, ratio: float, given: Given) -> None:
    _step("split_channels")(draft, ratio, given)
    if ratio:
        _step_option(("split_channels",), "ratio")(draft, ratio, given)
        _step_option(("split_channels",), "side")(draft, "output", given)


def _learned(draft: Draft, form: str, given: Given) -> None:
    wanted = "reconstruct" if given.get("learned-round-mode") == "blockwise" else "learned_rounding"
    for name in ("learned_rounding", "reconstruct"):
        _step(name)(draft, name == wanted and form != "None", given)
    if form != "None":
        _step_option((wanted,), "form", {"identity": "linear"} | {n: n for n in _FORMS})(draft, form, given)


_FORMS = ("hard_sigmoid", "sigmoid")
_LEARNED = ("learned_rounding", "reconstruct")


def _learned_mode(draft: Draft, value: str, given: Given) -> None:
    if given.get("learned-round", "None") == "None":
        raise RecipeError("learned-round-mode: goes with learned-round")


def _learned_loss(draft: Draft, value: str, given: Given) -> None:
    _step_option(_LEARNED, "regulariser", {"regularised_mse": 20.0, "mse": 0.0})(draft, value, given)


def _learned_batch(draft: Draft, value: int, given: Given) -> None:
    _step_option(_LEARNED, "batch_size")(draft, value, given)
    for step in draft["steps"]:
        if step["name"] == "learned_rounding":
            step["target"] = "activation"


def _calibrate_bn(draft: Draft, value: bool, given: Given) -> None:
    _step("reestimate_batch_norm")(draft, value, given)
    if value and "bias-corr" not in given:
        _step("bias_correction")(draft, False, given)


_COLUMNS = ("gptq", "gpfq", "qronos")
_BITS = "2 to 16"
_ROWS = (
    RecipeOption("target-backend", ("runtime", "fx", "layerwise", "flexml"), "where quantizers stand",
                 lambda draft, value, given: draft.update(placement=value)),
    RecipeOption("quant-format", ("int", "float", "float_ocp"), "integers, small floats without reserved codes, or OCP",
                 _float_format),
    RecipeOption("weight-exponent-bit-width", int, "of small floats, default 4", _float_bits),
    RecipeOption("weight-mantissa-bit-width", int, "of small floats, default 3", _float_bits),
    RecipeOption("act-exponent-bit-width", int, "of small floats, default 4", _float_bits),
    RecipeOption("act-mantissa-bit-width", int, "of small floats, default 3", _float_bits),
    RecipeOption("weight-bit-width", int, _BITS, _bits("weights")),
    RecipeOption("act-bit-width", int, f"{_BITS}; 0: weights only", _bits("activations")),
    RecipeOption("scale-factor-type", ("float_scale", "po2_scale"), "of weights and activations", _scale),
    RecipeOption("weight-quant-type", ("sym", "asym"), "without or with a zero point", _symmetry("weights")),
    RecipeOption("weight-quant-granularity", ("per_tensor", "per_channel", "per_group"), "how many share a scale; "
                 "groups are of 32", _granularity),
    RecipeOption("weight-narrow-range", bool, "leave the most negative code out", _narrow),
    RecipeOption("weight-quant-calibration-type", ("stats", "mse", "hqo"), "greatest value, least square error, HQO",
                 _rule("weights", {"stats": "minmax", "mse": "mse", "hqo": "hqo"})),
    RecipeOption("act-quant-type", ("sym", "asym"), "without or with a zero point", _symmetry("activations")),
    RecipeOption("act-quant-calibration-type", ("stats", "mse"), "percentile or least square error",
                 _rule("activations", {"stats": "percentile", "mse": "mse"})),
    RecipeOption("act-quant-percentile", float, "that ranges reach to", _percentile),
    RecipeOption("uint-sym-act-for-unsigned-values", bool, "no sign for what is never negative",
                 _set("activations", "auto_unsigned", {True: True, False: False})),
    RecipeOption("bias-bit-width", ("32", "16", "None"), "None: float", _bias_bits),
    RecipeOption("layerwise-first-last-bit-width", int, "of the first and last layer, under every backend", _ends),
    RecipeOption("merge-bn", bool, "fold batch norms", _step("fold_batch_norm")),
    RecipeOption("graph-eq-iterations", int, "cross-layer equalization, where it helps; 0: none", _equalize),
    RecipeOption("graph-eq-merge-bias", bool, "biases count in its ranges", _step_option(("equalize",), "merge_bias")),
    RecipeOption("act-equalization", ("None", "fx", "layerwise"), "SmoothQuant, where it helps",
                 _activation_equalization),
    RecipeOption("channel-splitting-ratio", float, "share of the channels to split, where it helps; 0: none", _split),
    RecipeOption("channel-splitting-split-input", bool, "halve the readers' weights instead",
                 _step_option(("split_channels",), "side", {True: "input", False: "output"})),
    RecipeOption("gptq", bool, "GPTQ", _step("gptq")),
    RecipeOption("gpfq", bool, "GPFQ", _step("gpfq")),
    RecipeOption("qronos", bool, "Qronos", _step("qronos")),
    RecipeOption("gpxq-act-order", bool, "columns of strong inputs first", _step_option(_COLUMNS, "act_order")),
    RecipeOption("gpxq-accumulator-bit-width", int, "no sum leaves it", _step_option(_COLUMNS, "accumulator_bits")),
    RecipeOption("gptq-use-quant-activations", bool, "GPTQ's Hessian from quantized inputs",
                 _step_option(("gptq",), "inputs", {True: "quantized", False: "float"})),
    RecipeOption("learned-round", ("None", "identity", "hard_sigmoid", "sigmoid"), "learn which weights to round up",
                 _learned),
    RecipeOption("learned-round-mode", ("layerwise", "blockwise"), "AdaRound or block reconstruction", _learned_mode),
    RecipeOption("learned-round-loss", ("regularised_mse", "mse"), "with or without the pull to 0 and 1",
                 _learned_loss),
    RecipeOption("learned-round-iters", int, "iterations", _step_option(_LEARNED, "iterations")),
    RecipeOption("learned-round-lr", float, "learning rate", _step_option(_LEARNED, "lr")),
    RecipeOption("learned-round-batch-size", int, "samples of an iteration; layerwise then learns behind the "
                 "activation function", _learned_batch),
    RecipeOption("bias-corr", bool, "bias correction", _step("bias_correction")),
    RecipeOption("calibrate-bn", bool, "give outputs their float mean and variance, in place of bias correction",
                 _calibrate_bn),
    RecipeOption("act-quant-granularity", ("per_tensor", "per_group"), "of activations", refused=
                 "static activations have one scale per tensor; dynamic ones belong to --recipe int8-dynamic-token"),
    RecipeOption("act-scale-computation-type", ("static", "dynamic"), "when scales are found", refused=
                 "it belongs to the recipe: int8-dynamic finds its scales at run time, all others before"),
    RecipeOption("gpxq-accumulator-tile-size", int, "AXE's tiles", refused=
                 "sums are bounded as a whole: no runtime that is written for adds up in tiles"),
    RecipeOption("disable-create-weight-orig", bool, "GPTQ's memory", refused=
                 "the walk keeps no second copy of the weights, so there is none to leave out"),
    RecipeOption("gpfq-p", float, "share of the positions that GPFQ reads", refused=
                 "GPFQ reads all samples and all positions here, in linear time"),
    RecipeOption("learned-round-block-name", ("None",), "which modules are blocks", refused=
                 "blocks are found in the graph: they end where one value is alive"),
    RecipeOption("learned-round-lr-scheduler", ("None", "linear"), "how the rate falls", refused=
                 "it belongs to learned-round: identity falls linearly, the sigmoids keep their rate"),
    RecipeOption("optimizer", ("adam",), "of learned rounding", refused="learned rounding has one optimizer, Adam"),
    RecipeOption("dtype", ("float", "bfloat16", "float16"), "of the float model", refused=
                 "quantization starts from float32; write weights of other types as float32 first"),
    RecipeOption("compile", bool, "torch.compile", refused=
                 "the simulation compiles its own kernels where a compiler is there"),
)  # fmt: skip

RECIPE_OPTIONS: dict[str, RecipeOption] = {row.name: row for row in _ROWS}
