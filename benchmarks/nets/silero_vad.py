"""Silero's voice activity detector at 16 kHz: a learned STFT, four convolutions and an LSTM cell."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHUNK, CONTEXT = 512, 64


class SileroVAD(nn.Module):
    """One chunk of 512 samples behind 64 earlier ones, ``(batch, 576)``, and the cell's state, to a probability."""

    def __init__(self) -> None:
        super().__init__()
        self.stft_conv = nn.Conv1d(1, 258, 256, stride=128, bias=False)
        self.conv1 = nn.Conv1d(129, 128, 3, padding=1)
        self.conv2 = nn.Conv1d(128, 64, 3, stride=2, padding=1)
        self.conv3 = nn.Conv1d(64, 64, 3, stride=2, padding=1)
        self.conv4 = nn.Conv1d(64, 128, 3, padding=1)
        self.lstm_cell = nn.LSTMCell(128, 128)
        self.final_conv = nn.Conv1d(128, 1, 1)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = F.pad(x.unsqueeze(1), (0, 64), mode="reflect")
        spectrum = self.stft_conv(x)
        real, imaginary = spectrum[:, :129], spectrum[:, 129:]
        x = torch.sqrt(real**2 + imaginary**2)
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            x = F.relu(conv(x))
        h, c = self.lstm_cell(x.squeeze(-1), (h, c))
        return torch.sigmoid(self.final_conv(F.relu(h).unsqueeze(-1)))[:, 0, 0], h, c
