"""Truths about WeakNAS."""

from __future__ import annotations

import numpy as np
import pytest

from supple.errors import SettingError
from supple.search.base import Problem, Told
from supple.search.weaknas import WeakNAS
from supple.space import Site, Space

GRID = Space([Site(f"s{i}", "width", tuple(range(4)), 3) for i in range(4)])


def told(count: int) -> Told:
    rows = GRID.random_many(count, 0)
    return Told(rows, rows.sum(axis=1, keepdims=True).astype(float), np.zeros(count))


def test_what_is_drawn_is_of_the_best_of_the_whole_space_in_random_order() -> None:
    problem = Problem(GRID, ("loss",))
    known = told(40)
    search = WeakNAS(first=10, sample=8, predictor="ridge")
    drawn = search.propose_for(problem, known, np.random.default_rng(0))[:8]
    left = [row for row in GRID.every() if not (known.rows == row).all(axis=1).any()]
    sums = sorted(int(row.sum()) for row in left)[:8]
    assert sorted(drawn.sum(axis=1).tolist()) == sums
    again = search.propose_for(problem, known, np.random.default_rng(1))[:8]
    assert not (drawn == again).all()


def test_the_first_configs_are_random() -> None:
    drawn = WeakNAS(first=50).propose_for(
        Problem(GRID, ("loss",)), told(40), np.random.default_rng(0)
    )
    assert len(drawn) == 50
    assert 5 < drawn.sum(axis=1).mean() < 7


@pytest.mark.parametrize(
    "wrong", [{"population": 0}, {"first": 3}, {"sample": 0}, {"candidates": 50}]
)
def test_settings_out_of_range_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(SettingError, match=next(iter(wrong))):
        WeakNAS(**wrong)  # type: ignore[arg-type]
