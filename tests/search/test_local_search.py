"""Truths about local search."""

from __future__ import annotations

import numpy as np

from supple.search.local_search import LocalSearch, _neighbours
from supple.search.random_search import RandomSearch
from supple.space import Site, Space
from tests.search.problems import SPACE, searched

SMALL = Space(
    [
        Site("a", "width", (2, 3, 5, 7), 7),
        Site("b", "depth", (0, 1), 1),
        Site("c", "width", (1, 2, 4, 8), 8, inside=(("b", frozenset({1})),)),
    ]
)


def test_neighbours_are_all_that_differ_in_one_site() -> None:
    for row in SMALL.every():
        config = SMALL.decode(row)
        listed = {
            SMALL.canonical({**config, s.name: v})
            for s in SMALL.sites
            for v in s.choices
            if s.name in config
        } - {config}
        found = SMALL.decode_many(_neighbours(SMALL, row[None]))
        assert set(found) == listed
        assert len(found) == len(listed)


def test_the_neighbours_of_the_best_come_first_and_then_those_of_the_next_best() -> None:
    space = Space([Site(name, "width", (0, 1, 2), 2) for name in "abc"])
    run = LocalSearch().start(space, ["loss"], 0)
    run.tell(
        np.array([[0, 0, 0], [2, 2, 2], [1, 1, 1], [0, 1, 2]]), [[0.0], [3.0], [1.0], [2.0]]
    )
    nearest = [row for _ in range(12) for row in run.ask_rows(1)]
    assert [(row != 0).sum() for row in nearest[:6]] == [1] * 6
    assert [(row != 1).sum() for row in nearest[6:]] == [1] * 6


def test_it_moves_on_at_the_first_better_neighbour() -> None:
    space = Space([Site(f"s{i}", "width", tuple(range(9)), 8) for i in range(8)])
    run = LocalSearch().start(space, ["loss"], 1)
    run.tell([space.config({f"s{i}": 4 for i in range(8)})], [[32.0]])
    best = np.full(8, 4)
    for _ in range(40):
        row = run.ask_rows(1)
        assert (row[0] != best).sum() == 1
        run.tell(row, row.sum(axis=1, keepdims=True))
        best = row[0] if row.sum() < best.sum() else best
    assert best.sum() < 20


def test_it_finds_more_hypervolume_than_random_search() -> None:
    gains = []
    for seed in range(3):
        climbed = searched(LocalSearch().start(SPACE, ["loss", "cost"], seed), 300)
        drawn = searched(RandomSearch().start(SPACE, ["loss", "cost"], seed), 300)
        gains.append(climbed - drawn)
    assert np.mean(gains) > 0.02
