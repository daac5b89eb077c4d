"""ShuffleNetV2 (Ma et al. 2018) for 32 x 32 images: the first convolution keeps the size, no max-pool."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    """Interleave the channels of `groups` groups."""
    batchsize, num_channels, height, width = x.size()
    channels_per_group = num_channels // groups
    x = x.view(batchsize, groups, channels_per_group, height, width)
    x = torch.transpose(x, 1, 2).contiguous()
    x = x.view(batchsize, -1, height, width)
    return x


def depthwise(channels: int, stride: int) -> nn.Conv2d:
    """A 3 x 3 convolution with one filter per channel."""
    return nn.Conv2d(channels, channels, 3, stride, padding=1, groups=channels, bias=False)


class InvertedResidual(nn.Module):
    """One unit: half of the channels pass by (stride 1), or both branches halve the size (stride 2)."""

    def __init__(self, inp: int, oup: int, stride: int):
        super().__init__()
        self.stride = stride
        width = oup // 2
        assert stride != 1 or inp == width << 1
        if stride > 1:
            self.branch1 = nn.Sequential(
                depthwise(inp, stride),
                nn.BatchNorm2d(inp),
                nn.Conv2d(inp, width, 1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
            )
        else:
            self.branch1 = nn.Sequential()
        self.branch2 = nn.Sequential(
            nn.Conv2d(inp if stride > 1 else width, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            depthwise(width, stride),
            nn.BatchNorm2d(width),
            nn.Conv2d(width, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 1:
            x1, x2 = x.chunk(2, dim=1)
            out = torch.cat((x1, self.branch2(x2)), dim=1)
        else:
            out = torch.cat((self.branch1(x), self.branch2(x)), dim=1)
        out = channel_shuffle(out, 2)
        return out


class ShuffleNetV2(nn.Module):
    """A stem, three stages of units, a 1 x 1 convolution, global mean and one linear layer."""

    def __init__(self, repeats: tuple[int, ...], widths: tuple[int, ...], num_classes: int = 10):
        super().__init__()
        channels = widths[0]
        self.conv1 = nn.Sequential(
            nn.Conv2d(3, channels, 3, stride=1, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
        )
        for name, count, width in zip(("stage2", "stage3", "stage4"), repeats, widths[1:]):
            units = [InvertedResidual(channels, width, 2)]
            units += [InvertedResidual(width, width, 1) for _ in range(count - 1)]
            setattr(self, name, nn.Sequential(*units))
            channels = width
        self.conv5 = nn.Sequential(
            nn.Conv2d(channels, widths[4], 1, bias=False), nn.BatchNorm2d(widths[4]), nn.ReLU(inplace=True)
        )
        self.fc = nn.Linear(widths[4], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x = self.stage2(x)
        x = self.stage3(x)
        x = self.stage4(x)
        x = self.conv5(x)
        x = x.mean([2, 3])  # global average pool
        x = self.fc(x)
        return x


def shufflenetv2_x0_5() -> ShuffleNetV2:
    """0.35 M parameters."""
    return ShuffleNetV2((4, 8, 4), (24, 48, 96, 192, 1024))
