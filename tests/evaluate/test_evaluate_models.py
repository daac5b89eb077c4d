"""Models by name."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from bitsmith.demo import WEIGHTS, DigitsNet, digits, digits_net
from bitsmith.errors import CaptureError, CheckpointError, MissingExtraError
from bitsmith.evaluate import load_model, load_weights, weights_note
from bitsmith.evaluate.factory import load_callable

REGISTERED: list[torch.library.Library] = []
HAS_VISION = all(importlib.util.find_spec(name) for name in ("timm", "torchvision"))
needs_vision = pytest.mark.skipif(not HAS_VISION, reason="the vision extra is not installed")


@pytest.fixture
def torchvision_operators():
    """Schemas of the compiled operators, where torchvision comes without them: models need no more."""
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            library = torch.library.Library("torchvision", "FRAGMENT")
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            REGISTERED.append(library)


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    """A user's file with a neighbour that it imports."""
    (tmp_path / "widths.py").write_text("WIDTH = 3\n")
    path = tmp_path / "net.py"
    path.write_text(
        "from torch import nn\nfrom widths import WIDTH\n\n"
        "class Net(nn.Sequential):\n    def __init__(self):\n"
        "        super().__init__(nn.Linear(4, WIDTH))\n\n"
        "def build():\n    return Net()\n\ndef broken():\n    return 1 / 0\n\n"
        "def wrong():\n    return 'a string'\n"
    )
    return path


def test_a_factory_in_a_file_gives_a_model_in_eval_mode(model_file: Path) -> None:
    model = load_model(f"{model_file}:build")
    assert model(torch.zeros(2, 4)).shape == (2, 3)
    assert not model.training


def test_a_class_is_a_factory_too(model_file: Path) -> None:
    assert type(load_model(f"{model_file}:Net")).__name__ == "Net"


def test_a_factory_in_a_package_is_found() -> None:
    assert isinstance(load_model("bitsmith.demo:digits_net"), DigitsNet)


def test_the_current_folder_is_on_the_path(model_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model_file.parent)
    assert load_model("net:build")(torch.zeros(1, 4)).shape == (1, 3)
    assert str(model_file.parent) not in sys.path


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("broken", ["ZeroDivisionError", "net.py, line 12"]),
        ("wrong", ["returned a str", "torch.nn.Module"]),
        ("absent", ["has no 'absent'", "build"]),
    ],
)
def test_a_bad_factory_is_named_with_what_is_wrong(model_file: Path, name: str, words: list[str]) -> None:
    with pytest.raises(CaptureError) as error:
        load_model(f"{model_file}:{name}")
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize("spec", ["resnet18", "nowhere.py:f", "no_such_package:f", "torchvision:", ":f"])
def test_what_names_no_model_is_quoted_with_the_forms(spec: str) -> None:
    with pytest.raises(CaptureError, match="'"):
        load_model(spec)


def test_a_module_that_needs_a_missing_module_says_which(tmp_path: Path) -> None:
    (tmp_path / "needy.py").write_text("import no_such_thing\n")
    with pytest.raises(CaptureError, match="no_such_thing"):
        load_callable(f"{tmp_path / 'needy.py'}:f", "a function", CaptureError)


@needs_vision
def test_torchvision_and_timm_models_come_without_the_network(torchvision_operators: None) -> None:
    assert load_model("torchvision:mobilenet_v2")(torch.zeros(1, 3, 32, 32)).shape == (1, 1000)
    assert load_model("timm:resnet10t")(torch.zeros(1, 3, 32, 32)).shape == (1, 1000)
    with pytest.raises(CaptureError, match="did you mean resnet18"):
        load_model("torchvision:resnet81")
    with pytest.raises(CaptureError, match="timm has no model"):
        load_model("timm:resnet_nothing")


@needs_vision
def test_torchvision_without_its_operators_names_the_fix() -> None:
    # A failed import leaves torchvision half there, so this needs a process of its own.
    code = (
        "import sys, builtins\nimport torch\nfrom bitsmith.evaluate.models import load_model\n"
        "real = builtins.__import__\n"
        "def broken(name, *a, **k):\n"
        "    if name.startswith('torchvision'):\n"
        "        raise RuntimeError('operator torchvision::nms does not exist')\n"
        "    return real(name, *a, **k)\n"
        "builtins.__import__ = broken\n"
        "for _ in range(2):\n"
        "    try: load_model('torchvision:resnet18')\n"
        "    except Exception as error: print(type(error).__name__, error)\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    lines = out.splitlines()
    assert len(lines) == 2
    for line in lines:
        assert line.startswith("MissingExtraError torchvision's compiled operators are missing or do not match")
        assert "pip install" in line


def test_a_missing_torchvision_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torchvision", "torchvision.models", "timm"):
        monkeypatch.setitem(sys.modules, name, None)
    for spec in ("torchvision:resnet18", "timm:resnet18"):
        with pytest.raises(MissingExtraError, match=r"pip install 'bitsmith\[vision\]'"):
            load_model(spec)


def test_random_weights_are_announced() -> None:
    assert "random weights" in str(weights_note("torchvision:resnet18", None))
    assert weights_note("torchvision:resnet18", "w.pth") is None
    assert weights_note("net.py:build", None) is None


def test_a_pt2_file_computes_what_was_exported(tmp_path: Path) -> None:
    net, x = digits_net(), torch.rand(2, 1, 8, 8)
    torch.export.save(torch.export.export(net, (x,)), tmp_path / "net.pt2")
    with torch.no_grad():
        model = load_model(str(tmp_path / "net.pt2"))
        assert torch.equal(model(x), net(x))
    assert model.train().eval() is model  # a program's mode is built in; switching it does nothing


def test_the_demo_net_knows_its_digits() -> None:
    _, (x, y) = digits()
    with torch.no_grad():
        accuracy = (digits_net()(x).argmax(1) == y).double().mean().item()
    assert accuracy >= 0.985
    assert WEIGHTS.stat().st_size < 300_000


@pytest.mark.parametrize("wrap", ["plain", "state_dict", "model", "nested", "module.", "_orig_mod.module."])
def test_weights_load_however_they_were_wrapped(tmp_path: Path, wrap: str) -> None:
    state = nn.Linear(4, 3).state_dict()
    saved: dict[str, object] = {
        "plain": state,
        "state_dict": {"state_dict": state, "epoch": 3},
        "model": {"model": state, "optimizer": {"lr": 0.1}},
        "nested": {"model": {"state_dict": state}},
    }.get(wrap, {wrap + key: value for key, value in state.items()})
    torch.save(saved, tmp_path / "w.pth")
    found = load_weights(nn.Linear(4, 3), tmp_path / "w.pth").state_dict()
    assert all(torch.equal(found[key], state[key]) for key in state)


def test_a_model_that_has_a_part_called_module_keeps_its_names(tmp_path: Path) -> None:
    net = nn.Sequential()
    net.module = nn.Linear(4, 3)
    torch.save(net.state_dict(), tmp_path / "w.pth")
    load_weights(net, tmp_path / "w.pth")


def test_safetensors_weights_load_and_batch_counters_may_be_missing(tmp_path: Path) -> None:
    net = digits_net()
    state = {k: v for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}
    save_file(state, tmp_path / "w.safetensors")
    loaded = load_model("bitsmith.demo:DigitsNet", tmp_path / "w.safetensors")
    assert torch.equal(loaded.linear.weight, net.linear.weight)


def test_weights_that_do_not_fit_change_nothing(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    before = net[0].weight.clone()
    torch.save(
        {"0.weight": torch.zeros(3, 4), "0.bias": torch.zeros(3), "1.weight": torch.zeros(9, 9)},
        tmp_path / "w.pt",
    )
    with pytest.raises(CheckpointError, match=r"1\.bias"):
        load_weights(net, tmp_path / "w.pt")
    assert torch.equal(net[0].weight, before)
