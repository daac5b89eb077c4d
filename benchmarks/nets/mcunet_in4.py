"""MCUNet-in4 (Lin et al. 2020): inverted residuals of mixed kernel sizes, BatchNorm already folded."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

# (in, expanded, out, depthwise kernel, stride) of each block; the first has no expansion
BLOCKS = (
    (32, 32, 16, 3, 1), (16, 48, 24, 7, 2), (24, 120, 24, 3, 1), (24, 96, 24, 5, 1), (24, 120, 40, 7, 2),
    (40, 160, 40, 3, 1), (40, 160, 40, 7, 1), (40, 120, 80, 7, 2), (80, 240, 80, 3, 1), (80, 240, 80, 7, 1),
    (80, 320, 96, 3, 1), (96, 288, 96, 5, 1), (96, 288, 96, 5, 1), (96, 384, 192, 7, 2),
    (192, 576, 192, 7, 1), (192, 576, 192, 5, 1), (192, 768, 320, 5, 1),
)  # fmt: skip


def conv(inp: int, out: int, kernel: int = 1, stride: int = 1, groups: int = 1, act: bool = True):
    """A convolution with bias, and ReLU6 unless it is linear."""
    layers: list[tuple[str, nn.Module]] = [("conv", nn.Conv2d(inp, out, kernel, stride, kernel // 2, groups=groups))]
    if act:
        layers.append(("act", nn.ReLU6(inplace=True)))
    return nn.Sequential(OrderedDict(layers))


class MBConv(nn.Module):
    """Expand, filter each channel, project; add the input where the shape is kept."""

    def __init__(self, inp: int, mid: int, out: int, kernel: int, stride: int):
        super().__init__()
        self.inverted_bottleneck = conv(inp, mid) if mid != inp else None
        self.depth_conv = conv(mid, mid, kernel, stride, groups=mid)
        self.point_linear = conv(mid, out, act=False)
        self.residual = stride == 1 and inp == out

    def forward(self, x: Tensor) -> Tensor:
        res = x
        if self.inverted_bottleneck is not None:
            x = self.inverted_bottleneck(x)
        x = self.depth_conv(x)
        x = self.point_linear(x)
        return x + res if self.residual else x


class MCUNet(nn.Module):
    """1.72 M parameters, 160 x 160 images."""

    def __init__(self, num_classes: int = 1000):
        super().__init__()
        self.first_conv = conv(3, 32, kernel=3, stride=2)
        self.blocks = nn.ModuleList(MBConv(*block) for block in BLOCKS)
        self.classifier = nn.Linear(320, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first_conv(x)
        for block in self.blocks:
            x = block(x)
        x = x.mean(3).mean(2)  # global average pooling
        x = self.classifier(x)
        return x
