"""The options, one row for each.

The names are those of Brevitas' post-training evaluation, so that its command lines carry over. An option that is not
given leaves the recipe as it is. One that cannot be followed is refused with the reason, never ignored.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..errors import RecipeError
from . import changes as c
from .constraints import CONSTRAINTS, Given, features

if TYPE_CHECKING:
    from ..recipe import Recipe

_NAMES = {bool: "true or false", int: "whole number", float: "number", str: "text"}


@dataclass(frozen=True)
class RecipeOption:
    """One option: ``kind`` is a type, or the tuple of words it may have; ``group`` its place in the help.

    ``change`` edits the recipe's plain data. ``refused`` says why there is nothing to change, whatever is asked for
    but ``kept``, which is what holds anyway. Numbers are ``between`` two, or ``off``.
    """

    name: str
    kind: type | tuple[str, ...]
    help: str
    change: c.Change = c.nothing
    group: str = ""
    refused: str | None = None
    kept: Any = None
    between: tuple[int, int] | None = None
    off: int | None = None
    aliases: tuple[str, ...] = ()

    def parse(self, value: Any) -> Any:
        """``value`` in the option's type; RecipeError says what it may be."""
        if isinstance(self.kind, tuple):
            text = "None" if value is None else str(value)
            if text in self.kind:
                return text
            raise RecipeError(f"{self.name}: {value!r} is not one of {', '.join(self.kind)}")
        if self.kind in (bool, str):
            if isinstance(value, self.kind):
                return value
        elif isinstance(value, int | float) and not isinstance(value, bool) and value == self.kind(value):
            if self.between is not None and value != self.off and not self.between[0] <= value <= self.between[1]:
                raise RecipeError(f"{self.name}: {value} is not from {self.between[0]} to {self.between[1]}")
            return self.kind(value)
        raise RecipeError(f"{self.name}: {value!r} is no {_NAMES[self.kind]}")


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
    from pydantic import ValidationError

    from ..recipe import Recipe

    given = _parsed(options)
    if not given:
        return recipe
    draft = recipe.model_dump(mode="json")
    # what was not given stays so: some options of a step go with some of its others only
    draft["steps"] = [{"name": step.name} | step.model_dump(mode="json", exclude_unset=True) for step in recipe.steps]
    for name, value in given.items():
        RECIPE_OPTIONS[name].change(draft, value, given)
    found = {recipe.placement, *features(draft)}  # also the placement that it comes from
    for constraint in CONSTRAINTS:
        if constraint.refuses(given, found):
            raise RecipeError(str(constraint))
    draft["steps"].sort(key=lambda step: c.STEP_ORDER.index(step["name"]))
    draft["name"] = "-".join([recipe.name, *(f"{name}={value}" for name, value in given.items())])
    try:
        return Recipe.model_validate(draft)
    except ValidationError as error:
        said = "; ".join(_problem(e) for e in error.errors())
        raise RecipeError(f"{', '.join(f'{name} {value}' for name, value in given.items())}: {said}") from error


def _parsed(options: Given) -> Given:
    """The options in their types and in the table's order, less those that say what holds anyway."""
    if unknown := sorted(set(options) - set(RECIPE_OPTIONS)):
        raise RecipeError(f"there is no option {unknown[0]!r}: known are {', '.join(RECIPE_OPTIONS)}")
    given = {}
    for name, option in RECIPE_OPTIONS.items():
        if name not in options:
            continue
        given[name] = option.parse(options[name])
        if option.refused is not None and given.pop(name) != option.kept:
            raise RecipeError(f"{name}: {option.refused}")
    return given


def _problem(error: Any) -> str:
    """What pydantic says, without the parts of its path that name types."""
    where = ".".join(str(part) for part in error["loc"] if str(part) not in ("int", "float"))
    said = str(error["msg"]).removeprefix("Value error, ")
    return f"{where}: {said}" if where else said


REFUSED = "Refused"  # the group of options that are known for their reasons alone
_WIDTHS = (2, 16)
_FORMS = ("None", "identity", "hard_sigmoid", "sigmoid")

_GROUPS: dict[str, tuple[RecipeOption, ...]] = {
    "Numbers": (
        RecipeOption("quant-format", ("int", "float", "float_ocp"), "integers; small floats of which every code is a "
                     "number; small floats with OCP's reserved codes. Small floats have float biases and activation "
                     "ranges of least squared error", c.quant_format),
        RecipeOption("weight-exponent-bit-width", int, "of small floats [default: 4]",
                     c.float_bits("weights", "exponent_bits")),
        RecipeOption("weight-mantissa-bit-width", int, "of small floats [default: 3]",
                     c.float_bits("weights", "mantissa_bits")),
        RecipeOption("act-exponent-bit-width", int, "of small floats [default: 4]",
                     c.float_bits("activations", "exponent_bits")),
        RecipeOption("act-mantissa-bit-width", int, "of small floats [default: 3]",
                     c.float_bits("activations", "mantissa_bits")),
        RecipeOption("weight-bit-width", int, "of integers, 2 to 16", c.bits("weights"), between=_WIDTHS),
        RecipeOption("act-bit-width", int, "of integers, 2 to 16; 0: weights only", c.bits("activations"),
                     between=_WIDTHS, off=0),
        RecipeOption("layerwise-first-last-bit-width", int, "of the first and the last layer, found by their place in "
                     "the graph, and of what they read; under every backend", c.ends, between=_WIDTHS),
        RecipeOption("bias-bit-width", ("32", "16", "None"), "of biases; None: float", c.bias_bits),
    ),
    "Scales and ranges": (
        RecipeOption("scale-factor-type", ("float_scale", "po2_scale"), "of weights and activations: any number, or "
                     "powers of two", c.scale),
        RecipeOption("weight-quant-type", ("sym", "asym"), "without or with a zero point", c.symmetry("weights")),
        RecipeOption("weight-quant-granularity", ("per_tensor", "per_channel", "per_group"), "which weights share a "
                     "scale; groups are of 32", c.granularity),
        RecipeOption("weight-narrow-range", bool, "leave the most negative code out", c.narrow),
        RecipeOption("weight-quant-calibration-type", ("stats", "mse", "hqo"), "range of weights: the greatest value, "
                     "least squared error, or half-quadratic optimization",
                     c.rule("weights", {"stats": "minmax", "mse": "mse", "hqo": "hqo"})),
        RecipeOption("act-quant-type", ("sym", "asym"), "without or with a zero point", c.symmetry("activations")),
        RecipeOption("act-quant-calibration-type", ("stats", "mse"), "range of activations: percentile or least "
                     "squared error", c.rule("activations", {"stats": "percentile", "mse": "mse"})),
        RecipeOption("act-quant-percentile", float, "of all values that the range reaches to, over 50 [default: "
                     "99.999]", c.percentile),
        RecipeOption("uint-sym-act-for-unsigned-values", bool, "no sign for activations that are never negative",
                     c.field("activations", "auto_unsigned")),
        RecipeOption("act-quant-granularity", ("per_tensor", "per_group"), "which activations share a scale",
                     refused="static activations have one scale per tensor; --recipe int8-dynamic-token has one per "
                     "token", kept="per_tensor"),
        RecipeOption("act-scale-computation-type", ("static", "dynamic"), "when scales are found",
                     refused="it belongs to the recipe: --recipe int8-dynamic finds its scales at run time, all "
                     "others before", kept="static"),
    ),
    "Structure": (
        RecipeOption("target-backend", ("runtime", "fx", "layerwise", "flexml"), "where quantizers stand: what the "
                     "target runs in integers; operands of an add share a scale; only what layers read; as fx and the "
                     "outputs too", lambda draft, value, given: draft.update(placement=value), aliases=("placement",)),
        RecipeOption("merge-bn", bool, "fold batch norms into the layers beside them", c.step("fold_batch_norm")),
        RecipeOption("graph-eq-iterations", int, "sweeps of cross-layer equalization, kept where it helps; 0: none",
                     c.equalize),
        RecipeOption("graph-eq-merge-bias", bool, "biases count in its ranges",
                     c.step_option(("equalize",), "merge_bias")),
        RecipeOption("act-equalization", ("None", "fx", "layerwise"), "SmoothQuant, kept where it helps: into what is "
                     "there, or with multiplications in front of layers", c.activation_equalization),
        RecipeOption("channel-splitting-ratio", float, "share of the channels to split, kept where it helps; 0: none",
                     c.split),
        RecipeOption("channel-splitting-split-input", bool, "halve the readers' weights instead",
                     c.step_option(("split_channels",), "side", {True: "input", False: "output"})),
    ),
    "Rounding and correction": (
        RecipeOption("gptq", bool, "GPTQ, in place of the recipe's own rounding", c.column_step("gptq")),
        RecipeOption("gpfq", bool, "GPFQ, likewise", c.column_step("gpfq")),
        RecipeOption("qronos", bool, "Qronos, likewise", c.column_step("qronos")),
        RecipeOption("gpxq-act-order", bool, "columns of strong inputs first [default: on]",
                     c.step_option(c.COLUMNS, "act_order")),
        RecipeOption("gpxq-accumulator-bit-width", int, "no sum of products leaves so many bits",
                     c.step_option(c.COLUMNS, "accumulator_bits")),
        RecipeOption("gptq-use-quant-activations", bool, "GPTQ's Hessian from quantized inputs [default: on]",
                     c.step_option(("gptq",), "inputs", {True: "quantized", False: "float"})),
        RecipeOption("learned-round", _FORMS, "learn which weights to round up", c.learned),
        RecipeOption("learned-round-mode", ("layerwise", "blockwise"), "AdaRound, or block reconstruction [default: "
                     "layerwise]", c.nothing),
        RecipeOption("learned-round-loss", ("regularised_mse", "mse"), "with or without the pull to 0 and 1",
                     c.step_option(c.LEARNED, "regulariser", {"regularised_mse": 20.0, "mse": 0.0})),
        RecipeOption("learned-round-iters", int, "iterations [default: 1000]", c.step_option(c.LEARNED, "iterations")),
        RecipeOption("learned-round-lr", float, "learning rate [default: 0.05; of identity 2 / iterations]",
                     c.step_option(c.LEARNED, "lr")),
        RecipeOption("learned-round-batch-size", int, "samples of an iteration [default: by layer all, by block 32]; "
                     "by layer it then learns behind the activation function", c.learned_batch),
        RecipeOption("learned-round-lr-scheduler", ("None", "linear"), "how the rate falls: fixed by learned-round, "
                     "linearly for identity, not at all for the sigmoids", c.nothing),
        RecipeOption("bias-corr", bool, "bias correction, in place of the recipe's own; off: none of either kind",
                     c.bias_correction),
        RecipeOption("calibrate-bn", bool, "give outputs their float mean and variance, in place of bias correction",
                     c.calibrate_bn),
    ),
    REFUSED: (
        RecipeOption("gpxq-accumulator-tile-size", int, "AXE's tiles", refused=
                     "sums are bounded as a whole: no runtime that is written for adds up in tiles"),
        RecipeOption("disable-create-weight-orig", bool, "GPTQ's memory", refused=
                     "the walk keeps no second copy of the weights, so there is none to leave out", kept=False),
        RecipeOption("gpfq-p", float, "share of the positions that GPFQ reads", refused=
                     "GPFQ reads all samples and all positions here, in linear time", kept=1.0),
        RecipeOption("learned-round-block-name", str, "which modules are blocks", refused=
                     "blocks are found in the graph: they end where one value is alive"),
        RecipeOption("optimizer", str, "of learned rounding", refused="learned rounding has one optimizer, adam",
                     kept="adam"),
        RecipeOption("dtype", ("float", "bfloat16", "float16"), "of the float model", refused=
                     "quantization starts from float32; write weights of other types as float32 first", kept="float"),
        RecipeOption("compile", bool, "torch.compile", refused=
                     "the simulation compiles its own kernels where a compiler is there", kept=False),
    ),
}  # fmt: skip

# Changes are made in this order: formats before their bits, steps before their options.
RECIPE_OPTIONS: dict[str, RecipeOption] = {
    row.name: replace(row, group=group) for group, rows in _GROUPS.items() for row in rows
}
