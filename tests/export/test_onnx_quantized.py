"""Quantized graphs: the file computes what the simulation computes, and onnxruntime runs it on integers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, numpy_helper
from onnx_helpers import float_graph, op_types, optimized_ops, quantized_graph, quantizer, run_onnx, simulate
from torch import Tensor, fx, nn

import bitsmith as bs
from bitsmith.errors import CalibrationError, ExportError
from bitsmith.export.onnx import build_onnx
from bitsmith.grid import FP8_E4M3, FP8_E5M2, FloatFormat, Grid, IntFormat, Quantizer, TensorSpec, fake_quantize
from bitsmith.recipe import load_recipe


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv1(x))
        x = torch.relu(x + self.conv2(x))
        return self.fc(F.adaptive_avg_pool2d(F.max_pool2d(x, 2), 1).flatten(1))


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 1)
        self.b = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([torch.relu(self.a(x)), torch.relu(self.b(x))], 1)
        return F.relu6(self.depthwise(y))


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.reduce = nn.Conv2d(8, 4, 1)
        self.expand = nn.Conv2d(4, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        gate = torch.relu(self.reduce(x.mean((2, 3), keepdim=True)))
        return x * torch.sigmoid(self.expand(gate))


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(16, 32)
        self.fc2 = nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.relu(self.fc1(x))) + x


class Moves(nn.Module):
    """Max pool, upsampling, split, slice, transpose, reshape: codes pass through unchanged."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)
        self.last = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, _ = F.max_pool2d(F.interpolate(self.conv(x), scale_factor=2.0), 2).chunk(2, 1)
        return self.last(a[:, :, 1:]).permute(0, 2, 3, 1).reshape(x.shape[0], -1, 4)


IMAGE = (4, 3, 16, 16)
POOL = {"QLinearGlobalAveragePool": 1}
NETS: dict[str, tuple[type[nn.Module], tuple[int, ...], dict[str, int], set[str]]] = {
    "residual": (Residual, IMAGE, {"QLinearConv": 2, "QLinearAdd": 1, "QGemm": 1, **POOL}, set()),
    "branches": (Branches, IMAGE, {"QLinearConv": 3, "QLinearConcat": 1}, {"Clip", "Relu"}),
    "squeeze_excite": (SqueezeExcite, IMAGE, {"QLinearConv": 3, "QLinearMul": 1, **POOL}, set()),
    "tokens": (Tokens, (4, 6, 16), {"QGemm": 2, "QLinearAdd": 1}, {"MatMul"}),
    "moves": (Moves, IMAGE, {"QLinearConv": 2, "Resize": 1, "Split": 1, "Slice": 1, "Transpose": 2}, set()),
}  # fmt: skip


def quantized(name: str, **options: Any) -> tuple[fx.GraphModule, Tensor]:
    torch.manual_seed(0)
    make, shape, _, _ = NETS[name]
    x = torch.randn(shape)
    return quantized_graph(make(), x, **options), x


def assert_within_one_code(graph: fx.GraphModule, file: onnx.ModelProto, x: Tensor) -> None:
    """Outputs are on the last Quantizer's grid: at most one step apart, and nearly all equal."""
    modules = [graph.get_submodule(n.target) for n in graph.graph.nodes if n.op == "call_module"]
    step = [float(m.require_grid().scale) for m in modules if isinstance(m, Quantizer)][-1]
    for got, want in zip(run_onnx(file, x), simulate(graph, x), strict=True):
        difference = (got - want).abs()
        assert float(difference.max()) <= 1.001 * step
        assert float((difference > 1e-6).float().mean()) < 0.01


@pytest.mark.parametrize("opset", [13, 21, 26])
@pytest.mark.parametrize("name", NETS)
def test_onnxruntime_computes_the_simulation_on_integers(name: str, opset: int, tmp_path: Path) -> None:
    graph, x = quantized(name)
    file = build_onnx(graph, opset=opset)
    assert_within_one_code(graph, file, x)
    assert_within_one_code(graph, file, x[:1])
    ran = optimized_ops(file, tmp_path)
    _, _, expected, absent = NETS[name]
    assert {op: ran.count(op) for op in expected} == expected
    assert not {"Conv", "FusedConv", "Gemm", "Mul", *absent} & set(ran)


@pytest.mark.parametrize("pool", [lambda x: x.mean((2, 3)), lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1)])
def test_a_global_pool_fuses_with_the_quantizer_behind_its_reshape(pool: Any, tmp_path: Path) -> None:
    class Pooled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return pool(torch.relu(x))

    torch.manual_seed(0)
    x = torch.randn(4, 8, 6, 6)
    graph = quantized_graph(Pooled(), x, float_ops=["adaptive_avg_pool2d"])
    file = build_onnx(graph)
    assert_within_one_code(graph, file, x)
    assert "QLinearGlobalAveragePool" in optimized_ops(file, tmp_path)


def test_the_file_holds_no_casts_copies_or_repeated_constants() -> None:
    graph, _ = quantized("residual")
    file = build_onnx(graph)
    assert not {"Cast", "Identity", "Shape"} & set(op_types(file))
    large = [(t.data_type, t.raw_data) for t in file.graph.initializer if len(t.raw_data) > 64]
    assert len(set(large)) == len(large)
    read = {name for node in file.graph.node for name in node.input}
    assert {t.name for t in file.graph.initializer} <= read


def test_names_are_the_layers_own() -> None:
    graph, _ = quantized("residual")
    file = build_onnx(graph, output_names=["logits"])
    names = {node.name: node.op_type for node in file.graph.node}
    assert (names["conv1"], names["fc"]) == ("Conv", "Gemm")
    stored = {t.name: t for t in file.graph.initializer}
    assert stored["conv1.weight"].data_type == TensorProto.INT8
    assert stored["conv1.bias"].data_type == TensorProto.INT32
    assert list(stored["conv1.weight_scale"].dims) == [8]
    assert list(stored["conv1.weight_zero_point"].dims) == [8]
    assert [i.name for i in file.graph.input] == ["x"]
    assert [o.name for o in file.graph.output] == ["logits"]
    assert file.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert file.graph.output[0].type.tensor_type.shape.dim[0].dim_param == "batch"


def test_weight_codes_are_the_grids_codes() -> None:
    graph, _ = quantized("residual")
    layer = graph.conv1
    stored = {t.name: t for t in build_onnx(graph).graph.initializer}
    codes = numpy_helper.to_array(stored["conv1.weight"])
    expected = np.rint(layer.weight.detach().numpy() / layer.weight_quantizer.scale.numpy().reshape(-1, 1, 1, 1))
    assert np.array_equal(codes, expected.astype(np.int8))


@pytest.mark.parametrize("pack", [True, False])
def test_four_bit_weights(pack: bool, tmp_path: Path) -> None:
    graph, x = quantized("residual", weight_bits=4)
    file = build_onnx(graph, pack_int4=pack)
    weight = next(t for t in file.graph.initializer if t.name == "conv2.weight")
    assert weight.data_type == (TensorProto.INT4 if pack else TensorProto.INT8)
    assert len(weight.raw_data) == 8 * 8 * 9 // (2 if pack else 1)
    assert_within_one_code(graph, file, x)
    # onnxruntime 1.31 has no int4 convolution: packed weights are computed with in float.
    assert ("QLinearConv" in optimized_ops(file, tmp_path)) is not pack


@pytest.mark.parametrize(("bits", "opset", "pack"), [(4, 21, False), (4, 20, True), (6, 21, True), (2, 21, False)])
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_few_bits_in_a_byte_need_no_zero_point(
    bits: int, opset: int, pack: bool, granularity: Any, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Flatten())
    net.append(nn.Linear(8 * 4 * 4, 10)).eval()
    for layer in (net[0], net[2], net[5]):
        layer.weight.data.add_(layer.weight.abs().amax() / 3)  # ranges that are not symmetric
    x = torch.randn(16, 3, 8, 8)
    weights = TensorSpec(format=IntFormat(bits), symmetric=False, granularity=granularity)
    q = bs.quantize(net, [x], load_recipe("int8").model_copy(update={"weights": weights}))
    path = bs.export_onnx(q, tmp_path / "m.onnx", opset=opset, pack_int4=pack)
    stored = {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    for name in ("0", "2", "5"):
        grid = q.graph.get_submodule(name).weight_quantizer.require_grid()
        assert bool((grid.zero_point != 0).any())
        assert not stored[f"{name}.weight_zero_point"].any()
        codes, weight = stored[f"{name}.weight"], q.graph.get_submodule(name).weight
        axis = [-1 if axis == (grid.axis or 0) and grid.scale.ndim else 1 for axis in range(weight.ndim)]
        assert codes.dtype == np.int8
        codes = codes.T if codes.shape != weight.shape else codes
        assert torch.equal(torch.tensor(codes) * grid.scale.view(axis), fake_quantize(weight.detach(), grid))
    certificate = bs.verify(q, path, [x])
    assert certificate.passed, certificate.verdict
    assert certificate.integer_kernels["QLinearConv"] == 2


@pytest.mark.parametrize("opset", [13, 21])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(4, 16), (4, 6, 16)])
def test_weights_with_a_scale_per_group(bits: int, opset: int, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape)
    graph = quantized_graph(Tokens(), x, weight_bits=bits, group=8)
    file = build_onnx(graph, opset=opset)
    assert_within_one_code(graph, file, x)
    blocked = any(a.name == "block_size" for node in file.graph.node for a in node.attribute)
    assert blocked is (bits == 4 and opset >= 21)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 6])
def test_narrow_activations_are_clipped_in_qcdq_style(bits: int, signed: bool) -> None:
    graph, x = quantized("residual", weight_bits=max(bits, 3), bits=bits, signed=signed)
    with pytest.raises(ExportError, match="style='qcdq'"):
        build_onnx(graph)
    file = build_onnx(graph, style="qcdq", pack_int4=False)
    assert "Clip" in op_types(file)
    assert_within_one_code(graph, file, 3 * x)


@pytest.mark.parametrize(("bits", "style"), [(16, "qdq"), (12, "qcdq")])
@pytest.mark.parametrize("signed", [False, True])
def test_wide_activations(bits: int, style: Any, signed: bool) -> None:
    graph, x = quantized("residual", bits=bits, signed=signed)
    assert_within_one_code(graph, build_onnx(graph, style=style), 2 * x)
    with pytest.raises(ExportError, match="opset 21"):
        build_onnx(graph, style=style, opset=20)


@pytest.mark.parametrize("bits", [8, 6])
def test_signed_activations_stored_as_uint8_fuse(bits: int, tmp_path: Path) -> None:
    graph, x = quantized("residual", bits=bits, signed=True)
    file = build_onnx(graph, style="qcdq", uint8_activations=True)
    assert_within_one_code(graph, file, x)
    assert not {"Conv", "FusedConv", "Add", "Gemm"} & set(optimized_ops(file, tmp_path))


def on_edge(function: Any, *grids: Grid, again: bool = False) -> fx.GraphModule:
    """A function of one input, with Quantizers after it; ``again``: the last one is called twice."""

    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return function(x)

    graph = float_graph(Net(), torch.randn(2, 3, 4, 4))
    node = next(n for n in graph.graph.nodes if n.op == "output").args[0][0]
    output = next(n for n in graph.graph.nodes if n.op == "output")
    modules = [quantizer(grid) for grid in grids]
    for i, module in enumerate([*modules, *modules[-1:]] if again else modules):
        graph.add_submodule(f"q{min(i, len(grids) - 1)}", module)
        with graph.graph.inserting_before(output):
            call = graph.graph.call_module(f"q{min(i, len(grids) - 1)}", (node,))
        call.meta = dict(node.meta)
        output.replace_input_with(node, call)
        node = call
    graph.recompile()
    return graph


UNSIGNED = Grid(IntFormat(8, signed=False), torch.tensor(6 / 255), torch.tensor(0, dtype=torch.int32))
SIGNED = Grid(IntFormat(8), torch.tensor(1 / 128), None)


@pytest.mark.parametrize(
    ("function", "grid", "expected"),
    [
        (
            F.relu6,
            UNSIGNED,
            "Relu",
        ),  # float32(255 * scale) may exceed 6: a Clip would stay in onnxruntime's way
        (F.relu6, Grid(UNSIGNED.format, torch.tensor(8 / 255), None), "Clip"),
        (lambda x: F.hardtanh(x, -1.0, 1.0), SIGNED, None),
        (lambda x: F.hardtanh(x, -2.0, 0.5), SIGNED, "Clip"),
        (lambda x: x.clamp(min=0.0), UNSIGNED, "Relu"),
    ],
)
def test_a_clamp_is_left_out_where_the_quantizer_saturates_anyway(function: Any, grid: Grid, expected: str) -> None:
    graph = on_edge(function, grid)
    file = build_onnx(graph)
    assert op_types(file) == ([expected] if expected else []) + ["QuantizeLinear", "DequantizeLinear"]
    x = torch.linspace(-9, 9, 2 * 48).reshape(2, 3, 4, 4)
    torch.testing.assert_close(run_onnx(file, x), simulate(graph, x), atol=0, rtol=0)


def test_the_same_quantizer_twice_in_a_row_is_written_once() -> None:
    assert op_types(build_onnx(on_edge(torch.relu, UNSIGNED, again=True))).count("QuantizeLinear") == 1
    assert op_types(build_onnx(on_edge(torch.relu, UNSIGNED, SIGNED))).count("QuantizeLinear") == 2


@pytest.mark.parametrize("fmt", [FP8_E4M3, FP8_E5M2])
def test_fp8(fmt: FloatFormat) -> None:
    graph = on_edge(torch.tanh, Grid(fmt, torch.tensor(0.01), None))
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(run_onnx(build_onnx(graph, opset=19), x), simulate(graph, x), atol=1e-6, rtol=0)
    with pytest.raises(ExportError, match="opset 19"):
        build_onnx(graph, opset=18)


def test_a_float_format_without_an_onnx_type_is_refused() -> None:
    with pytest.raises(ExportError, match="E4M3"):
        build_onnx(on_edge(torch.tanh, Grid(FloatFormat(3, 2), torch.tensor(0.01), None)))


def test_a_quantizer_per_channel() -> None:
    grid = Grid(IntFormat(8), torch.tensor([0.01, 0.02, 0.03]), None, axis=1)
    graph = on_edge(torch.tanh, grid)
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(run_onnx(build_onnx(graph), x), simulate(graph, x), atol=1e-6, rtol=0)


def test_a_quantizer_without_a_grid_is_refused() -> None:
    graph = on_edge(torch.tanh, SIGNED)
    graph.q0 = Quantizer(TensorSpec(format=IntFormat(8)))
    with pytest.raises(CalibrationError):
        build_onnx(graph)
