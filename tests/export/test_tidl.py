"""Files for TI's TIDL import: every rule of it on the file, and the file against the simulation."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import yaml
from onnx import helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F

import bitsmith as bs
from bitsmith.errors import ExportError, RecipeError
from bitsmith.targets.tidl_contract import check_tidl

DEVICES = ("tidl", "tda4vm", "am62a", "am68a")


class Segmenter(nn.Module):
    """A small encoder and decoder with two transposed convolutions and a skip."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.down = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU())
        self.up = nn.ConvTranspose2d(16, 8, 4, 2, 1)
        self.out = nn.ConvTranspose2d(16, 8, 2, 2)
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.stem(x)
        b = F.relu(self.up(self.down(a)))
        return self.head(F.relu(self.out(torch.cat([a, b], 1))))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Patches and one transformer block, as vision transformers have them."""

    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.patch = nn.Conv2d(3, width, 8, 8)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2, self.head = nn.Linear(width, 32), nn.Linear(32, width), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        b, n, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-2, -1) * 0.35).softmax(-1)
        x = x + self.proj((weights @ v).transpose(1, 2).reshape(b, n, d))
        x = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return self.head(x.mean(1))  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=[Segmenter, Block])
def net(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = request.param()
    return model.eval()


@pytest.mark.parametrize("device", DEVICES)
def test_files_keep_every_rule_and_compute_the_simulation(
    net: nn.Module, images: Tensor, device: str, tmp_path: Path
) -> None:
    q = bs.quantize(net, [images], target=device)
    path = bs.export_onnx(q, tmp_path / "m.onnx")
    certificate = bs.verify(q, path, images)
    assert certificate.contract == []
    assert certificate.passed, certificate.verdict
    assert certificate.coverage == 1.0


def test_the_device_is_not_blamed_for_what_checks_its_files(images: Tensor) -> None:
    """onnxruntime clips a ReLU6 between powers of two in float; TI's compiler does not."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU6(), nn.Conv2d(8, 4, 3)).eval()
    report = bs.quantize(net, [4 * images], target="tda4vm").report
    assert report.coverage.runtime == "onnxruntime"
    assert [layer.note for layer in report.layers if not layer.integer] == [
        "onnxruntime computes it in float between Q and DQ"
    ]


def test_the_file_is_for_one_image(images: Tensor, tmp_path: Path) -> None:
    q = bs.quantize(Segmenter().eval(), [images], target="am68a")
    model = onnx.load(bs.export_onnx(q, tmp_path / "m.onnx"))
    assert [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim] == [1, 3, 32, 32]
    assert model.opset_import[0].version == 16
    assert q(images).shape[0] == len(images)  # and the model itself still takes any number


def test_matmuls_of_mmav1_have_signed_operands(images: Tensor) -> None:
    q = bs.quantize(Block().eval(), [images], target="tda4vm")
    grid = q.graph.get_submodule("quantizers.softmax").grid
    assert grid.format.signed
    free = bs.quantize(Block().eval(), [images], target="am68a").graph.get_submodule("quantizers.softmax").grid
    assert not free.format.signed


@pytest.mark.parametrize(("recipe", "why"), [("int8", "po2"), ("int8-po2", "per tensor"), ("fp8", "small floats")])
def test_recipes_that_the_device_has_no_numbers_for_are_refused(images: Tensor, recipe: str, why: str) -> None:
    with pytest.raises(RecipeError, match=why):
        bs.quantize(Segmenter().eval(), [images], recipe, target="tda4vm")


# The checker against files that break one rule each.


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(16, 3)).eval()
    q = bs.quantize(net, [torch.randn(4, 3, 6, 6)], target="tda4vm")
    return bs.export_onnx(q, tmp_path_factory.mktemp("tidl") / "good.onnx")


def _node(model: onnx.ModelProto, kind: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.op_type == kind)


def _replace(model: onnx.ModelProto, name: str, value: np.ndarray) -> None:
    next(t for t in model.graph.initializer if t.name == name).CopyFrom(numpy_helper.from_array(value, name))


def _newer(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 20


def _free(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"


def _shapeless(model: onnx.ModelProto) -> None:
    del model.graph.value_info[:]


def _twins(model: onnx.ModelProto) -> None:
    model.graph.node[1].name = model.graph.node[0].name


def _cast(model: onnx.ModelProto) -> None:
    conv = _node(model, "Conv")
    model.graph.node.append(helper.make_node("Cast", [conv.output[0]], ["cast"], name="cast", to=1))


def _float_weight(model: onnx.ModelProto) -> None:
    conv = _node(model, "Conv")
    source = next(node for node in model.graph.node if conv.input[1] in node.output)
    codes = next(t for t in model.graph.initializer if t.name == source.input[0])
    model.graph.initializer.append(numpy_helper.from_array(numpy_helper.to_array(codes).astype(np.float32), "w"))
    conv.input[1] = "w"


def _float_bias(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(4, np.float32), "b"))
    _node(model, "Conv").input[2] = "b"


def _bias_scale(model: onnx.ModelProto) -> None:
    bias = next(node for node in model.graph.node if _node(model, "Conv").input[2] in node.output)
    _replace(model, bias.input[1], np.float32(2.0**-30))


def _scale(model: onnx.ModelProto) -> None:
    _replace(model, _node(model, "QuantizeLinear").input[1], np.float32(0.3))


def _zero_point(model: onnx.ModelProto) -> None:
    _replace(model, _node(model, "QuantizeLinear").input[2], np.int8(3))


def _output(model: onnx.ModelProto) -> None:
    model.graph.output[0].name = _node(model, "Gemm").output[0]


def _identity(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Identity", [model.graph.output[0].name], ["same"], name="same"))


@pytest.mark.parametrize(
    ("breaks", "why"),
    [
        (_newer, "opset 20"), (_free, "free dimension"), (_shapeless, "no shape"), (_twins, "unique"),
        (_cast, "Cast in the middle"), (_float_weight, "in float"), (_float_bias, "bias that is not int32"),
        (_bias_scale, r"not s_x \* s_w"), (_scale, "no power of two"), (_zero_point, "zero point"),
        (_output, "without a grid"), (_identity, "Identity"),
    ],
)  # fmt: skip
def test_the_checker_finds_what_breaks_a_rule(
    good: Path, tmp_path: Path, breaks: Callable[[onnx.ModelProto], None], why: str
) -> None:
    device = bs.get_target("tda4vm").tidl
    assert device is not None
    assert check_tidl(good, device) == []
    model = onnx.load(good)
    breaks(model)
    onnx.save(model, tmp_path / "bad.onnx")
    found = check_tidl(tmp_path / "bad.onnx", device)
    assert any(re.search(why, sentence) for sentence in found), found


def test_a_broken_rule_fails_the_certificate(good: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(16, 3)).eval()
    x = torch.randn(4, 3, 6, 6)
    q = bs.quantize(net, [x], target="tda4vm")
    model = onnx.load(bs.export_onnx(q, tmp_path / "m.onnx"))
    _newer(model)
    onnx.save(model, tmp_path / "m.onnx")
    certificate = bs.verify(q, tmp_path / "m.onnx", x)
    assert not certificate.passed
    assert "opset 20" in certificate.verdict


# 16 bits by the file of ranges.


def _mixed(images: Tensor, target: str = "tda4vm", match: str = "first") -> bs.QuantizedModel:
    wide = bs.load_recipe("int16")
    po2 = {"scale": "po2", "granularity": "tensor"}
    assert wide.weights is not None
    assert wide.activations is not None
    override = bs.Override(
        match=match, weights=wide.weights.model_copy(update=po2),
        activations=wide.activations.model_copy(update={"scale": "po2"}),
    )  # fmt: skip
    torch.manual_seed(0)
    return bs.quantize(Segmenter().eval(), [images], "int8-tensor-po2", target=target, overrides=[override])


def _parse(text: str) -> list[dict[str, str]]:
    """Top-level fields of each ``layers`` block."""
    blocks = text.split("layers {\n")[1:]
    return [dict(line.strip().split(": ", 1) for line in b.splitlines() if line.startswith("  ") and ": " in line
                 and not line.startswith("    ")) for b in blocks]  # fmt: skip


def test_16_bit_layers_enter_by_their_ranges(images: Tensor, tmp_path: Path) -> None:
    q = _mixed(images)
    with pytest.raises(ExportError, match="export_tidl"):
        bs.export_onnx(q, tmp_path / "m.onnx")
    folder = bs.export_tidl(q, tmp_path / "tidl")
    text = (folder / "ranges.prototxt").read_text()
    layers = _parse(text)
    assert text.startswith(f"num_layers: {len(layers)}\nquant_type: SYMMETRIC\ncalib_type: PERTENSOR\n")
    bits = {layer["layer_name"].strip('"'): int(layer["bit_depth"]) for layer in layers}
    assert bits["stem.0"] == 16
    assert bits["head"] == 8
    options = yaml.safe_load((folder / "import.yaml").read_text())
    assert options["advanced_options:quant_params_proto_path"] == "ranges.prototxt"
    assert options["advanced_options:output_feature_16bit_names_list"] == "stem.0"
    nodes = {node.name: node.op_type for node in onnx.load(folder / "model.onnx").graph.node}
    assert nodes.keys() >= {"stem.0", "down.0", "up", "out", "head"}
    assert not {"QuantizeLinear", "DequantizeLinear", "Cast"} & set(nodes.values())
    assert text.count("{") == text.count("}")
    assert "inf" not in text
    assert "nan" not in text


def test_the_float_file_beside_the_ranges_computes_the_float_model(images: Tensor, tmp_path: Path) -> None:
    import onnxruntime

    q = _mixed(images)
    session = onnxruntime.InferenceSession(bs.export_tidl(q, tmp_path / "tidl") / "model.onnx")
    (found,) = session.run(None, {"x": images[:1].numpy()})
    torch.manual_seed(0)
    with torch.no_grad():
        expected = Segmenter().eval()(images[:1])
    assert np.abs(found - expected.numpy()).max() < 0.05 * float(expected.abs().max())  # biases are corrected
    assert q.graph.get_submodule("head").weight_quantizer is not None  # and q is as it was


def test_devices_without_wide_transposed_convolutions_say_so(images: Tensor, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="'up'"):
        bs.export_tidl(_mixed(images, "tidl", "up"), tmp_path / "tidl")


def test_other_targets_have_no_such_files(images: Tensor, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="tda4vm"):
        bs.export_tidl(bs.quantize(Segmenter().eval(), [images]), tmp_path / "tidl")
