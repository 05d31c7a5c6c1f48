"""Truths about NSGA-III."""

from __future__ import annotations

import numpy as np
import pytest

from supple.errors import SettingError
from supple.search.base import Told
from supple.search.nsga3 import NSGA3, directions_of
from supple.search.random_search import RandomSearch
from supple.space import Site, Space
from supple.study.indicators import hypervolume

SPACE = Space([Site(f"s{i}", "width", tuple(range(4)), 3) for i in range(12)])


def told(values: list[list[float]], violations: list[float] | None = None) -> Told:
    n = len(values)
    rows = np.arange(n)[:, None].repeat(12, axis=1) % 4
    return Told(rows, np.array(values, dtype=float), np.array(violations or [0.0] * n))


@pytest.mark.parametrize(
    ("objectives", "most", "number"),
    [(2, 20, 20), (3, 20, 15), (3, 91, 91), (4, 3, 4), (1, 9, 1)],
)
def test_there_are_as_many_directions_as_fit(objectives: int, most: int, number: int) -> None:
    directions = directions_of(objectives, most)
    assert directions.shape == (number, objectives)
    np.testing.assert_allclose(directions.sum(axis=1), 1)


def test_each_direction_keeps_the_config_that_is_nearest_to_it() -> None:
    # One front between (0, 12) and (12, 0), four directions: towards the ends, 1:2 and 2:1.
    # The points (4, 8) and (8, 4) lie on the inner ones; those around them are farther.
    pool = told([[0, 12], [4, 8], [4.5, 7.5], [3.5, 8.5], [8, 4], [7, 5], [12, 0], [13, 13]])
    kept = NSGA3(population=4).select(pool)
    assert sorted(kept.values.tolist()) == [[0, 12], [4, 8], [8, 4], [12, 0]]


def test_a_whole_rank_is_kept_before_the_next_and_the_emptiest_direction_is_filled() -> None:
    # Rank 0: three, of which each has a direction of its own. Rank 1: beside each of them one,
    # and (2, 3) alone with the fourth direction, 1:2.
    beside = [[0.2, 4.4], [4.4, 0.2], [2.5, 1.2]]
    for order in ([*beside, [2, 3]], [[2, 3], *beside], [beside[0], [2, 3], *beside[1:]]):
        kept = NSGA3(population=4).select(told([[0, 4], [4, 0], [2, 1], *order]))
        assert sorted(kept.values.tolist()) == [[0, 4], [2, 1], [2, 3], [4, 0]]


def test_what_breaks_a_constraint_comes_last_by_violation() -> None:
    pool = told([[0, 0], [5, 5], [1, 1], [2, 2], [9, 9]], [0.5, 0.0, 0.1, np.inf, 0.0])
    kept = NSGA3(population=4).select(pool)
    assert kept.violations.tolist() == [0.0, 0.0, 0.1, 0.5]
    pairs = NSGA3(population=40)._tournament(kept, np.random.default_rng(0))
    chosen = np.bincount(pairs.ravel(), minlength=4) / pairs.size
    assert chosen[3] < 0.15 < 0.3 < chosen[0]


def test_one_objective_keeps_the_best() -> None:
    pool = told([[5], [1], [4], [2], [3], [6]])
    assert sorted(NSGA3(population=4).select(pool).values[:, 0]) == [1, 2, 3, 4]


def values_of(rows: np.ndarray) -> np.ndarray:
    a, b = rows[:, :4].sum(axis=1), rows[:, 4:8].sum(axis=1)
    waste = rows[:, 8:].sum(axis=1)
    return np.stack([a + waste, b + waste, 24 - a - b + waste], axis=1).astype(float)


def test_it_finds_more_of_a_front_of_three_objectives_than_chance() -> None:
    volumes = []
    for method in (NSGA3(population=20), RandomSearch()):
        run = method.start(SPACE, ["a", "b", "c"], 0)
        for _ in range(15):
            rows = run.ask_rows(20)
            run.tell(rows, values_of(rows))
        volumes.append(hypervolume(run.told.values, np.full(3, 30.0)))
    assert volumes[0] > 1.05 * volumes[1]


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(SettingError, match="population must be at least 4, got 3"):
        NSGA3(population=3)
