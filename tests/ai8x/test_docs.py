"""The Python of the page runs."""

from __future__ import annotations

import re
from pathlib import Path

import torch

PAGE = Path(__file__).parents[2] / "docs" / "max78000.md"


def test_the_python_of_the_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    state = {"c.op.weight": torch.ones(2, 1, 3, 3)}
    torch.save({"epoch": 1, "arch": "a", "state_dict": state, "extras": {}}, "qat_best.pth.tar")
    layer = "  - {processors: 1, out_offset: 0, op: conv2d, activate: ReLU, quantization: 4}\n"
    Path("proj.yaml").write_text("arch: a\ndataset: d\nlayers:\n" + layer)
    checkpoints = PAGE.read_text(encoding="utf-8").partition("### From Python")[2]
    exec(re.findall(r"```python\n(.*?)```", checkpoints, re.DOTALL)[0], {})
    assert capsys.readouterr().out == "[]\n"
