"""Truths about random search."""

from __future__ import annotations

import numpy as np

from supple.search.random_search import RandomSearch
from supple.space import Site, Space


def test_every_choice_is_drawn_equally_often_whatever_was_told() -> None:
    space = Space([Site(f"s{i}", "width", (1, 2, 3, 4, 5), 5) for i in range(9)])
    run = RandomSearch().start(space, ["loss"], 0)
    for _ in range(4):
        rows = run.ask_rows(500)
        run.tell(rows, rows.sum(axis=1, keepdims=True))
    counts = np.stack([(run.told.rows == choice).sum(axis=0) for choice in range(5)])
    spread = np.sqrt(2000 * 0.2 * 0.8)
    assert np.abs(counts - 400).max() < 4 * spread


def test_asking_in_parts_gives_the_same_sequence() -> None:
    space = Space([Site(f"s{i}", "width", (1, 2, 3, 4, 5), 5) for i in range(9)])
    whole = RandomSearch().start(space, ["loss"], 3).ask(20)
    run = RandomSearch().start(space, ["loss"], 3)
    assert [config for n in (1, 7, 12) for config in run.ask(n)] == whole
