"""Truths about front search."""

from __future__ import annotations

import numpy as np
import pytest

from supple.errors import SettingError
from supple.search.base import Problem, Told
from supple.search.front_search import FrontSearch, _batch
from supple.space import Site, Space
from supple.study.indicators import hypervolume

GRID = Space([Site(f"s{i}", "width", tuple(range(4)), 3) for i in range(8)])


def told(values: list[list[float]], violations: list[float] | None = None) -> Told:
    rows = np.arange(len(values))[:, None].repeat(8, axis=1) % 4
    return Told(
        rows, np.array(values, dtype=float), np.array(violations or [0.0] * len(values))
    )


def both(rows: np.ndarray) -> np.ndarray:
    """Size and loss: the first site only harms."""
    size = rows.sum(axis=1)
    return np.stack([size, 30.0 - size + 3 * rows[:, 0]], axis=1).astype(float)


def test_a_batch_takes_what_adds_most_volume_one_after_the_other() -> None:
    known = told([[0, 8], [8, 0]])
    # (2, 2) adds 36; beside it (1, 6) adds 2 and (2, 2.1) nothing.
    found = told([[3, 1], [1, 3], [6, 0.5], [8, 8]])
    assert _batch(known, told([[2, 2], [2, 2.1], [1, 6], [8, 8]]), 3) == [0, 2, 1]
    slow: list[int] = []
    points = known.values
    for _ in range(3):
        gains = [
            hypervolume(np.concatenate([points, found.values[i : i + 1]]), [8, 8])
            if i not in slow
            else -1.0
            for i in range(4)
        ]
        slow.append(int(np.argmax(gains)))
        points = np.concatenate([points, found.values[slow[-1] :][:1]])
    assert _batch(known, found, 3) == slow


def test_what_breaks_a_constraint_comes_last() -> None:
    known = told([[0, 8], [8, 0]])
    found = told([[6, 6], [1, 1]], [0.0, 1.0])
    assert _batch(known, found, 2) == [0, 1]
    nothing_met = told([[0, 8], [8, 0]], [1.0, 1.0])
    assert _batch(nothing_met, found, 1) == [0]


def test_the_ends_come_first_and_then_the_true_front() -> None:
    search = FrontSearch(first=20, candidates=1000)
    run = search.start(GRID, ["size", "loss"], 0, exact={"size": lambda r: r.sum(axis=1)})
    for _ in range(4):
        rows = run.ask_rows(10)
        run.tell(rows, both(rows))
    assert run.told.rows[:2].tolist() == [[0] * 8, [3] * 8]
    assert (run.told.rows[20:, 0] == 0).mean() > 0.8
    # Each size once: a batch spreads along the front.
    assert len(np.unique(run.told.values[20:, 0])) > 10


def test_computed_costs_are_never_predicted() -> None:
    asked: list[int] = []

    def size(rows: np.ndarray) -> np.ndarray:
        asked.append(len(rows))
        return rows.sum(axis=1)

    known = GRID.random_many(20, 0)
    problem = Problem(GRID, ("size", "loss"), {"size": size})
    search = FrontSearch(first=4, candidates=200)
    search.propose_for(
        problem, Told(known, both(known), np.zeros(20)), np.random.default_rng(0)
    )
    assert sum(asked) > 200


@pytest.mark.parametrize(
    "wrong",
    [{"population": 0}, {"first": 3}, {"candidates": 50}, {"optimism": -0.5}],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(SettingError, match=next(iter(wrong))):
        FrontSearch(**wrong)  # type: ignore[arg-type]
