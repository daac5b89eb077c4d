"""Models quantized for the chips, written, read back: the files compute the same integers, for every operator."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

import bitsmith as bs
from bitsmith.ai8x.checkpoint import read_checkpoint
from bitsmith.ai8x.deployed import DeployedChip, description_path
from bitsmith.errors import BitsmithError, CheckpointError, ExportError, VerificationError
from bitsmith.grid import IntFormat, TensorSpec
from bitsmith.verify import save_evidence, verify_folder


class Net(nn.Module):
    """Two convolutions and what a test does with them."""

    def __init__(
        self, first: nn.Module, second: nn.Module, how: Callable[[nn.Module, nn.Module, Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.first, self.second, self.how = first, second, how

    def forward(self, x: Tensor) -> Tensor:
        return self.how(self.first, self.second, x)


def conv(inputs: int, outputs: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)


def signal(inputs: int, outputs: int, kernel: int, **options: Any) -> nn.Conv1d:
    return nn.Conv1d(inputs, outputs, kernel, **options)


IMAGE, SIGNAL = (4, 8, 8), (4, 24)
TWICE: dict[str, Any] = {"stride": 2, "padding": 1, "output_padding": 1}
HALF = nn.MaxPool1d(2)
NETS: dict[str, tuple[tuple[int, ...], Callable[[], nn.Module]]] = {
    "plain": (IMAGE, lambda: Net(conv(4, 6), nn.Linear(384, 5), lambda a, b, x: b(a(x).relu().flatten(1)))),
    "8-bit output": (IMAGE, lambda: Net(conv(4, 6), conv(6, 3, 1), lambda a, b, x: b(a(x)).relu())),
    "max pooling": (IMAGE, lambda: Net(conv(4, 6), conv(6, 3), lambda a, b, x: b(F.max_pool2d(a(x).relu(), 3, 2)))),
    "pool, relu": (IMAGE, lambda: Net(conv(4, 6), conv(6, 3), lambda a, b, x: b(F.max_pool2d(a(x), 2).relu()))),
    "average pooling": (IMAGE, lambda: Net(conv(4, 6), conv(6, 3, 1), lambda a, b, x: b(F.avg_pool2d(a(x), 2)))),
    "pooled output": (IMAGE, lambda: Net(conv(4, 6), conv(6, 3), lambda a, b, x: F.avg_pool2d(b(a(x).relu()), 2))),
    "global pooling": (
        IMAGE,
        lambda: Net(conv(4, 6), nn.Linear(6, 3), lambda a, b, x: b(F.adaptive_avg_pool2d(a(x).relu(), 1).flatten(1))),
    ),
    "stride": (IMAGE, lambda: Net(conv(4, 6, stride=2), conv(6, 3, stride=2), lambda a, b, x: b(a(x).relu()))),
    "stride read twice": (
        IMAGE,
        lambda: Net(conv(4, 6, stride=2), conv(6, 6), lambda a, b, x: (y := a(x).relu()) + b(y)),
    ),
    "residual": (IMAGE, lambda: Net(conv(4, 6), conv(6, 6), lambda a, b, x: ((y := a(x).relu()) + b(y)).relu())),
    "sum into a convolution": (IMAGE, lambda: Net(conv(4, 4), conv(4, 5), lambda a, b, x: b(a(x) + x))),
    "twice": (IMAGE, lambda: Net(conv(4, 4), conv(4, 5), lambda a, b, x: b((y := a(x)) + y))),
    "difference": (IMAGE, lambda: Net(conv(4, 4), conv(4, 4), lambda a, b, x: b(x) - a(x).relu())),
    "depthwise": (IMAGE, lambda: Net(conv(4, 4, groups=4), conv(4, 5, 1), lambda a, b, x: b(F.relu6(a(x))))),
    "groups": (IMAGE, lambda: Net(conv(4, 6, groups=2), conv(6, 5, 1), lambda a, b, x: b(F.hardtanh(a(x))))),
    "abs": (IMAGE, lambda: Net(conv(4, 6), conv(6, 5, 1), lambda a, b, x: b(a(x).abs()))),
    "transposed": (
        IMAGE,
        lambda: Net(
            nn.ConvTranspose2d(4, 6, 3, **TWICE), conv(6, 5), lambda a, b, x: b(a(x).relu())
        ),
    ),
    "option A": (
        IMAGE,
        lambda: Net(
            conv(4, 8, stride=2),
            conv(8, 5),
            lambda a, b, x: b((a(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))).relu()),
        ),
    ),
    "many channels": (IMAGE, lambda: Net(conv(4, 70), conv(70, 70), lambda a, b, x: (y := a(x).relu()) + b(y))),
    "signal": (SIGNAL, lambda: Net(signal(4, 6, 5), signal(6, 3, 3, dilation=2), lambda a, b, x: b(a(x).relu()))),
    "pooled signal": (
        SIGNAL,
        lambda: Net(signal(4, 6, 9, padding=1), signal(6, 3, 2), lambda a, b, x: HALF(b(F.avg_pool1d(a(x), 2)))),
    ),
    "linear": ((10,), lambda: Net(nn.Linear(10, 7), nn.Linear(7, 2), lambda a, b, x: b(a(x).relu()))),
    "without biases": (
        IMAGE, lambda: Net(conv(4, 6, bias=False), conv(6, 3, 1, bias=False), lambda a, b, x: b(a(x).relu())),
    ),
}  # fmt: skip


def quantized(name: str, target: str, **options: Any) -> tuple[bs.QuantizedModel, Tensor]:
    torch.manual_seed(len(name))
    shape, build = NETS[name]
    return bs.quantize(build(), [torch.randn(24, *shape)], target=target, **options), torch.randn(5, *shape) * 2


@pytest.mark.parametrize("target", ["max78000", "max78002"])
@pytest.mark.parametrize("name", NETS)
def test_files_compute_what_the_model_computes(name: str, target: str, tmp_path: Path) -> None:
    q, x = quantized(name, target)
    assert torch.equal(q(x), q.integer_executor()(x))
    path = bs.export_ai8x(q, tmp_path / "net.pth.tar")
    certificate = bs.verify(q, path, [x])
    assert certificate.passed, certificate.verdict
    assert certificate.allowed_max_lsb == 0.0
    assert certificate.outputs[0].equal_fraction == 1.0
    assert torch.equal(bs.deploy(q, "ai8x")(x).flatten(), q(x).flatten())
    assert q.report.coverage.fraction == 1.0


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_narrow_weights_go_through_the_files(bits: int, tmp_path: Path) -> None:
    narrow = bs.Override(match="first", weights=TensorSpec(format=IntFormat(bits)))
    q, x = quantized("plain", "max78000", overrides=[narrow])
    path = bs.export_ai8x(q, tmp_path / "net.pth.tar")
    assert bs.verify(q, path, [x]).passed
    state = read_checkpoint(path)["state_dict"]
    assert state["first.weight_bits"].tolist() == [float(bits)]
    weight = state["first.op.weight"]
    assert -(2 ** (bits - 1)) <= weight.min() <= weight.max() < 2 ** (bits - 1)
    assert bool((state["first.op.bias"] % 2 ** (bits - 1) == 0).all())


def test_the_files_have_the_loader_s_form(tmp_path: Path) -> None:
    q, _ = quantized("residual", "max78000")
    path = bs.export_ai8x(q, tmp_path / "net.pth.tar", arch="mynet", dataset="mine")
    checkpoint, described = read_checkpoint(path), yaml.safe_load(description_path(path).read_text())
    assert (checkpoint["arch"], checkpoint["epoch"]) == ("mynet", 0)
    assert (described["arch"], described["dataset"]) == ("mynet", "mine")
    state = checkpoint["state_dict"]
    assert [key for key in state if key.endswith("weight")] == [
        "first.op.weight", "second.op.weight", "add_identity.op.weight",
    ]  # fmt: skip
    assert all(value.dtype == torch.float32 and bool((value == value.round()).all()) for value in state.values())
    operations = [(layer["op"], layer.get("eltwise"), layer.get("write_gap")) for layer in described["layers"]]
    assert operations == [
        ("conv2d", None, None),
        ("conv2d", None, 1),
        ("passthrough", None, 1),
        ("conv2d", "add", None),
    ]
    both = [int(str(layer["out_offset"]), 0) for layer in described["layers"][1:3]]
    assert abs(both[0] - both[1]) == 4  # word by word beside each other
    assert described["layers"][3]["in_sequences"] == [2, 1]


def test_average_rounding_is_the_target_s(tmp_path: Path) -> None:
    torch.manual_seed(0)
    target = bs.get_target("max78000").model_copy(update={"average_rounding": True})
    net = Net(conv(4, 6), conv(6, 3, 1), lambda a, b, x: b(F.avg_pool2d(a(x), 2)))
    x = torch.randn(24, 4, 8, 8)
    rounded, cut = bs.quantize(net, [x], target=target), bs.quantize(net, [x], target="max78000")
    assert not torch.equal(rounded(x), cut(x))
    assert bs.verify(rounded, bs.export_ai8x(rounded, tmp_path / "net.pth"), [x]).passed


def test_the_demo_net_stays_within_a_point_of_float(tmp_path: Path) -> None:
    from bitsmith.demo import digits, digits_net, one_thread

    pytest.importorskip("sklearn")
    (train, _), (x, y) = digits()
    net = digits_net()
    narrow = bs.Override(match="block3.depthwise", weights=TensorSpec(format=IntFormat(4)))
    with one_thread(), torch.no_grad():
        scores = {"float": net(x)}
        for target, overrides in (("max78002", ()), ("max78000", (narrow,))):
            q = bs.quantize(net, [train], target=target, overrides=overrides)
            scores[target] = q(x)
            assert bs.verify(q, bs.export_ai8x(q, tmp_path / f"{target}.pth.tar"), [x[:50]]).passed
    accuracy = {name: float((s.argmax(1) == y).double().mean()) * 100 for name, s in scores.items()}
    assert accuracy["max78002"] >= accuracy["float"] - 1.0, accuracy
    assert accuracy["max78000"] >= accuracy["float"] - 1.0, accuracy


def test_chip_models_are_kept_loaded_and_made_in_steps(tmp_path: Path) -> None:
    torch.manual_seed(0)
    _, build = NETS["residual"]
    net, x = build().eval(), torch.randn(16, *IMAGE)
    q = bs.quantize(net, [x], target="max78000")
    bs.save(q, tmp_path / "kept")
    assert torch.equal(bs.load(tmp_path / "kept", net)(x), q(x))
    prepared = bs.prepare(net, "ai8x", x, target="max78000")
    prepared(x)
    converted = bs.convert(prepared)
    assert torch.equal(converted(x), q(x))
    assert bs.verify(converted, bs.export_ai8x(converted, tmp_path / "net.pth.tar"), [x]).passed


def test_models_for_other_targets_are_refused(tmp_path: Path) -> None:
    q = bs.quantize(nn.Linear(4, 2), [torch.randn(16, 4)])
    with pytest.raises(ExportError, match="quantized for onnxruntime"):
        bs.export_ai8x(q, tmp_path / "net.pth.tar")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    q, x = quantized("residual", "max78000")
    path = bs.export_ai8x(q, tmp_path / "net.pth.tar")
    save_evidence(tmp_path, q, bs.verify(q, path, [x]), ((x,), {}))
    return tmp_path


def test_evidence_is_verified_again(folder: Path) -> None:
    assert verify_folder(folder).passed


@pytest.mark.parametrize("name", ["net.pth.tar", "net.yaml"])
def test_changed_and_missing_files_are_told(folder: Path, name: str) -> None:
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content + b"\n")
    with pytest.raises(VerificationError, match=f"{name} is not the file that was certified"):
        verify_folder(folder)
    (folder / name).unlink()
    with pytest.raises(VerificationError, match=f"{name}, which the certificate is about, is not there"):
        verify_folder(folder)


def test_another_shift_fails_the_certificate(folder: Path) -> None:
    """The certificate is about the integers: one weight moved, and the file no longer passes."""
    checkpoint = read_checkpoint(folder / "net.pth.tar")
    checkpoint["state_dict"]["second.output_shift"] += 1
    torch.save(checkpoint, folder / "net.pth.tar")
    q, x = quantized("residual", "max78000")
    assert not bs.verify(q, folder / "net.pth.tar", [x]).passed


def _without(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda checkpoint: checkpoint["extras"].pop(key)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.pop("state_dict"), "lacks `extras` or `state_dict`"),
        (_without("input_scale"), "does not say what its codes mean"),
        (lambda c: c["extras"].update(output_scale=-1.0), "must be positive"),
        (lambda c: c.update(arch="other"), "is of architecture 'other'"),
    ],
)
def test_damaged_checkpoints_are_told(folder: Path, change: Callable[[Any], Any], words: str) -> None:
    checkpoint = read_checkpoint(folder / "net.pth.tar")
    change(checkpoint)
    torch.save(checkpoint, folder / "net.pth.tar")
    with pytest.raises(CheckpointError, match=words):
        DeployedChip.open(folder / "net.pth.tar")


def test_files_that_run_code_or_are_cut_short_are_told(folder: Path) -> None:
    content = (folder / "net.pth.tar").read_bytes()
    (folder / "net.pth.tar").write_bytes(content[: len(content) // 2])
    with pytest.raises(BitsmithError):
        DeployedChip.open(folder / "net.pth.tar")
    torch.save({"state_dict": {}, "extras": {"run": print}}, folder / "net.pth.tar")
    with pytest.raises(CheckpointError):
        DeployedChip.open(folder / "net.pth.tar")


def test_quantize_command_ends_in_files_and_certificate(tmp_path: Path) -> None:
    import numpy as np
    from typer.testing import CliRunner

    from bitsmith.cli.app import app

    generator = np.random.default_rng(0)
    np.savez(tmp_path / "data.npz", x=generator.normal(size=(40, 1, 8, 8)).astype(np.float32), y=np.arange(40) % 10)
    (tmp_path / "model.py").write_text(
        "import torch\n\ndef net():\n    torch.manual_seed(0)\n    return torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3, "
        "padding=1), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(256, 10)).eval()\n"
    )
    arguments = ["quantize", f"{tmp_path / 'model.py'}:net", "--calibration", str(tmp_path / "data.npz")]
    arguments += ["--validation", str(tmp_path / "data.npz"), "--target", "max78000", "-o", str(tmp_path / "out")]
    arguments += ["--calibration-samples", "20"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"model.pth.tar", "model.yaml", "certificate.json", "report.json", "recipe.yaml"} <= names
    assert "bit for bit" in result.output
    assert json.loads((tmp_path / "out" / "certificate.json").read_text())["engine"] == "ai8x"
    again = CliRunner().invoke(app, ["verify", str(tmp_path / "out")])
    assert again.exit_code == 0, again.output
