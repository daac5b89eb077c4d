"""DS-CNN for keyword spotting (Zhang et al. 2017), as in MLPerf Tiny: 12 keywords from 49 x 10 MFCC."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class DSCNN(nn.Module):
    """A 10 x 4 convolution and four depthwise separable layers of 64 channels; 24 k parameters."""

    def __init__(self, num_classes: int = 12, width: int = 64):
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, (10, 4), stride=2)
        self.conv1_bn = nn.BatchNorm2d(width, eps=1e-3)
        for k in range(1, 5):
            setattr(self, f"dw{k}", nn.Conv2d(width, width, 3, padding=1, groups=width))
            setattr(self, f"dw{k}_bn", nn.BatchNorm2d(width, eps=1e-3))
            setattr(self, f"pw{k}", nn.Conv2d(width, width, 1))
            setattr(self, f"pw{k}_bn", nn.BatchNorm2d(width, eps=1e-3))
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (1, 1, 4, 5))  # left, right, top, bottom
        x = F.relu(self.conv1_bn(self.conv1(x)))
        x = F.relu(self.dw1_bn(self.dw1(x)))
        x = F.relu(self.pw1_bn(self.pw1(x)))
        x = F.relu(self.dw2_bn(self.dw2(x)))
        x = F.relu(self.pw2_bn(self.pw2(x)))
        x = F.relu(self.dw3_bn(self.dw3(x)))
        x = F.relu(self.pw3_bn(self.pw3(x)))
        x = F.relu(self.dw4_bn(self.dw4(x)))
        x = F.relu(self.pw4_bn(self.pw4(x)))
        x = x.mean(dim=(2, 3))
        return self.fc(x)
