"""A run that was killed goes on where it stopped, and ends at the same bits; a folder of another run is refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import bitsmith as bs
from bitsmith.calibrate import block_steps
from bitsmith.errors import CheckpointError
from bitsmith.recipe import bits_recipe

SCRIPT = """
import sys, time, torch
sys.path.insert(0, {folder!r})
import bitsmith as bs
from test_resume import data, net, recipe
torch.set_num_threads(1)
bs.quantize(net(), data(), recipe(), resume=sys.argv[1], progress=lambda *call: time.sleep(0.01))
"""


def net() -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for index in range(5):
        layers += [nn.Conv2d(3 if index == 0 else 6, 6, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers)


def data() -> list[torch.Tensor]:
    return [torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(1))]


def recipe(seed: int = 0) -> bs.Recipe:
    options = {"iterations": 60, "batch_size": 8, "layers": 1, "seed": seed}
    return bits_recipe(3, 4, steps=("fold_batch_norm", {"reconstruct": options}))


@pytest.fixture(autouse=True)
def _one_thread() -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    script = SCRIPT.format(folder=str(Path(__file__).parent))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", script, str(folder)], env=environment)
    deadline = time.monotonic() + 60
    while len(list(folder.glob("block-*.safetensors"))) < 2:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = len(list(folder.glob("block-*.safetensors")))
    assert 2 <= kept < 5
    learned = []
    inner = block_steps.reconstruct
    monkeypatch.setattr(block_steps, "reconstruct", lambda *args: (learned.append(1), inner(*args)))
    resumed = bs.quantize(net(), data(), recipe(), resume=folder)
    assert len(learned) == 5 - kept
    whole = bs.quantize(net(), data(), recipe())
    state = resumed.graph.state_dict()
    for key, value in whole.graph.state_dict().items():
        assert torch.equal(value, state[key]), key
    assert [e.error_after for e in resumed.report.steps] == [e.error_after for e in whole.report.steps]


@pytest.mark.parametrize("step", ["gptq", "learned_rounding"])
def test_steps_on_layers_go_on_too(tmp_path: Path, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = bits_recipe(3, 4, steps=("fold_batch_norm", step, "bias_correction"))
    whole = bs.quantize(net(), data(), chosen, resume=tmp_path)
    pieces = sorted(tmp_path.glob("layer-*.safetensors"))
    assert len(pieces) == 5
    for piece in pieces[3:]:
        piece.unlink()
    again = bs.quantize(net(), data(), chosen, resume=tmp_path)
    state = again.graph.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in whole.graph.state_dict().items())
    seconds = [[entry.seconds for entry in q.report.steps if entry.step == step] for q in (whole, again)]
    assert [a == b for a, b in zip(*seconds)] == [True, True, True, False, False]


def test_the_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    bs.quantize(net(), data(), recipe(), resume=tmp_path)
    with pytest.raises(CheckpointError, match="another model, recipe"):
        bs.quantize(net(), data(), recipe(seed=1), resume=tmp_path)
    changed = net()
    changed[0].weight.data[0, 0, 0, 0] += 1e-3
    with pytest.raises(CheckpointError, match="another model, recipe"):
        bs.quantize(changed, data(), recipe(), resume=tmp_path)


def test_a_damaged_piece_says_what_to_do(tmp_path: Path) -> None:
    bs.quantize(net(), data(), recipe(), resume=tmp_path)
    piece = sorted(tmp_path.glob("block-*.safetensors"))[1]
    piece.write_bytes(piece.read_bytes()[:40])
    with pytest.raises(CheckpointError, match="delete it"):
        bs.quantize(net(), data(), recipe(), resume=tmp_path)


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "weights.safetensors").write_bytes(b"mine")
    with pytest.raises(CheckpointError, match="empty folder"):
        bs.quantize(net(), data(), recipe(), resume=tmp_path)
    assert (tmp_path / "weights.safetensors").read_bytes() == b"mine"
