"""The running average of the weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from supple.errors import CheckpointError, SettingError
from supple.training.ema import Average


def test_the_average_follows_the_formula_by_hand():
    module = nn.Linear(1, 1, bias=False)
    values = [1.0, 3.0, 2.0]
    with torch.no_grad():
        module.weight.fill_(values[0])
        average = Average(module, 0.15)
        for value in values[1:]:
            module.weight.fill_(value)
            average.update()
        # The first decay is (1 + 0) / (10 + 0), the second min(0.15, 2 / 11).
        expected = 0.15 * (0.1 * 1.0 + 0.9 * 3.0) + 0.85 * 2.0
        with average.applied():
            assert module.weight.item() == pytest.approx(expected)
    assert module.weight.item() == 2.0


def test_constants_among_the_buffers_are_not_averaged():
    module = nn.BatchNorm1d(2)
    module.register_buffer("mask", torch.full((2,), -torch.inf))
    average = Average(module, 0.5)
    module.running_mean.fill_(1.0)
    average.update()
    with average.applied():
        assert module.running_mean.tolist() == pytest.approx([0.9, 0.9])
        assert torch.isneginf(module.mask).all()


def test_decay_zero_keeps_the_last_weights():
    module = nn.Linear(2, 3)
    average = Average(module, 0.0)
    with torch.no_grad():
        module.weight.fill_(5.0)
    average.update()
    with average.applied():
        assert (module.weight == 5.0).all()


def test_the_state_round_trips():
    module = nn.Linear(2, 3)
    a, b = Average(module, 0.9), Average(nn.Linear(2, 3), 0.9)
    a.update()
    b.load_state_dict(a.state_dict())
    assert b.updates == 1
    assert torch.equal(b.state_dict()["average"]["weight"], a.state_dict()["average"]["weight"])
    with pytest.raises(CheckpointError, match="other tensors"):
        b.load_state_dict({"updates": 1, "average": {}})


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_decay_is_checked(decay):
    with pytest.raises(SettingError, match="ema must lie"):
        Average(nn.Linear(1, 1), decay)
