"""Truths about regularized evolution."""

from __future__ import annotations

import numpy as np
import pytest

from supple.errors import SettingError
from supple.search._ranking import winner
from supple.search.base import Told
from supple.search.random_search import RandomSearch
from supple.search.regularized_evolution import RegularizedEvolution
from supple.space import Site, Space
from tests.search.problems import SPACE, searched

GRID = Space([Site(f"s{i}", "width", tuple(range(5)), 4) for i in range(11)])


def told(values: list[float]) -> Told:
    rows = np.arange(len(values))[:, None].repeat(11, axis=1) % 5
    return Told(rows, np.array(values)[:, None], np.zeros(len(values)))


def test_the_oldest_die_even_the_best() -> None:
    kept = RegularizedEvolution(population=3, sample=1).select(told([0.0, 5.0, 4.0, 9.0]))
    assert kept.values.ravel().tolist() == [5.0, 4.0, 9.0]


def test_children_are_one_site_away_from_the_best_of_the_sample() -> None:
    algorithm = RegularizedEvolution(population=5, sample=5)
    random = np.random.default_rng(0)
    drawn = [
        algorithm.propose(GRID, told([3.0, 2.0, 0.5, 1.0, 4.0]), random) for _ in range(60)
    ]
    children = np.concatenate(drawn)
    changed = children != 2
    assert (changed.sum(axis=1) == 1).all()
    assert changed.any(axis=0).all()
    assert set(children[changed]) == {0, 1, 3, 4}


def test_a_small_sample_lets_others_than_the_best_have_children() -> None:
    random = np.random.default_rng(0)
    population = told([0.0, 1.0, 2.0, 3.0, 4.0])
    best = [winner(population, 2, random) for _ in range(1500)]
    # The best of two of five: 4, 3, 2, 1 and 0 of ten pairs.
    assert np.bincount(best, minlength=5) / 1500 == pytest.approx(
        [0.4, 0.3, 0.2, 0.1, 0], abs=0.04
    )


def test_it_finds_more_hypervolume_than_random_search() -> None:
    gains = []
    for seed in range(3):
        algorithm = RegularizedEvolution(population=20, sample=10)
        evolved = searched(algorithm.start(SPACE, ["loss", "cost"], seed), 300)
        drawn = searched(RandomSearch().start(SPACE, ["loss", "cost"], seed), 300)
        gains.append(evolved - drawn)
    assert np.mean(gains) > 0.02


@pytest.mark.parametrize("wrong", [{"population": 1}, {"sample": 0}, {"sample": 101}])
def test_settings_out_of_range_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(SettingError, match=next(iter(wrong))):
        RegularizedEvolution(**wrong)
