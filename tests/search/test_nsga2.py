"""Truths about NSGA-II."""

from __future__ import annotations

import numpy as np
import pytest

from supple.errors import SettingError
from supple.search._ranking import front, ranked
from supple.search.base import Told
from supple.search.nsga2 import NSGA2
from supple.search.random_search import RandomSearch
from supple.space import Site, Space
from tests.search.problems import SPACE, searched

GRID = Space([Site(f"s{i}", "width", tuple(range(5)), 4) for i in range(11)])


def told(values: list[list[float]], violations: list[float] | None = None) -> Told:
    n = len(values)
    rows = np.arange(n)[:, None].repeat(11, axis=1) % 5
    return Told(rows, np.array(values, dtype=float), np.array(violations or [0.0] * n))


def test_ranks_and_crowding_distances_by_hand() -> None:
    # Front 0: (0, 4) (1, 2) (4, 0); front 1: (2, 3) (3, 2); front 2: (4, 4).
    pool = told([[4, 4], [0, 4], [2, 3], [1, 2], [3, 2], [4, 0]])
    rank, crowding = ranked(pool)
    assert rank.tolist() == [2, 0, 1, 0, 1, 0]
    # The middle of front 0: (4 - 0) / 4 + (4 - 0) / 4, as pymoo has it over 2 objectives.
    assert crowding[3] == pytest.approx(1.0)
    assert np.isinf(crowding[[0, 1, 2, 4, 5]]).all()


def test_survival_takes_ranks_in_order_and_the_least_crowded_of_the_last() -> None:
    # One front: ends, a lonely point, and three that crowd together.
    pool = told([[0, 9], [9, 0], [3, 6], [6, 3], [6.1, 2.9], [6.2, 2.8], [9, 9]])
    kept = NSGA2(population=4).select(pool)
    assert sorted(kept.values[:, 0].tolist())[:2] == [0, 3]
    assert [9, 0] in kept.values.tolist()
    assert [9, 9] not in kept.values.tolist()


def test_configs_that_break_a_constraint_come_after_all_others_by_violation() -> None:
    pool = told([[0, 0], [5, 5], [1, 1], [2, 2], [9, 9]], [0.5, 0.0, 0.1, np.inf, 0.1])
    rank, _ = ranked(pool)
    assert rank.tolist() == [2, 0, 1, 3, 1]
    kept = NSGA2(population=4).select(pool)
    assert kept.violations.tolist() == [0.0, 0.1, 0.1, 0.5]


def test_the_front_is_rank_zero_also_with_repeats_and_violations() -> None:
    random = np.random.default_rng(0)
    for objectives in (1, 2, 3):
        pool = told(random.integers(6, size=(40, objectives)).tolist())
        assert front(pool).tolist() == np.flatnonzero(ranked(pool)[0] == 0).tolist()
    assert front(told([[1, 1], [0, 0], [2, 2]], [0.5, 0.7, 0.5])).tolist() == [0, 2]
    assert front(told([[1, 1], [0, 0], [2, 2]], [0.0, 0.7, 0.0])).tolist() == [0]
    assert len(front(told([[1, 1]]).take(slice(0, 0)))) == 0


def test_children_stay_inside_and_the_outer_choices_are_reached() -> None:
    random = np.random.default_rng(0)
    middle = told([[float(i), -float(i)] for i in range(20)])
    algorithm = NSGA2(population=400, mutation_probability=1.0)
    children = algorithm.propose(GRID, middle, random)
    assert children.shape == (400, 11)
    assert (children >= 0).all()
    assert (children < 5).all()
    assert set(np.unique(children)) == {0, 1, 2, 3, 4}


def test_without_crossover_and_mutation_children_are_parents() -> None:
    random = np.random.default_rng(0)
    parents = told([[float(i), -float(i)] for i in range(5)])
    algorithm = NSGA2(population=30, crossover_probability=0.0, mutation_probability=0.0)
    children = algorithm.propose(GRID, parents, random)
    assert set(map(tuple, children)) <= set(map(tuple, parents.rows))


@pytest.mark.parametrize("count", [2, 3, 9])
def test_a_mutated_gene_always_moves(count: int) -> None:
    space = Space([Site(f"s{i}", "width", tuple(range(count)), 0) for i in range(7)])
    rows = np.full((4, 7), count - 1)
    parents = Told(rows, np.zeros((4, 2)), np.zeros(4))
    algorithm = NSGA2(population=50, crossover_probability=0.0, mutation_probability=1.0)
    children = algorithm.propose(space, parents, np.random.default_rng(0))
    assert (children < count - 1).all()


def test_better_parents_win_tournaments() -> None:
    parents = told([[float(i), float(i)] for i in range(10)])
    pairs = NSGA2(population=4000)._tournament(parents, np.random.default_rng(0))
    shares = np.bincount(pairs.ravel(), minlength=10) / pairs.size
    # The best wins unless it is not drawn: 1 - 0.9^2; the worst needs both draws: 0.1^2.
    assert shares[0] == pytest.approx(0.19, abs=0.03)
    assert shares[9] == pytest.approx(0.01, abs=0.01)


def test_sites_that_a_parent_lacks_come_from_the_other() -> None:
    skipped = SPACE.encode({f"{i}.depth": 0 for i in range(6)})
    whole = SPACE.encode({f"{i}.{what}": 1 for i in range(6) for what in ("width", "ratio")})
    parents = Told(np.stack([skipped, whole]), np.array([[0.0, 1.0], [1.0, 0.0]]), np.zeros(2))
    algorithm = NSGA2(population=200, mutation_probability=0.0)
    children = algorithm.propose(SPACE, parents, np.random.default_rng(0))
    present = SPACE.present(children)
    widths = [SPACE.column(f"{i}.width") for i in range(6)]
    crossed = children[present[:, widths].any(axis=1) & ~present[:, widths].all(axis=1)]
    kept = crossed[:, widths][SPACE.present(crossed)[:, widths]]
    # Only a pair of two skipping parents would have to draw, and that gives no block.
    assert len(kept) > 50
    assert (kept == 0).all()


def test_it_finds_more_hypervolume_than_random_search() -> None:
    gains = []
    for seed in range(3):
        evolved = searched(NSGA2().start(SPACE, ["loss", "cost"], seed), 300)
        drawn = searched(RandomSearch().start(SPACE, ["loss", "cost"], seed), 300)
        gains.append(evolved - drawn)
    # The best known is 1.109; random search reaches 1.02 on average.
    assert np.mean(gains) > 0.02


@pytest.mark.parametrize(
    "wrong",
    [
        {"population": 3},
        {"crossover_probability": 1.5},
        {"mutation_probability": -0.1},
        {"crossover_eta": 0.5},
        {"mutation_eta": float("nan")},
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(SettingError, match=next(iter(wrong))):
        NSGA2(**wrong)  # type: ignore[arg-type]
