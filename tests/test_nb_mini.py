"""The table of sizes trained alone: it is whole, and it judges scores."""

from __future__ import annotations

import itertools
import statistics

import pytest
import torch

from benchmarks import nb_mini
from supple.data.base import Dataset, Splits, TensorSource
from supple.files import read_json

FOUND = read_json(nb_mini.RESULT)


def test_the_table_is_of_the_network_and_of_all_seeds():
    network = nb_mini.net(0)
    assert nb_mini.configs() == nb_mini.spread_sizes()
    rows = network.space.encode_many(nb_mini.configs())
    assert network.costs(rows)["macs"].tolist() == nb_mini.costs() == sorted(nb_mini.costs())
    assert nb_mini.costs()[-1] > 15 * nb_mini.costs()[0]
    assert all(len(row["accuracies"]) == len(nb_mini.SEEDS) for row in FOUND["sizes"])
    assert all(0.1 < accuracy < 1 for accuracy in nb_mini.table())


def test_the_ceiling_is_the_agreement_of_the_seeds():
    by_seed = zip(*(row["accuracies"] for row in FOUND["sizes"]), strict=True)
    pairs = [nb_mini.tau(a, b) for a, b in itertools.combinations(by_seed, 2)]
    assert nb_mini.ceiling() == pytest.approx(statistics.fmean(pairs))
    assert nb_mini.ceiling() > 0.7


def test_tau_is_one_for_the_same_order_and_minus_one_for_the_reverse():
    truth = nb_mini.table()
    assert nb_mini.tau([2 * value + 1 for value in truth]) == pytest.approx(1)
    assert nb_mini.tau([-value for value in truth]) == pytest.approx(-1)
    # Three of six pairs in order, one tied among the scores, by the definition of tau-b.
    assert nb_mini.tau([1, 1, 2, 0], [1, 2, 3, 4]) == pytest.approx((2 - 3) / (5 * 6) ** 0.5)


def test_regret_is_what_the_best_scored_size_lacks():
    truth, costs = nb_mini.table(), nb_mini.costs()
    assert nb_mini.regret(truth) == 0
    first = [1.0] + [0.0] * (len(truth) - 1)
    assert nb_mini.regret(first) == max(truth) - truth[0]
    limit = costs[9]
    assert nb_mini.regret(first, macs=limit) == max(truth[:10]) - truth[0]
    assert nb_mini.regret([0.0] * len(truth), macs=limit) == max(truth[:10]) - truth[0]


def test_a_network_is_scored_size_by_size_with_its_own_statistics(monkeypatch):
    sizes = [nb_mini.configs()[0], nb_mini.configs()[-1]]
    monkeypatch.setattr(nb_mini, "configs", lambda: sizes)
    generator = torch.Generator().manual_seed(0)
    xs, ys = torch.randn(40, 1, 8, 8, generator=generator), torch.arange(40) % 10
    part = Dataset(source=TensorSource((xs, ys)), batch_size=20)
    splits = Splits(train=part, validation=part, test=part, classes=10)
    monkeypatch.setattr(nb_mini, "data", lambda: splits)
    network = nb_mini.net(3)
    scores = nb_mini.score(network)
    assert set(network.statistics) == set(sizes)
    for config, score in zip(sizes, scores, strict=True):
        alone = network.extract(config).eval()
        right = int((alone(xs).argmax(1) == ys).sum())
        assert score == pytest.approx(right / 40)
