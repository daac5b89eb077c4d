"""Fused modules compute what the modules computed one after the other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import bitsmith as bs
from bitsmith.errors import DataError

LAYERS = {
    "conv1d": (nn.Conv1d(4, 6, 3, groups=2), nn.BatchNorm1d(6), (2, 4, 8)),
    "conv2d": (nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), (2, 3, 8, 8)),
    "conv3d": (nn.Conv3d(2, 4, 3), nn.BatchNorm3d(4), (2, 2, 5, 5, 5)),
    "transposed1d": (nn.ConvTranspose1d(4, 6, 3), nn.BatchNorm1d(6), (2, 4, 8)),
    "transposed2d": (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), nn.BatchNorm2d(6), (2, 4, 8, 8)),
    "transposed3d": (nn.ConvTranspose3d(2, 4, 3), nn.BatchNorm3d(4), (2, 2, 4, 4, 4)),
    "linear": (nn.Linear(4, 6), nn.BatchNorm1d(6), (5, 4)),
}


def randomized(norm: nn.Module) -> nn.Module:
    for tensor in (norm.weight.data, norm.bias.data, norm.running_mean):
        tensor.uniform_(-1, 1)
    norm.running_var.uniform_(0.3, 3)
    return norm


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("activation", [None, nn.ReLU(), nn.ReLU6(), nn.Hardtanh(-1, 2)], ids=str)
def test_layer_norm_and_activation_become_one(kind: str, activation: nn.Module | None) -> None:
    layer, norm, shape = LAYERS[kind]
    net = nn.Sequential(layer, randomized(norm), *([activation] if activation else [])).eval()
    names, x = [str(i) for i in range(len(net))], torch.randn(shape)
    fused = bs.fuse_modules(net, names)
    assert torch.allclose(fused(x), net(x), atol=1e-5)
    assert all(type(module) is nn.Identity for module in fused[1:])
    assert isinstance(fused[0], type(layer))
    assert fused[0].weight is not layer.weight
    found = bs.fuse_modules(net, example_inputs=x)
    assert [type(m) for m in found] == [type(m) for m in fused]


class Flow(nn.Module):
    """Two chains that may be fused, and three that must not."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("plain", "twice", "functional", "tail", "shared"):
            self.add_module(name, nn.Conv2d(4, 4, 1))
            self.add_module(f"{name}_norm", nn.BatchNorm2d(4))
        self.act, self.one = nn.ReLU(), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(self.plain_norm(self.plain(x)))  # fused, inplace or not
        y = self.twice(x)
        x = self.twice_norm(y) + y  # the convolution's output is read twice
        x = self.act(self.functional_norm(self.functional(x) * 2))  # something is in between
        x = self.act(self.shared_norm(self.shared(x)))  # this activation is called twice
        return self.tail_norm(self.tail(x))


def test_only_what_nothing_else_reads_is_fused() -> None:
    net = Flow().eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            randomized(module)
    x = torch.randn(2, 4, 5, 5)
    fused = bs.fuse_modules(net, example_inputs=x)
    assert torch.allclose(fused(x), net(x), atol=1e-4)
    gone = {name for name, module in fused.named_modules() if isinstance(module, nn.Identity)}
    assert gone == {"plain_norm", "one", "shared_norm", "tail_norm"}
    assert type(fused.plain).__name__ == "ConvAct2d"


def test_the_groups_may_be_deep_and_in_place() -> None:
    net = nn.Sequential(nn.Sequential(nn.Linear(3, 4), nn.ReLU()), nn.Linear(4, 2)).eval()
    assert bs.fuse_modules(net, [["0.0", "0.1"]], inplace=True) is net
    assert type(net[0][0]).__name__ == "LinearAct"


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["0", "2"], "a group is a convolution"),
        (["0"], "a group is a convolution"),
        (["0", "9"], "has no attribute"),
    ],
)
def test_what_cannot_be_fused_is_refused_in_words(names: list[str], words: str) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Sigmoid()).eval()
    with pytest.raises(DataError, match=words):
        bs.fuse_modules(net, names)


def test_batch_norms_in_train_mode_are_refused() -> None:
    with pytest.raises(DataError, match=r"call model\.eval"):
        bs.fuse_modules(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), ["0", "1"])
    with pytest.raises(DataError, match="groups"):
        bs.fuse_modules(nn.Sequential(nn.Conv2d(3, 4, 1)))
