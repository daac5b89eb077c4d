"""Sums of products are exact on both carriers: equal to numpy's sums in int64."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bitsmith.integer.accumulate import (
    accumulator_bound,
    has_int32_kernel,
    layer_function,
    product_dtype,
    to_float32,
)

Array = np.ndarray[Any, Any]


def numpy_conv(x: Array, w: Array, layer: Any) -> Array:
    """Convolution by its definition, in int64: one shifted product per kernel offset and group."""
    pads = [(0, 0), (0, 0), *((p, p) for p in layer.padding)]
    x, groups, rank = np.pad(x, pads), layer.groups, x.ndim - 2
    sizes = [
        (x.shape[2 + i] - layer.dilation[i] * (w.shape[2 + i] - 1) - 1) // layer.stride[i] + 1 for i in range(rank)
    ]
    outs, ins = w.shape[0] // groups, w.shape[1]
    result = np.zeros((x.shape[0], w.shape[0], *sizes), dtype=np.int64)
    for offset in itertools.product(*map(range, w.shape[2:])):
        window = tuple(
            slice(o * d, o * d + s * (n - 1) + 1, s) for o, d, s, n in zip(offset, layer.dilation, layer.stride, sizes)
        )
        for g in range(groups):
            piece, rows = (
                x[(slice(None), slice(g * ins, (g + 1) * ins), *window)],
                slice(g * outs, (g + 1) * outs),
            )
            product = np.tensordot(w[(rows, slice(None), *offset)], piece, (1, 1))  # (out, batch, ...)
            result[:, rows] += np.moveaxis(product, 0, 1)
    return result


def numpy_conv_transpose(x: Array, w: Array, layer: Any) -> Array:
    """Transposed convolution by its definition, in int64: inputs scattered over the outputs they reach."""
    groups, rank = layer.groups, x.ndim - 2
    full = [
        (x.shape[2 + i] - 1) * layer.stride[i] + layer.dilation[i] * (w.shape[2 + i] - 1) + 1 + layer.output_padding[i]
        for i in range(rank)
    ]
    ins, outs = w.shape[0] // groups, w.shape[1]
    result = np.zeros((x.shape[0], outs * groups, *full), dtype=np.int64)
    for offset in itertools.product(*map(range, w.shape[2:])):
        window = tuple(
            slice(o * d, o * d + s * (n - 1) + 1, s)
            for o, d, s, n in zip(offset, layer.dilation, layer.stride, x.shape[2:])
        )
        for g in range(groups):
            rows, cols = slice(g * ins, (g + 1) * ins), slice(g * outs, (g + 1) * outs)
            product = np.tensordot(w[(rows, slice(None), *offset)], x[:, rows], (0, 1))  # (out, batch, ...)
            result[(slice(None), cols, *window)] += np.moveaxis(product, 0, 1)
    crop = tuple(slice(p, n - p) for p, n in zip(layer.padding, full))
    return result[(slice(None), slice(None), *crop)]


LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "conv1d": (nn.Conv1d(6, 8, 5, stride=2, padding=2), (2, 6, 17)),
    "conv2d": (nn.Conv2d(6, 8, 3, padding=1), (2, 6, 7, 9)),
    "conv2d, 64 channels": (nn.Conv2d(64, 32, 3, padding=1), (1, 64, 14, 14)),
    "conv2d, dilated": (nn.Conv2d(4, 8, 3, dilation=2, stride=(1, 2)), (2, 4, 11, 9)),
    "conv2d, grouped": (nn.Conv2d(8, 12, 3, groups=4), (2, 8, 6, 6)),
    "conv2d, depthwise": (nn.Conv2d(8, 8, 3, groups=8, padding=1), (2, 8, 7, 7)),
    "conv2d, depthwise with multiplier": (nn.Conv2d(8, 16, 3, groups=8, stride=2), (2, 8, 7, 7)),
    "conv3d": (nn.Conv3d(3, 5, (1, 3, 2), padding=(0, 1, 0)), (2, 3, 4, 5, 6)),
    "transposed 1d": (nn.ConvTranspose1d(6, 4, 4, stride=2), (2, 6, 9)),
    "transposed 2d": (nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, output_padding=1), (2, 6, 5, 4)),
    "transposed 2d, grouped": (nn.ConvTranspose2d(8, 12, 3, groups=4, dilation=2), (2, 8, 5, 5)),
    "transposed 3d": (nn.ConvTranspose3d(3, 4, 2, stride=2), (1, 3, 3, 4, 3)),
    "linear": (nn.Linear(300, 10), (5, 300)),
    "linear over sequences": (nn.Linear(30, 10), (2, 7, 30)),
}


@pytest.mark.parametrize("carrier", ["float", "integer"])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("name", LAYERS)
def test_sums_of_products_are_exact(name: str, bits: int, carrier: Any) -> None:
    layer, shape = LAYERS[name]
    rng, largest = np.random.default_rng(0), 2**bits - 1
    x = rng.integers(-largest, largest + 1, shape)
    w = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), tuple(layer.weight.shape))  # type: ignore[union-attr]
    transposed = "transposed" in name
    if "linear" in name:
        expected = x @ w.T
    else:
        expected = (numpy_conv_transpose if transposed else numpy_conv)(x, w, layer)
    bound = accumulator_bound(torch.from_numpy(w), largest, None, 1 if transposed else 0)
    assert int(np.abs(expected).max()) <= bound
    dtype = product_dtype(carrier, bound)
    if dtype == torch.int32 and not has_int32_kernel(layer):
        dtype = torch.int64
    found = layer_function(layer)(torch.from_numpy(x).to(dtype), torch.from_numpy(w).to(dtype))
    assert found.dtype == dtype
    assert torch.equal(found.to(torch.int64), torch.from_numpy(expected))


def test_the_bound_chooses_the_narrowest_exact_type() -> None:
    assert product_dtype("float", 2**24 - 1) == torch.float32
    assert product_dtype("float", 2**24) == torch.float64
    assert product_dtype("integer", 2**31 - 1) == torch.int32
    assert product_dtype("integer", 2**31) == torch.int64


def test_graphics_cards_sum_in_float64() -> None:
    """Their float32 convolutions may run in TF32."""
    assert product_dtype("float", 10, "cuda") == torch.float64


def test_sums_past_2_to_the_24_are_still_exact() -> None:
    """All codes at their ends and one odd product: float32 cannot hold the sum, and the bound says so."""
    layer = nn.Linear(521, 1)
    w = torch.full((1, 521), 127, dtype=torch.int32)
    w[0, -1] = 1
    x = torch.full((1, 521), 255, dtype=torch.int32)
    exact = 520 * 127 * 255 + 255
    assert exact > 2**24
    assert exact % 2 == 1
    bound = accumulator_bound(w, 255, None, 0)
    assert bound == exact
    dtype = product_dtype("float", bound)
    assert int(layer_function(layer)(x.to(dtype), w.to(dtype))) == exact
    assert int(layer_function(layer)(x.float(), w.float())) != exact


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(-128, 127), min_size=1, max_size=40),
    st.integers(1, 255),
    st.integers(-(2**31), 2**31 - 1),
)
def test_the_bound_is_reached_by_the_worst_input_and_never_passed(row: list[int], largest: int, bias: int) -> None:
    w, b = torch.tensor([row], dtype=torch.int32), torch.tensor([bias])
    worst = sum(abs(value) * largest for value in row) + abs(bias)
    assert accumulator_bound(w, largest, b, 0) == worst


def test_the_bound_is_that_of_the_worst_channel() -> None:
    w = torch.tensor([[1, -1], [3, 4]])
    assert accumulator_bound(w, 10, None, axis=0) == 70
    assert accumulator_bound(w, 10, None, axis=1) == 50
    assert accumulator_bound(w, 10, torch.tensor([100, 0]), axis=0) >= 120


def test_accumulators_are_rounded_once_to_even() -> None:
    """2**24 + 1 and 2**24 + 3 lie between two float32: the even neighbours are 2**24 and 2**24 + 4."""
    for dtype in (torch.int32, torch.int64, torch.float64):
        values: Tensor = to_float32(torch.tensor([2**24 + 1, 2**24 + 3], dtype=dtype))
        assert values.dtype == torch.float32
        assert values.tolist() == [2**24, 2**24 + 4]
