"""Truths about FBNetV3's search."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from supple.errors import SettingError
from supple.predictors import PretrainedMLP
from supple.search import fbnetv3
from supple.search.base import AskTell, Problem, Told
from supple.search.fbnetv3 import FBNetV3, epochs_that_tell, free_statistics, quasi_random
from supple.space import Site, Space

NETWORK = [Site(f"s{i}", "width", (1, 2, 3, 4), 4) for i in range(4)]
SPACE = Space([*NETWORK, Site("lr", "recipe", (1, 10, 100), 10)])
FAST = FBNetV3(population=10, rounds=2, candidates=250, statistics=100)


def size(rows: np.ndarray) -> np.ndarray:
    found: np.ndarray = rows[:, :4].sum(axis=1)
    return found


def loss(rows: np.ndarray) -> np.ndarray:
    """Large networks are better, and one recipe is."""
    found: np.ndarray = 20 - size(rows) + 3 * np.abs(rows[:, 4] - 1)
    return found


def told(rows: np.ndarray) -> Told:
    values = np.stack([loss(rows), size(rows)], axis=1).astype(float)
    return Told(rows, values, np.zeros(len(rows)))


def problem(**known: Any) -> Problem:
    return Problem(SPACE, ("loss", "size"), {"size": size}, **known)


def proposed(parents: Told, search: FBNetV3 = FAST, **known: Any) -> np.ndarray:
    return search.propose_for(problem(**known), parents, np.random.default_rng(0))


def test_quasi_random_configs_cover_every_pair_of_choices_alike() -> None:
    rows = quasi_random(SPACE, 200, np.random.default_rng(0))
    assert len(rows) == 256
    for a, b in itertools.combinations(range(4), 2):
        pairs = np.zeros((4, 4))
        np.add.at(pairs, (rows[:, a], rows[:, b]), 1)
        assert (pairs == 16).all()
    thirds = np.bincount(rows[:, 4])
    assert thirds.min() >= 84


def test_the_first_generation_covers_the_space_and_meets_computed_constraints_first() -> None:
    nothing = told(SPACE.every()[:0])
    first = proposed(nothing)[:16]
    # The first 16 points of the sequence have each choice of each site four times.
    assert [np.bincount(first[:, i]).tolist() for i in range(4)] == [[4] * 4] * 4

    def beyond(rows: np.ndarray) -> np.ndarray:
        return np.maximum(size(rows) - 3, 0)

    few = proposed(nothing, violation=beyond)
    allowed = int((size(few) <= 3).sum())
    assert allowed > 10
    assert (np.diff(beyond(few)) >= 0).all()


def test_the_best_predicted_of_the_pool_come_next(monkeypatch: pytest.MonkeyPatch) -> None:
    known = SPACE.random_many(10, 0)
    monkeypatch.setattr(fbnetv3, "prices", lambda *_: told)
    search = FBNetV3(population=10, candidates=4096, statistics=0)
    rows = proposed(told(known), search)
    seen = set(map(tuple, known))
    front = [row for row in SPACE.every() if row[4] == 1 and tuple(row) not in seen]
    # At each size all networks with the best recipe are on the front, as the size is its loss.
    assert {tuple(row) for row in rows[:40]} <= set(map(tuple, front))
    assert not {tuple(row) for row in rows[:40]} & seen
    # Of the front the ends come first: the least crowded.
    assert {int(size(row[None])[0]) for row in rows[:10]} >= {0, 12}


def test_after_the_rounds_it_evolves_from_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    known = SPACE.random_many(20, 0)
    begun = []

    def evolved(*args: Any) -> Told:
        begun.append(args)
        return told(SPACE.every()[:3])

    monkeypatch.setattr(fbnetv3, "evolved", evolved)
    monkeypatch.setattr(fbnetv3, "prices", lambda *_: told)
    search = FBNetV3(population=10, rounds=2, candidates=250, statistics=0)
    proposed(told(known[:19]), search)
    assert not begun
    rows = proposed(told(known), search)
    *_, candidates, _, parents, start = begun[0]
    np.testing.assert_array_equal(rows[:3], SPACE.every()[:3])
    assert candidates == 250
    assert len(start) == 20
    np.testing.assert_array_equal(parents, known)
    best = known[np.lexsort((loss(known),))][:1]
    assert tuple(best[0]) in set(map(tuple, start[:10]))


def test_the_predictor_is_taught_what_can_be_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    taught = []

    def pretrain(self: PretrainedMLP, space: Space, rows: Any, known: Any) -> Any:
        taught.append((rows, known))
        return self

    monkeypatch.setattr(PretrainedMLP, "pretrain", pretrain)
    known = told(SPACE.random_many(10, 0))
    proposed(known)
    ((rows, statistics),) = taught
    assert rows.shape == (100, 5)
    np.testing.assert_array_equal(statistics[:, 0], size(rows))
    monkeypatch.setattr(fbnetv3, "prices", lambda *_: told)
    proposed(known, FBNetV3(population=10, candidates=10, statistics=0))
    FAST.propose_for(Problem(SPACE, ("loss", "size")), known, np.random.default_rng(0))
    assert len(taught) == 1


def test_statistics_are_exact_values_and_violations_that_differ() -> None:
    rows = SPACE.random_many(50, 0)
    task = Problem(
        SPACE,
        ("loss", "macs", "same"),
        {"macs": lambda rows: 1 + size(rows), "same": lambda rows: np.ones(len(rows))},
        violation=lambda rows: np.maximum(size(rows) - 8, 0),
    )
    found = free_statistics(task, rows)
    np.testing.assert_allclose(found[:, 0], np.log(1 + size(rows)))
    np.testing.assert_array_equal(found[:, 1], np.maximum(size(rows) - 8, 0))
    assert found.shape == (50, 2)
    assert free_statistics(Problem(SPACE, ("loss",)), rows).shape == (50, 0)


def test_a_search_rebuilt_after_any_evaluation_goes_on_the_same_way() -> None:
    def started() -> AskTell:
        search = FBNetV3(population=4, rounds=1, candidates=16, statistics=0)
        return search.start(SPACE, ["loss", "size"], 5, exact={"size": size})

    run = started()
    whole = []
    for _ in range(10):
        rows = run.ask_rows(1)
        whole.append(rows[0])
        run.tell(rows, told(rows).values)
    for done in (3, 4, 9):
        rebuilt = started()
        rebuilt.tell(np.array(whole[:done]), told(np.array(whole[:done])).values)
        np.testing.assert_array_equal(rebuilt.ask_rows(1)[0], whole[done])


def test_epochs_that_tell_are_the_first_whose_order_is_the_last() -> None:
    # By hand: Spearman's correlations with the last epoch are -1, 0.8, 0.8, 1.
    last = [1.0, 2.0, 3.0, 4.0]
    curves = np.array([last[::-1], [1, 2, 4, 3], [2, 1, 3, 4], last]).T
    assert epochs_that_tell(curves) == 4
    assert epochs_that_tell(curves, 0.79) == 2
    # Where all are equal nothing is told, not even at the end.
    assert epochs_that_tell(np.ones((4, 3))) == 3
    with pytest.raises(SettingError, match=r"at least 3 by 1, got \(2, 2\)"):
        epochs_that_tell(np.ones((2, 2)))
    with pytest.raises(SettingError, match="correlation must be in"):
        epochs_that_tell(curves, 1.5)


@pytest.mark.parametrize(
    "wrong", [{"population": 3}, {"rounds": 0}, {"candidates": 39}, {"statistics": 1}]
)
def test_settings_out_of_range_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(SettingError, match=f"{next(iter(wrong))} must be at least"):
        FBNetV3(**wrong)  # type: ignore[arg-type]
