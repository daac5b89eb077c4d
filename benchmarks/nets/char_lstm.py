"""textgenrnn: a language model on characters, two LSTM layers and an attention-weighted average."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class CharLSTM(nn.Module):
    """40 characters ``(batch, 40)`` to the logits of the next one."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(465, 100)
        self.rnn_1 = nn.LSTM(100, 128, batch_first=True)
        self.rnn_2 = nn.LSTM(128, 128, batch_first=True)
        self.attention = nn.Linear(356, 1, bias=False)
        self.output = nn.Linear(356, 465)

    def forward(self, x: Tensor) -> Tensor:
        embedded = self.embedding(x)
        first, _ = self.rnn_1(embedded)
        second, _ = self.rnn_2(first)
        z = torch.cat([embedded, first, second], dim=-1)
        weights = torch.softmax(self.attention(z), dim=1)
        return self.output((z * weights).sum(dim=1))
