"""Truths about exhaustive ranking."""

from __future__ import annotations

import numpy as np
import pytest

from supple.errors import SettingError
from supple.predictors import predictor
from supple.search._ranking import front
from supple.search.base import Told
from supple.search.exhaustive import Exhaustive
from supple.space import Site, Space

SPACE = Space([Site(f"s{i}", "width", tuple(range(3)), 2) for i in range(6)])


def loss(rows: np.ndarray) -> np.ndarray:
    """Additive, with another weight for each site, so that the order is known."""
    out: np.ndarray = rows @ np.array([1.0, 2.1, 4.3, 8.9, 17.0, 33.0])
    return out


def test_what_is_tried_after_the_first_are_the_best_predictions_of_all_in_order() -> None:
    run = Exhaustive(first=40, population=10, predictor="ridge").start(SPACE, ["loss"], 0)
    rows = run.ask_rows(40)
    run.tell(rows, loss(rows)[:, None])
    asked = run.ask_rows(10)
    known = {row.tobytes() for row in rows}
    every = np.array([row for row in SPACE.every() if row.tobytes() not in known])
    predicted = predictor("ridge").fit(SPACE, rows, loss(rows)).predict(every)
    assert asked.tolist() == every[np.argsort(predicted)[:10]].tolist()


def test_of_two_objectives_the_known_front_of_what_is_left_is_tried() -> None:
    def size(rows: np.ndarray) -> np.ndarray:
        return rows.sum(axis=1).astype(float)

    def waste(rows: np.ndarray) -> np.ndarray:
        return 30 - 2 * size(rows) + 3 * rows[:, 0]

    exact = {"size": size, "loss": waste}
    run = Exhaustive(first=20, population=5).start(SPACE, ["size", "loss"], 0, exact=exact)
    for _ in range(4):
        rows = run.ask_rows(5)
        run.tell(rows, np.stack([size(rows), waste(rows)], axis=1))
    known = {row.tobytes() for row in run.told.rows}
    left = np.array([row for row in SPACE.every() if row.tobytes() not in known])
    told = Told(left, np.stack([size(left), waste(left)], axis=1), np.zeros(len(left)))
    truth = {row.tobytes() for row in left[front(told)]}
    asked = run.ask_rows(5)
    assert len(truth) >= 5
    assert {row.tobytes() for row in asked} <= truth
    assert 0 in size(asked)  # the ends of the front come first
    assert 10 in size(asked)


def test_the_first_are_random_and_a_small_space_is_exhausted() -> None:
    space = Space([Site("a", "width", (0, 1, 2), 2), Site("b", "width", (0, 1, 2), 2)])
    run = Exhaustive(first=4, population=2).start(space, ["loss"], 0)
    seen = []
    while len(rows := run.ask_rows(1)):
        seen.append(tuple(rows[0]))
        run.tell(rows, rows.sum(axis=1)[:, None])
    assert sorted(seen) == [(a, b) for a in range(3) for b in range(3)]


def test_a_space_that_is_too_large_and_wrong_settings_are_refused() -> None:
    with pytest.raises(SettingError, match=r"729 of them, more than the 728 .* search/weaknas"):
        Exhaustive(candidates=728).start(SPACE, ["loss"], 0)
    Exhaustive(candidates=729).start(SPACE, ["loss"], 0)
    for name, value in (("population", 0), ("first", 3), ("candidates", 0)):
        with pytest.raises(SettingError, match=f"{name} must be at least"):
            Exhaustive(**{name: value})
    with pytest.raises(SettingError):
        Exhaustive(predictor="oracle")
