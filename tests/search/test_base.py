"""Truths about every search in progress, told for random search and NSGA-II."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from supple.errors import CheckpointError, SettingError
from supple.search.base import AskTell, Problem, SearchAlgorithm, Told
from supple.search.nsga2 import NSGA2
from supple.search.random_search import RandomSearch
from supple.space import Config, Site, Space
from tests.search.problems import SPACE, loss_and_cost

SMALL = Space([Site("a", "width", (1, 2, 3), 3), Site("b", "width", (1, 2), 2)])
both = pytest.mark.parametrize("algorithm", [RandomSearch(), NSGA2(population=4)])


def values(configs: list[Config]) -> np.ndarray:
    return loss_and_cost(SPACE.encode_many(configs))


@both
def test_a_small_space_is_asked_for_wholly_and_once(algorithm: SearchAlgorithm) -> None:
    run = algorithm.start(SMALL, ["loss"], 0)
    asked = []
    while configs := run.ask(1):
        asked += configs
        run.tell(configs, [[float(len(asked))]])
    assert len(asked) == len(set(asked)) == SMALL.size() == 6
    assert run.ask(3) == []


@both
def test_what_was_asked_and_not_told_is_not_asked_again(algorithm: SearchAlgorithm) -> None:
    run = algorithm.start(SPACE, ["loss", "cost"], 0)
    asked = [config for _ in range(5) for config in run.ask(7)]
    assert len(set(asked)) == 35
    assert all(SPACE.contains(config) for config in asked)


@both
def test_what_was_told_without_being_asked_is_known(algorithm: SearchAlgorithm) -> None:
    run = algorithm.start(SMALL, ["loss"], 0)
    told = SMALL.decode_many(SMALL.every()[:4])
    run.tell(told, np.zeros((4, 1)))
    assert set(run.ask(6)) == set(SMALL.decode_many(SMALL.every()[4:]))


@both
@given(cuts=st.lists(st.integers(1, 12), min_size=1, max_size=4))
@settings(max_examples=10, deadline=None, derandomize=True)
def test_a_search_that_is_told_everything_again_goes_on_where_it_stopped(
    algorithm: SearchAlgorithm, cuts: list[int]
) -> None:
    whole = algorithm.start(SPACE, ["loss", "cost"], 3)
    run = algorithm.start(SPACE, ["loss", "cost"], 3)
    for cut in cuts:
        for _ in range(cut):
            expected, got = whole.ask(1), run.ask(1)
            assert got == expected
            whole.tell(expected, values(expected))
            run.tell(got, values(got))
        run.ask(3)  # interrupted: asked for and never told
        state = json.loads(json.dumps(run.state_dict()))
        run = algorithm.start(SPACE, ["loss", "cost"], 99)
        run.load_state_dict(state)


@both
def test_failed_values_survive_saving(algorithm: SearchAlgorithm) -> None:
    run = algorithm.start(SMALL, ["loss"], 0)
    run.tell(run.ask(2), [[np.nan], [1.0]])
    again = algorithm.start(SMALL, ["loss"], 0)
    again.load_state_dict(json.loads(json.dumps(run.state_dict())))
    assert again.told.violations.tolist() == [np.inf, 0.0]


def test_the_state_of_another_search_is_refused() -> None:
    state = RandomSearch().start(SMALL, ["loss"], 0).state_dict()
    with pytest.raises(CheckpointError, match="another space"):
        RandomSearch().start(SPACE, ["loss"], 0).load_state_dict(state)
    with pytest.raises(CheckpointError, match="other objectives"):
        RandomSearch().start(SMALL, ["cost"], 0).load_state_dict(state)


def test_what_is_known_without_an_evaluation_reaches_the_proposals() -> None:
    class Exhaustive(RandomSearch):
        def propose_for(self, problem: Problem, parents: Told, random: object) -> np.ndarray:
            rows = problem.space.every()
            assert problem.violation is not None
            order = np.lexsort((problem.exact["cost"](rows), problem.violation(rows)))
            return rows[order]

    def cost(rows: np.ndarray) -> np.ndarray:
        return rows.sum(axis=1)

    def violation(rows: np.ndarray) -> np.ndarray:
        return (rows[:, 0] == 0).astype(float)

    run = Exhaustive().start(
        SMALL, ["loss", "cost"], 0, exact={"cost": cost}, violation=violation
    )
    assert run.ask(1) == [Config({"a": 2, "b": 1})]
    with pytest.raises(SettingError, match="exact values are of objectives"):
        Exhaustive().start(SMALL, ["loss"], 0, exact={"cost": cost})


@both
def test_one_seed_gives_one_sequence_whatever_the_kind_of_generator(
    algorithm: SearchAlgorithm,
) -> None:
    def asked(run: AskTell) -> list[Config]:
        return run.ask(8)

    first = asked(algorithm.start(SPACE, ["loss"], 5))
    assert first == asked(algorithm.start(SPACE, ["loss"], np.random.default_rng(5)))
    assert first != asked(algorithm.start(SPACE, ["loss"], 6))
    torches = [torch.Generator().manual_seed(5) for _ in range(2)]
    runs = [algorithm.start(SPACE, ["loss"], generator) for generator in torches]
    assert asked(runs[0]) == asked(runs[1])


def test_the_first_value_of_a_config_stands() -> None:
    run = RandomSearch().start(SMALL, ["loss"], 0)
    (config,) = run.ask(1)
    run.tell([config], [[1.0]])
    run.tell([config, config], [[2.0], [3.0]])
    assert run.told.values.tolist() == [[1.0]]


def test_wrong_shapes_and_objectives_are_refused() -> None:
    with pytest.raises(SettingError, match="distinct"):
        RandomSearch().start(SMALL, [], 0)
    with pytest.raises(SettingError, match="distinct"):
        RandomSearch().start(SMALL, ["loss", "loss"], 0)
    run = RandomSearch().start(SMALL, ["loss", "cost"], 0)
    configs = run.ask(2)
    with pytest.raises(SettingError, match=r"shape \(2, 2\)"):
        run.tell(configs, [[1.0, 2.0]])
    with pytest.raises(SettingError, match="at least 0"):
        run.tell(configs, np.zeros((2, 2)), [0.0, -1.0])
    with pytest.raises(SettingError, match="at least 0"):
        run.ask(-1)
