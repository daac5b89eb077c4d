"""TorchScript and .pt2 files of dynamically quantized models, which PyTorch runs alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import bitsmith as bs
from bitsmith.errors import CaptureError, ExportError

_LOADER = """
import os, sys, torch
sys.modules["bitsmith"] = None
folder = sys.argv[1]
for name in sys.argv[2:]:
    pt2 = f"{folder}/{name}.pt2"
    file = torch.export.load(pt2).module() if os.path.exists(pt2) else torch.jit.load(f"{folder}/{name}.pt")
    for inputs, expected in torch.load(f"{folder}/{name}.pth", weights_only=True):
        with torch.no_grad():
            found = torch.utils._pytree.tree_leaves(file(*inputs))
        assert all(map(torch.equal, found, expected)), name
"""


class Decoder(nn.Module):
    """Attention to another sequence, whose projections are parts of a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.TransformerDecoderLayer(16, 4, 32, batch_first=True)

    def forward(self, x: Tensor, memory: Tensor) -> dict[str, Tensor]:
        return {"y": self.decoder(x, memory)}


def _ids(*shape: int) -> Tensor:
    return torch.randint(0, 20, shape)


MODELS: dict[str, tuple[Any, Any, Any]] = {
    "lstm": (nn.LSTM(8, 16, 2, bidirectional=True), (torch.randn(4, 2, 8),), (torch.randn(7, 3, 8),)),
    "gru": (nn.Sequential(nn.Linear(8, 8), nn.GRU(8, 16)), (torch.randn(4, 2, 8),), (torch.randn(7, 3, 8),)),
    "states": (
        nn.LSTM(8, 16), (torch.randn(4, 2, 8), (torch.randn(1, 2, 16), torch.randn(1, 2, 16))),
        (torch.randn(7, 3, 8), (torch.randn(1, 3, 16), torch.randn(1, 3, 16))),
    ),
    "bag": (
        nn.EmbeddingBag(20, 6, padding_idx=3), (_ids(9), torch.tensor([0, 2, 2])),
        (_ids(15), torch.tensor([0, 1, 8, 9])),
    ),
    "sum": (nn.EmbeddingBag(20, 6, mode="sum"), (_ids(9), torch.tensor([0, 2])), (_ids(15), torch.tensor([0, 1, 9]))),
    "tagger": (nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 4)), (_ids(2, 3),), (_ids(5, 1),)),
    "decoder": (
        Decoder(), (torch.randn(2, 5, 16), torch.randn(2, 7, 16)), (torch.randn(3, 8, 16), torch.randn(3, 9, 16)),
    ),
}  # fmt: skip


def test_files_run_without_bitsmith_at_other_sizes(tmp_path: Path) -> None:
    for name, (model, example, other) in MODELS.items():
        q = bs.quantize_dynamic(model.eval(), target="torch")
        q(*example)
        bs.export_torchscript(q, tmp_path / f"{name}.pt")
        run = bs.deploy(q, engine="torch")
        # A bag's rows are summed in another order there, by a product of matrices.
        cases = [(x, tree_leaves(torch.jit.load(tmp_path / f"{name}.pt")(*x))) for x in (example, other)]
        for x, found in cases:
            for a, b in zip(found, tree_leaves(run(*x)), strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-6 if name == "bag" else 0)
        torch.save(cases, tmp_path / f"{name}.pth")
    subprocess.run([sys.executable, "-W", "ignore", "-c", _LOADER, str(tmp_path), *MODELS], check=True)


def test_pt2_files_run_without_bitsmith_at_other_sizes(tmp_path: Path) -> None:
    names = ("tagger", "decoder")
    for name in names:
        model, example, other = MODELS[name]
        q = bs.quantize_dynamic(model.eval())
        q(*example)
        bs.export_pt2(q, tmp_path / f"{name}.pt2")
        torch.save([(x, tree_leaves(q(*x))) for x in (example, other)], tmp_path / f"{name}.pth")
    subprocess.run([sys.executable, "-W", "ignore", "-c", _LOADER, str(tmp_path), *names], check=True)


def test_a_certificate_of_such_a_file(tmp_path: Path) -> None:
    model, example, _ = MODELS["lstm"]
    q = bs.quantize_dynamic(model.eval(), target="torch", example_inputs=example)
    certificate = bs.verify(q, bs.export_torchscript(q, tmp_path / "m.pt"), example)
    assert certificate.passed, certificate.verdict


def test_what_has_no_file_says_so(tmp_path: Path) -> None:
    q = bs.quantize_dynamic(nn.LSTM(8, 16), example_inputs=torch.randn(4, 2, 8))
    with pytest.raises(ExportError, match="'int8' alone"):
        bs.export_torchscript(q, tmp_path / "m.pt", style="qcdq")
    with pytest.raises(ExportError, match="export_torchscript or export_onnx"):
        bs.export_pt2(q, tmp_path / "m.pt2")
    packed = nn.utils.rnn.pack_sequence([torch.randn(3, 8), torch.randn(2, 8)])
    q = bs.quantize_dynamic(nn.LSTM(8, 16))
    q(packed)
    for export in (bs.export_onnx, bs.export_torchscript):
        with pytest.raises(CaptureError, match=r"no packed sequences.*engine='torch'"):
            export(q, tmp_path / "m.pt")
