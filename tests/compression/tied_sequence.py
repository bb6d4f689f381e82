"""A network of every kind of layer that a compression method may trip over, for the tests of several."""

from __future__ import annotations

from torch import nn


class Sequence(nn.Module):
    """Embedding, LSTM, attention and a tied read-out."""

    def __init__(self, layers=2, bias=True):
        super().__init__()
        self.embedding = nn.Embedding(12, 16)
        self.lstm = nn.LSTM(16, 16, num_layers=layers, batch_first=True)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 12, bias=bias)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        x, _ = self.lstm(self.embedding(x.abs().long().clamp(max=11)))
        x, _ = self.attention(x, x, x)
        return self.head(x[:, -1])
