"""What to quantize, to which numbers, where: a Recipe, by name, as a value, or from YAML."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_serializer, field_validator, model_validator

from .errors import RecipeError
from .grid import FP8_E4M3, FloatFormat, IntFormat, RangeRule, TensorSpec
from .steps import (
    BiasCorrection,
    Equalize,
    FoldBatchNorm,
    Gptq,
    Qronos,
    Reconstruct,
    ReestimateBatchNorm,
    Step,
    check_steps,
    dump_step,
    parse_step,
)

PlacementName = Literal["runtime", "fx", "layerwise", "flexml", "dynamic"]


class Override(BaseModel):
    """Another treatment for some layers.

    ``match`` is a glob over layer names (``"layer1.*"``), ``"type:Linear"``, ``"first"`` or ``"last"`` (compute
    layers by their place in the graph). ``exclude`` leaves them in float. What is None stays as the recipe has it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    match: str
    exclude: bool = False
    weights: TensorSpec | None = None
    activations: TensorSpec | None = None
    bias: TensorSpec | None = None

    @model_validator(mode="after")
    def _does_something(self) -> Override:
        if not self.exclude and not (self.weights or self.activations or self.bias):
            raise ValueError(f"override {self.match!r} changes nothing: give exclude, weights, activations or bias")
        return self

    def applies(self, name: str, type_name: str, position: Literal["first", "middle", "last", "only"]) -> bool:
        """Whether a layer of this name, type and place in the graph is meant."""
        if self.match in ("first", "last"):
            return position in (self.match, "only")
        if self.match.startswith("type:"):
            return type_name == self.match.removeprefix("type:")
        return fnmatchcase(name, self.match)


class Recipe(BaseModel):
    """TensorSpecs for weights, activations and bias, a placement, steps, and overrides by layer.

    ``weights`` or ``activations`` None leaves that side in float. ``steps`` are those of ``bitsmith.steps``, by name
    or with their options; what is not listed is not done. Reads and writes YAML.

    >>> recipe = load_recipe("int8")
    >>> recipe.weights.granularity, recipe.activations.symmetric
    ('channel', False)
    >>> Recipe.from_yaml(recipe.to_yaml()) == recipe
    True
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = "custom"
    weights: TensorSpec | None = None
    activations: TensorSpec | None = None
    bias: TensorSpec | None = TensorSpec(format=IntFormat(32))
    placement: PlacementName = "runtime"
    steps: tuple[Step, ...] = (FoldBatchNorm(), BiasCorrection())
    overrides: tuple[Override, ...] = ()
    min_coverage: float = Field(
        default=0.0,
        ge=0.0,
        le=1.0,
        description="least share of multiply-accumulates in integers; 0: more than none",
    )

    on_collapse: Literal["stop", "warn"] = Field(
        default="warn", description="what to do when the outputs are at chance level"
    )

    @field_validator("steps", mode="before")
    @classmethod
    def _parse_steps(cls, value: Any) -> Any:
        return tuple(map(parse_step, value)) if isinstance(value, list | tuple) else value

    @field_serializer("steps")
    def _dump_steps(self, steps: tuple[Step, ...]) -> list[Any]:
        return [dump_step(step) for step in steps]

    def step(self, name: str) -> Any:
        """The step of this name with its options, or None where the recipe does not list it."""
        return next((step for step in self.steps if step.name == name), None)

    @property
    def samples(self) -> int:
        """How many samples the quantized stream of the walk should follow for these steps."""
        return max((step.samples for step in self.steps), default=128)

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        check_steps(self.steps)
        if self.weights is None and self.activations is None:
            raise ValueError("a recipe must quantize weights or activations")
        if self.weights is not None and self.weights.dynamic:
            raise ValueError("weights are constants: their spec cannot be dynamic")
        for spec in (self.activations, *(o.activations for o in self.overrides)):
            if spec is None:
                continue
            if self.placement == "dynamic":
                if not spec.dynamic:
                    raise ValueError("placement 'dynamic' has no calibration: its activations must be dynamic too")
                continue
            if spec.dynamic:
                raise ValueError(
                    "dynamic activations belong to bitsmith.quantize_dynamic and placement 'dynamic'; static "
                    "quantization has none"
                )
            if spec.granularity != "tensor":
                raise ValueError(f"static activations have one scale per tensor, not per {spec.granularity}")
        return self

    def to_yaml(self) -> str:
        """The recipe as YAML, defaults left out where they say nothing."""
        data = self.model_dump(mode="json", exclude_defaults=True)
        return yaml.safe_dump({"name": self.name, **data}, sort_keys=False)

    @classmethod
    def from_yaml(cls, text: str, source: str = "the recipe") -> Recipe:
        """A recipe from YAML; RecipeError names the field that is wrong."""
        try:
            data = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise RecipeError(f"{source} is not YAML: {error}") from error
        if not isinstance(data, dict):
            raise RecipeError(f"{source} must be a mapping with weights, activations ..., not {type(data).__name__}")
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'recipe'}: {e['msg']}" for e in error.errors())
            raise RecipeError(f"{source} is not valid: {problems}") from error


def bits_recipe(
    weight_bits: int, activation_bits: int, *, name: str | None = None, scale: Literal["float32", "po2"] = "float32",
    granularity: Literal["tensor", "channel"] = "channel", symmetric: bool = False, **fields: Any,
) -> Recipe:  # fmt: skip
    """A recipe of any widths from 2 to 16 bits, with percentile ranges for activations.

    >>> bits_recipe(4, 8).weights.format.bits
    4
    """
    weights = TensorSpec(format=IntFormat(weight_bits), scale=scale, granularity=granularity)
    activations = TensorSpec(
        format=IntFormat(activation_bits, signed=symmetric),
        scale=scale,
        symmetric=symmetric,
        range=RangeRule(name="percentile" if activation_bits <= 8 else "minmax"),
    )
    return Recipe(name=name or f"w{weight_bits}a{activation_bits}", weights=weights, activations=activations, **fields)


def _by_effort(weight_bits: int, activation_bits: int, effort: Literal["fast", "best"]) -> Recipe:
    """``fast`` rounds column by column (seconds, no training); ``best`` (minutes) first equalizes, then learns blocks.

    Both are kept only where samples held out gain: equalization on depthwise nets, even with a scale for each channel.

    As the literature has it, the first and the last layer and what they read have 8 bits where weights or activations
    have 4 bits or less. Weights of 4 bits or less have zero points: a channel's weights seldom reach as far down as
    up, and of so few codes none can be spared.
    """
    ends = bits_recipe(8, 8)
    few = min(weight_bits, activation_bits) <= 4
    overrides = [Override(match=end, weights=ends.weights, activations=ends.activations) for end in ("first", "last")]
    rounding: Step = Qronos(damping="auto") if weight_bits <= 4 else Gptq(asymmetric=True)
    equalizing: tuple[Step, ...] = ()
    learning: tuple[Step, ...] = ()
    if effort == "best":
        equalizing = (Equalize(objective="noise", clips="trade"),)
        learning = (Reconstruct(iterations=400, least_samples=200),)
    # variances are worth matching where much is lost; else their own error is more, with a hundred samples at least
    matched = weight_bits < 4 or activation_bits <= 4
    moments: Step = ReestimateBatchNorm() if matched else BiasCorrection()
    recipe = bits_recipe(
        weight_bits, activation_bits, name=f"w{weight_bits}a{activation_bits}-{effort}",
        steps=(FoldBatchNorm(), *equalizing, rounding, *learning, moments), overrides=tuple(overrides) if few else (),
    )  # fmt: skip
    assert recipe.weights is not None
    assert recipe.activations is not None
    changed = {"weights": recipe.weights.model_copy(update={"symmetric": weight_bits > FEW_BITS})}
    if activation_bits <= 4:
        changed["activations"] = recipe.activations.model_copy(update={"range": RangeRule(name="mse")})
    return recipe.model_copy(update=changed)


FEW_BITS = 4
"""Weights of so many bits and fewer have zero points in the recipes by effort."""

_WIDTHS = ((8, 8), (6, 6), (4, 8), (3, 8), (2, 8), (4, 4), (2, 4))


def _fp8() -> Recipe:
    weights = TensorSpec(format=FP8_E4M3, granularity="channel")
    activations = TensorSpec(format=FP8_E4M3, range=RangeRule(name="mse"))
    steps = (FoldBatchNorm(), Gptq(asymmetric=True), BiasCorrection())
    return Recipe(name="fp8", weights=weights, activations=activations, bias=None, steps=steps)


def _ai8x() -> Recipe:
    """One scale per tensor, signed codes throughout, 8-bit biases: what MAX78000 and MAX78002 have."""
    recipe = bits_recipe(8, 8, name="ai8x", granularity="tensor", symmetric=True, bias=TensorSpec(format=IntFormat(8)))
    assert recipe.activations is not None
    signed = recipe.activations.model_copy(update={"auto_unsigned": False})
    return recipe.model_copy(update={"activations": signed})


# Mean and variance of every channel: 0.4 to 1.2 dB less noise than its mean alone, where channels have their scales.
_MATCHED = (FoldBatchNorm(), ReestimateBatchNorm())

NAMED: dict[str, Recipe] = {
    "int8": bits_recipe(8, 8, name="int8", steps=_MATCHED),
    "int8-tensor": bits_recipe(8, 8, name="int8-tensor", granularity="tensor"),
    "int8-sym": bits_recipe(8, 8, name="int8-sym", symmetric=True, steps=_MATCHED),
    "int8-po2": bits_recipe(8, 8, name="int8-po2", symmetric=True, scale="po2"),
    "int8-tensor-po2": bits_recipe(8, 8, name="int8-tensor-po2", symmetric=True, scale="po2", granularity="tensor"),
    # one power of two for a whole depthwise weight: equalized and rounded column by column, or lost (benchmarks.tidl)
    "tidl": bits_recipe(
        8, 8, name="tidl", symmetric=True, scale="po2", granularity="tensor",
        steps=(FoldBatchNorm(), Equalize(objective="noise", clips="trade"), Gptq(), BiasCorrection()),
    ),
    "w8a16": bits_recipe(8, 16, name="w8a16", symmetric=True),
    "int16": bits_recipe(16, 16, name="int16", symmetric=True),
    "fp8": _fp8(),
    "ai8x": _ai8x(),
}  # fmt: skip

# Recipes by widths and effort: "w4a8-fast", "w4a8-best" ...
BY_EFFORT: dict[str, Recipe] = {
    recipe.name: recipe for w, a in _WIDTHS for recipe in (_by_effort(w, a, "fast"), _by_effort(w, a, "best"))
}


_SHRUNK = RangeRule(name="percentile", percentile=99.99)


def _ti(
    name: str, weight_bits: int = 8, activation_bits: int = 8, *, ranges: RangeRule = _SHRUNK,
    weight_ranges: RangeRule | None = None, po2_rounding: Literal["ceil", "nearest"] = "ceil", **options: Any,
) -> Recipe:  # fmt: skip
    """A setting of TI's quantization tools, whose activation ranges lose 0.01 % of the values at each end."""
    recipe = bits_recipe(weight_bits, activation_bits, name=name, **options)
    assert recipe.weights is not None
    assert recipe.activations is not None
    activations = {"range": ranges, "po2_rounding": po2_rounding}
    return recipe.model_copy(
        update={
            "weights": recipe.weights.model_copy(update={"range": weight_ranges or RangeRule()}),
            "activations": recipe.activations.model_copy(update=activations),
        }
    )


_ALL = RangeRule()
_SYM_PO2: dict[str, Any] = {"symmetric": True, "scale": "po2"}
# By the names of TI's quantization tools (edgeai-modeloptimization): weights per channel (WC) or tensor (WT),
# activations per tensor (AT), their bits, symmetric (SYM), powers of two (P2), a range of 4 (R4), weights clipped at 4
# (M4), whole ranges (MSA). A range of 4 is 128 steps of 2**-5 or 256 of 2**-6: rounded up, it would become 8.
TI: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        _ti("WC8_AT8"),
        _ti("MSA_WC8_AT8", ranges=_ALL),
        _ti("WT8SYMP2_AT8SYMP2", granularity="tensor", **_SYM_PO2),
        _ti("WC8SYMP2_AT8SYMP2", **_SYM_PO2),
        _ti("WC8SYMP2_AT8SYMP2R4", ranges=RangeRule(limit=4.0, fixed=True), po2_rounding="nearest", **_SYM_PO2),
        _ti("WC8P2_AT8P2", scale="po2"),
        _ti("MSA_WC8P2_AT8P2", ranges=_ALL, scale="po2"),
        _ti("WC4_AT8", 4),
        _ti("WC4M4_AT8", 4, weight_ranges=RangeRule(limit=4.0)),
        _ti("WC16_AT16", 16, 16, ranges=_ALL, symmetric=True),
    )
}


def _dynamic(name: str, weights: TensorSpec, activations: TensorSpec | None) -> Recipe:
    return Recipe(name=name, weights=weights, activations=activations, bias=None, placement="dynamic", steps=())


# Least squared error: on STS-B dev (1,500 pairs) 86.72 instead of 86.54 with minmax, of 86.72 in float.
_ROWS = TensorSpec(format=IntFormat(8), granularity="channel", range=RangeRule(name="mse"))
_BYTES = TensorSpec(format=IntFormat(8, signed=False), symmetric=False, dynamic=True)

# Recipes of bitsmith.quantize_dynamic: activations get their scales at run time.
DYNAMIC: dict[str, Recipe] = {
    "int8-dynamic": _dynamic("int8-dynamic", _ROWS, _BYTES),
    # onnxruntime's kernels take up to a seventh less time on short inputs; STS-B test 81.55 instead of 81.88
    "int8-dynamic-tensor": _dynamic("int8-dynamic-tensor", _ROWS.model_copy(update={"granularity": "tensor"}), _BYTES),
    "int8-dynamic-token": _dynamic(
        "int8-dynamic-token", _ROWS, TensorSpec(format=IntFormat(8), granularity="token", dynamic=True)
    ),
    "fp16-dynamic": _dynamic("fp16-dynamic", TensorSpec(format=FloatFormat(5, 10, reserved="ieee")), None),
}


def load_recipe(recipe: str | Path | Recipe) -> Recipe:
    """A Recipe from its name, a YAML file, or itself.

    >>> load_recipe("int9")
    Traceback (most recent call last):
    ...
    bitsmith.errors.RecipeError: no recipe is called 'int9': known names are MSA_WC8P2_AT8P2, \
MSA_WC8_AT8, WC16_AT16, WC4M4_AT8, WC4_AT8, WC8P2_AT8P2, WC8SYMP2_AT8SYMP2, WC8SYMP2_AT8SYMP2R4, WC8_AT8, \
WT8SYMP2_AT8SYMP2, ai8x, fp16-dynamic, fp8, int16, \
int8, int8-dynamic, int8-dynamic-tensor, int8-dynamic-token, int8-po2, int8-sym, int8-tensor, int8-tensor-po2, tidl, \
w2a4-best, w2a4-fast, w2a8-best, w2a8-fast, w3a8-best, w3a8-fast, w4a4-best, w4a4-fast, w4a8-best, w4a8-fast, \
w6a6-best, w6a6-fast, w8a16, w8a8-best, w8a8-fast; a path to a YAML file is taken too
    """
    if isinstance(recipe, Recipe):
        return recipe
    named = NAMED | BY_EFFORT | DYNAMIC | TI
    if isinstance(recipe, str) and recipe in named:
        return named[recipe]
    if not isinstance(recipe, str | Path):
        raise RecipeError(f"a recipe is a name, a Recipe or the path of a YAML file, not a {type(recipe).__name__}")
    path = Path(recipe)
    if path.suffix in (".yaml", ".yml"):
        try:
            return Recipe.from_yaml(path.read_text(encoding="utf-8"), source=str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"the recipe file {path} cannot be read: {error}") from error
    raise RecipeError(
        f"no recipe is called {str(recipe)!r}: known names are {', '.join(sorted(named))}; "
        "a path to a YAML file is taken too"
    )
