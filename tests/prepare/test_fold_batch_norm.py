"""Folding a batch norm, in every direction: the same function, and exactly the weights that algebra gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitsmith.capture import capture
from bitsmith.prepare import fold_batch_norm

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def settled(model: nn.Module) -> nn.Module:
    """Norms with statistics and affine parameters that are not the identity."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, NORMS) and module.running_mean is not None:
            module.running_mean.normal_(0, 0.5)
            module.running_var.uniform_(0.3, 2.0)
            if module.affine:
                nn.init.normal_(module.weight, 1.0, 0.5)  # some of them negative
                nn.init.normal_(module.bias, 0.0, 0.5)
    return model.eval()


def norms_left(graph: nn.Module) -> int:
    return sum(isinstance(module, NORMS) for module in graph.modules())


IMAGE, SIGNAL, VOLUME = (2, 4, 7, 7), (2, 4, 9), (2, 4, 4, 5, 5)
AFTER = {
    "conv": (nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), IMAGE),
    "conv without bias": (nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), IMAGE),
    "reflected border": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(6), IMAGE),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), IMAGE),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4, padding=1), nn.BatchNorm2d(8), IMAGE),
    "1-D": (nn.Conv1d(4, 6, 3, stride=2), nn.BatchNorm1d(6), SIGNAL),
    "3-D": (nn.Conv3d(4, 6, 3), nn.BatchNorm3d(6), VOLUME),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2), nn.BatchNorm2d(6), IMAGE),
    "transposed grouped": (nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False), nn.BatchNorm2d(6), IMAGE),
    "transposed depthwise": (nn.ConvTranspose1d(4, 4, 3, groups=4), nn.BatchNorm1d(4), SIGNAL),
    "linear": (nn.Linear(5, 6), nn.BatchNorm1d(6), (3, 5)),
    "linear without bias": (nn.Linear(5, 6, bias=False), nn.BatchNorm1d(6), (3, 5)),
    "norm without affine": (nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, affine=False), IMAGE),
}  # fmt: skip


@pytest.mark.parametrize("name", AFTER)
def test_a_norm_behind_a_layer_folds_into_it(name: str) -> None:
    layer, norm, shape = AFTER[name]
    model = settled(nn.Sequential(layer, norm, nn.ReLU()))
    graph = capture(model, (torch.randn(shape),))
    log = fold_batch_norm(graph)
    x = torch.randn(shape)
    torch.testing.assert_close(graph(x), model(x), rtol=1e-5, atol=1e-5)
    assert norms_left(graph) == 0
    assert log == ["batch norm 1 folded into 0"]


BEFORE = {
    "conv": (nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3), IMAGE),
    "padding='valid'": (nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding="valid"), IMAGE),
    "grouped": (nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, groups=2, bias=False), IMAGE),
    "depthwise": (nn.BatchNorm2d(4, affine=False), nn.Conv2d(4, 4, 3, groups=4), IMAGE),
    "1-D": (nn.BatchNorm1d(4), nn.Conv1d(4, 6, 3), SIGNAL),
    "3-D": (nn.BatchNorm3d(4), nn.Conv3d(4, 6, 3), VOLUME),
    "linear": (nn.BatchNorm1d(5), nn.Linear(5, 6), (3, 5)),
}


@pytest.mark.parametrize("name", BEFORE)
def test_a_norm_before_an_unpadded_layer_folds_into_it(name: str) -> None:
    norm, layer, shape = BEFORE[name]
    model = settled(nn.Sequential(norm, layer))
    graph = capture(model, (torch.randn(shape),))
    assert fold_batch_norm(graph) == ["batch norm 0 folded into 1"]
    x = torch.randn(shape)
    torch.testing.assert_close(graph(x), model(x), rtol=1e-5, atol=1e-5)


class Graph(nn.Module):
    """A model from a function of its members."""

    def __init__(self, function: Any, **members: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, member in members.items():
            setattr(self, name, member)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


STAYS = {
    "before a padded conv": (nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding=1)), IMAGE),
    "before padding='same'": (nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding="same")), IMAGE),
    "before a transposed conv": (nn.Sequential(nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 6, 3)), IMAGE),
    "behind a ReLU": (nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.Tanh()), IMAGE),
    "the conv's output is read twice": (
        Graph(lambda s, x: s.norm(y := s.conv(x)) + y, conv=nn.Conv2d(4, 4, 1), norm=nn.BatchNorm2d(4)), IMAGE
    ),
    "the norm's output is read twice": (
        Graph(lambda s, x: s.conv(y := s.norm(x)) + y, conv=nn.Conv2d(4, 4, 1), norm=nn.BatchNorm2d(4)), IMAGE
    ),
    "over the sequence axis of a linear layer": (
        Graph(lambda s, x: s.norm(s.linear(x)), linear=nn.Linear(5, 6), norm=nn.BatchNorm1d(4)), (2, 4, 5)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STAYS)
def test_a_norm_that_cannot_be_folded_exactly_stays(name: str) -> None:
    model, shape = STAYS[name]
    graph = capture(settled(model), (torch.randn(shape),))
    assert fold_batch_norm(graph) == []
    assert norms_left(graph) == 1
    x = torch.randn(shape)
    torch.testing.assert_close(graph(x), model(x), rtol=1e-5, atol=1e-5)


def test_a_norm_of_the_batch_itself_stays() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, track_running_stats=False)).eval()
    graph = capture(model, (torch.randn(IMAGE),))
    assert fold_batch_norm(graph) == []
    x = torch.randn(5, *IMAGE[1:])
    torch.testing.assert_close(graph(x), model(x), rtol=1e-5, atol=1e-5)


def test_a_shared_layer_is_copied_for_the_call_that_takes_the_norm() -> None:
    model = settled(
        Graph(
            lambda s, x: s.norm(s.conv(x)) + s.conv(x * 2) + s.other(s.conv(x * 3)), conv=nn.Conv2d(4, 4, 1),
            norm=nn.BatchNorm2d(4), other=nn.BatchNorm2d(4),
        )
    )  # fmt: skip
    graph = capture(model, (torch.randn(IMAGE),))
    assert len(fold_batch_norm(graph)) == 2
    x = torch.randn(IMAGE)
    torch.testing.assert_close(graph(x), model(x), rtol=1e-5, atol=1e-5)
    assert len({str(n.target) for n in graph.graph.nodes if n.op == "call_module"}) == 3
    torch.testing.assert_close(graph.get_submodule("conv").weight, model.conv.weight)


class Levels(nn.Module):
    """One convolution for all levels, a norm for each, as heads of detectors have."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for norm in self.norms:
            x = torch.relu(norm(self.conv(x)))
        return x


def test_every_call_of_a_shared_layer_takes_its_own_norm() -> None:
    model = settled(Levels())
    x = torch.randn(IMAGE)
    graph = capture(model, (x,))
    assert len(set(fold_batch_norm(graph))) == 4
    torch.testing.assert_close(graph(x), model(x), rtol=1e-5, atol=1e-5)


def test_a_norm_on_flattened_features_folds_through_the_reshape() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:  # timm's LeViT
        y = s.linear(x)
        return s.norm(y.flatten(0, 1)).reshape_as(y)

    model = settled(Graph(forward, linear=nn.Linear(5, 6, bias=False), norm=nn.BatchNorm1d(6)))
    graph = capture(model, (torch.randn(2, 4, 5),))
    assert fold_batch_norm(graph) == ["batch norm norm folded into linear"]
    x = torch.randn(3, 4, 5)
    torch.testing.assert_close(graph(x), model(x), rtol=1e-5, atol=1e-5)


def test_two_norms_in_a_row_both_fold() -> None:
    model = settled(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.BatchNorm2d(6)))
    graph = capture(model, (torch.randn(IMAGE),))
    assert len(fold_batch_norm(graph)) == 2
    x = torch.randn(IMAGE)
    torch.testing.assert_close(graph(x), model(x), rtol=1e-5, atol=1e-5)


def _closed_form(norm: nn.Module) -> tuple[Tensor, Tensor]:
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    return scale, norm.bias.double() - norm.running_mean.double() * scale


def test_the_folded_parameters_are_the_closed_form_rounded_once() -> None:
    model = settled(nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)))
    graph = capture(model, (torch.randn(IMAGE),))
    fold_batch_norm(graph)
    scale, offset = _closed_form(model[1])
    weight = model[0].weight.double().clone()  # (in, out / groups, 3, 3)
    for group in range(2):
        for out in range(3):
            weight[group * 2 : group * 2 + 2, out] *= scale[group * 3 + out]
    folded = graph.get_submodule("0")
    assert torch.equal(folded.weight, weight.float())
    assert torch.equal(folded.bias, (model[0].bias.double() * scale + offset).float())


def test_the_bias_of_a_norm_before_a_grouped_conv_is_the_closed_form() -> None:
    model = settled(nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, groups=2)))
    graph = capture(model, (torch.randn(IMAGE),))
    fold_batch_norm(graph)
    scale, offset = _closed_form(model[0])
    conv, folded = model[1], graph.get_submodule("1")
    for out in range(6):
        inputs = slice(0, 2) if out < 3 else slice(2, 4)
        expected = conv.weight[out].double() * scale[inputs].view(2, 1, 1)
        assert torch.equal(folded.weight[out], expected.float())
        bias = conv.bias[out].double() + (conv.weight[out].double().sum((1, 2)) * offset[inputs]).sum()
        assert float(folded.bias[out]) == pytest.approx(float(bias), rel=1e-6)
