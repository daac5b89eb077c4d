"""QuantizedTensor: the integers, the numbers they stand for, exact arithmetic, files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitsmith import QuantizedTensor
from bitsmith.errors import CheckpointError, NonFiniteError, RecipeError


@pytest.mark.parametrize(
    ("bits", "signed", "dtype"),
    [(8, True, torch.int8), (8, False, torch.uint8), (16, True, torch.int16), (32, True, torch.int32)],
)
def test_from_float_is_the_definition_in_numpy(bits: int, signed: bool, dtype: torch.dtype) -> None:
    x = torch.randn(50, generator=torch.Generator().manual_seed(0)) * 3
    scale, zero = np.float32(0.037), 3
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    expected = np.clip(np.rint(x.numpy() / scale) + zero, low, high)
    q = QuantizedTensor.from_float(x, float(scale), zero, bits=bits, signed=signed)
    assert q.int_repr().dtype == dtype
    assert np.array_equal(q.int_repr().numpy(), expected)
    assert torch.equal(q.dequantize(), torch.from_numpy(((expected - zero) * scale).astype(np.float32)))


def test_torch_s_own_quantized_tensors_hold_the_same_integers() -> None:
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
    scales, zeros = torch.tensor([0.01, 0.02, 0.03, 0.04]), torch.tensor([1, 2, 3, 4])
    theirs = torch.quantize_per_channel(x, scales.double(), zeros, 0, torch.qint8)
    ours = QuantizedTensor.from_float(x, scales, zeros, axis=0)
    assert torch.equal(ours.int_repr(), theirs.int_repr())
    assert torch.equal(ours.dequantize(), theirs.dequantize())


def test_a_grid_of_its_own_covers_the_tensor_within_half_a_step() -> None:
    x = torch.randn(6, 40, generator=torch.Generator().manual_seed(2))
    for axis, symmetric, bits in ((None, True, 8), (0, True, 16), (1, False, 8), (-1, True, 8)):
        q = QuantizedTensor.from_float(x, axis=axis, symmetric=symmetric, bits=bits)
        assert q.scale.numel() == (1 if axis is None else x.shape[axis])
        step = q.scale if q.axis is None else q.scale.view([-1 if d == q.axis else 1 for d in range(2)])
        assert bool(((q.dequantize() - x).abs() <= 0.501 * step).all())


@given(
    st.lists(st.integers(-128, 127), min_size=4, max_size=4),
    st.lists(st.integers(-128, 127), min_size=4, max_size=4),
    st.integers(-20, 20),
)
def test_sums_and_products_are_exact(a: list[int], b: list[int], zero: int) -> None:
    left = QuantizedTensor.from_float(torch.tensor(a).float() * 0.5, 0.5, zero)
    right = QuantizedTensor.from_float(torch.tensor(b).float() * 0.5, 0.5)
    x, y = left.dequantize().double(), right.dequantize().double()
    assert torch.equal((left + right).dequantize().double(), x + y)
    assert torch.equal((left - right).dequantize().double(), x - y)
    assert torch.equal((left * right).dequantize().double(), x * y)
    assert torch.equal((-left).dequantize().double(), -x)


def test_a_matrix_product_is_that_of_the_dequantized_operands() -> None:
    generator = torch.Generator().manual_seed(3)
    x = QuantizedTensor.from_float(torch.randn(3, 8, generator=generator), symmetric=False)
    w = QuantizedTensor.from_float(torch.randn(8, 5, generator=generator), axis=1)
    y = x @ w
    assert (y.bits, y.axis) == (32, 1)
    exact = x.dequantize().double() @ w.dequantize().double()
    assert torch.allclose(y.dequantize().double(), exact, rtol=1e-6, atol=1e-6)


def test_unequal_scales_and_overflow_are_refused_in_words() -> None:
    x, y = (QuantizedTensor.from_float(torch.ones(2), scale) for scale in (0.1, 0.2))
    with pytest.raises(RecipeError, match=r"equal scales, but they are 0\.1 and 0\.2: requantize"):
        _ = x + y
    assert torch.equal((x + y.requantize(0.1)).dequantize(), torch.full((2,), 2.0))
    rows = QuantizedTensor.from_float(torch.eye(2), axis=0)
    with pytest.raises(RecipeError, match="summed axis"):
        _ = x.requantize(0.1) @ rows
    with pytest.raises(RecipeError, match="one scale per operand"):
        _ = rows * rows
    wide = QuantizedTensor.from_float(torch.full((1,), 3e4), 1.0, bits=32)
    with pytest.raises(RecipeError, match="beyond 32 bits"):
        _ = wide * wide * wide


def test_what_is_no_tensor_of_integers_is_refused() -> None:
    with pytest.raises(NonFiniteError):
        QuantizedTensor.from_float(torch.tensor([float("nan")]))
    with pytest.raises(RecipeError, match="positive"):
        QuantizedTensor.from_float(torch.ones(2), -1.0)
    with pytest.raises(RecipeError, match="do not fit a tensor of shape"):
        QuantizedTensor.from_float(torch.ones(2, 3), torch.ones(2), axis=1)
    with pytest.raises(RecipeError, match="goes with a scale"):
        QuantizedTensor.from_float(torch.ones(2), zero_point=3)


@pytest.mark.parametrize(("bits", "axis"), [(8, None), (16, 1), (32, 0)])
def test_files_hold_everything(tmp_path: Path, bits: int, axis: int | None) -> None:
    x = QuantizedTensor.from_float(torch.randn(3, 4), bits=bits, axis=axis, symmetric=False)
    y = QuantizedTensor.load(x.save(tmp_path / "x.safetensors"))
    assert torch.equal(x.int_repr(), y.int_repr())
    assert torch.equal(x.scale, y.scale)
    assert torch.equal(x.zero_point, y.zero_point)
    assert (x.bits, x.axis) == (y.bits, y.axis)


def test_damaged_and_foreign_files_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "x.safetensors"
    with pytest.raises(CheckpointError):
        QuantizedTensor.load(path)
    path.write_bytes(b"nothing")
    with pytest.raises(CheckpointError):
        QuantizedTensor.load(path)
    save_file({"weight": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match="holds no QuantizedTensor"):
        QuantizedTensor.load(path)
