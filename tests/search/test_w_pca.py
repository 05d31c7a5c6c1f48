"""Truths about W-PCA and the genetic algorithm under it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import supple
from supple.errors import SettingError
from supple.search._genetic import allowed, fittest, offspring
from supple.search.base import Problem, Told
from supple.search.w_pca import WPCA
from supple.space import Site, Space
from tests.search.problems import SPACE

GRID = Space([Site(f"s{i}", "width", tuple(range(9)), 8) for i in range(11)])


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(3, 7), nn.Linear(7, 2)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


def test_the_score_is_parameters_times_components_of_what_lies_before_the_activation() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(FeedForward())
    tokens = torch.randn(5, 7, 3)
    parameters = 3 * 7 + 7 + 7 * 2 + 2
    assert WPCA().score(model, tokens) == parameters * 3  # three inputs, three directions
    assert WPCA(weighted=False).score(model, tokens) == 3
    tokens[..., 2] *= 1e-4
    assert WPCA(weighted=False).score(model, tokens) == 2
    assert WPCA(layers="0.down", weighted=False).score(model, tokens) == 2


def test_the_score_of_batches_is_their_mean_and_carries_the_name() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(FeedForward())
    flat, full = torch.randn(50, 3) * torch.tensor([1.0, 0.0, 0.0]), torch.randn(50, 3)
    assert WPCA(weighted=False).evaluate([flat, full])(model) == {"w_pca": 2.0}
    with pytest.raises(SettingError, match="batches"):
        WPCA().evaluate([])


def test_the_search_maximises_the_score_within_the_bound() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), *(FeedForwardOf(8, 9) for _ in range(3)))
    net = supple.elastic(
        model, torch.ones(1, 5), axes=[supple.Width((1, 3, 5, 7, 9))], verify=False
    )
    search = WPCA(population=6, parents=3)
    score = search.evaluate([torch.randn(40, 5)])
    every = net.space.every()
    beyond = lambda rows: np.maximum(net.costs(rows)["params"] - 300, 0)  # noqa: E731
    run = search.start(net.space, ["w_pca"], 0, violation=beyond)
    scores = {}
    for _ in range(30):
        for config in run.ask(1):
            with net.at(config):
                scores[config] = score(net.module)["w_pca"]
            run.tell([config], [[-scores[config]]], beyond(net.space.encode_many([config])))
    assert (beyond(net.space.encode_many(scores)) == 0).all()
    possible = [net.space.decode(row) for row in every[beyond(every) == 0]]
    best = []
    for config in possible:
        with net.at(config):
            best.append(score(net.module)["w_pca"])
    assert len(scores) < len(possible)
    assert max(scores.values()) >= np.quantile(best, 0.95)


class FeedForwardOf(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


def test_half_of_the_children_are_mutated_and_half_are_crossed() -> None:
    parents = np.stack([np.full(11, 2), np.full(11, 6)])
    random = np.random.default_rng(0)
    children = offspring(GRID, parents, 400, 0.1, random)
    mutated, crossed = children[:200], children[200:]
    kept = np.maximum((mutated == 2).sum(axis=1), (mutated == 6).sum(axis=1))
    # a tenth is drawn anew, one in nine of these to what it was
    assert 1 - kept.mean() / 11 == pytest.approx(0.1 * 8 / 9, abs=0.02)
    assert set(mutated.ravel()) == set(range(9))
    assert set(crossed.ravel()) == {2, 6}
    both = crossed[(crossed != crossed[:, :1]).any(axis=1)]
    assert len(both) == pytest.approx(100, abs=25)
    assert (both == 2).mean() == pytest.approx(0.5, abs=0.05)


def test_children_of_parents_with_skipped_blocks_are_canonical() -> None:
    parents = SPACE.random_many(5, 0)
    children = offspring(SPACE, parents, 60, 0.5, np.random.default_rng(0))
    assert (SPACE.canonical_many(children) == children).all()


def test_the_best_are_parents_and_what_breaks_the_bound_comes_last() -> None:
    rows = np.arange(44).reshape(4, 11) % 9
    pool = Told(rows, np.array([[3.0], [1.0], [0.0], [2.0]]), np.array([0.0, 0.0, 5.0, 0.0]))
    assert fittest(pool, 2).values.ravel().tolist() == [1.0, 2.0]
    assert fittest(pool, 4).values.ravel().tolist() == [1.0, 2.0, 3.0, 0.0]
    assert WPCA(parents=1).select(pool).values.ravel().tolist() == [1.0]


def test_where_nothing_meets_the_bound_the_nearest_is_tried() -> None:
    rows = GRID.random_many(7, 0)
    sums = rows.sum(axis=1)
    assert (allowed(Problem(GRID, ("x",)), rows) == rows).all()
    bound = Problem(
        GRID, ("x",), violation=lambda rows: np.maximum(rows.sum(axis=1) - sums[3], 0)
    )
    assert (allowed(bound, rows) == rows[sums <= sums[3]]).all()
    never = Problem(GRID, ("x",), violation=lambda rows: rows.sum(axis=1) + 1.0)
    assert (allowed(never, rows) == rows[[sums.argmin()]]).all()


@pytest.mark.parametrize(
    "wrong", [{"population": 1}, {"parents": 0}, {"mutation_probability": 1.5}, {"eta": 1.0}]
)
def test_settings_out_of_range_are_refused(wrong) -> None:
    with pytest.raises(SettingError, match=next(iter(wrong))):
        WPCA(**wrong)
