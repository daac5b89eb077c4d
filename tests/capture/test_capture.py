"""Capture takes models as people write them: same function, any batch size, the user's names."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from capture_zoo import CASES, Case
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves

import bitsmith as bs
from bitsmith.capture import capture
from bitsmith.capture.ops import module_of
from bitsmith.verify.verify import float_operators

BY_NAME = {case.name: case for case in CASES}
zoo = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def worst(expected: Any, found: Any) -> float:
    """Largest difference relative to the largest value, over all outputs in their structure."""
    (left, structure), (right, other) = tree_flatten(expected), tree_flatten(found)
    assert structure == other
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(left, right))


@zoo
@pytest.mark.parametrize("captured_with", [1, 4])
def test_the_graph_computes_the_model_at_any_batch_size(case: Case, captured_with: int) -> None:
    model = case.model()
    graph = capture(model, case.batch(captured_with))
    for samples in (1, 3, 7):
        args, kwargs = case.batch(samples, seed=samples)
        with torch.no_grad():
            assert worst(model(*args, **kwargs), graph(*args, **kwargs)) < 1e-5


@zoo
def test_layers_keep_their_names_and_the_model_its_state(case: Case) -> None:
    model = case.model()
    for index, module in enumerate(model.modules()):
        module.training = index % 2 == 0  # a mode per module
    modes = [module.training for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    graph = capture(model, case.batch(2))
    layers = {str(node.target) for node in graph.graph.nodes if node.op == "call_module"}
    assert set(case.layers) <= layers
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    own = {parameter.data_ptr() for parameter in model.parameters()}
    assert not own & {parameter.data_ptr() for parameter in graph.parameters()}


@zoo
def test_the_quantized_model_stays_close_and_runs_deployed(case: Case) -> None:
    model, batch = case.model(), case.batch(64, seed=5)
    q = bs.quantize(model, [batch], forward=lambda m, b: m(*b[0], **b[1]))
    args, kwargs = batch
    with torch.no_grad():
        exact, simulated = tree_leaves(model(*args, **kwargs)), tree_leaves(q(*args, **kwargs))
    for a, b in zip(exact, simulated):
        assert 10 * torch.log10(a.square().sum() / (a - b).square().sum()) > 20.0  # dB
    assert q.report.coverage.quantized_fraction == 1.0
    if case.name == "LSTM in the middle":
        return  # simulated only: there is no ONNX form for it yet
    files = tree_leaves(bs.deploy(q)(*args, **kwargs))
    allowed = 0.0 if not float_operators(q) else 1e-5
    for a, b in zip(files, simulated):
        assert float((a - b).abs().max()) <= allowed * float(b.abs().max())


def test_a_layer_called_three_times_is_one_layer_with_three_inputs() -> None:
    case = BY_NAME["one conv called three times"]
    graph = capture(case.model(), case.batch(2))
    calls = [node for node in graph.graph.nodes if node.target == "conv"]
    assert len(calls) == 3
    q = bs.quantize(case.model(), [case.batch(16)[0]])
    quantizers = [module for name, module in q.graph.named_modules() if name.startswith("quantizers.")]
    assert len({float(quantizer.scale) for quantizer in quantizers}) >= 3  # one for each call


def test_tied_layers_keep_both_names() -> None:
    graph = capture(BY_NAME["tied weights"].model(), BY_NAME["tied weights"].batch(2))
    assert torch.equal(graph.get_submodule("a").weight, graph.get_submodule("b").weight)


class _Wrapped(nn.Module):
    def __init__(self, function: Any, **members: Any) -> None:
        super().__init__()
        self.function = function
        for name, member in members.items():
            setattr(self, name, member)

    def forward(self, *xs: Tensor) -> Any:
        return self.function(self, *xs)


def _vocabulary(model: nn.Module, *inputs: Tensor) -> list[str]:
    graph = capture(model.eval(), inputs)
    torch.testing.assert_close(graph(*inputs), model(*inputs))
    calls = [node for node in graph.graph.nodes if node.op.startswith("call")]
    return [type(m).__name__ if (m := module_of(n)) is not None else str(n.target) for n in calls]


IMAGE = torch.randn(2, 4, 6, 6)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda s, x: x.mean((2, 3)), ["aten.mean.dim", "aten.flatten.using_ints"]),
        (lambda s, x: x.mean(3).mean(2), ["aten.mean.dim", "aten.flatten.using_ints"]),
        (lambda s, x: x.mean(2).mean(2), ["aten.mean.dim", "aten.flatten.using_ints"]),
        (lambda s, x: x.mean(2, keepdim=True).mean(3, keepdim=True), ["aten.mean.dim"]),
        (lambda s, x: x.mean([-2, -1], True), ["aten.mean.dim"]),
        (lambda s, x: torch.cat([x, x.new_zeros(x.shape[0], 2, 6, 6)], 1), ["aten.constant_pad_nd.default"]),
        (lambda s, x: x + x.new_zeros(1, 4, 1, 1), ["aten.add.Tensor"]),
        (lambda s, x: x.view_as(x).clone().contiguous() * torch.ones_like(x[:1]), ["aten.mul.Tensor"]),
        (lambda s, x: x @ s.w, ["Linear"]),
        (lambda s, x: torch.einsum("nchw,wd->ndhc", x, s.w), ["Linear", "aten.permute.default"]),
        (
            lambda s, x: torch.einsum("nihk,njhk->nhij", x, x),
            ["aten.permute.default", "aten.permute.default", "aten.matmul.default"],
        ),
        (lambda s, x: torch.einsum("nchw,nchd->nwd", x, x), ["aten.einsum.default"]),  # two axes are summed
        (
            lambda s, x: torch.einsum("nid,njd->nij", x[:, 0], x[:, 1]),
            ["aten.permute.default", "aten.matmul.default"],
        ),
        (lambda s, x: torch.addmm(s.b, x[:, 0, 0], s.w), ["Linear"]),
    ],
)  # fmt: skip
def test_many_spellings_become_one_vocabulary(function: Any, expected: list[str]) -> None:
    model = _Wrapped(function, w=nn.Parameter(torch.randn(6, 3)), b=nn.Parameter(torch.randn(3)))
    noise = ("sym_size", "slice", "select")  # which bring the input into shape
    names = [name for name in _vocabulary(model, IMAGE) if not any(part in name for part in noise)]
    assert names == expected


def test_an_in_place_activation_needs_no_decomposition_of_the_graph() -> None:
    case = BY_NAME["in-place SiLU, new_zeros"]
    names = _vocabulary(case.model(), *case.batch(2)[0])
    assert names.count("BatchNorm2d") == 2
    assert "aten.silu.default" in names


def test_writes_through_views_become_concats() -> None:
    case = BY_NAME["in-place writes through views"]
    names = _vocabulary(case.model(), *case.batch(2)[0])
    assert not any("scatter" in name or "copy" in name for name in names)


def test_batch_norm_is_recognised_where_the_graph_had_to_be_functionalized() -> None:
    def write(s: Any, x: Tensor) -> Tensor:
        y = s.norm(s.conv(x))
        y[:, 1:].mul_(2.0)
        return y

    norm = nn.BatchNorm2d(3)
    norm.running_mean.normal_()
    names = _vocabulary(_Wrapped(write, conv=nn.Conv2d(4, 3, 1), norm=norm), IMAGE)
    assert names[:2] == ["Conv2d", "BatchNorm2d"]


def test_no_grad_and_autocast_regions_are_read_through() -> None:
    def regions(s: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = s.conv(x)
        with torch.autocast("cpu", enabled=False):
            return s.conv(y.float())

    assert _vocabulary(_Wrapped(regions, conv=nn.Conv2d(4, 4, 1)), IMAGE) == ["Conv2d", "Conv2d"]


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_wrappers_do_not_change_names(wrap: Any) -> None:
    graph = capture(wrap(nn.Sequential(nn.Linear(4, 3))), (torch.randn(2, 4),))
    assert "0" in dict(graph.named_modules())


def test_outputs_that_are_inputs_or_constants_stay_in_place() -> None:
    model = _Wrapped(lambda s, x: (x, s.linear(x), None, 3), linear=nn.Linear(4, 2))
    x = torch.randn(3, 4)
    same, scores, nothing, three = capture(model, (torch.randn(2, 4),))(x)
    assert same is x
    assert scores.shape == (3, 2)
    assert (nothing, three) == (None, 3)


def test_state_that_forward_keeps_is_noted() -> None:
    model = _Wrapped(lambda s, x: s.linear(x) + s.steps.add_(1), linear=nn.Linear(4, 2))
    model.register_buffer("steps", torch.zeros(()))
    graph = capture(model, (torch.randn(2, 4),))
    assert "writes to its own buffers (steps)" in graph.meta["notes"][0]
    assert float(model.steps) == 0.0


def test_a_batch_size_that_the_code_fixes_is_noted() -> None:
    model = _Wrapped(lambda s, x: s.linear(x).view(len(x), -1), linear=nn.Linear(4, 2))
    graph = capture(model, (torch.randn(5, 2, 4),))
    assert "batches of 5 only" in graph.meta["notes"][0]
