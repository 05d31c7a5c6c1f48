"""Truths about LINAS."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from supple.errors import SettingError
from supple.predictors import Fitted, Ridge, SupportVectors
from supple.search._predicted import evolved, prices
from supple.search._ranking import ranked
from supple.search.base import AskTell, Problem, Told
from supple.search.hardware_aware_search import HardwareAwareSearch
from supple.search.nsga2 import NSGA2
from supple.search.random_search import RandomSearch
from supple.space import Site, Space
from supple.study.pareto import pareto
from supple.technique import from_settings
from tests.search.problems import SPACE, loss_and_cost, searched
from tests.study.stub import Net, accuracy

FAST = HardwareAwareSearch(population=12, candidates=600, predictor="ridge")
GRID = Space([Site(f"s{i}", "width", (1, 2, 3), 3) for i in range(6)])
WORTH = np.array([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])


def size(rows: np.ndarray) -> np.ndarray:
    found: np.ndarray = rows.sum(axis=1)
    return found


def loss(rows: np.ndarray) -> np.ndarray:
    """What the first sites take costs as much as what the last ones take, for less."""
    found: np.ndarray = 200 - rows @ WORTH
    return found


def told(rows: np.ndarray, violations: np.ndarray | None = None) -> Told:
    beyond = np.zeros(len(rows)) if violations is None else violations
    return Told(rows, np.stack([loss(rows), size(rows)], axis=1), beyond)


def problem(**known: Any) -> Problem:
    return Problem(GRID, ("loss", "size"), {"size": size}, **known)


def next_generation(search: HardwareAwareSearch, parents: Told, **known: Any) -> np.ndarray:
    return search.propose_for(problem(**known), parents, np.random.default_rng(0))


def test_the_first_generation_is_random_and_the_second_the_predicted_front() -> None:
    known = GRID.random_many(40, 0)
    proposed = next_generation(HardwareAwareSearch(population=13, candidates=2000), told(known))
    # The true front fills the most valuable sites first: 13 sizes, less what is known.
    front = [np.clip(total - 2 * np.arange(5, -1, -1), 0, 2) for total in range(13)]
    seen = set(map(tuple, known))
    wanted = {tuple(row) for row in front} - seen
    assert len(wanted) > 8
    assert wanted <= set(map(tuple, proposed))
    nothing = told(known[:0])
    drawn = next_generation(HardwareAwareSearch(population=13, candidates=2000), nothing)
    expected = GRID.random_many(13, np.random.default_rng(0))
    np.testing.assert_array_equal(drawn, expected)


def test_what_is_proposed_was_never_evaluated_and_comes_best_first() -> None:
    known = GRID.random_many(60, 0)
    proposed = next_generation(FAST, told(known))
    assert len(proposed) == len(np.unique(proposed, axis=0)) == 12
    assert not set(map(tuple, proposed)) & set(map(tuple, known))
    predicted = prices(problem(), told(known), Ridge())(proposed)
    rank, _ = ranked(predicted)
    assert (np.diff(rank) >= 0).all()


def test_evolution_on_prices_keeps_the_best_of_all_that_it_priced_and_did_not_know() -> None:
    priced = []

    def price(rows: np.ndarray) -> Told:
        priced.append(rows)
        return told(rows)

    known = np.array([np.clip(n - 2 * np.arange(5, -1, -1), 0, 2) for n in range(13)])
    method, random = NSGA2(population=8), np.random.default_rng(0)
    best = evolved(GRID, price, method, 400, random, known)
    rows = np.concatenate(priced[1:])  # the first call learns the number of objectives
    assert len(rows) == len(np.unique(rows, axis=0)) <= 400
    assert set(map(tuple, best.rows)) <= set(map(tuple, rows)) - set(map(tuple, known))
    assert set(map(tuple, known)) & set(map(tuple, rows))  # they do take part
    pool = told(np.array([row for row in rows if tuple(row) not in set(map(tuple, known))]))
    rank, _ = ranked(pool)
    # The end that costs least is never crowded out.
    assert loss(best.rows).min() == loss(pool.rows).min()
    assert size(best.rows).min() == size(pool.rows).min()
    assert len(best) == 8
    assert {tuple(row) for row in best.rows} & {tuple(row) for row in pool.rows[rank == 0]}


def test_computed_objectives_are_never_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    learned = []

    def fit(self: Ridge, space: Space, rows: Any, values: Any) -> Fitted:
        learned.append(np.asarray(values).tolist())
        return original(self, space, rows, values)

    original = Ridge.fit
    monkeypatch.setattr(Ridge, "fit", fit)
    known = GRID.random_many(40, 0)
    next_generation(FAST, told(known))
    assert learned == [loss(known).tolist()]
    learned.clear()
    plain = Problem(GRID, ("loss", "size"))
    FAST.propose_for(plain, told(known), np.random.default_rng(0))
    assert learned == [loss(known).tolist(), size(known).tolist()]


def test_computed_bounds_hold_for_what_is_proposed() -> None:
    known = GRID.random_many(40, 0)
    beyond = np.maximum(size(known) - 5, 0).astype(float)
    proposed = next_generation(
        FAST, told(known, beyond), violation=lambda rows: np.maximum(size(rows) - 5, 0)
    )
    assert (size(proposed) <= 5).all()


def test_bounds_that_only_evaluations_tell_are_predicted() -> None:
    known = GRID.random_many(60, 0)
    beyond = np.maximum(size(known) - 5, 0).astype(float)
    proposed = next_generation(FAST, told(known, beyond))
    free = next_generation(FAST, told(known))
    assert size(proposed).mean() < 6 < size(free).max()
    # Where nothing breaks them, they cost nothing.
    fitted = prices(problem(), told(known), Ridge())
    assert (fitted(free).violations == 0).all()


def test_failed_evaluations_teach_nothing() -> None:
    known = GRID.random_many(40, 0)
    clean = told(known)
    values = clean.values.copy()
    values[::2] = np.nan
    failed = np.where(np.arange(len(known)) % 2 == 0, np.inf, 0.0)
    broken = Told(known, values, failed)
    rows = GRID.every()
    got = prices(problem(), broken, Ridge())(rows)
    expected = prices(problem(), told(known[1::2]), Ridge())(rows)
    np.testing.assert_array_equal(got.values, expected.values)
    few = broken.take(slice(0, 7))  # three that did not fail
    drawn = next_generation(FAST, few)
    np.testing.assert_array_equal(drawn, GRID.random_many(12, np.random.default_rng(0)))


def test_the_predictor_of_the_settings_is_used() -> None:
    known = SPACE.random_many(30, 0)
    values = loss_and_cost(known)
    parents = Told(known, values, np.zeros(len(known)))
    task = Problem(SPACE, ("loss", "cost"))
    for name, method in (("ridge", Ridge()), ("svr", SupportVectors())):
        search = HardwareAwareSearch(population=12, candidates=60, predictor=name)
        random = np.random.default_rng(1)
        best = evolved(
            SPACE, prices(task, parents, method), NSGA2(population=12), 60, random, known
        )
        got = search.propose_for(task, parents, np.random.default_rng(1))
        np.testing.assert_array_equal(got[: len(best)], best.rows)


def test_a_space_that_is_nearly_known_is_walked_to_its_end() -> None:
    small = Space([Site("a", "width", (1, 2, 3), 3), Site("b", "width", (1, 2, 3), 3)])
    search = HardwareAwareSearch(population=4, candidates=8, predictor="ridge")
    run = search.start(small, ["loss"], 0)
    asked = []
    while configs := run.ask(1):
        asked += configs
        run.tell(configs, [[float(sum(configs[0].values()))]])
    assert len(set(asked)) == len(asked) == 9


def test_a_search_rebuilt_after_any_evaluation_goes_on_the_same_way() -> None:
    def started() -> AskTell:
        search = HardwareAwareSearch(population=5, candidates=10, predictor="ridge")
        return search.start(SPACE, ["loss", "cost"], 5)

    def proposals(run: AskTell) -> Any:
        while True:
            row = run.ask_rows(1)
            yield row[0]
            run.tell(row, loss_and_cost(row))

    whole = np.array(list(itertools.islice(proposals(started()), 18)))
    for done in (1, 4, 5, 11, 17):
        rebuilt = started()
        rebuilt.tell(whole[:done], loss_and_cost(whole[:done]))
        np.testing.assert_array_equal(rebuilt.ask_rows(1)[0], whole[done])


def test_it_finds_more_hypervolume_than_nsga2_and_random_search() -> None:
    found = {
        type(one).__name__: np.mean(
            [searched(one.start(SPACE, ["loss", "cost"], s), 48, 12) for s in range(2)]
        )
        for one in (FAST, NSGA2(population=12), RandomSearch())
    }
    # The best known is 1.109.
    assert found["HardwareAwareSearch"] > found["NSGA2"] + 0.03
    assert found["HardwareAwareSearch"] > found["RandomSearch"] + 0.03


def test_a_search_of_a_network_that_was_stopped_evaluates_what_one_would_have(
    tmp_path: Path,
) -> None:
    search = HardwareAwareSearch(population=4, candidates=8, predictor="ridge")
    go = functools.partial(
        pareto, costs=["params"], algorithm=search, where={"params": "<= 20"}, progress=False
    )
    whole, parted = Net(widths=8), Net(widths=8)
    go(whole, accuracy, evaluations=8, study=":memory:")
    for evaluations in (6, 8):
        go(parted, accuracy, evaluations=evaluations, study=tmp_path / "parted.db")
    assert parted.entered == whole.entered
    assert len(set(whole.entered)) == 8


def test_settings_come_from_a_recipe_and_wrong_ones_are_refused() -> None:
    made = from_settings("search/hardware-aware-search", {"population": 8, "predictor": "mlp"})
    assert made == HardwareAwareSearch(population=8, predictor="mlp")
    with pytest.raises(SettingError, match="population must be at least 4"):
        HardwareAwareSearch(population=3)
    with pytest.raises(SettingError, match="candidates must be at least the population"):
        HardwareAwareSearch(population=20, candidates=10)
    with pytest.raises(SettingError, match="did you mean 'ridge'"):
        HardwareAwareSearch(predictor="rigde")
