"""Truths about the graph networks that a reproduction searches."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from reproductions.search import _graphs as graphs
from supple.training.seeds import generator, kept

NODES = 11
NEIGHBOURS = torch.stack(
    [torch.tensor([i, (i + 1) % NODES, (i * 3 + 2) % NODES]) for i in range(NODES)]
)


def _layer(**chosen: object) -> graphs.GraphLayer:
    settings = {"hidden": 4, "attention": "gat", "heads": 2, "aggregation": "sum"}
    settings |= {"combine": "identity", "activation": "identity", **chosen}
    with kept(0):
        layer = graphs.GraphLayer(5, graphs.Choices(**settings))  # type: ignore[arg-type]
    torch.nn.init.zeros_(layer.skip.weight)
    return layer.eval()


def _leaky(x: float) -> float:
    return x if x > 0 else 0.2 * x


def _score(layer: graphs.GraphLayer, own: Tensor, theirs: Tensor, k: int) -> float:
    """How much a head attends to a neighbour, before the softmax."""
    attention = layer.chosen.attention
    a, b = getattr(layer, "own", None), getattr(layer, "theirs", None)
    if attention == "const":
        return 0.0
    assert b is not None
    if attention == "linear":
        return math.tanh(float(theirs @ b[k]))
    assert a is not None
    if attention == "cos":
        return float((own * a[k]) @ (theirs * b[k]))
    if attention == "gen-linear":
        return float((own * a[k] + theirs * b[k]).tanh() @ layer.out[k])
    there = _leaky(float(own @ a[k]) + float(theirs @ b[k]))
    back = _leaky(float(theirs @ a[k]) + float(own @ b[k]))
    return there + back if attention == "sym-gat" else there


@pytest.mark.parametrize("attention", graphs.ATTENTIONS)
def test_a_layer_attends_as_by_hand(attention: str) -> None:
    layer = _layer(attention=attention)
    x = torch.randn(NODES, 5, generator=generator(0, "test"))
    with torch.no_grad():
        got = layer(x, NEIGHBOURS).unflatten(1, (2, 4))
        h = layer.project(x).unflatten(1, (2, 4))
        for node, k in ((0, 0), (7, 1)):
            near = [h[j, k] for j in NEIGHBOURS[node].tolist()]
            scores = torch.tensor([_score(layer, h[node, k], n, k) for n in near])
            expected = (scores.softmax(0)[:, None] * torch.stack(near)).sum(0)
            # A fresh batch norm divides by the root of 1 + 1e-5.
            torch.testing.assert_close(got[node, k], expected, rtol=1e-4, atol=1e-5)


def test_aggregation_by_hand() -> None:
    messages = torch.tensor([[[[1.0]], [[5.0]], [[3.0]]]])
    for name, expected in (("sum", 9.0), ("mean", 3.0), ("max", 5.0)):
        assert _layer(aggregation=name)._aggregated(messages).item() == expected


def test_nodes_have_no_order() -> None:
    with kept(0):
        net = graphs.GraphNet(graphs.SPACE.random(3), 5).eval()
    x = torch.randn(NODES, 5, generator=generator(0, "test"))
    order = torch.randperm(NODES, generator=generator(1, "test"))
    place = order.argsort()
    with torch.no_grad():
        moved = net(x[order], place[NEIGHBOURS[order]])
        torch.testing.assert_close(moved, net(x, NEIGHBOURS)[order])


def test_a_graph_keeps_its_parts_apart() -> None:
    data = graphs.graph(0, train=5, validation=7, test=3)
    parts = [data.train, data.validation, data.test]
    assert [len(part) for part in parts] == [50, 70, 30]
    assert len(torch.cat(parts).unique()) == len(data.labels) == 150
    assert (data.labels[data.train].bincount() == 5).all()
    assert torch.equal(data.neighbours[:, 0], torch.arange(150))
    assert graphs.kind(_layer(attention="cos", activation="relu")) == ("cos", "relu")
