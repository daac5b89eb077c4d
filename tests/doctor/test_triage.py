"""The triage: is it quantization at all?"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import bitsmith as bs
from bitsmith.cli.app import app
from bitsmith.demo import digits_net
from bitsmith.doctor import triage
from bitsmith.doctor.triage import better_recipe, judge, training_call


@pytest.mark.parametrize(
    ("bits_16", "bits_8", "cause"),
    [(91.9, 91.5, "none"), (91.9, 80.0, "quantization"), (60.0, 58.0, "elsewhere"), (60.0, 91.9, "elsewhere")],
)
def test_the_verdict_follows_from_three_numbers(bits_16: float, bits_8: float, cause: str) -> None:
    found, verdict = judge("top1", 92.0, bits_16, bits_8, {"conv1": 3.0}, "recipe 'w8a8-best'", "train")
    assert found == cause
    assert ("conv1" in verdict) == (cause == "quantization")


@pytest.mark.parametrize("target", ["onnxruntime", "tda4vm", "am68a", "max78000"])
def test_the_next_recipe_is_one_that_the_target_takes(target: str) -> None:
    words = better_recipe(bs.get_target(target))
    bs.get_target(target).check(bs.load_recipe(words.split("'")[-2]))


@pytest.mark.parametrize("target", ["onnxruntime", "tda4vm", "am68a"])
def test_the_call_that_starts_training_runs(target: str) -> None:
    names = {"bitsmith": bs, "model": nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), "x": torch.randn(4, 3, 8, 8)}
    p = eval(training_call(bs.get_target(target)), names)
    assert p.target.name == target


def compare(threshold: float) -> nn.Module:
    """Class 0 where the second input is above a threshold."""
    layer = nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.0, 1.0], [0.0, -1.0]]))
        layer.bias.copy_(torch.tensor([-threshold, threshold]))
    return nn.Sequential(layer).eval()


def sample(low: float, high: float, wide: float) -> tuple[Tensor, Tensor]:
    """The first input takes the range, the second is one of two values, the lower of which is class 1."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(0, 2, (256,), generator=generator)
    second = torch.where(y == 0, high, low)
    return torch.stack([torch.randn(256, generator=generator) * wide, second], 1), y


def test_a_loss_of_8_bits() -> None:
    x, y = sample(-3.0, 3.0, wide=1000.0)  # a step of 8 bits is about 24, one of 16 bits 0.1
    found = triage(compare(0.0), [x], "onnxruntime", [(x, y)])
    assert (found.measure, found.float_model, found.bits_16, found.cause) == ("top1", 100.0, 100.0, "quantization")


def test_a_loss_of_the_data() -> None:
    x, y = sample(5.0, 15.0, wide=1.0)
    unlike, _ = sample(-3.0, 3.0, wide=1.0)  # its range ends below what tells the classes apart
    found = triage(compare(10.0), [unlike], "onnxruntime", [(x, y)])
    assert (found.float_model, found.cause) == (100.0, "elsewhere")
    assert found.bits_16 < 80.0


def test_no_loss() -> None:
    x, y = sample(-3.0, 3.0, wide=1.0)
    assert triage(compare(0.0), [x], "tda4vm", [(x, y)]).cause == "none"


def test_rule_d28_in_a_diagnosis() -> None:
    net = digits_net().eval()
    x = torch.rand(32, 1, 8, 8)
    diagnosis = bs.doctor(net, x, calibration=[x], validation=[x])
    assert diagnosis.triage is not None
    assert diagnosis.triage.measure in ("agreement", "sqnr_db")
    assert [f.rule for f in diagnosis.findings if f.rule == "D28"] == ["D28"]
    assert "D28" not in diagnosis.not_run


@pytest.fixture
def factory(tmp_path: Path) -> str:
    path = tmp_path / "nets.py"
    path.write_text(
        "from torch import nn\n"
        "def good():\n    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU6())\n"
        "def bad():\n    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(5))\n"
    )
    return str(path)


def test_the_command_prints_json_and_sets_its_status(factory: str, tmp_path: Path) -> None:
    runner = CliRunner()
    good = runner.invoke(app, ["doctor", f"{factory}:good", "--shape", "3,16,16", "--json"])
    assert good.exit_code == 0, good.output
    assert [f["rule"] for f in json.loads(good.stdout)["findings"]] == ["D8"]
    bad = runner.invoke(app, ["doctor", f"{factory}:bad", "--shape", "3,16,16", "--target", "tda4vm"])
    assert bad.exit_code == 1
    assert "D12" in bad.output


def test_a_quiet_command_prints_the_diagnosis_alone(factory: str, tmp_path: Path) -> None:
    fix = ["--fix", "relu6", "-o", str(tmp_path / "fixed.pt2")]
    done = CliRunner().invoke(app, ["doctor", f"{factory}:good", "--shape", "3,16,16", "-q", *fix])
    assert done.exit_code == 0, done.output
    assert done.stderr == ""
    assert "D8" in done.stdout
    assert (tmp_path / "fixed.pt2").exists()


def test_the_command_operates(factory: str, tmp_path: Path) -> None:
    runner = CliRunner()
    out = tmp_path / "fixed.pt2"
    done = runner.invoke(app, ["doctor", f"{factory}:good", "--shape", "3,16,16", "--fix", "relu6", "-o", str(out)])
    assert done.exit_code == 0, done.output
    again = runner.invoke(app, ["doctor", str(out), "--shape", "3,16,16", "--json"])
    assert again.exit_code == 0, again.output
    assert "D8" not in [f["rule"] for f in json.loads(again.stdout)["findings"]]


@pytest.mark.parametrize(
    "options", [["--fix", "relu6"], ["-o", "x.pt2"], ["--fix", "relu6", "-o", "x.onnx"], ["--shape", "a"]]
)
def test_wrong_usage_is_refused(factory: str, options: list[str]) -> None:
    assert CliRunner().invoke(app, ["doctor", f"{factory}:good", *options]).exit_code == 2
