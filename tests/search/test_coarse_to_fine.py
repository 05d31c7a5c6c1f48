"""Truths about coarse-to-fine search."""

from __future__ import annotations

import numpy as np
import pytest

from supple.errors import SettingError
from supple.search.base import Told
from supple.search.coarse_to_fine import CoarseToFine, stepped, steps_of
from supple.search.random_search import RandomSearch
from supple.space import Site, Space
from supple.study.indicators import hypervolume

SPACE = Space([Site(f"s{i}", "width", tuple(range(16)), 15) for i in range(6)])
INSIDE = Space(
    [
        Site("depth", "depth", (0, 1), 1),
        Site("w", "width", (1, 2, 3, 4), 4, (("depth", frozenset({1})),)),
    ]
)


def test_steps_halve_down_to_one() -> None:
    assert steps_of(SPACE) == [8, 4, 2, 1]
    assert steps_of(INSIDE) == [2, 1]
    assert steps_of(Space([Site("a", "width", (3,), 3)])) == []


def test_a_step_moves_one_site_where_there_is_room() -> None:
    small = Space([Site("a", "width", tuple(range(5)), 4), Site("b", "width", (0, 1, 2), 2)])
    rows = stepped(small, np.array([[3, 0]]), 2)
    assert sorted(map(tuple, rows.tolist())) == [(1, 0), (3, 2)]
    rows = stepped(small, np.array([[3, 0]]), 1)
    assert sorted(map(tuple, rows.tolist())) == [(2, 0), (3, 1), (4, 0)]


def test_a_block_that_comes_to_exist_is_full_and_one_that_is_skipped_has_no_steps() -> None:
    skipped = INSIDE.encode({"depth": 0})
    rows = stepped(INSIDE, skipped[None], 1)
    assert [dict(c) for c in INSIDE.decode_many(rows)] == [{"depth": 1, "w": 4}]


def test_it_begins_at_the_ends_and_smaller_steps_wait_for_larger_ones() -> None:
    method = CoarseToFine(population=4, first=4)
    run = method.start(SPACE, ["loss"], 0)
    rows = run.ask_rows(4)
    assert set(rows.ravel()) <= {0, 15}
    run.tell(rows, np.array([[1.0], [2.0], [3.0], [4.0]]))
    # From the best, each site has one step of 8; then come steps of 4.
    asked = np.concatenate([rows[:1], run.ask_rows(6)])
    moved = np.abs(asked[1:] - asked[0])
    assert moved.max(axis=1).tolist() == [8] * 6
    assert (np.count_nonzero(moved, axis=1) == 1).all()
    known = Told(asked, np.arange(7.0)[:, None], np.zeros(7))
    finer = method.propose(SPACE, known, np.random.default_rng(0))
    assert np.abs(finer - asked[0]).max(axis=1).tolist() == [4] * len(finer)


def test_it_finds_more_of_a_front_than_chance() -> None:
    volumes = []
    for method in (CoarseToFine(), RandomSearch()):
        run = method.start(SPACE, ["a", "b"], 0)
        for _ in range(30):
            rows = run.ask_rows(5)
            size = rows[:, :3].sum(axis=1)
            waste = np.abs(rows[:, 3:] - 6).sum(axis=1)
            run.tell(rows, np.stack([size + waste, 45 - size + waste], axis=1).astype(float))
        volumes.append(hypervolume(run.told.values, np.full(2, 46.0)))
    assert volumes[0] > 1.1 * volumes[1]


@pytest.mark.parametrize("name", ["population", "first"])
def test_wrong_settings_are_refused(name: str) -> None:
    with pytest.raises(SettingError, match=f"{name} must be at least 1, got 0"):
        CoarseToFine(**{name: 0})
