"""The examples on quantization by hand run on a few real images, and say what is missing where there are none."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("name", ["mobilenet_v1", "eager_tutorial"])
def test_without_data_they_say_what_is_missing(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](str(tmp_path))
    assert "skipped: imagenet_mobilenet_v1_0.25_224.safetensors and" in capsys.readouterr().out


def test_resnet50_says_what_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "resnet50.py"))["main"]("weights.pth")
    assert "skipped: weights.pth, TRAIN, VALIDATION not found" in capsys.readouterr().out


def test_resnet50_s_flow_on_a_small_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for part in ("train", "val"):
        for label in range(3):
            (tmp_path / part / str(label)).mkdir(parents=True)
            pixels = np.random.default_rng(label).integers(0, 255, (230, 230, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / part / str(label) / "image.png")
    (tmp_path / "weights.pth").touch()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 6)).eval()
    script = runpy.run_path(str(EXAMPLES / "resnet50.py"))
    script["main"].__globals__["load_model"] = lambda name, weights: net
    script["main"](*(str(tmp_path / name) for name in ("weights.pth", "train", "val", "net.pt")))
    printed = capsys.readouterr().out
    assert printed.count("images/s") == 2
    assert torch.jit.load(tmp_path / "net.pt")(torch.zeros(1, 3, 224, 224)).shape == (1, 6)


@pytest.mark.slow
def test_the_eager_tutorial(data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "net.pt"
    runpy.run_path(str(EXAMPLES / "eager_tutorial.py"))["main"](str(data_folder), 8, str(path))
    printed = capsys.readouterr().out
    assert printed.count("accuracy on 4 images") == 4
    assert path.is_file()


@pytest.mark.slow
def test_the_hand_written_mobilenet(data_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "mobilenet_v1.py"))["main"](str(data_folder), count=8)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "4 images calibrate, 4 judge"
    assert [line.split("  ")[0] for line in lines[1:]] == [
        "float", "int8, simulated", "int8, onnxruntime", "4-bit pointwise weights, GPTQ",
    ]  # fmt: skip
    assert all("images/s" in line for line in lines[1:])
