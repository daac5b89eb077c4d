"""The Quantizer on an edge: static and dynamic."""

from __future__ import annotations

import pytest
import torch

from bitsmith.errors import CalibrationError
from bitsmith.grid import Grid, IntFormat, Quantizer, TensorSpec


def test_without_a_grid_values_pass_and_codes_are_refused() -> None:
    quantizer = Quantizer(TensorSpec(format=IntFormat(8)))
    x = torch.randn(5)
    assert torch.equal(quantizer(x), x)
    with pytest.raises(CalibrationError, match="no grid"):
        quantizer.to_int(x)


def test_codes_and_values_go_back_and_forth_and_state_dicts_carry_the_grid() -> None:
    quantizer = Quantizer(TensorSpec(format=IntFormat(4), symmetric=False))
    quantizer.set_grid(Grid(IntFormat(4, signed=False), torch.tensor(0.5), torch.tensor(3, dtype=torch.int32)))
    codes = torch.arange(16, dtype=torch.uint8)
    assert torch.equal(quantizer.to_int(quantizer.from_int(codes)), codes)
    assert set(quantizer.state_dict()) == {"scale", "zero_point"}


def test_a_dynamic_quantizer_takes_its_grid_from_each_input() -> None:
    quantizer = Quantizer(TensorSpec(format=IntFormat(8, signed=False), symmetric=False, dynamic=True))
    for size in (0.1, 100.0):
        x = torch.linspace(-size, 2 * size, 50)
        assert float((quantizer(x) - x).abs().max()) <= 3 * size / 255 * 0.51
    assert torch.equal(quantizer(torch.zeros(4)), torch.zeros(4))


def test_a_dynamic_quantizer_per_token_has_a_grid_for_each() -> None:
    spec = TensorSpec(format=IntFormat(8), granularity="channel", axis=0, dynamic=True)
    x = torch.randn(4, 16) * torch.tensor([[0.01], [1.0], [10.0], [1000.0]])
    error = (Quantizer(spec)(x) - x).abs().amax(1) / x.abs().amax(1)
    assert float(error.max()) <= 0.5 / 127 * 1.01
