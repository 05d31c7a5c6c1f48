"""Which modes batch normalization and dropout have in training."""

from __future__ import annotations

import pytest
from torch import nn

from supple.training.norms import running_statistics, tracking_norms, without_dropout


def net() -> nn.Module:
    return nn.Sequential(nn.BatchNorm1d(2), nn.Dropout(), nn.InstanceNorm1d(2))


def test_only_norms_with_running_statistics_are_found():
    assert list(tracking_norms(net())) == ["0"]
    assert list(running_statistics(net())) == ["0.running_mean", "0.running_var"]
    assert list(running_statistics(nn.BatchNorm1d(2))) == ["running_mean", "running_var"]


def test_everything_but_batch_norm_is_in_eval_mode_and_then_as_before():
    module = net()
    module[0].eval()
    modes = []

    def fail():
        with without_dropout(module):
            modes.extend(part.training for part in module)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert modes == [False, False, True]
    assert [part.training for part in module] == [False, True, True]
