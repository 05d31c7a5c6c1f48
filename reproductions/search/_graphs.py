"""Small graph networks whose every layer is chosen, and digits as a graph of neighbours.

Each node of the graph is an image, with its nearest images as neighbours. All nodes have
equally many, so neighbours are a dense table of shape (nodes, neighbours) and no layer needs a
sparse matrix.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from supple.space import Site, Space
from supple.training.losses import Labels
from supple.training.seeds import generator, kept
from supple.training.step import SizesRun, WholeOnly

__all__ = [
    "ATTENTIONS",
    "LAYERS",
    "SPACE",
    "Graph",
    "GraphNet",
    "accuracy",
    "fit",
    "graph",
    "kind",
]

LAYERS = 2
CLASSES = 10
NEIGHBOURS = 8
RATE, DECAY = 0.01, 5e-4
ATTENTIONS = ("const", "gat", "sym-gat", "cos", "linear", "gen-linear")
AGGREGATIONS = ("sum", "mean", "max")
COMBINES = ("identity", "mlp")
ACTIVATIONS = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": F.relu,
    "identity": lambda x: x,
    "softplus": F.softplus,
    "leaky-relu": F.leaky_relu,
    "relu6": F.relu6,
    "elu": F.elu,
}
CHOICES = {
    "hidden": (4, 8, 16),
    "attention": tuple(range(len(ATTENTIONS))),
    "heads": (1, 2, 4),
    "aggregation": tuple(range(len(AGGREGATIONS))),
    "combine": tuple(range(len(COMBINES))),
    "activation": tuple(range(len(ACTIVATIONS))),
}
SPACE = Space(
    [
        Site(f"{layer}.{name}", name, choices, choices[-1])
        for layer in range(LAYERS)
        for name, choices in CHOICES.items()
    ]
)
"""The choices of Auto-GNN's space; hidden dimensions and heads up to 16 and 4."""


class Graph(NamedTuple):
    """Images as nodes, and which of them are for what."""

    features: Tensor
    """Shape (nodes, pixels)."""
    neighbours: Tensor
    """Each node itself and its nearest, shape (nodes, 1 + neighbours)."""
    labels: Tensor
    train: Tensor
    """Nodes; as `validation` and `test`, shape (some nodes,)."""
    validation: Tensor
    test: Tensor


@cache
def graph(seed: int, *, train: int = 20, validation: int = 30, test: int = 10) -> Graph:
    """Draws images of scikit-learn's digits, so many of each class for each purpose."""
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=generator(seed, "nodes"))
    of_class = [order[labels[order] == c][: train + validation + test] for c in range(CLASSES)]
    nodes = torch.cat(of_class)
    features = images[nodes]
    near = torch.cdist(features, features).topk(NEIGHBOURS + 1, largest=False).indices
    place = torch.arange(len(nodes)).view(CLASSES, -1)
    parts = place.split([train, validation, test], dim=1)
    return Graph(features, near, labels[nodes], *(part.flatten() for part in parts))


@dataclass(frozen=True)
class Choices:
    """What is chosen in a layer."""

    hidden: int
    attention: str
    heads: int
    aggregation: str
    combine: str
    activation: str


def choices(config: Mapping[str, int], layer: int) -> Choices:
    """Reads a layer's choices from a config of `SPACE`."""
    found = {name: config[f"{layer}.{name}"] for name in CHOICES}
    return Choices(
        found["hidden"],
        ATTENTIONS[found["attention"]],
        found["heads"],
        AGGREGATIONS[found["aggregation"]],
        COMBINES[found["combine"]],
        tuple(ACTIVATIONS)[found["activation"]],
    )


class GraphLayer(nn.Module):
    """Attention, aggregation and combination; a norm, a skip connection, an activation."""

    def __init__(self, inputs: int, chosen: Choices) -> None:
        super().__init__()
        self.chosen = chosen
        heads, hidden = chosen.heads, chosen.hidden
        width = heads * hidden
        self.project = nn.Linear(inputs, width, bias=False)
        for name in _VECTORS[chosen.attention]:
            vector = nn.Parameter(torch.empty(heads, hidden))
            nn.init.xavier_uniform_(vector)
            self.register_parameter(name, vector)
        if chosen.combine == "mlp":
            self.mlp = nn.Sequential(
                nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)
            )
        self.norm = nn.BatchNorm1d(width)
        self.skip = nn.Linear(inputs, width, bias=False)

    def forward(self, x: Tensor, neighbours: Tensor) -> Tensor:
        h = self.project(x).unflatten(1, (self.chosen.heads, self.chosen.hidden))
        around = h[neighbours]
        weights = self._scores(h, around, neighbours).softmax(1)
        out = self._aggregated(weights[..., None] * around).flatten(1)
        if self.chosen.combine == "mlp":
            out = self.mlp(out)
        return ACTIVATIONS[self.chosen.activation](self.norm(out) + self.skip(x))

    def _scores(self, h: Tensor, around: Tensor, neighbours: Tensor) -> Tensor:
        """Scores of each neighbour by each head, shape (nodes, neighbours, heads)."""
        attention = self.chosen.attention
        if attention == "const":
            return torch.zeros(around.shape[:3])
        if attention == "linear":
            return (around * self.theirs).sum(3).tanh()
        if attention == "cos":
            return (h[:, None] * self.own * around * self.theirs).sum(3)
        if attention == "gen-linear":
            return ((h[:, None] * self.own + around * self.theirs).tanh() * self.out).sum(3)
        own, theirs = (h * self.own).sum(2), (h * self.theirs).sum(2)
        scores = F.leaky_relu(own[:, None] + theirs[neighbours], 0.2)
        if attention == "sym-gat":
            scores = scores + F.leaky_relu(own[neighbours] + theirs[:, None], 0.2)
        return scores

    def _aggregated(self, messages: Tensor) -> Tensor:
        if self.chosen.aggregation == "max":
            return messages.amax(1)
        return messages.sum(1) if self.chosen.aggregation == "sum" else messages.mean(1)


_VECTORS = {
    "const": (),
    "gat": ("own", "theirs"),
    "sym-gat": ("own", "theirs"),
    "cos": ("own", "theirs"),
    "linear": ("theirs",),
    "gen-linear": ("own", "theirs", "out"),
}


class GraphNet(nn.Module):
    """Two layers and a classifier of nodes."""

    def __init__(self, config: Mapping[str, int], inputs: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for layer in range(LAYERS):
            self.layers.append(GraphLayer(inputs, choices(config, layer)))
            inputs = self.layers[-1].norm.num_features
        self.classify = nn.Linear(inputs, CLASSES)

    def forward(self, x: Tensor, neighbours: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, neighbours)
        return self.classify(x)


def kind(layer: nn.Module) -> Hashable:
    """What homogeneous layers have in common beside their shapes."""
    return layer.chosen.attention, layer.chosen.activation


def fresh(config: Mapping[str, int], seed: int) -> GraphNet:
    """Builds a network, untrained."""
    with kept(seed):
        return GraphNet(config, graph(seed).features.shape[1])


def fit(
    net: GraphNet, data: Graph, epochs: int, *, lr: float = 0.01, decay: float = 5e-4
) -> None:
    """Trains on the labelled nodes, all at once."""

    def loss(output: Tensor, batch: Graph) -> Tensor:
        return F.cross_entropy(output[batch.train], batch.labels[batch.train])

    run = SizesRun(
        net,
        torch.optim.Adam(net.parameters(), lr=RATE, weight_decay=DECAY),
        WholeOnly(),
        Labels(loss),
        forward=lambda model, batch: model(batch.features, batch.neighbours),
    )
    net.train()
    for _ in range(epochs):
        run.step(data)


@torch.no_grad()
def accuracy(net: GraphNet, data: Graph, nodes: Tensor) -> float:
    """Gives the share of nodes that are classified rightly."""
    output = net.eval()(data.features, data.neighbours)
    return float((output[nodes].argmax(1) == data.labels[nodes]).double().mean())
