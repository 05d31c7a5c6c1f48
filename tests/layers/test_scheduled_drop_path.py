"""Truths about paths that are dropped more and more often."""

from __future__ import annotations

import pytest
import torch

from supple.errors import SettingError
from supple.layers.scheduled_drop_path import ScheduledDropPath


@pytest.mark.parametrize(("forwards", "dropped"), [(0, 0.0), (25, 0.2), (50, 0.4), (200, 0.4)])
def test_the_probability_rises_to_its_end_and_stays(forwards: int, dropped: float) -> None:
    layer = ScheduledDropPath(0.4, steps=50)
    layer.forwards.fill_(forwards)
    torch.manual_seed(0)
    out = layer(torch.ones(20_000, 3, 1))
    assert float((out[:, 0, 0] == 0).float().mean()) == pytest.approx(dropped, abs=0.012)
    # An example loses its path wholly, or not at all; the mean is kept.
    assert torch.equal(out[:, :1].expand_as(out), out)
    assert float(out.max()) == pytest.approx(1 / (1 - dropped))
    assert layer.forwards == forwards + 1


def test_eval_mode_drops_nothing_and_counts_nothing() -> None:
    layer = ScheduledDropPath(0.9, steps=1)
    layer.forwards.fill_(7)
    x = torch.randn(5, 3)
    assert torch.equal(layer.eval()(x), x)
    assert layer.forwards == 7


def test_where_training_was_is_saved() -> None:
    layer = ScheduledDropPath(0.5, steps=10)
    layer(torch.ones(2, 2))
    other = ScheduledDropPath(0.5, steps=10)
    other.load_state_dict(layer.state_dict())
    assert other.forwards == 1


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(SettingError, match=r"drop must be in \[0, 1\)"):
        ScheduledDropPath(1.0, steps=3)
    with pytest.raises(SettingError, match="steps must be at least 1"):
        ScheduledDropPath(0.1, steps=0)
