"""Our laws of requantization give the codes that onnxruntime's integer kernels give, ties included."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from law_cases import CARRIERS, LAWS, NEAR_MISSES, codes, differing, draw_scales, grid_of, misses, read_golden
from onnx import TensorProto, helper
from ort_kernels import Codes, run_kernel
from torch import nn

import bitsmith as bs
from bitsmith.grid import Grid, IntFormat, dequantize, quantize
from bitsmith.integer import laws


def has_vnni() -> bool:
    with open("/proc/cpuinfo") as file:
        return "vnni" in file.read()


needs_vnni = pytest.mark.skipif(not has_vnni(), reason="without VNNI onnxruntime saturates u8 x s8 products in 16 bits")


@pytest.mark.parametrize("name", LAWS)
def test_laws_give_the_codes_that_onnxruntime_gave(name: str) -> None:
    """Golden vectors, from onnxruntime 1.31 on AVX-512 VNNI."""
    law, golden = LAWS[name], read_golden(name)
    assert len(golden) >= 5
    for case, expected in golden:
        for carrier in CARRIERS.values():
            assert differing(case, law, expected, carrier) == 0


@pytest.mark.parametrize(
    ("name", "formula"), [(name, formula) for name, formulas in NEAR_MISSES.items() for formula in formulas]
)
def test_the_golden_vectors_tell_the_laws_from_near_misses(name: str, formula: str) -> None:
    assert sum(misses(case, expected, NEAR_MISSES[name][formula]) for case, expected in read_golden(name)) > 0


@needs_vnni
@pytest.mark.parametrize("kind", range(5), ids=["any", "powers", "multiples", "255ths", "equal"])
@pytest.mark.parametrize("name", LAWS)
def test_laws_give_the_codes_that_onnxruntime_gives(name: str, kind: int) -> None:
    law, rng = LAWS[name], np.random.default_rng(100 + kind)
    for _ in range(6):
        case = law.draw(rng, draw_scales(rng, kind))
        expected, kernels = case.run(law.op)
        assert law.kernel in kernels, f"onnxruntime ran {kernels} instead"
        for carrier in CARRIERS.values():
            assert differing(case, law, expected, carrier) == 0


ALL_PAIRS = np.repeat(np.arange(256), 256).astype(np.uint8), np.tile(np.arange(256), 256).astype(np.uint8)


@needs_vnni
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("op", ["Add", "Mul"])
def test_adds_and_products_agree_on_every_pair_of_codes(op: str, signed: bool) -> None:
    rng, law = np.random.default_rng(7), laws.add if op == "Add" else laws.multiply
    dtype, low = (np.int8, -128) if signed else (np.uint8, 0)
    a, b = ((part.astype(np.int32) + low).astype(dtype) for part in ALL_PAIRS)
    for kind in [0, 1, 2, 3, 4] * 3:
        s = draw_scales(rng, kind)
        base = float(s[0] * s[1]) * 64 if op == "Mul" else float(max(s[0], s[1]))
        scale = float(np.float32(base * rng.choice([1.0, 2.0, 1.1, 3.0])))
        zeros = [int(z) + low for z in rng.choice([0, 128, 255, 77], 3)]
        x = Codes(a, float(s[0]), zeros[0]), Codes(b, float(s[1]), zeros[1])
        expected, kernels = run_kernel(op, list(x), scale, zeros[2], dtype=dtype)
        assert kernels == [f"QLinear{op}"]
        grids = [grid_of(dtype, c.scale, c.zero) for c in x]
        centred = [torch.from_numpy(c.codes.astype(np.float32) - c.zero) for c in x]
        found = law(*centred, *grids, grid_of(dtype, scale, zeros[2]), torch.float32)  # type: ignore[arg-type]
        assert bool((found.numpy() + zeros[2] == expected).all())


def test_a_product_rounds_before_the_zero_point_is_added() -> None:
    """9 / 720 is not a float32: a fused multiply-add, which rounds once, decides some ties otherwise."""
    ratio = np.float32(np.float32(1.5) * np.float32(6.0)) / np.float32(720.0)
    a, b = np.meshgrid(np.arange(256), np.arange(256) - 255)
    two_steps = np.rint(np.float32(np.float32(a * b) * ratio) + np.float32(128))
    one_step = np.rint((a * b * np.float64(ratio) + 128).astype(np.float32))
    differ = (two_steps != one_step) & (two_steps >= 0) & (two_steps <= 255)
    assert differ.any()
    grids = grid_of(np.uint8, 1.5, 0), grid_of(np.uint8, 6.0, 255), grid_of(np.uint8, 720.0, 128)
    found = laws.multiply(torch.from_numpy(a[differ]), torch.from_numpy(b[differ]), *grids, torch.int32) + 128
    assert found.tolist() == two_steps[differ].tolist()


def test_products_of_wide_codes_do_not_overflow() -> None:
    """65,535 * 65,535 needs 33 bits: int32 would wrap."""
    grid = Grid(IntFormat(16, signed=False), torch.tensor(1.0))
    output = Grid(IntFormat(16, signed=False), torch.tensor(65535.0))
    largest = torch.tensor([65535])
    for carrier in CARRIERS.values():
        found = laws.multiply(largest.to(carrier), largest.to(carrier), grid, grid, output, carrier)
        assert found.item() == 65535


def test_quantize_and_dequantize_are_those_of_the_grid() -> None:
    x = torch.randn(500, generator=torch.Generator().manual_seed(0))
    grid = Grid(IntFormat(8, signed=False), torch.tensor(0.013), torch.tensor(77, dtype=torch.int32))
    stored = quantize(x, grid)
    centred = laws.quantize_centred(x.clone(), grid, torch.int32)
    assert torch.equal(centred + 77, stored.int())
    assert torch.equal(laws.dequantize_centred(centred, grid), dequantize(stored, grid))
    assert laws.code_range(grid) == (-77, 178)
    assert laws.largest_code(grid) == 178


@pytest.mark.parametrize(
    "shapes", [((2, 8, 1, 1), (2, 8, 5, 5)), ((2, 8, 5, 5), (2, 1, 5, 5)), ((8, 1, 1), (2, 8, 5, 5))]
)
def test_an_add_beside_convolutions_is_one_of_channels_last_tensors(
    shapes: tuple[tuple[int, ...], ...],
) -> None:
    """There onnxruntime transposes first: the order of operands follows the axes as they lie in memory."""
    rng = np.random.default_rng(3)
    for kind in range(5):
        s, zeros = draw_scales(rng, kind), [int(z) for z in rng.integers(0, 256, 3)]
        grids = [grid_of(np.uint8, scale, z) for scale, z in zip([s[0], s[1], max(s)], zeros)]
        a, b = (torch.from_numpy(codes(rng, *shape).astype(np.float32) - z) for shape, z in zip(shapes, zeros))
        a4, b4 = (x.view([1] * (4 - x.ndim) + list(x.shape)).permute(0, 2, 3, 1) for x in (a, b))
        found = laws.add(a, b, *grids, torch.float32, channels_last=True)
        assert torch.equal(found.permute(0, 2, 3, 1), laws.add(a4, b4, *grids, torch.float32))


@needs_vnni
def test_a_global_context_added_in_front_gives_onnxruntimes_bits(tmp_path: Path) -> None:
    """[N, C, 1, 1] + [N, C, H, W] between convolutions: one code in 50 million tells the two orders apart."""

    class Context(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.gate = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 1)
            self.out = nn.Conv2d(16, 16, 1, bias=False)
            with torch.no_grad():
                self.out.weight.copy_(torch.eye(16)[:, :, None, None])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.conv(x)
            return self.out(self.gate(F.adaptive_avg_pool2d(x, 1)) + x)

    torch.manual_seed(4)
    q = bs.quantize(Context(), [torch.randn(32, 3, 16, 16)], recipe="int8-sym")
    path = bs.export_onnx(q, tmp_path / "model.onnx")
    assert bs.verify(q, path, torch.randn(128, 3, 16, 16)).max_lsb == 0


def run_float_pool(x: np.ndarray, op: str, **attributes: object) -> np.ndarray:
    """A pool behind a Relu, as in a net: on a bare graph input onnxruntime reorders channels first."""
    nodes = [helper.make_node("Relu", ["x"], ["r"]), helper.make_node(op, ["r"], ["y"], **attributes)]
    inputs, outputs = (
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s)] for n, s in (("x", x.shape), ("y", None))
    )
    graph = helper.make_graph(nodes, "pool", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


@pytest.mark.parametrize("channels", [16, 5])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_float_pools_sum_in_onnxruntimes_order(rank: int, channels: int) -> None:
    rng = np.random.default_rng(rank)
    for size in (1, 2, 3, 5, 7, 8):
        x = np.maximum(rng.standard_normal((3, channels, *[size] * rank)), 0).astype(np.float32)
        found = laws.float_mean(torch.from_numpy(x), list(range(2, 2 + rank)))
        assert np.array_equal(found.numpy(), run_float_pool(x, "GlobalAveragePool"))
    x = np.maximum(rng.standard_normal((2, channels, *[13] * rank)), 0).astype(np.float32)
    for kernel, stride, padding, include in [(2, 2, 0, 1), (3, 2, 1, 1), (3, 2, 1, 0), (5, 3, 2, 0)]:
        geometry = (kernel,) * rank, (stride,) * rank, (padding,) * rank
        found = laws.float_window_mean(torch.from_numpy(x), laws.AveragePool(*geometry, bool(include)))
        attributes = {"kernel_shape": geometry[0], "strides": geometry[1], "pads": geometry[2] * 2}
        expected = run_float_pool(x, "AveragePool", count_include_pad=include, **attributes)
        assert np.array_equal(found.numpy(), expected)
