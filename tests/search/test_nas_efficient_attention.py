"""Truths about the ranking-based search over kinds of attention."""

from __future__ import annotations

import numpy as np
import pytest

from supple.errors import SettingError
from supple.predictors import Ridge, rank_correlation
from supple.search._pairwise import PairwiseRanking, _derivatives
from supple.search.base import Problem, Told
from supple.search.nas_efficient_attention import NASEfficientAttention
from supple.space import Site, Space

KINDS = Space([Site(f"{i}.attention", "operator", (0, 1), 1) for i in range(9)])
GRID = Space([Site(f"s{i}", "width", tuple(range(4)), 3) for i in range(5)])
GAINS = np.array([5.0, 0.0, 3.0, 0.1, 1.0, 0.0, 4.0, 0.3, 2.0])


def told(count: int) -> Told:
    rows = np.unique(KINDS.random_many(count, 0), axis=0)
    return Told(rows, (15 - rows @ GAINS)[:, None], np.zeros(len(rows)))


def test_derivatives_of_the_loss_over_pairs_are_those_of_differences() -> None:
    random = np.random.default_rng(0)
    scores, values = random.normal(size=7), np.array([1.0, 3.0, 2.0, 3.0, 0.0, 5.0, 4.0])
    better = (values[:, None] < values).astype(float)

    def loss(s: np.ndarray) -> float:
        return float((np.logaddexp(0, s[:, None] - s) * better).sum())

    slope, curvature = _derivatives(scores, better)
    for place, step in enumerate(np.eye(7) * 1e-4):
        up, here, down = loss(scores + step), loss(scores), loss(scores - step)
        assert slope[place] == pytest.approx((up - down) / 2e-4, abs=1e-6)
        assert curvature[place] == pytest.approx((up - 2 * here + down) / 1e-8, abs=1e-5)


def test_only_the_order_of_the_values_counts() -> None:
    rows = GRID.random_many(40, 0)
    values = rows @ np.array([3.0, 1.0, 0.5, 2.0, 0.1])
    ranking = PairwiseRanking(trees=15)
    first = ranking.fit(GRID, rows, values).predict(GRID.every())
    second = ranking.fit(GRID, rows, np.exp(3 * values)).predict(GRID.every())
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(first, ranking.fit(GRID, rows, -values).predict(GRID.every()))


def test_it_ranks_what_squared_errors_cannot_see() -> None:
    rows = GRID.random_many(60, 0)
    values = np.exp(
        4 * rows @ np.array([3.0, 1.0, 0.5, 2.0, 0.1])
    )  # one value is all the error
    ranked = rank_correlation(PairwiseRanking(trees=25), GRID, rows, values)
    assert ranked > rank_correlation(Ridge(), GRID, rows, values) + 0.1
    assert ranked > 0.7


def test_only_the_sites_that_matter_are_looked_at() -> None:
    rows = GRID.random_many(60, 0)
    values = rows @ np.array([0.1, 2.0, 0.0, -3.0, 0.1])
    fitted = PairwiseRanking(trees=15, sites=2).fit(GRID, rows, values)
    every = GRID.every()
    scores = fitted.predict(every).reshape(4, 4, 4, 4, 4)
    assert (scores == scores[:1, :, :1, :, :1]).all()
    assert len(np.unique(scores)) > 8


def test_the_best_new_ones_by_rank_are_proposed() -> None:
    known = told(120)
    search = NASEfficientAttention(population=6, first=20, candidates=500, trees=25)
    drawn = search.propose_for(Problem(KINDS, ("loss",)), known, np.random.default_rng(0))[:6]
    left = [row for row in KINDS.every() if not (known.rows == row).all(axis=1).any()]
    best = np.sort([float(row @ GAINS) for row in left])[::-1]
    assert not any((known.rows == row).all(axis=1).any() for row in drawn)
    assert (drawn @ GAINS).mean() > best[:20].mean()


def test_the_search_on_scores_goes_on_from_generation_to_generation() -> None:
    space = Space([Site(f"s{i}", "width", tuple(range(9)), 8) for i in range(20)])
    problem = Problem(space, ("loss",))
    random = np.random.default_rng(0)

    def price(rows: np.ndarray) -> Told:
        return Told(rows, -rows.sum(axis=1, keepdims=True).astype(float), np.zeros(len(rows)))

    search = NASEfficientAttention(mutation_probability=0.1)
    drawn = space.random_many(500, random)
    found = search._evolved(problem, price, drawn, random)
    assert len(np.unique(found.rows, axis=0)) == len(found)
    assert drawn.sum(axis=1).max() < 130
    assert -found.values.min() > 150  # of 160


def test_what_needs_no_evaluation_is_neither_ranked_nor_broken() -> None:
    known = told(120)
    both = Told(
        known.rows,
        np.concatenate([known.values, np.full_like(known.values, np.pi)], axis=1),
        known.violations,
    )
    problem = Problem(
        KINDS,
        ("loss", "softmax"),
        {"softmax": lambda rows: rows.sum(axis=1)},  # what was told of it is not believed
        lambda rows: np.maximum(rows.sum(axis=1) - 4, 0),
    )
    search = NASEfficientAttention(population=6, first=20, candidates=500, trees=25)
    drawn = search.propose_for(problem, both, np.random.default_rng(0))
    assert (drawn.sum(axis=1) <= 4).all()
    softmax = drawn[:6].sum(axis=1)
    assert len(set(softmax)) > 2  # a front of both
    gains = drawn[:6] @ GAINS
    assert (gains >= GAINS.mean() * softmax).all()


def test_the_first_are_random_and_within_the_bound() -> None:
    problem = Problem(
        KINDS, ("loss",), violation=lambda rows: np.maximum(rows.sum(axis=1) - 4, 0)
    )
    drawn = NASEfficientAttention().propose_for(problem, told(30), np.random.default_rng(0))
    assert (drawn.sum(axis=1) <= 4).all()
    assert len(np.unique(drawn, axis=0)) > 80
    assert (drawn @ GAINS).mean() < 10


def test_bounds_that_only_evaluations_tell_are_predicted() -> None:
    known = told(120)
    beyond = 1e6 * np.maximum(known.rows.sum(axis=1) - 4.0, 0)  # bytes, say
    search = NASEfficientAttention(population=6, first=20, candidates=500, trees=25)
    held = search.propose_for(
        Problem(KINDS, ("loss",)),
        Told(known.rows, known.values, beyond),
        np.random.default_rng(0),
    )[:6]
    free = search.propose_for(Problem(KINDS, ("loss",)), known, np.random.default_rng(0))[:6]
    assert held.sum(axis=1).mean() < free.sum(axis=1).mean() - 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"population": 0},
        {"first": 3},
        {"candidates": 0},
        {"mutation_probability": -0.1},
        {"trees": 0},
        {"sites": 0},
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(SettingError, match=next(iter(wrong))):
        NASEfficientAttention(**wrong)  # type: ignore[arg-type]
