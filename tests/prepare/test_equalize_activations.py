"""Activation equalization: the function stays, and ranges become what the paper's equation says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bitsmith as bs
from bitsmith.capture import capture, read_batches
from bitsmith.prepare.equalize import channel_ends
from bitsmith.prepare.equalize_activations import equalize_activations
from bitsmith.recipe import Recipe, load_recipe
from bitsmith.steps import EqualizeActivations

INT8 = load_recipe("int8")


class _RmsNorm(nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(features) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * self.weight


class _Block(nn.Module):
    """A transformer's feed-forward block with outlying channels behind its norm."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.gate, self.up, self.down = norm, nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)
        with torch.no_grad():
            norm.weight[3], norm.weight[7] = 40.0, 90.0  # type: ignore[index, operator]

    def forward(self, x: Tensor) -> Any:
        y = self.norm(x)
        return x + self.down(torch.nn.functional.silu(self.gate(y)) * self.up(y))


MODELS = {
    "layer norm": (lambda: _Block(nn.LayerNorm(16)), (8, 5, 16)),
    "norm by hand": (lambda: _Block(_RmsNorm(16)), (8, 5, 16)),
    "convolutions": (
        lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 4, 3)), (8, 3, 10, 10)),
}  # fmt: skip


def _capture(name: str) -> tuple[Any, list[Any], Tensor]:
    torch.manual_seed(0)
    make, shape = MODELS[name]
    x = torch.randn(shape)
    model = make().eval()
    batches = read_batches(model, [x])
    return capture(model, batches[0]), batches, x


@pytest.mark.parametrize("placement", ["fx", "layerwise"])
@pytest.mark.parametrize("alpha", [0.5, 0.8, "search"])
@pytest.mark.parametrize("name", MODELS)
def test_the_function_stays(name: str, alpha: Any, placement: Any) -> None:
    graph, batches, x = _capture(name)
    recipe = INT8.model_copy(update={"placement": placement})
    with torch.no_grad():
        before = graph(x)
        note = equalize_activations(graph, batches, EqualizeActivations(alpha=alpha), recipe)
        torch.testing.assert_close(graph(x), before, rtol=1e-4, atol=1e-5 * float(before.abs().max()))
    assert note.startswith("scaled what")


@pytest.mark.parametrize("name", ["layer norm", "norm by hand"])
def test_ranges_follow_the_papers_equation(name: str) -> None:
    """max|X'_j| is max|X_j|^(1-alpha) max|W_j|^(1-alpha), up to a factor common to all channels."""
    graph, batches, _ = _capture(name)
    alpha = 0.6
    readers = [n for n in graph.graph.nodes if n.target in ("gate", "up")]
    act = torch.stack([torch.maximum(-low, high) for low, high in channel_ends(graph, batches, readers).values()])
    weight = torch.maximum(graph.gate.weight.abs().amax(0), graph.up.weight.abs().amax(0)).double()
    with torch.no_grad():
        equalize_activations(graph, batches, EqualizeActivations(alpha=alpha), INT8)
    found = torch.stack([torch.maximum(-low, high) for low, high in channel_ends(graph, batches, readers).values()])
    expected = (act.amax(0) * weight) ** (1 - alpha)
    ratio = found.amax(0) / expected
    torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), rtol=1e-4, atol=0)


def test_outliers_cost_less_afterwards() -> None:
    torch.manual_seed(0)
    model, x = _Block(nn.LayerNorm(16)), torch.randn(512, 5, 16)
    steps = ("fold_batch_norm", {"equalize_activations": {"alpha": "search"}})
    recipe = Recipe.model_validate({**INT8.model_dump(), "steps": steps})
    plain = bs.quantize(model, [x], Recipe.model_validate({**INT8.model_dump(), "steps": ("fold_batch_norm",)}))
    q = bs.quantize(model, [x], recipe)
    assert any(note.startswith("equalize_activations: scaled") for note in q.report.notes)
    assert q.report.output_sqnr_db > plain.report.output_sqnr_db + 3


class _Twice(nn.Module):
    """Two pairs of layers, each of which reads one norm's output, met in the order first, second, first."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(2))
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[0](x)
        z = self.norms[1](self.layers[0](y))
        return self.layers[1](z).relu() + self.layers[2](y).relu() + self.layers[3](z).relu()


def test_groups_that_interleave_stay_apart() -> None:
    torch.manual_seed(0)
    model, x = _Twice().eval(), torch.randn(32, 16)
    batches = read_batches(model, [x])
    graph = capture(model, batches[0])
    with torch.no_grad():
        equalize_activations(graph, batches, EqualizeActivations(), INT8)
        torch.testing.assert_close(graph(x), model(x), rtol=1e-4, atol=1e-4)


def _mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 8))


def test_inserted_multiplications_are_saved_and_exported(tmp_path: Path) -> None:
    model, x = _mlp(), torch.randn(64, 5, 16) * torch.logspace(-1, 2, 16)
    steps = ("fold_batch_norm", "equalize_activations")
    q = bs.quantize(model, [x], Recipe.model_validate({**INT8.model_dump(), "steps": steps}), placement="layerwise")
    assert {"0_input_scale", "2_input_scale"} <= set(dict(q.graph.named_buffers()))
    bs.save(q, tmp_path / "saved")
    torch.testing.assert_close(bs.load(tmp_path / "saved", _mlp())(x), q(x), rtol=0, atol=0)
    certificate = bs.verify(q, bs.export_onnx(q, tmp_path / "m.onnx"), [x])
    assert certificate.passed


class _PostNorm(nn.Module):
    """Attention's three layers on a norm whose output is added to theirs: no factor can go into the norm.

    Two channels are large, and what attention takes from the others is most of the result.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(16, 16), nn.LayerNorm(16)
        self.query, self.key, self.value = (nn.Linear(16, 16) for _ in range(3))
        with torch.no_grad():
            self.norm.weight[3], self.norm.weight[7] = 60.0, 90.0
            self.query.weight *= 0.02
            self.key.weight *= 0.02
            self.value.weight *= 20.0
            self.value.weight[:, [3, 7]] *= 0.02

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.first(x))
        return y + torch.softmax(self.query(y) @ self.key(y).mT, -1) @ self.value(y)


def test_layers_behind_a_norm_that_others_read_share_one_multiplication(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = _PostNorm().eval(), torch.randn(64, 5, 16)
    plain = bs.quantize(model, [x], Recipe.model_validate({**INT8.model_dump(), "steps": ("fold_batch_norm",)}))
    steps = ("fold_batch_norm", "equalize_activations")
    q = bs.quantize(model, [x], Recipe.model_validate({**INT8.model_dump(), "steps": steps}))
    assert [name for name, _ in q.graph.named_buffers() if name.endswith("input_scale")] == ["query_input_scale"]
    assert q.report.output_sqnr_db > plain.report.output_sqnr_db + 10
    bs.save(q, tmp_path / "saved")
    torch.testing.assert_close(bs.load(tmp_path / "saved", _PostNorm().eval())(x), q(x), rtol=0, atol=0)
    assert bs.verify(q, bs.export_onnx(q, tmp_path / "m.onnx"), [x]).passed


@pytest.mark.parametrize(("insert", "expected"), [(None, ["2_input_scale"]), (False, [])])
def test_only_what_is_computed_in_float_is_multiplied_unless_asked(insert: Any, expected: list[str]) -> None:
    """The model's own input is left alone, GELU's output is float already."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 8)).eval()
    batches = read_batches(model, [torch.randn(64, 5, 16)])
    graph = capture(model, batches[0])
    with torch.no_grad():
        equalize_activations(graph, batches, EqualizeActivations(alpha=0.5, insert=insert), INT8)
    assert [name for name, _ in graph.named_buffers() if name.endswith("input_scale")] == expected
