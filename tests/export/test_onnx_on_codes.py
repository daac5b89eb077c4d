"""Layers whose output stays float run on their codes in onnxruntime's float kernels: to the bit, in every geometry."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

import bitsmith as bs
from bitsmith.capture.ops import op_of
from bitsmith.integer.accumulate import sums_in_float32
from bitsmith.integer.kernels import largest_sum
from bitsmith.recipe import bits_recipe

CONVOLUTIONS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "1-D": (nn.Conv1d(6, 8, 5, stride=2, padding=2), (6, 21)),
    "2-D": (nn.Conv2d(6, 8, 3, padding=1), (6, 9, 9)),
    "3-D": (nn.Conv3d(4, 8, 3), (4, 5, 6, 7)),
    "without bias": (nn.Conv2d(6, 8, 3, bias=False), (6, 9, 9)),
    "same padding": (nn.Conv2d(6, 8, 4, padding="same"), (6, 9, 9)),
    "grouped": (nn.Conv2d(8, 12, 3, groups=4), (8, 9, 9)),
    "depthwise": (nn.Conv2d(8, 8, 3, groups=8, stride=2, padding=1), (8, 9, 9)),
    "dilated": (nn.Conv2d(6, 8, 3, dilation=2, padding=2), (6, 9, 9)),
    "1 x 1": (nn.Conv2d(32, 64, 1), (32, 7, 7)),
    "deep": (nn.Conv2d(200, 8, 3), (200, 6, 6)),
    "transposed": (nn.ConvTranspose2d(6, 8, 3, stride=2), (6, 7, 7)),
    "transposed in groups": (nn.ConvTranspose2d(8, 12, 3, stride=2, groups=4), (8, 7, 7)),
    "transposed 1-D": (nn.ConvTranspose1d(6, 8, 4, stride=2, padding=1), (6, 9)),
}


def samples(shape: tuple[int, ...], count: int = 32, seed: int = 0) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def kernels_on_codes(q: bs.QuantizedModel, path: Path, x: Tensor) -> int:
    """Verified to the bit; how many float kernels multiplied codes."""
    certificate = bs.verify(q, path, x)
    assert certificate.max_lsb == 0, certificate.verdict
    assert certificate.allowed_max_lsb == 0
    assert certificate.float_operators == []
    assert certificate.float_compute_kernels == {}
    return sum(n for kernel, n in certificate.integer_kernels.items() if kernel.endswith("on codes"))


def name_of(recipe: Any) -> str:
    return str(getattr(recipe, "name", recipe))


@pytest.mark.parametrize("recipe", ["int8", "int8-tensor", "int8-po2", bits_recipe(4, 8)], ids=name_of)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_with_float_output_is_exact(name: str, recipe: Any, tmp_path: Path) -> None:
    layer, shape = CONVOLUTIONS[name]
    net = nn.Sequential(layer, nn.ReLU())
    q = bs.quantize(net, [samples(shape)], recipe=recipe, placement="layerwise")
    path = bs.export_onnx(q, tmp_path / "model.onnx")
    assert kernels_on_codes(q, path, samples(shape, seed=1)) == 1


def test_a_residual_net_is_exact_and_its_float_adds_and_pools_with_it(tmp_path: Path) -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a, self.b = (nn.Conv2d(i, 12, 3, padding=1) for i in (3, 12, 12))
            self.pool, self.head = nn.AvgPool2d(2), nn.Linear(12, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.stem(x))
            x = torch.relu(x + self.b(torch.relu(self.a(x))))
            return self.head(self.pool(x).mean((2, 3)))

    torch.manual_seed(0)
    q = bs.quantize(Residual(), [samples((3, 14, 14))], placement="layerwise")
    path = bs.export_onnx(q, tmp_path / "model.onnx")
    assert kernels_on_codes(q, path, samples((3, 14, 14), 128, seed=1)) == 2  # 'a' is fused with its quantizer
    assert [layer.name for layer in q.report.layers if "codes in float32" in layer.note] == ["stem", "b"]
    assert q.report.coverage.fraction < 1


def test_transposed_convolutions_are_exact_between_integer_layers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 8, 2, stride=2), nn.ReLU(), nn.Conv2d(8, 4, 3)
    )
    q = bs.quantize(net, [samples((3, 8, 8))])
    path = bs.export_onnx(q, tmp_path / "model.onnx")
    assert kernels_on_codes(q, path, samples((3, 8, 8), 64, seed=1)) == 1


def test_a_bias_past_24_bits_is_added_behind_the_exact_sum(tmp_path: Path) -> None:
    net: Any = nn.Sequential(nn.Conv2d(3, 8, 3))
    with torch.no_grad():
        net[0].weight[5] *= 1e-9  # a nearly dead channel whose bias is not small
        net[0].bias.fill_(0.7)
    q = bs.quantize(net, [samples((3, 8, 8))], placement="layerwise")
    (node,) = (n for n in q.graph.graph.nodes if op_of(n).name == "conv")
    layer: Any = q.graph.get_submodule(str(node.target))
    assert float((layer.bias / layer.bias_quantizer.require_grid().scale).abs().max()) > 2**24
    path = bs.export_onnx(q, tmp_path / "model.onnx")
    assert kernels_on_codes(q, path, samples((3, 8, 8), 64, seed=1)) == 1
    assert [n.op_type for n in onnx.load(path).graph.node][-4:] == ["Conv", "DequantizeLinear", "Add", "Mul"]


def test_sums_past_24_bits_stay_float_and_are_named(tmp_path: Path) -> None:
    net: Any = nn.Sequential(nn.Conv2d(600, 4, 3))
    nn.init.constant_(net[0].weight, 1.0)
    q = bs.quantize(net, [samples((600, 4, 4))], placement="layerwise")
    (node,) = (n for n in q.graph.graph.nodes if op_of(n).name == "conv")
    layer: Any = q.graph.get_submodule(str(node.target))
    assert not sums_in_float32(largest_sum(layer, q.program.grids[node.args[0]], None))
    certificate = bs.verify(q, bs.export_onnx(q, tmp_path / "model.onnx"), samples((600, 4, 4)))
    assert certificate.float_operators == ["0"]
    assert certificate.passed
    assert certificate.allowed_max_lsb > 0


def test_qcdq_and_openvino_keep_the_scale_in_front(tmp_path: Path) -> None:
    net, x = nn.Sequential(nn.Conv2d(3, 8, 3)), samples((3, 8, 8))
    q = bs.quantize(net, [x], placement="layerwise")
    chained = bs.export_onnx(q, tmp_path / "chained.onnx", style="qcdq")
    assert "Mul" not in [n.op_type for n in onnx.load(chained).graph.node]
    assert bs.verify(q, chained, x).passed
    q = bs.quantize(net, [x], placement="layerwise", target="openvino")
    assert "Mul" not in [n.op_type for n in onnx.load(bs.export_onnx(q, tmp_path / "openvino.onnx")).graph.node]
