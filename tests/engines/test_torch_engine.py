"""The model on PyTorch's int8 kernels: the same integers as the simulation, in process and as a file."""

import re
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bitsmith as bs
from bitsmith.engines import build_torch
from bitsmith.engines.torch_kernels import QuantizedMean, Stored
from bitsmith.errors import DataError, ExportError, VerificationError
from bitsmith.grid import IntFormat
from bitsmith.integer.laws import AveragePool

LOADER = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "bitsmith":
            raise ImportError(name)

sys.meta_path.insert(0, Block())
import torch
x, y = torch.load(sys.argv[2])
file = torch.jit.load(sys.argv[1])
for rows in (1, 3, len(x)):
    assert torch.allclose(file(x[:rows]), y[:rows], rtol=0, atol=float(sys.argv[3])), (file(x[:rows]) - y[:rows])
assert "bitsmith" not in sys.modules
"""


class Net(nn.Module):
    """A little of everything: residual add, a depthwise layer of many groups, concat, pools, a gate, a linear end."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.widen = nn.Conv2d(16, 128, 1)
        self.depthwise = nn.Conv2d(128, 128, 3, padding=1, groups=128, bias=False)
        self.narrow = nn.Conv2d(128, 16, 1)
        self.gate = nn.Conv2d(32, 32, 1)
        self.hidden = nn.Linear(32, 24)
        self.head = nn.Linear(24, 10)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        x = F.relu(x + self.narrow(F.relu6(self.depthwise(F.relu(self.widen(x))))))
        x = torch.cat([F.max_pool2d(x, 2), F.avg_pool2d(x, 2)], 1)
        x = x * torch.sigmoid(self.gate(x))
        return self.head(F.relu(self.hidden(x.mean((2, 3)))))


@pytest.fixture(scope="module")
def quantized():
    torch.manual_seed(0)
    x = torch.randn(8, 3, 16, 16)
    return bs.quantize(Net().eval(), [x], target="torch"), x


def test_engine_simulation_and_integer_executor_agree_to_the_bit(quantized):
    q, x = quantized
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        deployed = bs.deploy(q, "torch")
    for rows in (1, 3, 8):
        assert torch.equal(deployed(x[:rows]), q(x[:rows]))
    assert deployed.note == ""
    assert torch.equal(q.integer_executor()(x), q(x))


def test_layers_print_as_torch_users_know_them(quantized):
    text = repr(bs.deploy(quantized[0], "torch"))
    geometry = r"3, 16, kernel_size=\(3, 3\), stride=\(1, 1\), scale=0\.\d+, zero_point=0, padding=\(1, 1\)"
    assert re.search(rf"\(stem\): QuantizedConvReLU2d\({geometry}\)", text)
    assert "(depthwise): QuantizedConvReLU2d(128, 128, kernel_size=(3, 3)" in text
    assert "padding=(1, 1), groups=128)" in text
    assert "QuantizedAddReLU(scale=" in text
    assert "(head): QuantizedLinear(in_features=24, out_features=10, bias=True, float output)" in text


def test_no_float_layer_is_left(quantized):
    kinds = {type(m).__module__.split(".")[0] for m in build_torch(quantized[0]).children()}
    assert kinds == {"bitsmith"}


@pytest.mark.parametrize("style", ["int8", "qcdq"])
def test_file_runs_with_torch_alone_at_any_batch_size(quantized, style, tmp_path):
    q, x = quantized
    path = bs.export_torchscript(q, tmp_path / "m.pt", style=style)
    expected = q(x) if style == "int8" else torch.jit.load(path)(x)
    torch.save((x, expected), tmp_path / "data")
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        LOADER,
        str(path),
        str(tmp_path / "data"),
        "0" if style == "int8" else "0.05",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (expected - q(x)).abs().max() < 0.1 * q(x).abs().max()


def test_int8_file_is_certified_to_the_bit_and_qcdq_within_bounds(quantized, tmp_path):
    q, x = quantized
    exact = bs.verify(q, bs.export_torchscript(q, tmp_path / "int8.pt"), x)
    assert exact.passed
    assert exact.engine == "torch"
    assert exact.max_lsb == exact.allowed_max_lsb == 0
    assert exact.float_compute_kernels == {}
    loose = bs.verify(q, bs.export_torchscript(q, tmp_path / "qcdq.pt", style="qcdq"), x)
    assert loose.passed
    assert loose.allowed_max_lsb > 0
    assert loose.float_compute_kernels


def test_a_changed_file_fails(quantized, tmp_path):
    q, x = quantized
    other = bs.quantize(Net().eval(), [x], target="torch")
    path = bs.export_torchscript(other, tmp_path / "m.pt")
    assert not bs.verify(q, path, x).passed


def test_files_of_depthwise_layers_do_not_saturate(tmp_path):
    """Loaded for FBGEMM, 255 * (127 + 127) would be cut off at 2**15."""
    net = nn.Conv2d(128, 128, 3, padding=1, groups=128, bias=False).eval()
    nn.init.constant_(net.weight, 1.0)
    x = torch.rand(2, 128, 8, 8).round_()
    q = bs.quantize(net, [x], target="torch")
    file = torch.jit.load(bs.export_torchscript(q, tmp_path / "m.pt"))
    assert torch.equal(file(x), q(x))
    assert (q(x) - net(x)).abs().max() < 0.5  # of sums up to 9; cut off, they would end at 4.6


def test_qcdq_file_stores_integers(tmp_path):
    net = nn.Linear(512, 512).eval()
    q = bs.quantize(net, [torch.randn(8, 512)], target="torch")
    path = bs.export_torchscript(q, tmp_path / "m.pt", style="qcdq")
    assert path.stat().st_size < 1.2 * 512 * 512
    assert "quantize_per_tensor" not in str(torch.jit.load(path).inlined_graph)


@pytest.mark.parametrize(
    ("net", "shape"),
    [
        (nn.Sequential(nn.Conv1d(3, 8, 3), nn.ReLU(), nn.Conv1d(8, 4, 1)), (4, 3, 12)),
        (nn.Sequential(nn.Conv3d(2, 8, 3), nn.ReLU(), nn.Conv3d(8, 4, 1)), (4, 2, 6, 6, 6)),
        (
            nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, dilation=2), nn.LeakyReLU(0.1), nn.Conv2d(8, 4, 1)),
            (4, 3, 12, 12),
        ),
        (nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)), (4, 5, 6)),
    ],
    ids=["conv1d", "conv3d", "strided", "sequence"],
)
def test_ranks_and_geometries(net, shape, tmp_path):
    torch.manual_seed(1)
    x = torch.randn(shape)
    q = bs.quantize(net.eval(), [x], target="torch")
    assert torch.equal(bs.deploy(q, "torch")(x), q(x))
    assert torch.equal(torch.jit.load(bs.export_torchscript(q, tmp_path / "m.pt"))(x), q(x))


@pytest.mark.parametrize("recipe", ["int8", "int8-tensor"])
def test_transposed_convolutions(recipe, tmp_path):
    torch.manual_seed(1)
    net = nn.Sequential(nn.ConvTranspose2d(4, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    x = torch.randn(4, 4, 6, 6)
    q = bs.quantize(net, [x], recipe=recipe, target="torch")
    deployed = bs.deploy(q, "torch")
    kinds = "QuantizedConvTranspose2d" in repr(deployed)
    assert kinds == (recipe == "int8-tensor")  # torch's kernel takes one scale
    file = torch.jit.load(bs.export_torchscript(q, tmp_path / "m.pt"))
    assert (file(x) - q(x)).abs().max() < 0.02 * q(x).abs().max()
    assert (deployed(x) - q(x)).abs().max() < 0.02 * q(x).abs().max()


def test_layers_left_in_float_stand_between_dequantize_and_quantize():
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.GELU(), nn.Conv2d(8, 4, 1)).eval()
    x = torch.randn(4, 3, 12, 12)
    recipe = bs.load_recipe("int8").model_copy(update={"overrides": (bs.Override(match="2", exclude=True),)})
    q = bs.quantize(net, [x], recipe=recipe, target="torch")
    deployed = bs.deploy(q, "torch")
    assert type(deployed.module.get_submodule("2")) is nn.Conv2d
    assert (deployed(x) - q(x)).abs().max() < 0.02 * q(x).abs().max()


@pytest.mark.parametrize("function", [nn.Hardswish(), nn.ELU(0.7), nn.CELU(0.7), nn.LeakyReLU(0.2), nn.Sigmoid()])
def test_functions_between_convolutions_run_on_codes(function, tmp_path):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), function, nn.Conv2d(8, 4, 1)).eval()
    x = torch.randn(4, 3, 12, 12)
    deployed = bs.deploy(q := bs.quantize(net, [x], target="torch"), "torch")
    assert {type(m).__name__ for m in deployed.module.children()} == {
        "Quantize", "QuantizedConv", "Pointwise", "QuantizedOnBytes",
    }  # fmt: skip
    assert torch.equal(deployed(x), q(x))
    assert bs.verify(q, bs.export_torchscript(q, tmp_path / "m.pt"), x).max_lsb == 0


@pytest.mark.parametrize("target", ["onnxruntime", "openvino", "generic"])
def test_models_of_other_targets_run_too(target):
    torch.manual_seed(0)
    x = torch.randn(8, 3, 16, 16)
    q = bs.quantize(Net().eval(), [x], target=target)
    with pytest.warns(UserWarning, match=f"target '{target}'.*quantize with target='torch'"):
        deployed = bs.deploy(q, "torch")
    assert (deployed(x) - q(x)).abs().max() < 0.05 * q(x).abs().max()
    assert f"note: simulated for target '{target}'" in repr(deployed)


@pytest.mark.parametrize("zero_point", [0, 57, 128])
def test_pools_that_keep_their_grid_round_as_torch_s(zero_point):
    torch.manual_seed(0)
    codes = torch.randint(0, 256, (8, 5, 8, 8), dtype=torch.uint8)
    for scale in torch.rand(20).tolist():
        grid, x = Stored(scale, zero_point, 0, 255), torch._make_per_tensor_quantized_tensor(codes, scale, zero_point)
        for size in (2, 4, 8):
            pool = QuantizedMean(grid, grid, 2, AveragePool((size, size), (size, size), (0, 0)), keep=True)
            assert torch.equal(pool(x).int_repr(), F.avg_pool2d(x, size).int_repr())
        plane = QuantizedMean(grid, grid, 2, None, keep=True)(x)
        assert torch.equal(plane.int_repr(), F.adaptive_avg_pool2d(x, 1).int_repr())


def test_small_floats_have_no_int8_kernel(tmp_path):
    q = bs.quantize(nn.Linear(4, 2), [torch.randn(32, 4)], recipe="fp8", target="torch")
    with pytest.raises(ExportError, match="integers"):
        bs.deploy(q, "torch")
    with pytest.raises(ExportError, match="integers"):
        bs.export_torchscript(q, tmp_path / "m.pt", style="qcdq")


def test_auto_says_what_it_took(quantized):
    q, x = quantized
    deployed = bs.deploy(q, "auto", inputs=x[:1])
    assert deployed.engine.name in deployed.timings
    assert {"onnxruntime", "torch"} <= set(deployed.timings)
    assert min(deployed.timings, key=lambda n: deployed.timings[n].median_ms) == deployed.engine.name
    assert "fastest of" in repr(deployed)
    assert deployed(x).shape == (8, 10)


def test_dictionaries_in_and_out():
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x, y):
            return {"sum": self.a(x) + self.b(y), "first": self.a(x)}

    torch.manual_seed(0)
    q = bs.quantize(Pair().eval(), [(torch.randn(16, 4), torch.randn(16, 4))], target="torch")
    x, y = torch.randn(2, 4), torch.randn(2, 4)
    found, expected = bs.deploy(q, "torch")(x, y=y), q(x, y)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)


def test_wrong_calls_say_what_to_do(quantized, tmp_path):
    q, x = quantized
    with pytest.raises(DataError, match="'torch', 'ai8x' or 'auto'"):
        bs.deploy(q, "tensorrt")
    with pytest.raises(VerificationError, match="set_num_threads"):
        bs.deploy(q, "torch", threads=97)
    with pytest.raises(DataError, match="auto"):
        bs.deploy(q, "torch", inputs=x)
    with pytest.raises(ExportError, match=r"\.pt"):
        bs.export_torchscript(q, tmp_path / "m.onnx")
    with pytest.raises(ExportError, match="style"):
        bs.export_torchscript(q, tmp_path / "m.pt", style="qdq")
    with pytest.raises(VerificationError, match="engine='onnxruntime' cannot run it"):
        bs.verify(q, bs.export_torchscript(q, tmp_path / "m.pt"), x, engine="onnxruntime")
    (tmp_path / "bad.pt").write_bytes(b"no zip")
    with pytest.raises(VerificationError, match="damaged"):
        bs.deploy(tmp_path / "bad.pt")


class _Recurrent(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer, self.head = layer, nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.layer(x)[0]).relu()


class _Created(nn.Module):
    """Tensors of the batch's size, made in every way that there is."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        batch = x.shape[0]
        made = torch.where(x.new_zeros(batch, 8) == 0, torch.ones(batch, 8), torch.full((batch, 8), 0.5))
        made = made + x.new_ones(batch, 8) + x.new_full((batch, 8), 0.25)
        return self.head(x + made) + torch.arange(batch).unsqueeze(1)


@pytest.mark.parametrize("make", [
    lambda: _Recurrent(nn.LSTM(8, 16, batch_first=True)), lambda: _Recurrent(nn.GRU(8, 16, batch_first=True)), _Created,
])  # fmt: skip
def test_sizes_are_not_baked_in(make, tmp_path):
    torch.manual_seed(0)
    net, x = make().eval(), torch.randn(24, 8)
    x = x if isinstance(net, _Created) else x.unsqueeze(1).repeat(1, 6, 1) * torch.rand(24, 6, 1)
    q = bs.quantize(net, [x], target="torch")
    deployed = bs.deploy(q, "torch")
    file = torch.jit.load(bs.export_torchscript(q, tmp_path / "m.pt"))
    for rows in (1, 3, 24):
        torch.testing.assert_close(deployed(x[:rows]), q(x[:rows]))
        torch.testing.assert_close(file(x[:rows]), q(x[:rows]))


@pytest.mark.parametrize(("bits", "share"), [(7, 1.0), (8, 0.0)])
def test_weights_whose_zero_points_leave_the_byte_are_counted_as_float(bits, share):
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval(), torch.randn(24, 3, 8, 8)
    for layer in (net[0], net[2]):
        layer.weight.data.add_(layer.weight.abs().amax() / 3)
    recipe = bs.load_recipe("int8")
    spec = recipe.weights.model_copy(update={"symmetric": False, "format": IntFormat(bits)})
    q = bs.quantize(net, [x], recipe.model_copy(update={"weights": spec}), target="torch")
    assert q.report.coverage.fraction == share
    if share:
        assert torch.equal(bs.deploy(q, "torch")(x), q(x))
    else:
        with pytest.raises((ExportError, DataError), match="8-bit weights without zero points"):
            bs.deploy(q, "torch")
