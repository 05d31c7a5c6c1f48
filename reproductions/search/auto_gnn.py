"""Auto-GNN: small steps from the best network find better graph networks than random draws.

Claims of the paper: a controller that keeps the best architecture and decides one action class
anew at a time finds better architectures than random search in as many evaluations; and weights
are worth sharing between networks only where their layers are homogeneous (same shapes, same
attention and activation, no norms): shared without limits they no longer tell networks apart.

Arms of the search: Auto-GNN and random search, 50 evaluations each, on the graph networks of
`reproductions.search._graphs` (two layers, 6.7 million configs: hidden dimension, attention,
heads, aggregation, combination and activation of each layer). An evaluation trains a network
from scratch for 25 epochs on 600 of scikit-learn's digits, 20 labelled nodes per class; its
value is the accuracy on 300 validation nodes. Both arms see the same graph and, for a config,
the same initial weights. The figure is the best validation accuracy found, which is what both
searches maximise; the accuracy of that config on 100 test nodes is among the details, and no
arm ever sees it. The controller has its default settings; nothing was tuned.

Sharing: the first 30 networks of the Auto-GNN search are evaluated again in the same order, now
each beginning with weights of earlier ones and trained for 5 epochs (25 where no layer found
any). The figure is Kendall's tau to the accuracies after training from scratch. Homogeneous
sharing is held against handing on whatever fits in shape, norms and skip connections included.

Thresholds: any gain that exceeds its spread over the seeds, as the catalogue of techniques has
it ("in four of five seeds" for the search).

History: a pilot with one seed (1000, not reported) of 60 evaluations, to see what it costs,
found 0.963 against 0.943, and a tau of 0.47 with homogeneous sharing against 0.52 without
limits. The thresholds stayed as they were; there are fewer evaluations now, to save time.

The paper's space has hidden dimensions up to 64 and heads up to 16, and 1,000 evaluations on
citation graphs; here it had to fit into three minutes of two cores.

Result: small steps beat random search; homogeneous sharing ranks no better than sharing
without limits (0.05 of tau worse, spread 0.1).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache

from scipy.stats import kendalltau

from reproductions.search import _graphs as graphs
from supple.search.auto_gnn import AutoGNN, HomogeneousSharing
from supple.search.base import SearchAlgorithm
from supple.search.random_search import RandomSearch
from supple.space import Config
from supple.testing.reproduce import Claim, across

__all__ = ["OFF", "ON", "SEEDS", "claims"]

SEEDS = tuple(range(5))
EVALUATIONS, SHARED = 50, 30
EPOCHS, TUNING = 25, 5

ON = AutoGNN()
OFF = RandomSearch()
HOMOGENEOUS = {"kind": graphs.kind, "own": ("skip.*",)}
WITHOUT_LIMITS = {"norms": True}


def claims(method: SearchAlgorithm, seeds: Sequence[int]) -> Iterator[Claim]:
    """Compares what searches find, and how networks with shared weights are ranked."""
    found = arms(tuple(seeds))
    best = {arm: [max(values) for _, values in rows] for arm, rows in found.items()}
    yield Claim(
        "a better network than by random search after as many evaluations",
        best[method],
        best[OFF],
        unit="validation accuracy",
        details={
            name: {
                "best so far": [
                    [max(values[:n]) for n in range(10, EVALUATIONS + 1, 10)]
                    for _, values in found[arm]
                ],
                "test accuracy of the best": tests(tuple(seeds))[arm],
            }
            for name, arm in (("auto-gnn", ON), ("random", OFF))
        },
    )
    shared = sharing(tuple(seeds))
    homogeneous = isinstance(method, AutoGNN)
    yield Claim(
        "homogeneous sharing ranks networks more like training from scratch does",
        [row[0 if homogeneous else 1][0] for row in shared],
        [row[1][0] for row in shared],
        unit="Kendall's tau",
        details={
            name: {"layers that inherited": [row[i][1] for row in shared]}
            for i, name in enumerate(("homogeneous", "without limits"))
        },
    )


Trace = tuple[list[Config], list[float]]
Ranked = tuple[float, float]
"""Kendall's tau, and the share of layers that inherited weights."""


@cache
def arms(seeds: tuple[int, ...]) -> dict[SearchAlgorithm, list[Trace]]:
    """Gives the networks that were evaluated and their accuracies, by arm and seed."""
    cases = [(arm, seed) for arm in (ON, OFF) for seed in seeds]
    found = dict(zip(cases, across(searched, cases), strict=True))
    return {arm: [found[arm, seed] for seed in seeds] for arm in (ON, OFF)}


@cache
def sharing(seeds: tuple[int, ...]) -> list[tuple[Ranked, ...]]:
    """Gives tau and the share of layers that inherited, homogeneous and without limits."""
    return across(
        shared_ranks, [(*trace, s) for trace, s in zip(arms(seeds)[ON], seeds, strict=True)]
    )


@cache
def tests(seeds: tuple[int, ...]) -> dict[SearchAlgorithm, list[float]]:
    """Gives the accuracy on test nodes of the network that was best on validation nodes."""
    found = arms(seeds)
    cases = [
        (*trace, seed) for arm in found for trace, seed in zip(found[arm], seeds, strict=True)
    ]
    scores = across(tested, cases)
    return dict(zip(found, (scores[: len(seeds)], scores[len(seeds) :]), strict=True))


def searched(case: tuple[SearchAlgorithm, int]) -> Trace:
    """Runs a search, each network trained from scratch."""
    method, seed = case
    data = graphs.graph(seed)
    run = method.start(graphs.SPACE, ["error"], seed)
    for _ in range(EVALUATIONS):
        (config,) = run.ask(1)
        net = graphs.fresh(config, seed)
        graphs.fit(net, data, EPOCHS)
        run.tell([config], [[1 - graphs.accuracy(net, data, data.validation)]])
    configs = graphs.SPACE.decode_many(run.told.rows)
    return configs, [1 - value for (value,) in run.told.values.tolist()]


def shared_ranks(
    case: tuple[list[Config], list[float], int],
) -> tuple[Ranked, ...]:
    """Evaluates the networks of a search with shared weights, under both policies."""
    configs, alone, seed = case
    results = []
    for policy in (HOMOGENEOUS, WITHOUT_LIMITS):
        scores, inherited = _shared(
            configs[:SHARED], seed, HomogeneousSharing("layers.?", **policy)
        )
        results.append((float(kendalltau(scores, alone[:SHARED])[0]), inherited))
    return tuple(results)


def _shared(
    configs: list[Config], seed: int, share: HomogeneousSharing
) -> tuple[list[float], float]:
    data = graphs.graph(seed)
    scores, inherited = [], 0
    for config in configs:
        net = graphs.fresh(config, seed)
        found = share.inherit(net)
        graphs.fit(net, data, TUNING if found else EPOCHS)
        share.keep(net)
        scores.append(graphs.accuracy(net, data, data.validation))
        inherited += len(found)
    return scores, inherited / (graphs.LAYERS * len(configs))


def tested(case: tuple[list[Config], list[float], int]) -> float:
    """Trains the best network again and scores it on the test nodes."""
    configs, values, seed = case
    data = graphs.graph(seed)
    net = graphs.fresh(configs[values.index(max(values))], seed)
    graphs.fit(net, data, EPOCHS)
    return graphs.accuracy(net, data, data.test)
