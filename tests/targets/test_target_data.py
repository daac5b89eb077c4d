"""Targets are data: what they take, what they refuse, and by which words."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from bitsmith.errors import RecipeError
from bitsmith.grid import FP8_E4M3, Grid, IntFormat, TensorSpec
from bitsmith.recipe import Recipe, bits_recipe, load_recipe
from bitsmith.targets import Target, get_target, list_targets

CHIP = Target(
    name="chip",
    description="a test",
    engine="none",
    weight_bits=(2, 4, 8),
    activation_bits=(8,),
    floats=False,
    scales=("po2",),
    symmetric_activations=True,
    integer_operators=frozenset({"conv"}),
    integer_bits=(4, 8),
)


def test_targets_are_found_by_name() -> None:
    assert [target.name for target in list_targets()][:2] == ["onnxruntime", "openvino"]
    assert get_target("generic").name == "generic"
    assert get_target(CHIP) is CHIP
    with pytest.raises(RecipeError, match=r"'tensorrt'.*known are onnxruntime, openvino"):
        get_target("tensorrt")


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (
            bits_recipe(3, 8, scale="po2", symmetric=True),
            "chip takes weights of 2 or 4 or 8 bits, but the recipe has 3",
        ),
        (bits_recipe(8, 4, scale="po2", symmetric=True), "activations of 8 bits, but the recipe has 4"),
        (bits_recipe(8, 8, symmetric=True), "takes scales .*po2.*weights have float32"),
        (bits_recipe(8, 8, scale="po2"), "no zero points"),
        (Recipe(weights=TensorSpec(format=FP8_E4M3)), "no small floats"),
    ],
)
def test_recipes_without_numbers_on_a_target_are_refused(recipe: Recipe, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        CHIP.check(recipe)


def test_recipes_with_numbers_on_a_target_are_taken() -> None:
    CHIP.check(bits_recipe(4, 8, scale="po2", symmetric=True))
    for target in list_targets():
        target.check(load_recipe(target.default_recipe))


def grid(bits: int) -> Grid:
    return Grid(IntFormat(bits), torch.tensor(1.0))


@pytest.mark.parametrize(
    ("operator", "grids", "expected"),
    [
        ("conv", [grid(8), grid(4)], True),
        ("conv", [grid(8), grid(2)], False),
        ("conv", [grid(8), None], False),
        ("conv", [grid(8), Grid(FP8_E4M3, torch.tensor(1.0))], False),
        ("linear", [grid(8), grid(8)], False),
    ],
)
def test_operators_run_in_integers_on_the_widths_of_the_target(operator: str, grids: Any, expected: bool) -> None:
    assert CHIP.runs_in_integers(operator, *grids) is expected


def test_targets_are_frozen_and_have_no_unknown_fields() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        CHIP.name = "other"  # type: ignore[misc]
    with pytest.raises(ValidationError, match="rounding"):
        Target.model_validate({**CHIP.model_dump(), "rounding": "up"})


def test_targets_are_written_the_same_in_every_process() -> None:
    """Sets have no order; files of them must."""
    data = get_target("onnxruntime").model_dump(mode="json")
    assert data["integer_operators"] == sorted(data["integer_operators"])
    assert Target.model_validate(data) == get_target("onnxruntime")


def test_x86_runtimes_store_unsigned_codes() -> None:
    """u8 x s8 is what its dot products take; with signed activations onnxruntime runs at float speed."""
    for name in ("onnxruntime", "openvino", "torch"):
        assert get_target(name).unsigned_codes
