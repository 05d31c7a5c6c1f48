"""Depth where the blocks' outputs are put side by side: what reads them is narrower."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import supple
from supple.errors import UnsupportedModelError
from supple.models.base import build
from supple.storage import save

pytestmark = pytest.mark.filterwarnings("ignore:the running statistics of this size")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv1d(3, 5, 1)
        self.outer = nn.Conv1d(5, 3, 1)

    def forward(self, x):
        return x + self.outer(self.inner(x).relu())


class Joined(nn.Module):
    """Three blocks; all their outputs, and what enters the first, are normed and read."""

    def __init__(self, twice: bool = False) -> None:
        super().__init__()
        self.enter = nn.Conv1d(2, 3, 1)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.norm = nn.BatchNorm1d(12)
        self.read = nn.Conv1d(12, 7, 1)
        self.twice = twice

    def forward(self, x):
        x = self.enter(x)
        outputs = [x]
        for block in self.blocks:
            x = block(x)
            outputs.append(x)
        out = self.read(self.norm(torch.cat(outputs, 1)))
        return out + torch.cat(outputs, 1).mean(1, keepdim=True) if self.twice else out


def made(joined=True, **settings):
    torch.manual_seed(0)
    axes = [supple.Depth(joined=joined), supple.Width((2 / 3, 1.0))]
    return supple.elastic(Joined(**settings).eval(), torch.randn(2, 2, 11), axes=axes)


def test_readers_lose_the_parts_of_the_blocks_that_are_left_out():
    net = made()
    model, x = net.module, torch.randn(2, 2, 11)
    size = net.space.config({**net.space.largest(), "blocks.depth": 1})
    with torch.no_grad():
        first = model.enter(x)
        outputs = torch.cat([first, model.blocks[0](first)], 1)
        weights = (model.norm.running_mean[:6], model.norm.running_var[:6])
        normed = nn.functional.batch_norm(outputs, *weights)
        expected = nn.functional.conv1d(normed, model.read.weight[:, :6], model.read.bias)
        with net.at(size):
            torch.testing.assert_close(model(x), expected)
        torch.testing.assert_close(net.extract(size)(x), expected)


def test_every_width_and_depth_is_verified_and_costs_what_its_network_costs():
    net = made()
    assert net.space.site("blocks.depth").choices == (1, 2, 3)
    assert net.verify().ok
    for depth in (1, 2, 3):
        size = net.space.config({**net.space.smallest(), "blocks.depth": depth})
        parameters = sum(p.numel() for p in net.extract(size).parameters())
        assert net.costs(net.space.encode_many([size]))["params"] == [parameters]


def test_without_asking_such_blocks_are_fixed():
    net = made(joined=False)
    assert {site.axis for site in net.space.sites} == {"width"}
    assert "joined" in {fixed.name: fixed.reason for fixed in net.space.fixed}["blocks.1"]


def test_blocks_that_are_joined_twice_stay():
    net = made(twice=True)
    assert {site.axis for site in net.space.sites} == {"width"}


def test_fixed_choices_leave_nothing_to_vary():
    with pytest.raises(UnsupportedModelError):
        supple.elastic(Joined(), torch.randn(2, 2, 11), axes=[supple.Depth((3,), joined=True)])


def test_a_network_cut_out_is_built_again_from_its_files(tmp_path):
    model = build(
        "tdnn", features=7, channels=8, blocks=2, scale=4, joint=8, embedding=3
    ).eval()
    x = torch.randn(2, 7, 11)
    net = supple.elastic(model, x, axes=[supple.Depth(joined=True)], verify=False)
    small = net.extract(net.space.smallest())
    assert len(small.blocks) == 1
    save(small, tmp_path / "small")
    torch.testing.assert_close(supple.load(tmp_path / "small")(x), small(x))
