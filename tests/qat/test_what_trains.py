"""What capture in eval mode hides, and training needs: dropouts, parameters read as constants, structures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bitsmith as bs
from bitsmith.qat import QATGraph


class DropPath(nn.Module):
    """Stochastic depth as models write it."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        kept = torch.rand(len(x), *[1] * (x.ndim - 1), device=x.device) < 0.5
        return x * kept / 0.5


class Transformer(nn.Module):
    """Embedding tied to the output, learned positions, functional dropout, stochastic depth, a dict of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.positions = nn.Parameter(torch.randn(1, 6, 8))
        self.first, self.second, self.norm = nn.Linear(8, 16), nn.Linear(16, 8), nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True)
        self.drop_path = DropPath()
        self.out = nn.Linear(8, 20, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, tokens: Tensor, scale: Tensor | None = None) -> dict[str, Tensor]:
        x = self.embedding(tokens) + self.positions
        x = x + self.attention(x, x, x, need_weights=False)[0]
        y = F.dropout(F.relu(self.first(self.norm(x))), 0.3, self.training)
        x = x + self.drop_path(self.second(y))
        return {"scores": self.out(x), "state": x if scale is None else x * scale}


def tokens(count: int = 8) -> Tensor:
    return torch.randint(20, (count, 6), generator=torch.Generator().manual_seed(0))


def prepared(**options: Any) -> tuple[QATGraph, Transformer]:
    torch.manual_seed(0)
    net = Transformer()
    x = {"tokens": tokens(), "scale": torch.ones(8, 1, 1)}
    return bs.prepare_qat(net, "int8", x, calibration=[x], **options), net


def test_outputs_and_inputs_keep_their_structure() -> None:
    p, net = prepared()
    p.eval(), net.eval()
    for arguments, named in (((tokens(4), torch.ones(4, 1, 1)), {}), ((tokens(4),), {"scale": torch.ones(4, 1, 1)})):
        found, expected = p(*arguments, **named), net(*arguments, **named)
        assert found.keys() == expected.keys()
        assert all((found[k] - expected[k]).abs().max() < 0.1 * expected[k].abs().max() for k in found)


def test_functional_dropout_and_stochastic_depth_act_in_train_mode() -> None:
    p, _ = prepared()
    kinds = {type(m).__name__: m for m in p.graph.modules()}
    assert kinds["Dropout"].p == 0.3
    x, ones = tokens(), torch.ones(8, 1, 1)
    for name in ("Dropout", "DropPath"):
        p.eval()
        assert torch.equal(p(x, ones)["state"], p(x, ones)["state"])
        kinds[name].train()
        assert not torch.equal(p(x, ones)["state"], p(x, ones)["state"]), name


def test_what_is_lost_is_noted_by_name() -> None:
    p, _ = prepared()
    assert any("attention (MultiheadAttention)" in note and "0.1" in note for note in p.notes)
    assert not any("drop_path" in note for note in p.notes)


def test_parameters_that_the_graph_reads_as_constants_train() -> None:
    p, net = prepared()
    optimizer = torch.optim.SGD(p.parameters(), lr=0.1)
    outputs = p(tokens(), torch.ones(8, 1, 1))
    outputs["scores"].square().sum().backward()
    optimizer.step()
    q = bs.convert(p)
    moved = {name: value for name, value in q.graph.state_dict().items() if value.shape == net.positions.shape}
    assert len(moved) == 1
    assert not torch.equal(next(iter(moved.values())), net.positions)
    assert torch.allclose(q(tokens(), torch.ones(8, 1, 1))["scores"], p.eval()(tokens(), torch.ones(8, 1, 1))["scores"],
                          atol=0.05)  # fmt: skip


def test_what_was_trained_is_saved_and_loaded(tmp_path: Path) -> None:
    p, net = prepared()
    optimizer = torch.optim.SGD(p.parameters(), lr=0.1)
    p(tokens(), torch.ones(8, 1, 1))["scores"].square().sum().backward()
    optimizer.step()
    q = bs.convert(p)
    loaded = bs.load(bs.save(q, tmp_path / "q"), net)
    arguments = tokens(), torch.ones(8, 1, 1)
    assert torch.equal(loaded(*arguments)["scores"], q(*arguments)["scores"])


def test_tied_weights_stay_tied() -> None:
    p, net = prepared()
    shared = [q for q in p.parameters() if q.shape == net.embedding.weight.shape]
    assert len(shared) == 1


def test_a_dropout_between_layer_and_norm_keeps_its_place() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(0.5), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3))
    p = bs.prepare_qat(net, "int8", torch.randn(4, 3, 8, 8))
    x = torch.randn(4, 3, 8, 8)
    p(x)
    assert any("run in float: 2" in note for note in p.notes)
    assert torch.allclose(bs.convert(p)(x), p.eval()(x), atol=0.05)
