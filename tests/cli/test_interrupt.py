"""Ctrl-C: one line, status 130, and the results of earlier runs as they were."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

FILE = """
import time
from pathlib import Path
import torch
from torch import nn


def build():
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 3))


class Slow:
    def __len__(self):
        return 1000

    def __iter__(self):
        for _ in range(1000):
            yield torch.rand(8, 3, 2, 2), torch.zeros(8, dtype=torch.int64)
            Path("working").touch()
            time.sleep(0.05)
"""
# A shell's background jobs ignore the signal, and so would their children.
RUN = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from bitsmith.cli import main; main()"


@pytest.mark.parametrize("command", ["quantize", "evaluate"])
def test_an_interrupted_command_says_so_and_leaves_what_was_there(tmp_path: Path, command: str) -> None:
    (tmp_path / "net.py").write_text(FILE)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.onnx").write_text("of an earlier run")
    arguments = [command, "net.py:build", "--calibration", "net.py:Slow", "--validation", "net.py:Slow", "-o", "out"]
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, *arguments], cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        deadline = time.monotonic() + 240
        while not (tmp_path / "working").exists() and time.monotonic() < deadline:
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 130
    assert out == ""
    assert [line for line in error.splitlines() if line.strip()] == [
        "interrupted: no half file was left; a sweep, and a run with --resume, go on where they were"
    ]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.onnx"]
    assert (tmp_path / "out" / "model.onnx").read_text() == "of an earlier run"
