"""Every target satisfies the contract, and the contract tells targets that do not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bitsmith.ranges.rules import RULES, Rule
from bitsmith.targets import Target, get_target, list_targets
from bitsmith.testing import check_range_rule, check_target


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("target", list_targets(), ids=lambda target: target.name)
def test_targets_satisfy_the_contract(target: Target) -> None:
    check_target(target)


CHIP = Target(
    name="chip",
    description="Power-of-two scales, symmetric 4 and 8 bits, no floats",
    engine="none",
    weight_bits=(4, 8),
    activation_bits=(8,),
    floats=False,
    scales=("po2",),
    symmetric_activations=True,
    integer_operators=frozenset({"conv", "linear", "add"}),
    integer_bits=(4, 8),
)


def test_a_target_of_ones_own_satisfies_it() -> None:
    check_target(CHIP)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"integer_operators": frozenset({"convolution"})}, "'convolution'.* are unknown"),
        ({"float_output": frozenset({"matmul"})}, "not among integer_operators"),
        ({"weight_bits": ()}, "weight_bits"),
        ({"integer_bits": (8, 4)}, "should rise"),
        ({"activation_bits": (8, 64)}, "1 to 32"),
        ({"accumulator_bits": 12}, "accumulator_bits"),
        ({"description": " "}, "description"),
        ({"weight_bits": (17,), "activation_bits": (17,)}, "takes none of the recipes"),
    ],
)
def test_incoherent_targets_are_told(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        check_target(CHIP.model_copy(update=changes))


def test_a_target_that_is_wrongly_called_exact_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another law than the runtime's: the file no longer computes what the simulation says."""
    from bitsmith.integer import laws

    monkeypatch.setattr(laws, "multiplier", lambda product, output: product / output.scale * 1.001)
    with pytest.raises(AssertionError, match="FAILED"):
        check_target(get_target("onnxruntime"))


@pytest.mark.parametrize("name", RULES)
def test_range_rules_satisfy_the_contract(name: str) -> None:
    check_range_rule(RULES[name], name)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda lo, hi: (lo / 4, hi / 4), "relative error"),
        (lambda lo, hi: (lo - 0.5, hi + 0.5), "does not follow the scale"),
    ],
)
def test_range_rules_that_are_wrong_are_told(wrong: Any, words: str) -> None:
    minmax = RULES["minmax"]
    rule = Rule(minmax.statistic, lambda summary, spec, non_negative: wrong(summary.lo, summary.hi))
    with pytest.raises(AssertionError, match=words):
        check_range_rule(rule)
