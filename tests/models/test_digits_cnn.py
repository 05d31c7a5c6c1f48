"""The demo's network is small, can skip its blocks, and learns the digits."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from supple.data.base import load
from supple.errors import SettingError
from supple.models.digits_cnn import ResidualBlock, build


def test_it_has_between_50_and_150_thousand_parameters():
    assert sum(p.numel() for p in build().parameters()) == 102_714


def test_blocks_keep_their_shape():
    blocks = [part for part in build().modules() if isinstance(part, ResidualBlock)]
    assert len(blocks) == 4
    for block in blocks:
        x = torch.randn(2, block.conv1.in_channels, 4, 4)
        assert block(x).shape == x.shape


def test_a_block_whose_last_norm_is_zero_passes_positive_inputs():
    block = ResidualBlock(5, 7).eval()
    torch.nn.init.zeros_(block.bn2.weight)
    x = torch.rand(2, 5, 4, 4)
    torch.testing.assert_close(block(x), x)


def test_a_few_epochs_classify_93_percent_of_the_digits():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = build(widths=(8, 16), blocks=(1, 1))
    data = load("digits")
    optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
    for epoch in range(6):
        for x, y in data.train.epoch(epoch):
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
    net.eval()
    with torch.no_grad():
        right = sum((net(x).argmax(1) == y).sum().item() for x, y in data.test)
    assert right / data.test.examples > 0.93


@pytest.mark.parametrize(
    "settings",
    [{"widths": (8,)}, {"widths": (8, 0, 8)}, {"blocks": (1, -1, 1)}, {"classes": 0}],
)
def test_impossible_settings_are_refused(settings):
    with pytest.raises(SettingError, match=next(iter(settings))):
        build(**settings)
