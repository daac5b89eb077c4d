"""Recipes mean the same numbers everywhere, survive YAML, and say which field is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bitsmith as bs
from bitsmith.errors import RecipeError
from bitsmith.grid import FP8_E4M3, IntFormat, RangeRule, TensorSpec
from bitsmith.recipe import BY_EFFORT, NAMED, TI, Override, Recipe, bits_recipe, load_recipe


@pytest.mark.parametrize("name", [*NAMED, *BY_EFFORT, *TI])
def test_named_recipes_survive_yaml(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(path) == load_recipe(str(path)) == recipe


# What a name means: (weights, per channel, activations, symmetric activations, scales). For ever.
MEANING: dict[str, tuple[Any, bool, Any, bool, str]] = {
    "int8": (IntFormat(8), True, IntFormat(8, signed=False), False, "float32"),
    "int8-tensor": (IntFormat(8), False, IntFormat(8, signed=False), False, "float32"),
    "int8-sym": (IntFormat(8), True, IntFormat(8), True, "float32"),
    "int8-po2": (IntFormat(8), True, IntFormat(8), True, "po2"),
    "w8a16": (IntFormat(8), True, IntFormat(16), True, "float32"),
    "int16": (IntFormat(16), True, IntFormat(16), True, "float32"),
    "fp8": (FP8_E4M3, True, FP8_E4M3, True, "float32"),
}


@pytest.mark.parametrize("name", MEANING)
def test_names_mean_the_same_numbers_for_ever(name: str) -> None:
    weights, per_channel, activations, symmetric, scale = MEANING[name]
    recipe = load_recipe(name)
    assert recipe.weights is not None
    assert recipe.activations is not None
    assert (recipe.weights.format, recipe.activations.format) == (weights, activations)
    assert recipe.weights.symmetric
    assert recipe.activations.symmetric is symmetric
    assert recipe.weights.granularity == ("channel" if per_channel else "tensor")
    assert recipe.activations.granularity == "tensor"
    assert (recipe.weights.scale, recipe.activations.scale) == (scale, scale)
    assert recipe.bias == (None if name == "fp8" else TensorSpec(format=IntFormat(32)))
    assert recipe.placement == "runtime"


@pytest.mark.parametrize("name", BY_EFFORT)
def test_weights_of_few_bits_have_zero_points(name: str) -> None:
    """Of 4 or 16 codes none can be spared; the ends of the net, of 8 bits, are as everywhere."""
    recipe = BY_EFFORT[name]
    assert recipe.weights is not None
    assert isinstance(recipe.weights.format, IntFormat)
    assert recipe.weights.symmetric is (recipe.weights.format.bits > 4)
    assert all(end.weights is not None and end.weights.symmetric for end in recipe.overrides)


def test_activations_of_eight_bits_clip_the_last_of_a_hundred_thousand() -> None:
    recipe = load_recipe("int8")
    assert recipe.activations is not None
    assert recipe.activations.range == RangeRule(name="percentile", percentile=99.999)


formats = st.one_of(
    st.builds(IntFormat, bits=st.integers(2, 16), signed=st.booleans(), narrow=st.booleans()),
    st.just(FP8_E4M3),
)
specs = st.builds(
    TensorSpec,
    format=formats,
    scale=st.sampled_from(["float32", "po2"]),
    granularity=st.sampled_from(["tensor", "channel"]),
    range=st.builds(RangeRule, name=st.sampled_from(["minmax", "percentile", "mse"]), percentile=st.floats(90, 100)),
)
activation_specs = specs.filter(lambda spec: spec.granularity == "tensor")
overrides = st.builds(
    Override,
    match=st.text(min_size=1, max_size=8),
    weights=specs,
    exclude=st.booleans(),
    activations=st.none() | activation_specs,
)


@settings(max_examples=100, deadline=None)
@given(
    st.builds(
        Recipe,
        name=st.text(max_size=12),
        weights=specs,
        activations=st.none() | activation_specs,
        bias=st.none() | specs,
        placement=st.sampled_from(["runtime", "fx", "layerwise", "flexml"]),
        steps=st.sampled_from([(), ("fold_batch_norm",)]),
        overrides=st.lists(overrides, max_size=2).map(tuple),
        min_coverage=st.floats(0, 1),
    )
)
def test_any_recipe_survives_yaml(recipe: Recipe) -> None:
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe


def test_yaml_is_written_as_people_write_it() -> None:
    recipe = Recipe.from_yaml(
        """
        name: mine
        weights: {format: {bits: 4}, granularity: channel, range: {name: mse}}
        activations: {format: {bits: 8, signed: false}, symmetric: false}
        overrides:
          - {match: first, weights: {format: {bits: 8}}}
          - {match: "type:Linear", exclude: true}
          - {match: "layer1.*", activations: {format: {exponent_bits: 4, mantissa_bits: 3, reserved: nan}}}
        """
    )
    assert recipe.weights == TensorSpec(format=IntFormat(4), granularity="channel", range=RangeRule(name="mse"))
    assert [o.match for o in recipe.overrides] == ["first", "type:Linear", "layer1.*"]
    assert recipe.overrides[2].activations is not None
    assert recipe.overrides[2].activations.format == FP8_E4M3


WRONG: dict[str, tuple[str, str]] = {
    "a misspelt field": ("weigths: {format: {bits: 8}}", "weigths"),
    "a misspelt field inside": ("weights: {format: {bits: 8}, granularty: channel}", r"weights\.granularty"),
    "too many bits": ("weights: {format: {bits: 40}}", r"weights\.format\.int\.bits.*32"),
    "bits in words": ("weights: {format: {bits: eight}}", r"weights\.format\.int\.bits"),
    "no format": ("weights: {granularity: channel}", r"weights\.format"),
    "an unknown range rule": ("weights: {format: {bits: 8}, range: {name: best}}", r"weights\.range\.name"),
    "a percentile of 120": ("weights: {format: {bits: 8}, range: {percentile: 120}}", r"range\.percentile"),
    "an unknown placement": ("weights: {format: {bits: 8}}\nplacement: magic", "placement"),
    "an unknown step": ("weights: {format: {bits: 8}}\nsteps: [polish]", r"steps\.0"),
    "an override without effect": (
        "weights: {format: {bits: 8}}\noverrides: [{match: x}]",
        r"overrides\.0.*'x' changes nothing",
    ),
    "nothing to quantize": ("name: empty", "must quantize weights or activations"),
    "dynamic weights": ("weights: {format: {bits: 8}, dynamic: true}", "cannot be dynamic"),
    "dynamic activations": ("activations: {format: {bits: 8}, dynamic: true}", "quantize_dynamic"),
    "activations per channel": (
        "activations: {format: {bits: 8}, granularity: channel}",
        "one scale per tensor",
    ),
    "a float with a zero point": (
        "weights: {format: {exponent_bits: 4, mantissa_bits: 3}, symmetric: false}",
        r"weights.*no zero point",
    ),
    "groups without a size": ("weights: {format: {bits: 8}, granularity: group}", r"weights.*group_size"),
    "coverage above 1": ("weights: {format: {bits: 8}}\nmin_coverage: 2", "min_coverage"),
    "a list": ("- int8", "must be a mapping"),
    "text": ("int8", "must be a mapping"),
    "nothing": ("", "must be a mapping"),
    "broken YAML": ("weights: {format: [}", "is not YAML"),
    "code": ("!!python/object/apply:os.system ['true']", "is not YAML"),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_name_the_field_and_the_file(name: str, tmp_path: Path) -> None:
    text, words = WRONG[name]
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=rf"(?s)mine\.yaml.*{words}"):
        load_recipe(path)


def test_files_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"missing\.yaml cannot be read"):
        load_recipe(tmp_path / "missing.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"name: \xff")
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path / "latin.yaml")
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path / "folder.yaml")


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(RecipeError, match=r"'int9'.*int8-po2.*YAML"):
        load_recipe("int9")


@pytest.mark.parametrize(
    ("match", "name", "kind", "position", "applies"),
    [
        ("layer1.*", "layer1.0.conv", "Conv2d", "middle", True),
        ("layer1.*", "layer10.0.conv", "Conv2d", "middle", False),
        ("*.conv", "a.b.conv", "Conv2d", "middle", True),
        ("conv", "a.conv", "Conv2d", "middle", False),
        ("Conv", "conv", "Conv2d", "middle", False),
        ("type:Conv2d", "x", "Conv2d", "middle", True),
        ("type:Conv", "x", "Conv2d", "middle", False),
        ("first", "x", "Linear", "first", True),
        ("first", "x", "Linear", "last", False),
        ("last", "x", "Linear", "last", True),
        ("last", "x", "Linear", "only", True),
        ("first", "first", "Linear", "middle", False),
    ],
)
def test_overrides_match_by_name_type_or_place(match: str, name: str, kind: str, position: Any, applies: bool) -> None:
    assert Override(match=match, exclude=True).applies(name, kind, position) is applies


@pytest.mark.parametrize("bits", range(2, 17))
def test_recipes_of_any_width(bits: int) -> None:
    recipe = bits_recipe(bits, bits)
    assert recipe.name == f"w{bits}a{bits}"
    assert recipe.weights is not None
    assert recipe.weights.format == IntFormat(bits)


def test_recipes_are_values() -> None:
    recipe = load_recipe("int8")
    with pytest.raises(Exception, match="frozen"):
        recipe.name = "other"  # type: ignore[misc]
    assert load_recipe(recipe) is recipe
    assert bs.load_recipe is load_recipe


@pytest.mark.parametrize("name", BY_EFFORT)
def test_recipes_by_effort_mean_their_widths(name: str) -> None:
    recipe = BY_EFFORT[name]
    assert recipe.weights is not None
    assert recipe.activations is not None
    widths = f"w{recipe.weights.format.bits}a{recipe.activations.format.bits}"  # type: ignore[union-attr]
    assert name.split("-")[0] == widths
    assert (recipe.step("reconstruct") is not None) == name.endswith("best")
    few = recipe.weights.format.bits <= 4 or recipe.activations.format.bits <= 4  # type: ignore[union-attr]
    assert [o.match for o in recipe.overrides] == (["first", "last"] if few else [])
    assert all(o.weights and o.weights.format.bits == 8 for o in recipe.overrides)  # type: ignore[union-attr]
