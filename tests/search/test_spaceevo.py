"""Truths about the search of search spaces."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from supple.errors import SettingError
from supple.search.base import Told
from supple.search.spaceevo import BlockTables, SpaceEvo, noise_to_signal, quality_tradeoff
from supple.space import Config, Site, Space

BLOCKS = [Site(f"block{i}", "block", (0, 1, 2), 2) for i in range(3)]
WINDOWS = [Site("window0", "window", (0, 1), 1), Site("window1", "window", (0, 1, 2), 2)]
HYPERSPACE = Space([*BLOCKS, *WINDOWS])
TABLES = BlockTables(
    sites=(("block0", "window0"), ("block1", "window1")),
    stages=tuple(
        {
            key: np.random.default_rng([stage, *key]).uniform(0.1, 1.0, (5 + stage, 2))
            for key in itertools.product(range(3), range(3))
        }
        for stage in range(2)
    ),
    rest=0.25,
)
SPACE = Config({"block0": 1, "block1": 2, "window0": 0, "window1": 1})


def told(values: list[float]) -> Told:
    rows = np.array([[i % 3, 1, 1, 0, i % 3] for i in range(len(values))])
    return Told(rows, np.array(values)[:, None], np.zeros(len(values)))


def proposed(parents: Told, **settings: int) -> np.ndarray:
    return SpaceEvo(**settings).propose(HYPERSPACE, parents, np.random.default_rng(0))


def test_the_first_spaces_are_homogeneous_and_the_next_random() -> None:
    rows = proposed(told([]), population=20, sample=1)
    # Three blocks times three windows; where there are two, the third is the second.
    expected = [[b, b, b, min(w, 1), w] for b in range(3) for w in range(3)]
    assert rows[:9].tolist() == expected
    assert len(np.unique(rows[9:], axis=0)) > 10
    few = proposed(told([]), population=4, sample=1)
    assert few[:4].tolist() == expected[:4]
    assert len(few) == 8


def test_the_best_of_a_sample_has_one_child_per_axis() -> None:
    parents = told([3.0, 1.0, 2.0])
    rows = proposed(parents, population=3, sample=3)
    best = np.array([1, 1, 1, 0, 1])
    changed = rows != best
    assert (changed.sum(axis=1) == 1).all()
    for pair in changed.reshape(-1, 2, 5):
        assert pair[:, :3].any(axis=1).sum() == 1  # one changes a block, one a window
    drawn = np.concatenate(
        [
            SpaceEvo(population=3, sample=3).propose(HYPERSPACE, parents, random)
            for random in map(np.random.default_rng, range(20))
        ]
    )
    for column in range(5):
        others = set(range(HYPERSPACE.counts[column])) - {best[column]}
        assert set(drawn[drawn[:, column] != best[column], column]) == others


def test_the_two_oldest_make_room_for_the_children() -> None:
    algorithm = SpaceEvo(population=3, sample=1)
    assert algorithm.generation == 2
    kept = algorithm.select(told([0.0, 5.0, 4.0, 9.0, 8.0]))
    assert kept.values.ravel().tolist() == [4.0, 9.0, 8.0]


def test_it_finds_a_better_space_than_it_began_with() -> None:
    def score(rows: np.ndarray) -> np.ndarray:
        found: np.ndarray = np.abs(rows - [0, 2, 1, 1, 0]).sum(axis=1, keepdims=True)
        return found

    run = SpaceEvo(population=12, sample=6).start(HYPERSPACE, ["score"], 3)
    for _ in range(20):
        rows = run.ask_rows(2)
        run.tell(rows, score(rows))
    assert run.told.values[:12].min() > run.told.values.min() == 0


def test_the_score_is_the_formula_of_the_paper() -> None:
    losses, latencies = [0.5, 0.25, 0.1, 0.4], [1.0, 2.0, 3.0, 2.0]
    # Under 2 the losses 0.25 and 0.4 are the best two; a share of 3/4 is enough.
    assert quality_tradeoff(losses, latencies, [2.0], top=2) == pytest.approx(1 / 0.325)
    # Under 1 a quarter is fast enough, where four fifths are asked for.
    expected = 1 / ((0.8 / 0.25001) ** 0.5 * 0.5)
    found = quality_tradeoff(losses, latencies, [1.0], share=0.8, exponent=0.5)
    assert found == pytest.approx(expected)
    both = quality_tradeoff(losses, latencies, [1.0, 2.0], top=2, share=0.8, exponent=0.5)
    second = (0.8 / 0.75001) ** 0.5 * 0.325
    assert both == pytest.approx(expected + 1 / second)
    # No network is fast enough: the loss is 1e5, the share 1e-5.
    assert quality_tradeoff(losses, latencies, [0.5]) == pytest.approx(1e-5 / 1e4**0.01)


def test_the_score_takes_many_networks_as_a_slow_reference_does() -> None:
    random = np.random.default_rng(0)
    losses, latencies = random.uniform(0.1, 1, 500), random.uniform(1, 9, 500)
    total = 0.0
    for limit in (1.2, 5.0):
        fast = sorted(
            loss for loss, time in zip(losses, latencies, strict=True) if time <= limit
        )
        mark = max(1.0, (0.1 / (len(fast) / 500 + 1e-5)) ** 0.01)
        total += 1 / (mark * (sum(fast[:50]) / len(fast[:50])))
    assert quality_tradeoff(losses, latencies, [1.2, 5.0]) == pytest.approx(total)


def test_drawn_networks_are_sums_of_sub_blocks() -> None:
    losses, latencies = TABLES.draw(SPACE, 400, seed=3)
    first, second = TABLES.stages[0][1, 0], TABLES.stages[1][2, 1]
    sums = {tuple((a + b + [0, 0.25]).round(9)) for a in first for b in second}
    drawn = set(zip(losses.round(9), latencies.round(9), strict=True))
    assert drawn == sums
    assert len(sums) == 30


def test_the_score_of_a_space_is_that_of_its_networks_and_repeats() -> None:
    found = TABLES.score(SPACE, [1.2], networks=200, seed=3)
    expected = quality_tradeoff(*TABLES.draw(SPACE, 200, seed=3), [1.2])
    assert found == expected == TABLES.score(SPACE, [1.2], networks=200, seed=3)
    assert found != TABLES.score(SPACE, [1.2], networks=200, seed=4)
    assert found != TABLES.score(SPACE, [1.2], networks=200, seed=3, top=1)


def test_noise_is_relative_to_what_the_teacher_varies_by() -> None:
    target = torch.tensor([[[[0.0]], [[0.0]]], [[[2.0]], [[20.0]]]])  # variances 2 and 200
    output = torch.tensor([1.0, 10.0])[:, None, None].expand_as(target)  # off by 1 and by 10
    assert noise_to_signal(output, target).item() == pytest.approx(0.5)
    assert noise_to_signal(target, target).item() == 0
    flat = torch.ones(1, 1, 2, 2)
    assert noise_to_signal(flat + 0.1, flat).item() == pytest.approx(0.01 / 1e-5, rel=1e-4)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"losses": [1.0]}, r"shapes \(1,\) and \(2,\)"),
        ({"losses": [1.0, 0.0]}, "losses must be above 0"),
        ({"limits": []}, "needs a limit"),
        ({"top": 0}, "a top of at least 1"),
        ({"share": 1.5}, r"a share in \(0, 1\]"),
        ({"exponent": -1.0}, "an exponent of at least 0"),
    ],
)
def test_what_cannot_be_scored_is_refused(wrong: dict[str, Any], told: str) -> None:
    given: dict[str, Any] = {"losses": [1.0, 2.0], "latencies": [1.0, 2.0], "limits": [1.0]}
    with pytest.raises(SettingError, match=told):
        quality_tradeoff(**{**given, **wrong})


def test_wrong_tables_and_settings_are_refused() -> None:
    with pytest.raises(SettingError, match="at least one, got 0 and 1"):
        BlockTables((("a",),), ())
    with pytest.raises(SettingError, match=r"shape \(sub-blocks, 2\), got \(3,\)"):
        BlockTables((("a",),), ({(0,): np.ones(3)},))
    with pytest.raises(SettingError, match=r"no table for the choices \(7, 0\)"):
        TABLES.draw(Config({**SPACE, "block0": 7}), 1)
    with pytest.raises(SettingError, match="population must be at least 2"):
        SpaceEvo(population=1)
    with pytest.raises(SettingError, match="from 1 to the population of 10"):
        SpaceEvo(population=10, sample=11)
