"""The chips' law against arithmetic in Python's integers: every operator, width, shift, tie and bound."""

from __future__ import annotations

from typing import Any, Literal

import chip_oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitsmith.ai8x.devices import MAX78002
from bitsmith.ai8x.network import parse_network
from bitsmith.ai8x.simulate import ChipProgram, chip_program
from bitsmith.errors import CalibrationError
from bitsmith.integer.max78000 import half_step, shift, total_shift
from bitsmith.targets import get_target

CARRIERS: tuple[Literal["float", "integer"], ...] = ("float", "integer")
_GEOMETRY = {
    "conv1d": {"kernel_size": 3, "pad": 1},
    "conv2d": {"kernel_size": "3x3", "pad": 1},
    "depthwise": {"kernel_size": "3x3", "pad": 2},
    "convtranspose2d": {"pad": 1},
    "linear": {},
}


def program(
    layers: list[dict[str, Any]], state: dict[str, Tensor], carrier: str, target: Any = "max78002"
) -> ChipProgram:
    entries = [{"processors": 1, "out_offset": 0, **layer} for layer in layers]
    network = parse_network({"arch": "net", "dataset": "data", "layers": entries}, MAX78002)
    return chip_program(state, network, target, carrier)  # type: ignore[arg-type]


def codes(generator: torch.Generator, *shape: int, bits: int = 8) -> Tensor:
    """Codes with many of the extremes among them."""
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    values = torch.randint(low, high + 1, shape, generator=generator)
    ends = torch.where(torch.rand(shape, generator=generator) < 0.5, low, high)
    return torch.where(torch.rand(shape, generator=generator) < 0.2, ends, values)


@settings(max_examples=60)
@given(
    kind=st.sampled_from(list(_GEOMETRY)), bits=st.sampled_from([1, 2, 4, 8]), total=st.integers(-15, 15),
    activation=st.sampled_from([None, "relu", "abs", "wide"]), has_bias=st.booleans(), seed=st.integers(0, 10**6),
)  # fmt: skip
def test_layers_equal_arithmetic_in_python(
    kind: str, bits: int, total: int, activation: str | None, has_bias: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    channels, outputs, groups = 4, 3, 1
    shapes = {
        "conv1d": (outputs, channels, 3),
        "conv2d": (outputs, channels, 3, 3),
        "depthwise": (channels, 1, 3, 3),
        "convtranspose2d": (channels, outputs, 3, 3),
        "linear": (outputs, channels),
    }
    inputs = {"conv1d": (1, channels, 5), "linear": (1, channels)}
    weight, x = codes(generator, *shapes[kind], bits=bits), codes(generator, *inputs.get(kind, (1, channels, 3, 4)))
    if kind == "depthwise":
        groups = outputs = channels
    bias = codes(generator, outputs) if has_bias else None
    output_shift = total - (8 - bits)
    wide = activation == "wide" and kind != "convtranspose2d"
    function = None if activation == "wide" else activation
    layer: dict[str, Any] = {"op": "conv2d" if kind == "depthwise" else kind, **_GEOMETRY[kind], "groups": groups}
    layer |= {"activate": function or "none", "output_width": 32 if wide else 8}
    state = {"a.op.weight": weight.float(), "a.weight_bits": torch.tensor([float(bits)])}
    state["a.output_shift"] = torch.tensor([float(output_shift)])
    if bias is not None:
        state["a.op.bias"] = bias.float() * 2 ** (bits - 1)

    planes = x.reshape(channels, -1, 1) if kind in ("conv1d", "linear") else x[0]
    kernels = weight.reshape(*weight.shape[:2], -1, 1) if kind in ("conv1d", "linear") else weight
    expected = torch.tensor(
        chip_oracle.outputs(
            planes.tolist(), kernels.tolist(), None if bias is None else bias.tolist(), bits=bits,
            output_shift=output_shift, activation=function, wide=wide, groups=groups, flat=kind == "conv1d",
            padding=0 if kind == "linear" else _GEOMETRY[kind]["pad"], transposed=kind == "convtranspose2d",
        )
    )  # fmt: skip
    for carrier in CARRIERS:
        found = program([layer], state, carrier)(x)
        assert found.dtype == (torch.int32 if wide else torch.int8)
        assert torch.equal(found.long().flatten(), expected.flatten()), carrier


@settings(max_examples=30)
@given(st.integers(-15, 15), st.lists(st.integers(-(2**24), 2**24), min_size=1, max_size=20))
def test_the_shifter_rounds_half_up_for_every_shift(total: int, accumulators: list[int]) -> None:
    ties = [int((k + 0.5) * 2.0 ** (7 - total)) for k in (-129, -128, -3, -1, 0, 2, 126, 127)] if total < 7 else []
    values = [*accumulators, *ties, *(t + 1 for t in ties), *(t - 1 for t in ties)]
    expected = [max(-128, min(127, (2 * a * 2 ** (total + 15) + 2**22) // 2**23)) for a in values]
    for dtype in (torch.int64, torch.float64):
        moved = torch.tensor(values, dtype=dtype) + half_step(total)
        assert shift(moved, total, (-128, 127), torch.int32).tolist() == expected


def test_a_ratio_that_no_shift_makes_is_refused() -> None:
    assert total_shift(2.0**-20, 2.0**-7) == -6
    with pytest.raises(CalibrationError, match="no power of two"):
        total_shift(3.0e-5, 2.0**-7)
    with pytest.raises(CalibrationError, match="shift by 17"):
        total_shift(2.0**3, 2.0**-7)


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 3), st.booleans())
def test_pooling_equals_arithmetic_in_python(seed: int, size: int, stride: int, rounding: bool) -> None:
    x = codes(torch.Generator().manual_seed(seed), 1, 2, 5, 6)
    target = get_target("max78002").model_copy(update={"average_rounding": rounding})
    windows = x.unfold(2, size, stride).unfold(3, size, stride).flatten(-2)
    for kind in ("max", "avg"):
        pool = max if kind == "max" else lambda values: chip_oracle.average(values, rounding)
        expected = [[[pool(window) for window in row] for row in plane] for plane in windows[0].tolist()]
        for carrier in CARRIERS:
            layer = {"op": "none", f"{kind}_pool": size, "pool_stride": stride}
            assert program([layer], {}, carrier, target)(x)[0].tolist() == expected


def test_averages_along_one_dimension_are_never_rounded() -> None:
    target = get_target("max78000").model_copy(update={"average_rounding": True})
    layer = {"op": "conv1d", "kernel_size": 1, "pad": 0, "avg_pool": 2, "pool_stride": 2, "output_shift": 0}
    state = {"a.op.weight": torch.full((1, 1, 1), 64.0), "a.output_shift": torch.tensor([1.0])}
    x = torch.tensor([[[3, 4, -3, -4]]])
    assert program([{**layer, "output_shift": 1}], state, "integer", target)(x).tolist() == [[[3, -3]]]


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.sampled_from(["add", "sub", "or", "xor"]), st.integers(2, 4), st.booleans())
def test_elementwise_operations_saturate_once(seed: int, name: str, operands: int, pool_first: bool) -> None:
    x = codes(torch.Generator().manual_seed(seed), 1, 2, 2, 4)
    copies = [{"op": "none", "in_sequences": "input"} for _ in range(operands)]
    layer = {"op": "none", "eltwise": name, "operands": operands, "in_sequences": list(range(operands))}
    layer |= {"max_pool": 2, "pool_stride": 2, "pool_first": pool_first}
    pooled = x.unfold(2, 2, 2).unfold(3, 2, 2).flatten(-2)

    def expected(window: list[int]) -> int:
        if pool_first:
            return chip_oracle.combine(name, [max(window)] * operands)
        return max(chip_oracle.combine(name, [value] * operands) for value in window)

    values = [[[expected(window) for window in row] for row in plane] for plane in pooled[0].tolist()]
    for carrier in CARRIERS:
        assert program([*copies, layer], {}, carrier)(x)[0].tolist() == values


def test_a_sum_of_different_values_feeds_a_convolution() -> None:
    """conv -> pass, then (conv + pass) -> conv with ReLU: the layers of a residual block."""
    generator = torch.Generator().manual_seed(0)
    x, weight, other = codes(generator, 1, 3, 4, 4), codes(generator, 3, 3, 3, 3), codes(generator, 3, 3, 1, 1)
    state = {"a.op.weight": weight.float(), "a.output_shift": torch.tensor([-4.0]), "b.op.weight": other.float()}
    layers: list[dict[str, Any]] = [
        {"op": "conv2d", "pad": 1},
        {"op": "none", "in_sequences": "input"},
        {"op": "conv2d", "kernel_size": "1x1", "pad": 0, "eltwise": "add", "in_sequences": [0, 1], "activate": "relu"},
    ]
    first = chip_oracle.outputs(x[0].tolist(), weight.tolist(), None, bits=8, output_shift=-4, padding=1)
    total = (torch.tensor(first) + x[0]).clamp(-128, 127)
    expected = chip_oracle.outputs(total.tolist(), other.tolist(), None, bits=8, output_shift=0, activation="relu")
    for carrier in CARRIERS:
        run = program(layers, state, carrier)
        assert run(x)[0].tolist() == expected
        assert run.layers(x)[0][0].tolist() == first


def test_binary_weights_are_minus_one_and_one() -> None:
    state = {"a.op.weight": torch.tensor([[1.0, -1.0]]), "a.output_shift": torch.tensor([0.0])}
    run = program([{"op": "linear", "quantization": "bin"}], state, "integer")
    assert run(torch.tensor([[100, 50]])).tolist() == [[50]]  # 50 * 2**7 / 128
    with pytest.raises(Exception, match="binary weights are -1 or 1"):
        program([{"op": "linear", "quantization": "bin"}], {"a.op.weight": torch.tensor([[1.0, 0.0]])}, "integer")
