"""The whole path on a real network: train a little, convert, export, and hold the file against the simulation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import bitsmith as bs


@pytest.mark.parametrize(("recipe", "style"), [("int8", "qdq"), ("w4a4-fast", "qcdq")])
def test_file_and_training_time_simulation_agree(data_folder: Path, tmp_path: Path, recipe: str, style: str) -> None:
    from benchmarks import nets

    model, calibration, test, _ = nets.load("resnet20")
    p = bs.prepare_qat(model, recipe, calibration=calibration[:1], schedule=bs.QATSchedule(total_steps=4))
    optimizer = torch.optim.Adam(p.parameters(), lr=1e-4)
    for x, y in calibration[1:5]:
        optimizer.zero_grad()
        F.cross_entropy(p(x[:32]), y[:32]).backward()
        optimizer.step()
    run = bs.deploy(bs.export_onnx(bs.convert(p), tmp_path / "m.onnx", style=style))
    x = torch.cat([x for x, _ in test[:4]])
    with torch.no_grad():
        agree = (run(x).argmax(1) == p.eval()(x).argmax(1)).float().mean()
    assert agree >= 0.999
