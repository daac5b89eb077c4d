"""Run-time quantization against ONNX's own operators and brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from bitsmith.dynamic import laws


def _dynamic_quantize_linear(x: np.ndarray) -> list[np.ndarray]:
    """onnxruntime's DynamicQuantizeLinear."""
    import onnxruntime as ort

    node = helper.make_node("DynamicQuantizeLinear", ["x"], ["y", "scale", "zero_point"])
    outputs = [
        helper.make_tensor_value_info("y", TensorProto.UINT8, None),
        helper.make_tensor_value_info("scale", TensorProto.FLOAT, []),
        helper.make_tensor_value_info("zero_point", TensorProto.UINT8, []),
    ]
    x_info = helper.make_tensor_value_info("x", TensorProto.FLOAT, [None])
    graph = helper.make_graph([node], "g", [x_info], outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})


@pytest.mark.parametrize("case", ["normal", "positive", "negative", "zeros", "one", "tiny", "ties"])
def test_codes_and_scale_are_those_of_dynamic_quantize_linear(case: str) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal(20_000).astype(np.float32)
    x = {
        "normal": x, "positive": np.abs(x), "negative": -np.abs(x), "zeros": np.zeros(5, np.float32),
        "one": np.array([3.5], np.float32), "tiny": x * np.float32(1e-30),
        "ties": np.arange(-510, 512, dtype=np.float32) / 2,
    }[case]  # fmt: skip
    codes, scale = laws.quantize_tensor(torch.from_numpy(x))
    expected, expected_scale, zero_point = _dynamic_quantize_linear(x)
    assert float(scale) == float(expected_scale)
    assert np.array_equal(codes.numpy(), expected.astype(np.float32) - float(zero_point))


@given(st.integers(1, 1600), st.integers(0, 2**31 - 1))
def test_sums_of_codes_are_exact(terms: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-255, 256, (3, terms), generator=generator)
    weight = torch.randint(-128, 128, (5, terms), generator=generator)
    found = laws.integer_linear(codes.float(), weight.to(torch.int8))
    assert torch.equal(found, (codes @ weight.t()).float())


def test_each_token_has_its_own_symmetric_scale() -> None:
    x = torch.tensor([[1.0, -2.54, 0.02], [0.0, 0.0, 0.0], [100.0, 1.0, -50.0]])
    codes, scale = laws.quantize_tokens(x)
    assert codes.tolist() == [[50, -127, 1], [0, 0, 0], [127, 1, -64]]
    assert torch.allclose(scale[[0, 2], 0], torch.tensor([0.02, 100 / 127]))


def test_an_empty_input_stays_empty() -> None:
    weight, scale = torch.ones(4, 3, dtype=torch.int8), torch.ones(4)
    assert laws.linear(torch.zeros(0, 3), weight, scale, None, "tensor").shape == (0, 4)
