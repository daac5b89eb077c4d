"""Layers of all kinds against rules that are computed with fractions, number by number."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

from bitsmith.ai8x import sums
from bitsmith.ai8x.arithmetic import average_maximum, deviation_maximum, maximum, order_statistic
from bitsmith.ai8x.devices import MAX78000
from bitsmith.ai8x.quantize import Options, quantize_checkpoint

from . import oracle

BITS = st.sampled_from([1, 2, 4, 8])
FLOAT = st.floats(-4, 4, width=32, allow_subnormal=False)
TIE = st.builds(lambda k, e: (k + 0.5) / 2.0**e, st.integers(-130, 129), st.integers(0, 12))
EDGE = st.builds(  # at, just above and just below powers of two
    lambda k, n: float((np.float32(2.0**k).view(np.int32) + n).astype(np.int32).view(np.float32)),
    st.integers(-16, 10),
    st.integers(-6, 6),
)
NUMBERS = st.lists(st.one_of(FLOAT, TIE, EDGE, st.just(0.0), st.just(-0.0)), min_size=1, max_size=24)
QUANTILE = st.one_of(st.just(1.0), st.floats(0, 1, width=32))


def quantized(weights, bias=None, dtype=torch.float32, options=None, **fields):
    state = {"c.op.weight": torch.tensor(weights, dtype=dtype).reshape(len(weights), 1)}
    if bias is not None:
        state["c.op.bias"] = torch.tensor(bias, dtype=dtype)
    state.update({f"c.{name}": torch.tensor([value]) for name, value in fields.items()})
    result = quantize_checkpoint({"state_dict": state, "extras": {}}, options or Options(MAX78000))["state_dict"]
    return {key.removeprefix("c."): np.asarray(value) for key, value in result.items()}


@given(NUMBERS, st.none() | NUMBERS, BITS, QUANTILE)
@example([0.5 / 128, -0.5 / 128, 1.5 / 128, -1.5 / 128, 127.5 / 128, -128.5 / 128, 1.0], None, 8, 1.0)
@example([0.49999997 / 128, 1.0], None, 8, 1.0)
@example([2.0**-5 * (1 + 2.0**-23)], None, 8, 1.0)
@example([0.0, 0.0], [0.0], 1, 1.0)
@example([0.1, 0.4, 0.6], None, 8, 0.8)
def test_qat(weights, bias, bits, quantile):
    found = quantized(weights, bias, weight_bits=bits, shift_quantile=np.float32(quantile))
    shift = oracle.exponent(weights + (bias or []), float(np.float32(quantile)), bits)
    factor = Fraction(2) ** (bits - 1 + shift)
    assert found["op.weight"].ravel().tolist() == [oracle.integer(value, factor, bits) for value in weights]
    assert found["output_shift"].tobytes() == np.array([-np.float32(shift)], np.float32).tobytes()  # -0.0 too
    assert found["weight_bits"].tolist() == [bits]
    if bias is not None:
        steps = [oracle.integer(value, factor, bits) * 2 ** (bits - 1) for value in bias]
        assert found["op.bias"].tolist() == steps
        assert found["bias_bits"].tolist() == [bits]


@given(st.lists(st.one_of(st.floats(-4, 4), TIE), min_size=1, max_size=20), BITS, st.floats(0, 1))
def test_float64_stays_float64(weights, bits, quantile):
    found = quantized(weights, dtype=torch.float64, weight_bits=bits, shift_quantile=quantile)
    stored = float(np.float64(torch.tensor([quantile]).item()))
    shift = oracle.exponent(weights, stored, bits, oracle.float64)
    factor = Fraction(2) ** (bits - 1 + shift)
    assert found["op.weight"].dtype == np.float64
    assert found["op.weight"].ravel().tolist() == [
        oracle.integer(value, factor, bits, oracle.float64) for value in weights
    ]
    assert found["output_shift"].tolist() == [-shift]


@given(NUMBERS, NUMBERS, BITS, st.floats(-2, 2).filter(bool))
@example([float(np.float32(-0.57586986))], [0.0], 8, 0.97)
def test_scale(weights, bias, bits, scale):
    options = Options(MAX78000, clip_method="SCALE", scale=scale)
    found = quantized(weights, bias, options=options, weight_bits=bits)
    factor = Fraction(2.0 ** (bits - 1) * scale)
    assert found["op.weight"].ravel().tolist() == [oracle.integer(value, factor, bits) for value in weights]
    steps = [oracle.integer(value, factor, bits) * 2 ** (bits - 1) for value in bias]
    assert found["op.bias"].tolist() == steps
    assert "output_shift" not in found


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("value", [0.0, -0.0, 0.3, -0.3, 2.0**-40, 2.0**40])
def test_constant_layers(bits, value):
    found = quantized([value] * 5, [value] * 2, weight_bits=bits)
    shift = oracle.exponent([value], 1.0, bits)
    assert found["output_shift"].tolist() == [-shift]
    expected = oracle.integer(value, Fraction(2) ** (bits - 1 + shift), bits)
    assert set(found["op.weight"].ravel().tolist()) == {expected}
    assert -7 - bits <= shift <= 23 - bits


@given(st.lists(st.floats(0, 8, width=32), min_size=1, max_size=50), st.floats(0, 1, width=32))
def test_order_statistic_is_torch_quantile(values, quantile):
    array = np.array(values, np.float32)
    expected = torch.quantile(torch.from_numpy(array), torch.tensor(quantile, dtype=torch.float32))
    assert order_statistic(array, quantile) == expected.item()


@given(st.integers(1, 3000), st.sampled_from([np.float32, np.float64]), st.integers(0, 2**32 - 1))
def test_sums_are_torchs(size, kind, seed):
    values = np.random.default_rng(seed).standard_normal(size).astype(kind)
    assert sums.total(values) == torch.from_numpy(values).sum().item()
    assert sums.mean(values) == torch.from_numpy(values).mean().item()
    assume(size > 1)
    assert sums.standard_deviation(values) == torch.from_numpy(values).std().item()


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_statistics_of_the_clip_methods(rows, columns, seed):
    assume(rows * columns > 1)
    values = np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)
    tensor = torch.from_numpy(values)
    low, high = tensor.min(dim=1).values.mean(), tensor.max(dim=1).values.mean()
    assert average_maximum(values) == max(abs(low), abs(high)).item()
    assert maximum(values) == tensor.abs().max().item()
    inside = torch.stack([tensor.mean() - 2 * tensor.std(), tensor.mean() + 2 * tensor.std()])
    clipped = torch.stack([torch.max(tensor.min(), inside[0]), torch.min(tensor.max(), inside[1])])
    assert deviation_maximum(values, 2.0) == clipped.abs().max().item()
