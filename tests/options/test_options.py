"""Every recipe option changes the recipe as its row says, and the numbers that come out, or says why it cannot."""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from bitsmith import load_recipe
from bitsmith.capture import capture, read_batches
from bitsmith.errors import RecipeError
from bitsmith.flow import quantize_graph
from bitsmith.grid import IntFormat
from bitsmith.options import CONSTRAINTS, RECIPE_OPTIONS, apply_options
from bitsmith.recipe import Recipe
from bitsmith.steps import ColumnByColumn
from bitsmith.targets import get_target

ROUGH = {"weight-bit-width": 3, "weight-quant-granularity": "per_tensor"}  # where preparing is a help
SPLIT = {**ROUGH, "weight-bit-width": 4}
LEARN = {"weight-bit-width": 3, "learned-round": "hard_sigmoid", "learned-round-iters": 20}
GPTQ = {"weight-bit-width": 3, "gptq": True}
NARROW = {"weight-bit-width": 3, "weight-quant-calibration-type": "mse"}  # where -4 is used
SYMMETRIC = {"act-quant-type": "sym"}
FLOATS = {"quant-format": "float_ocp"}


def bits(fmt: Any) -> int:
    return int(fmt.bits)


def has(step: str) -> Callable[[Recipe], bool]:
    return lambda r: r.step(step) is not None


def of(step: str, field: str) -> Callable[[Recipe], Any]:
    return lambda r: getattr(r.step(step), field)


def rounding(r: Recipe) -> Any:
    return next(step for step in r.steps if isinstance(step, ColumnByColumn))


def learned(r: Recipe) -> Any:
    return r.step("learned_rounding") or r.step("reconstruct")


def form(r: Recipe) -> str:
    names = {"linear": "identity", "hard_sigmoid": "hard_sigmoid", "sigmoid": "sigmoid"}
    return "None" if learned(r) is None else names[learned(r).form]


def fmt_kind(r: Recipe) -> str:
    formats = (r.weights.format, r.activations.format)
    if all(f.kind == "int" for f in formats):
        return "int"
    return "float" if all(f.reserved == "none" for f in formats) else "float_ocp"


# Option: what it goes with, the values to try, and how each is read in the recipe.
CASES: dict[str, tuple[dict[str, Any], list[Any], Callable[[Recipe], Any]]] = {
    "quant-format": ({}, ["int", "float", "float_ocp"], fmt_kind),
    "weight-exponent-bit-width": (FLOATS, [2, 4], lambda r: r.weights.format.exponent_bits),
    "weight-mantissa-bit-width": (FLOATS, [1, 3], lambda r: r.weights.format.mantissa_bits),
    "act-exponent-bit-width": (FLOATS, [2, 4], lambda r: r.activations.format.exponent_bits),
    "act-mantissa-bit-width": (FLOATS, [1, 3], lambda r: r.activations.format.mantissa_bits),
    "weight-bit-width": ({}, [2, 3, 8, 16], lambda r: r.weights.format.bits),
    "act-bit-width": ({}, [0, 4, 8, 16], lambda r: 0 if r.activations is None else r.activations.format.bits),
    "layerwise-first-last-bit-width": ({"weight-bit-width": 4}, [4, 8],
                                       lambda r: {o.match: o.weights.format.bits for o in r.overrides}["last"]),
    "bias-bit-width": ({}, ["32", "16", "None"], lambda r: "None" if r.bias is None else str(r.bias.format.bits)),
    "scale-factor-type": ({}, ["float_scale", "po2_scale"],
                          lambda r: "po2_scale" if r.weights.scale == r.activations.scale == "po2" else "float_scale"),
    "weight-quant-type": ({}, ["sym", "asym"], lambda r: "sym" if r.weights.symmetric else "asym"),
    "weight-quant-granularity": ({}, ["per_tensor", "per_channel", "per_group"],
                                 lambda r: f"per_{r.weights.granularity}"),
    "weight-narrow-range": (NARROW, [False, True], lambda r: r.weights.format.narrow),
    "weight-quant-calibration-type": ({"weight-bit-width": 4}, ["stats", "mse", "hqo"],
                                      lambda r: {"minmax": "stats"}.get(r.weights.range.name, r.weights.range.name)),
    "act-quant-type": ({}, ["sym", "asym"], lambda r: "sym" if r.activations.symmetric else "asym"),
    "act-quant-calibration-type": ({"act-bit-width": 4}, ["stats", "mse"],
                                   lambda r: {"percentile": "stats"}.get(r.activations.range.name, "mse")),
    "act-quant-percentile": ({}, [90.0, 99.9, 100.0], lambda r: r.activations.range.percentile),
    "uint-sym-act-for-unsigned-values": (SYMMETRIC, [False, True], lambda r: r.activations.auto_unsigned),
    "target-backend": ({"act-bit-width": 4}, ["runtime", "fx", "layerwise", "flexml"], lambda r: r.placement),
    "merge-bn": ({}, [False, True], has("fold_batch_norm")),
    "graph-eq-iterations": (ROUGH, [0, 1, 20], lambda r: getattr(r.step("equalize"), "iterations", 0)),
    "graph-eq-merge-bias": ({**ROUGH, "graph-eq-iterations": 20}, [False, True], of("equalize", "merge_bias")),
    "act-equalization": ({"weight-bit-width": 5, "act-bit-width": 4}, ["None", "fx", "layerwise"],
                         lambda r: {None: "None", False: "fx", True: "layerwise"}[
                             getattr(r.step("equalize_activations"), "insert", None)]),
    "channel-splitting-ratio": (SPLIT, [0.0, 0.05, 0.08], lambda r: getattr(r.step("split_channels"), "ratio", 0.0)),
    "channel-splitting-split-input": ({**SPLIT, "channel-splitting-ratio": 0.05}, [False, True],
                                      lambda r: r.step("split_channels").side == "input"),
    "gptq": ({"weight-bit-width": 3}, [False, True], has("gptq")),
    "gpfq": ({"weight-bit-width": 3}, [False, True], has("gpfq")),
    "qronos": ({"weight-bit-width": 3}, [False, True], has("qronos")),
    "gpxq-act-order": (GPTQ, [False, True], lambda r: rounding(r).act_order),
    "gpxq-accumulator-bit-width": ({**SPLIT, "gptq": True, "act-bit-width": 4}, [11, 13],
                                   lambda r: rounding(r).accumulator_bits),
    "gptq-use-quant-activations": ({**GPTQ, "act-bit-width": 3}, [False, True],
                                   lambda r: r.step("gptq").inputs == "quantized"),
    "learned-round": ({"weight-bit-width": 3}, ["None", "identity", "hard_sigmoid", "sigmoid"], form),
    "learned-round-mode": (LEARN, ["layerwise", "blockwise"],
                           lambda r: "blockwise" if has("reconstruct")(r) else "layerwise"),
    "learned-round-loss": (LEARN, ["regularised_mse", "mse"],
                           lambda r: "regularised_mse" if learned(r).regulariser else "mse"),
    "learned-round-iters": (LEARN, [2, 40], lambda r: learned(r).iterations),
    "learned-round-lr": (LEARN, [0.001, 0.2], lambda r: learned(r).lr),
    "learned-round-batch-size": (LEARN, [2, 16], lambda r: learned(r).batch_size),
    "bias-corr": ({"weight-bit-width": 3}, [False, True], has("bias_correction")),
    "calibrate-bn": ({"weight-bit-width": 3}, [False, True], has("reestimate_batch_norm")),
}  # fmt: skip

# What is refused whatever the recipe is, beside the value that holds anyway.
REFUSED = {
    "act-quant-granularity": ("per_tensor", "per_group"),
    "act-scale-computation-type": ("static", "dynamic"),
    "gpxq-accumulator-tile-size": (None, 64),
    "disable-create-weight-orig": (False, True),
    "gpfq-p": (1.0, 0.25),
    "learned-round-block-name": (None, r"layer\d+"),
    "optimizer": ("adam", "sgd"),
    "dtype": ("float", "bfloat16"),
    "compile": (False, True),
}


class Net(nn.Module):
    """Small, with all that options are about: an add, a part that is never negative, channels of unequal size."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.middle = nn.Conv2d(16, 16, 3, padding=1)
        self.body = nn.Conv2d(16, 16, 3, padding=1)
        self.last = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.middle(torch.relu(self.norm(self.stem(x)))))
        x = torch.relu(x + self.body(x))
        x = nn.functional.avg_pool2d(x, 4)[:, :, :, :1]
        return self.last(x.flatten(1))


@pytest.fixture(scope="module")
def captured() -> tuple[fx.GraphModule, list[Any], inspect.Signature, Tensor]:
    """A trained-looking net, captured once, with data to calibrate and other data to look at."""
    generator = torch.Generator().manual_seed(0)
    net = Net().eval()
    with torch.no_grad():
        for value in net.parameters():
            value.copy_(torch.randn(value.shape, generator=generator) * 0.2)
        spread = torch.logspace(-1.5, 0.5, 16).view(-1, 1, 1, 1)
        net.stem.weight *= spread
        net.middle.weight *= spread.flip(0) / spread.view(1, -1, 1, 1)
        net.body.weight /= spread.flip(0).view(1, -1, 1, 1)
        net.last.bias[0] = 60.0  # more than 16 bits hold
        net.norm.running_var.copy_(torch.rand(16, generator=generator) + 0.1)
        net.norm.running_mean.copy_(torch.randn(16, generator=generator) * 0.2)
    x = torch.randn(64, 3, 8, 4, generator=generator) ** 3  # with tails
    batches = read_batches(net, [x], None)
    return capture(net, batches[0]), batches, inspect.signature(net.forward), x[:16].flip(0) * 0.9


def outputs(captured: Any, recipe: Recipe) -> Tensor:
    graph, batches, signature, x = captured
    q = quantize_graph(copy.deepcopy(graph), batches, recipe, get_target("onnxruntime"), signature)
    with torch.no_grad():
        return q(x)


def test_every_option_has_a_case() -> None:
    assert CASES.keys() | REFUSED.keys() | {"learned-round-lr-scheduler"} == RECIPE_OPTIONS.keys()


@pytest.mark.parametrize("name", CASES)
def test_the_values_of_an_option_give_different_recipes_and_different_numbers(captured: Any, name: str) -> None:
    together, values, read = CASES[name]
    found = []
    for value in values:
        options = {**together, name: value}
        if name == "learned-round" and value != "None":
            options["learned-round-iters"] = 20
        recipe = apply_options(load_recipe("int8"), options)
        assert read(recipe) == value
        found.append(outputs(captured, recipe))
    for (a, x), (b, y) in itertools.combinations(zip(values, found), 2):
        assert not torch.equal(x, y), f"{name} {a} and {b} give the same numbers"


@pytest.mark.parametrize("name", CASES)
def test_every_word_of_an_option_is_tried(name: str) -> None:
    kind = RECIPE_OPTIONS[name].kind
    if isinstance(kind, tuple):
        assert set(CASES[name][1]) == set(kind)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_says_why_and_what_holds_anyway_is_taken(name: str) -> None:
    kept, refused = REFUSED[name]
    with pytest.raises(RecipeError, match=f"^{name}: .{{20}}"):
        apply_options(load_recipe("int8"), {name: refused})
    if kept is not None:
        assert apply_options(load_recipe("int8"), {name: kept}) == load_recipe("int8")


def test_the_rate_of_learned_rounding_is_what_its_form_has() -> None:
    for form, scheduler in (("identity", "linear"), ("sigmoid", "None"), ("hard_sigmoid", "None")):
        options = {"learned-round": form, "learned-round-lr-scheduler": scheduler}
        assert learned(apply_options(load_recipe("int8"), options))
        other = {"linear": "None", "None": "linear"}[scheduler]
        with pytest.raises(RecipeError, match="keep their rate"):
            apply_options(load_recipe("int8"), {**options, "learned-round-lr-scheduler": other})


def example(constraint: Any) -> tuple[str, dict[str, Any]]:
    """A recipe and options that a constraint is about."""
    samples = {bool: True, int: 8, float: 0.5, str: "x"}
    options = {}
    for name, value in constraint.forbid.items():
        kind = RECIPE_OPTIONS[name].kind
        first = kind[-1] if isinstance(kind, tuple) else samples[kind]
        options[name] = first if value == "*" else value[0] if isinstance(value, list) else value
    recipe = "int8"
    if "dynamic" in constraint.having:
        recipe = "int8-dynamic"
    if any(feature.startswith("small-float") for feature in constraint.having):
        recipe = "fp8"
    if constraint.lacking == ("activations",):
        options["act-bit-width"] = 0
    if constraint.having == ("learned_rounding",):
        options["learned-round-mode"] = "layerwise"
    return recipe, options


@pytest.mark.parametrize("constraint", CONSTRAINTS, ids=lambda c: "+".join(c.forbid))
def test_every_constraint_refuses_with_its_reason(constraint: Any) -> None:
    name, options = example(constraint)
    recipe = load_recipe(name)
    if constraint.lacking == ("weights",):
        recipe = recipe.model_copy(update={"weights": None, "steps": ()})
    with pytest.raises(RecipeError) as refusal:
        apply_options(recipe, options)
    assert constraint.reason in str(refusal.value)


def test_the_most_negative_code_is_left_out_anyway_where_leaving_it_out_is_refused(captured: Any) -> None:
    recipe = apply_options(load_recipe("int8"), {"weight-bit-width": 3})
    with pytest.raises(RecipeError, match="left out anyway"):
        apply_options(recipe, {"weight-narrow-range": True})
    narrow = recipe.weights.model_copy(update={"format": IntFormat(3, narrow=True)})  # what the option would do
    assert torch.equal(outputs(captured, recipe), outputs(captured, recipe.model_copy(update={"weights": narrow})))
    for more in ({"gpfq": True}, {"weight-quant-calibration-type": "mse"}, {"weight-quant-type": "asym"}):
        plain, changed = (outputs(captured, apply_options(recipe, {**more, "weight-narrow-range": value}))
                          for value in (False, True))  # fmt: skip
        assert not torch.equal(plain, changed), more


def test_every_constraint_names_options_that_exist() -> None:
    assert all(constraint.forbid.keys() <= RECIPE_OPTIONS.keys() for constraint in CONSTRAINTS)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"no-such": 1}, "there is no option 'no-such'"),
        ({"weight-bit-width": 1}, "1 is not from 2 to 16"),
        ({"act-bit-width": 1}, "1 is not from 2 to 16"),
        ({"weight-bit-width": 4.5}, "4.5 is no whole number"),
        ({"gptq": 1}, "1 is no true or false"),
        ({"target-backend": "tpu"}, "'tpu' is not one of runtime, fx"),
        ({"act-quant-percentile": 10}, "greater than 50"),
        ({"graph-eq-iterations": -1}, "greater than or equal to 1"),
    ],
)
def test_wrong_values_are_refused_by_name(options: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError) as refusal:
        apply_options(load_recipe("int8"), options)
    assert words in str(refusal.value)


def test_an_option_takes_the_place_of_the_recipes_own_rounding_and_correction() -> None:
    recipe = load_recipe("w4a8-best")
    changed = apply_options(recipe, {"gptq": True, "bias-corr": True})
    assert [step.name for step in changed.steps] == [
        "fold_batch_norm", "equalize", "gptq", "reconstruct", "bias_correction"
    ]  # fmt: skip
    assert changed.step("equalize") == recipe.step("equalize")
    off = {"qronos": False, "learned-round": "None", "bias-corr": False, "graph-eq-iterations": 0}
    assert [step.name for step in apply_options(recipe, off).steps] == ["fold_batch_norm"]


def test_options_reach_the_recipes_overrides() -> None:
    recipe = apply_options(load_recipe("w4a4-fast"), {"scale-factor-type": "po2_scale"})
    assert {o.weights.scale for o in recipe.overrides if o.weights} == {"po2"}
    weights_only = apply_options(load_recipe("w4a4-fast"), {"act-bit-width": 0})
    assert all(o.activations is None for o in weights_only.overrides)


def test_zero_points_of_few_bits_end_with_these() -> None:
    """Eight-bit weights with zero points run in float, or slowly, on most runtimes."""
    fast = load_recipe("w4a8-fast")
    assert fast.weights is not None
    for width, asked, symmetric in (
        (8, {}, True), (5, {}, True), (3, {}, False), (8, {"weight-quant-type": "asym"}, False),
    ):  # fmt: skip
        wider = apply_options(fast, {"weight-bit-width": width, **asked}).weights
        assert wider is not None
        assert (wider.format.bits, wider.symmetric) == (width, symmetric)
    ends = apply_options(fast, {"layerwise-first-last-bit-width": 8})
    assert ends.overrides == fast.overrides
    own = fast.model_copy(update={"name": "my own"})  # which says what it wants
    kept = apply_options(own, {"weight-bit-width": 8}).weights
    assert kept is not None
    assert not kept.symmetric


def test_no_option_leaves_the_recipe_as_it_is() -> None:
    assert apply_options(load_recipe("int8"), {}) is load_recipe("int8")
