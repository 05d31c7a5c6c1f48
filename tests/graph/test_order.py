"""Importance of units, by the weights that they own or that are read with."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from supple.axes.width import Width
from supple.errors import SettingError
from supple.network import elastic
from tests.graph.checks import shake


class Inverted(nn.Module):
    """Expand, filter each channel, project; then a plain matrix (inputs, outputs)."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Conv2d(3, 12, 1)
        self.norm = nn.BatchNorm2d(12)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.project = nn.Conv2d(12, 8, 1)
        self.matrix = nn.Parameter(torch.randn(8, 10))
        self.bias = nn.Parameter(torch.randn(10))
        self.head = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.project(self.depthwise(self.norm(self.expand(x)).relu()).relu())
        x = torch.addmm(self.bias, x.mean((2, 3)), self.matrix)
        return self.head(F.relu(x))


def test_units_count_by_the_weights_that_read_them() -> None:
    model = shake(Inverted()).eval()
    net = elastic(model, torch.randn(2, 3, 5, 5), axes=[Width()], verify=False)
    found = net.importance("read_l1")
    expected = {
        "expand": model.project.weight.abs().sum((0, 2, 3)),
        "matrix": model.matrix.abs().sum(1),  # no transpose: what it reads are its rows
        "matrix#2": model.head.weight.abs().sum(0),
    }
    assert found.keys() == expected.keys()
    for name, score in expected.items():
        torch.testing.assert_close(found[name], score.detach(), msg=name)
    assert net.importance("l1")["expand"].sum() > 2 * found["expand"].sum()


def test_sorting_by_reading_weights_puts_the_most_read_first() -> None:
    model = shake(Inverted()).eval()
    x = torch.randn(2, 3, 5, 5)
    net = elastic(model, x, axes=[Width()], verify=False)
    before = model(x)
    net.sort("read_l1")
    torch.testing.assert_close(model(x), before)
    for name, score in net.importance("read_l1").items():
        assert (score.diff() <= 1e-6).all(), name


def test_where_nothing_reads_all_weights_count() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.scale = nn.Linear(5, 8), nn.Parameter(torch.randn(8))

        def forward(self, x: Tensor) -> Tensor:
            return (self.inner(x) * self.scale).sum(-1)

    net = elastic(shake(Gated()), torch.randn(2, 5), axes=[Width()], verify=False)
    assert torch.equal(net.importance("read_l1")["scale"], net.importance("l1")["scale"])


def test_an_unknown_rule_is_refused() -> None:
    net = elastic(Inverted().eval(), torch.randn(2, 3, 5, 5), axes=[Width()], verify=False)
    with pytest.raises(SettingError, match="one of 'l1', 'read_l1', got 'l3'"):
        net.importance("l3")
