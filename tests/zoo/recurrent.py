"""Recurrent networks: whole layers of PyTorch's own, and loops over cells."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.zoo.base import BATCH, CLASSES, LENGTH, VOCAB, Entry, family, tokens


class LSTMClassifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 28)
        self.lstm = nn.LSTM(28, 20, num_layers=2, batch_first=True)
        self.hidden = nn.Linear(20, 34)
        self.head = nn.Linear(34, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        states, _ = self.lstm(self.embed(ids))
        return self.head(F.relu(self.hidden(states[:, -1])))


@family(
    sites={
        "width embed": 1,
        "width lstm": 1,
        "width hidden": 1,
    },
    fixed={
        "embed.weight[0]": "looked up by index",
        "head.weight[0]": "output",
    },
)
def lstm() -> Entry:
    return LSTMClassifier(), (tokens(),), {}


class ConvolutionalRecurrent(nn.Module):
    """A tagger: strided convolutions over time, then a GRU that reads in both directions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(13, 26, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm1d(26)
        self.gru = nn.GRU(26, 22, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * 22, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x)))
        states, _ = self.gru(x.transpose(1, 2))
        return self.head(states)


@family(
    sites={
        "width conv": 1,
        "width gru": 1,
    },
    fixed={
        "conv.weight[1]": "input dimension",
        "*[2]": "kernel size",
        "head.weight[0]": "output",
    },
)
def bidirectional_gru() -> Entry:
    return ConvolutionalRecurrent(), (torch.randn(BATCH, 13, LENGTH),), {}


class Sequence2Sequence(nn.Module):
    """An encoder whose last state starts the decoder, with dot-product attention between."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 30)
        self.encoder = nn.LSTM(30, 24, batch_first=True)
        self.decoder = nn.LSTM(30, 24, batch_first=True)
        self.combine = nn.Linear(2 * 24, 38)
        self.head = nn.Linear(38, VOCAB)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        memory, state = self.encoder(self.embed(source))
        states, _ = self.decoder(self.embed(target), state)
        scores = (states @ memory.transpose(1, 2)).softmax(-1)
        both = torch.cat([states, scores @ memory], -1)
        return self.head(torch.tanh(self.combine(both)))


@family(
    sites={
        "width embed": 1,
        "width encoder": 1,
        "width combine": 1,
    },
    fixed={
        "embed.weight[0]": "looked up by index",
        "head.weight[0]": "output",
    },
)
def lstm_seq2seq() -> Entry:
    return Sequence2Sequence(), (tokens(), tokens(8)), {}


class LSTMCellLoop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.LSTMCell(11, 18)
        self.second = nn.LSTMCell(18, 26)
        self.head = nn.Linear(26, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        batch = x.shape[0]
        h1, c1 = (x.new_zeros(batch, self.first.hidden_size) for _ in range(2))
        h2, c2 = (x.new_zeros(batch, self.second.hidden_size) for _ in range(2))
        for step in x.unbind(1):
            h1, c1 = self.first(step, (h1, c1))
            h2, c2 = self.second(h1, (h2, c2))
        return self.head(h2)


@family(
    sites={
        "width first": 1,
        "width second": 1,
    },
    fixed={
        "first.weight_ih[1]": "input dimension",
        "head.weight[0]": "output",
    },
)
def lstm_cells() -> Entry:
    return LSTMCellLoop(), (torch.randn(BATCH, 6, 11),), {}


class GRUCellLoop(nn.Module):
    """A decoder that feeds its own output back."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Linear(11, 26)
        self.cell = nn.GRUCell(14, 26)
        self.out = nn.Linear(26, 14)
        self.first = nn.Parameter(torch.randn(1, 14))

    def forward(self, x: Tensor) -> Tensor:
        state = torch.tanh(self.start(x))
        step = self.first.expand(x.shape[0], -1)
        steps = []
        for _ in range(5):
            state = self.cell(step, state)
            step = self.out(state)
            steps.append(step)
        return torch.stack(steps, 1)


@family(
    sites={
        "width start": 1,
    },
    fixed={
        "cell": "it is called 5 times",
        "first[1]": "output",
        "start.weight[1]": "input dimension",
    },
)
def gru_cell() -> Entry:
    return GRUCellLoop(), (torch.randn(BATCH, 11),), {}


class PlainRecurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(13, 18)
        self.rnn = nn.RNN(18, 22, nonlinearity="relu")
        self.head = nn.Linear(22, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        _, last = self.rnn(self.project(x).transpose(0, 1))
        return self.head(last[-1])


@family(
    sites={
        "width project": 1,
        "width rnn": 1,
    },
    fixed={
        "project.weight[1]": "input dimension",
        "head.weight[0]": "output",
    },
)
def rnn() -> Entry:
    return PlainRecurrent(), (torch.randn(BATCH, LENGTH, 13),), {}
