"""Truths about TPE."""

from __future__ import annotations

import numpy as np
import pytest

from supple.errors import SettingError
from supple.search.base import Told
from supple.search.tpe import TPE
from supple.space import Site, Space

LINE = Space([Site(name, "width", tuple(range(8)), 7) for name in "ab"])


def told(violations: bool = False) -> Told:
    """All configs; what is small is good, or what is large where the small breaks a rule."""
    rows = LINE.every()
    values = rows.sum(axis=1, keepdims=True).astype(float)
    beyond = np.where(values[:, 0] < 9, 1.0, 0.0) if violations else np.zeros(len(rows))
    return Told(rows, values, beyond)


def test_draws_come_from_where_the_good_ones_are() -> None:
    drawn = TPE(population=20).propose(LINE, told(), np.random.default_rng(0))
    assert drawn.shape[1:] == (2,)
    assert drawn[:20].sum(axis=1).mean() < 3


def test_configs_that_break_a_constraint_are_not_good() -> None:
    drawn = TPE(population=20).propose(LINE, told(violations=True), np.random.default_rng(0))
    assert 8 < drawn[:20].sum(axis=1).mean() < 11


@pytest.mark.parametrize("wrong", [{"population": 0}, {"candidates": 0}])
def test_settings_out_of_range_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(SettingError, match=next(iter(wrong))):
        TPE(**wrong)
