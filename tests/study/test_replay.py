"""A search that is rebuilt from what was told proposes what it would have proposed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest

from supple.search.base import AskTell, SearchAlgorithm
from supple.search.nsga2 import NSGA2
from supple.search.random_search import RandomSearch
from supple.space import Config, Site, Space

SMALL = Space(
    [
        Site("depth", "depth", (0, 1), 1),
        Site("a", "width", (1, 2, 3), 3),
        Site("b", "width", (1, 2, 3, 4), 4, (("depth", frozenset({1})),)),
    ]
)
LARGE = Space([Site(f"s{i}", "width", tuple(range(1, 9)), 8) for i in range(12)])
# So few configs that a search proposes what it knows again and again.
NARROW = Space([Site(f"s{i}", "width", (1, 2), 2) for i in range(9)])

ALGORITHMS = [RandomSearch(), NSGA2(population=4), NSGA2(population=4, mutation_probability=0)]


def values_of(config: Config) -> list[float]:
    numbers = list(config.values())
    wave = sum(np.sin(3 * place + number) for place, number in enumerate(numbers))
    return [float(sum(numbers)), float(wave)]


def started(algorithm: SearchAlgorithm, space: Space) -> AskTell:
    return algorithm.start(space, ["size", "loss"], 5)


def proposals(search: AskTell) -> Iterator[Config]:
    """What one worker evaluates: it asks for one, evaluates it, tells it."""
    while asked := search.ask(1):
        yield asked[0]
        search.tell(asked, [values_of(asked[0])])


@pytest.mark.parametrize("space", [SMALL, NARROW, LARGE], ids=["small", "narrow", "large"])
@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=["random", "nsga2", "crossover only"])
def test_a_search_rebuilt_after_any_evaluation_goes_on_the_same_way(
    algorithm: SearchAlgorithm, space: Space
) -> None:
    # A search that learns is asked for less: its generations are the same over and over.
    wanted = min(60 if algorithm.generation else 500, space.size() - 1)
    search = proposals(started(algorithm, space))
    whole = list(itertools.islice(search, wanted))
    assert len(set(whole)) == wanted
    told = [values_of(config) for config in whole]
    for done in {1, 2, 3, wanted // 4, wanted // 2, wanted - 30, wanted - 3, wanted - 1}:
        if done < 1:
            continue
        rebuilt = started(algorithm, space)
        rebuilt.tell(whole[:done], told[:done])
        assert rebuilt.ask(1) == [whole[done]], f"after {done}"


def test_workers_of_a_random_search_evaluate_what_one_would_have() -> None:
    whole = set(itertools.islice(proposals(started(RandomSearch(), NARROW)), 40))
    workers = [started(RandomSearch(), NARROW) for _ in range(3)]
    order = np.random.default_rng(0)
    done: set[Config] = set()
    while len(done) < 40:
        config = workers[order.integers(3)].ask(1)[0]
        if config not in done:  # else another one has it; the next one is asked for
            done.add(config)
    assert done == whole
