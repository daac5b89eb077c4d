"""MobileNetV1 at width 0.25 (Howard et al. 2017), the Keras layout: asymmetric padding before stride 2."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTHS = (64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024)  # of the 1 x 1 convolutions
STRIDED = (2, 4, 6, 12)  # depthwise layers with stride 2
BN_EPS = 1e-3


class MobileNetV1(nn.Module):
    """Thirteen pairs of a depthwise 3 x 3 and a 1 x 1 convolution, each with BatchNorm and ReLU6."""

    def __init__(self, alpha: float = 0.25, num_classes: int = 1000):
        super().__init__()
        channels = int(32 * alpha)
        self.conv1 = nn.Conv2d(3, channels, 3, stride=2, bias=False)
        self.conv1_bn = nn.BatchNorm2d(channels, eps=BN_EPS)
        for k, width in enumerate(WIDTHS, 1):
            out, strided = int(width * alpha), k in STRIDED
            dw = nn.Conv2d(channels, channels, 3, 2 if strided else 1, 0 if strided else 1, groups=channels, bias=False)
            self.add_module(f"conv_dw_{k}", dw)
            self.add_module(f"conv_dw_{k}_bn", nn.BatchNorm2d(channels, eps=BN_EPS))
            self.add_module(f"conv_pw_{k}", nn.Conv2d(channels, out, 1, bias=False))
            self.add_module(f"conv_pw_{k}_bn", nn.BatchNorm2d(out, eps=BN_EPS))
            channels = out
        self.fc = nn.Linear(channels, num_classes)

    def _block(self, x: Tensor, k: int) -> Tensor:
        if k in STRIDED:
            x = F.pad(x, (0, 1, 0, 1))
        x = F.relu6(getattr(self, f"conv_dw_{k}_bn")(getattr(self, f"conv_dw_{k}")(x)))
        return F.relu6(getattr(self, f"conv_pw_{k}_bn")(getattr(self, f"conv_pw_{k}")(x)))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.conv1_bn(self.conv1(F.pad(x, (0, 1, 0, 1)))))
        for k in range(1, len(WIDTHS) + 1):
            x = self._block(x, k)
        x = F.adaptive_avg_pool2d(x, 1)
        x = torch.flatten(x, 1)
        return self.fc(x)
