"""Small nets written the ways people write them; each row is a claim that capture takes it unmodified."""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SharedReLU(nn.Module):
    """torchvision's block: one nn.ReLU called twice, residual by ``+=``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        return self.relu(out)


class SharedConv(nn.Module):
    """One convolution called three times."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = F.relu(self.conv(x))
        return self.head(x.mean((2, 3)))


class PaddedShortcut(nn.Module):
    """CIFAR ResNet's parameter-free shortcut in a lambda, and pooling by the size of the plane."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.shortcut = lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2), "constant", 0)
        self.linear = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.conv1(x) + self.shortcut(x))
        out = F.avg_pool2d(out, out.size()[3])
        return self.linear(out.view(out.size(0), -1))


class ShapeBranch(nn.Module):
    """An ``if`` on a shape, asserts, and arithmetic on sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.small, self.large = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        assert x.dim() == 4, "images, please"
        n, c, h, w = x.shape
        torch._assert(c == 4, "four channels")
        x = self.large(x) if h > 4 else self.small(x)
        return x.reshape(n, c, h * w).permute(0, 2, 1).reshape(-1, h * w, c)


class Nested(nn.Module):
    """Tuples and dicts in and out."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, pair: tuple[Tensor, dict[str, Tensor]]) -> dict[str, Any]:
        x, more = pair
        y = self.a(x) + self.b(more["left"])
        return {"sum": y, "parts": (F.relu(y), [self.b(more["right"])])}


class Keywords(nn.Module):
    """Keyword arguments, one of them left at its default."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, *, context: Tensor, scale: float = 2.0, mask: Any = None) -> Tensor:
        y = self.a(x) + self.b(context) * scale
        return y if mask is None else y * mask


class Variadic(nn.Module):
    """forward(self, *xs)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])

    def forward(self, *xs: Tensor) -> Tensor:
        return sum(layer(x) for layer, x in zip(self.layers, xs))


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norm = nn.MultiheadAttention(8, 2, batch_first=True), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.attention(x, x, x, need_weights=False)[0])


class CrossAttention(nn.Module):
    """Two inputs with different lengths; the attention weights are returned too."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, kdim=6, vdim=6)

    def forward(self, query: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        return self.attention(query, memory, memory)


class Branches(nn.Module):
    """Concat of three branches with squeeze and excitation over them."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.three = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)
        self.pool = nn.AvgPool2d(3, 1, 1)
        self.squeeze, self.excite = nn.Conv2d(12, 4, 1), nn.Conv2d(4, 12, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([self.one(x).relu(), F.relu6(self.three(x)), self.pool(x)], 1)
        gate = F.adaptive_avg_pool2d(y, 1)
        return y * torch.sigmoid(self.excite(F.relu(self.squeeze(gate))))


class Transposed(nn.Module):
    """Transposed, grouped, depthwise; then a skip that is cropped to fit."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.up = nn.ConvTranspose2d(8, 4, 3, stride=2, padding=1, output_padding=1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(F.relu(self.depthwise(F.relu(self.down(x)))))
        return torch.cat([y[..., : x.shape[2], : x.shape[3]], x], dim=1)


class Signal(nn.Module):
    """1-D convolutions with a reflected border."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(2, 4, 5, padding="same", padding_mode="reflect")
        self.conv2, self.head = nn.Conv1d(4, 6, 3, stride=2, dilation=2), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.conv2(F.relu(self.conv1(x))), 0.1)
        return self.head(F.adaptive_avg_pool1d(x, 1).squeeze(-1))


class Volume(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv3d(2, 4, 3, padding=1), nn.BatchNorm3d(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool3d(F.relu(self.norm(self.conv(x))), 2)
        return self.head(F.adaptive_avg_pool3d(x, 1).flatten(1))


class Buffers(nn.Module):
    """Normalization by buffers inside the model, and a learned constant added at each position."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.1, 0.2, 0.3, 0.4]).view(1, 4, 1, 1))
        self.register_buffer("std", torch.tensor([0.5, 0.6, 0.7, 0.8]).view(1, 4, 1, 1))
        self.position = nn.Parameter(torch.randn(1, 4, 8, 8) * 0.1)
        self.conv = nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv((x - self.mean) / self.std + self.position)


class Normed(nn.Module):
    """Weight norm and spectral norm, as parametrizations."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 6, 3))
        self.head = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.conv(x)).mean((-2, -1)))


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 2)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.b(F.relu(self.a(x)))))


class InPlaceViews(nn.Module):
    """Writes through views: export must not lose them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x)
        y[:, :2].mul_(2.0).relu_()
        y[:, 2:] += 1.0
        return self.conv2(y)


class Recurrent(nn.Module):
    """Convolutions, an LSTM, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 8, 3, padding=1)
        self.lstm = nn.LSTM(8, 6, batch_first=True, bidirectional=True)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x)).transpose(1, 2)
        out, (_, _) = self.lstm(x)
        return self.head(out[:, -1])


class Functional(nn.Module):
    """Parameters of one's own and functional calls only."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.b1 = nn.Parameter(torch.randn(6, 4, 3, 3) * 0.2), nn.Parameter(torch.randn(6) * 0.1)
        self.gamma, self.beta = nn.Parameter(torch.rand(6) + 0.5), nn.Parameter(torch.randn(6) * 0.1)
        self.register_buffer("running_mean", torch.randn(6) * 0.1)
        self.register_buffer("running_var", torch.rand(6) + 0.5)
        self.w2 = nn.Parameter(torch.randn(3, 6) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.w1, self.b1, stride=2, padding=1)
        x = F.batch_norm(x, self.running_mean, self.running_var, self.gamma, self.beta, self.training)
        x = F.dropout(F.relu(x, inplace=True), 0.5, self.training)
        return F.linear(x.mean(3).mean(2), self.w2)


class SiluInPlace(nn.Module):
    """EfficientNet's way: in-place SiLU behind each norm, new_zeros for a static constant."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.act = nn.SiLU(inplace=True)
        self.point, self.norm2, self.drop = nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.point(self.act(self.norm(self.conv(x)))))
        return self.drop(y) + x + x.new_zeros(1, 4, 1, 1)


class Shuffle(nn.Module):
    """ShuffleNet: chunk, concat, channel shuffle by reshapes."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.ReLU(inplace=True),
            nn.Conv2d(2, 2, 3, padding=1, groups=2), nn.BatchNorm2d(2),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=1)
        y = torch.cat((left, self.branch(right)), dim=1)
        n, c, h, w = y.size()
        return y.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, -1, h, w)


class PlainUpsample(nn.Module):
    """A small U-Net: pooling, nearest upsampling to the size of a tensor, concat, softmax over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(9, 6, 3, padding=1)
        self.out = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.max_pool2d(F.relu(self.down(x)), 2)
        y = F.interpolate(y, size=x.shape[-2:], mode="nearest")
        return F.softmax(self.out(F.relu(self.up(torch.cat([y, x], 1)))), dim=1)


class Blocks(nn.Module):
    """Nested containers, operators from the operator module, hardswish."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleDict(OrderedDict(
            stem=nn.Sequential(nn.Conv2d(4, 8, 3, 2, 1), nn.Hardswish()),
            body=nn.Sequential(OrderedDict(point=nn.Conv2d(8, 8, 1), act=nn.Hardtanh(-2, 2))),
        ))  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages["stem"](x)
        return operator.add(x, self.stages["body"](x))


def _settle(model: nn.Module) -> nn.Module:
    """Norm statistics that are not 0 and 1, so that losing a norm would show."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.2)
    return model.eval()


@dataclass(frozen=True)
class Case:
    """``make()`` builds the net, ``inputs(n)`` its arguments for a batch of n."""

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[tuple[Any, ...], dict[str, Any]]]
    layers: tuple[str, ...]

    def model(self) -> nn.Module:
        """The net in eval mode, the same each time."""
        torch.manual_seed(0)
        return _settle(self.make())

    def batch(self, samples: int, seed: int = 1) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments, the same each time."""
        torch.manual_seed(seed)
        return self.inputs(samples)


def _tensor(*shape: int) -> Callable[[int], tuple[tuple[Any, ...], dict[str, Any]]]:
    return lambda n: ((torch.randn(n, *shape),), {})


def _nested(n: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return ((torch.randn(n, 4), {"left": torch.randn(n, 4), "right": torch.randn(n, 4)}),), {}


def _keywords(n: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (torch.randn(n, 4),), {"context": torch.randn(n, 4), "mask": torch.rand(n, 4)}


_IMAGE = _tensor(4, 8, 8)
_ENCODER = {"d_model": 8, "nhead": 2, "dim_feedforward": 16, "batch_first": True}

CASES = [
    Case("one relu per block, +=", SharedReLU, _IMAGE, ("conv1", "bn1", "conv2", "bn2")),
    Case("one conv called three times", SharedConv, _IMAGE, ("conv", "head")),
    Case("padded shortcut in a lambda", PaddedShortcut, _IMAGE, ("conv1", "linear")),
    Case("branch on a shape, asserts", ShapeBranch, _IMAGE, ("large",)),
    Case("nested tuples and dicts", Nested, _nested, ("a", "b")),
    Case("keyword arguments", Keywords, _keywords, ("a", "b")),
    Case("forward(*xs)", Variadic, lambda n: (tuple(torch.randn(n, 4) for _ in range(3)), {}),
         ("layers.0", "layers.1", "layers.2")),
    Case("self-attention", SelfAttention, _tensor(5, 8),
         ("attention.in_proj", "attention.out_proj", "norm")),
    Case("cross-attention", CrossAttention, lambda n: ((torch.randn(n, 3, 8), torch.randn(n, 5, 6)), {}),
         ("attention.out_proj",)),
    Case("transformer encoder layer", lambda: nn.TransformerEncoderLayer(**_ENCODER), _tensor(5, 8),
         ("self_attn.out_proj", "linear1", "linear2", "norm1", "norm2")),
    Case("concat and squeeze-excite", Branches, _IMAGE, ("one", "three", "squeeze", "excite")),
    Case("transposed, grouped, depthwise", Transposed, _IMAGE, ("down", "depthwise", "up")),
    Case("1-D convolutions", Signal, _tensor(2, 16), ("conv1", "conv2", "head")),
    Case("3-D convolutions", Volume, _tensor(2, 4, 6, 6), ("conv", "norm", "head")),
    Case("buffers and a learned constant", Buffers, _IMAGE, ("conv",)),
    Case("weight norm, spectral norm", Normed, _IMAGE, ("conv", "head")),
    Case("tied weights", Tied, _tensor(4), ("a", "b", "out")),
    Case("in-place writes through views", InPlaceViews, _IMAGE, ("conv1", "conv2")),
    Case("LSTM in the middle", Recurrent, _tensor(4, 7), ("conv", "head")),
    Case("functional with own parameters", Functional, _IMAGE, ()),
    Case("in-place SiLU, new_zeros", SiluInPlace, _IMAGE, ("conv", "norm", "point", "norm2")),
    Case("channel shuffle", Shuffle, _IMAGE, ("branch.0", "branch.1", "branch.3", "branch.4")),
    Case("upsampling to a size", PlainUpsample, _tensor(3, 8, 8), ("down", "up", "out")),
    Case("nested containers", Blocks, _IMAGE, ("stages.stem.0", "stages.body.point")),
]  # fmt: skip
