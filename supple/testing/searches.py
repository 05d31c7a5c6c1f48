"""Checks of techniques that search a space."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from supple.space import Config, Site, Space
from supple.technique import Search
from supple.testing.toys import global_random_untouched

__all__ = ["CHECKS"]


def check_search_stays_inside(technique: Search) -> None:
    """It proposes at most what is asked for, only canonical configs of the space, some new."""
    space = _space()
    run = technique.start(space, _OBJECTIVES, 7)
    for n in (1, 3, 0, 5):
        configs = run.ask(n)
        assert len(configs) <= n, f"asked for {n} configs, it proposed {len(configs)}"
        assert len(configs) == n or n == 0, "it proposed too few, with most of the space unseen"
        for config in configs:
            assert isinstance(config, Config), f"it proposed {config!r}, which is no Config"
            assert space.contains(config), f"{config} is not of the space"
            assert space.canonical(config) == config, f"{config} is not canonical"
        run.tell(configs, _values(configs))


def check_search_finds_the_optimum(technique: Search) -> None:
    """On a space of 20 configs it finds the best one for a single objective."""
    space = _space()
    best = min(_value(config) for config in map(space.decode, space.every()))
    found = math.inf
    run = technique.start(space, ["loss"], 7)
    for _ in range(40):
        configs = run.ask(4)
        if not configs:
            break
        values = [_value(config) for config in configs]
        run.tell(configs, np.array(values).reshape(-1, 1))
        found = min([found, *values])
    assert found == best, f"the best of {space.size()} is {best}, it found {found}"


def check_search_repeats(technique: Search) -> None:
    """The same seed and values give the same proposals; global random state is untouched."""
    with global_random_untouched():
        first, second = _proposals(technique, 7), _proposals(technique, 7)
    assert first == second, "the same seed gave other proposals"


def check_search_takes_what_it_never_asked_for(technique: Search) -> None:
    """Told configs of others count too: a search is rebuilt by telling it what is known."""
    space = _space()
    known = [space.decode(row) for row in space.every()[:6]]
    run = technique.start(space, _OBJECTIVES, 7)
    run.tell(known, _values(known))
    again = technique.start(space, _OBJECTIVES, 7)
    again.tell(known, _values(known))
    proposed = run.ask(4)
    assert proposed == again.ask(4), "two searches that know the same propose other configs"
    assert not set(proposed) & set(known), "it proposes a config whose values it knows"


def check_search_survives_failures(technique: Search) -> None:
    """Evaluations that failed (values that are not finite) don't stop it."""
    run = technique.start(_space(), _OBJECTIVES, 7)
    for _ in range(4):
        configs = run.ask(2)
        run.tell(configs, np.full((len(configs), len(_OBJECTIVES)), np.nan))
    assert run.ask(2), "it has nothing to propose after failed evaluations"


def check_search_state_is_plain(technique: Search) -> None:
    """Its state can be written as JSON."""
    run = technique.start(_space(), _OBJECTIVES, 7)
    configs = run.ask(3)
    run.tell(configs, _values(configs))
    json.dumps(run.state_dict())


_OBJECTIVES = ("error", "cost")


def _space() -> Space:
    """Gives 20 configs: where `b` is skipped, its width doesn't matter."""
    return Space(
        [
            Site("a", "width", (2, 3, 5, 7), 7),
            Site("b", "depth", (0, 1), 1),
            Site("c", "width", (1, 2, 4, 8), 8, inside=(("b", frozenset({1})),)),
        ]
    )


def _value(config: Config) -> float:
    return abs(config["a"] - 5) + abs(config.get("c", 16) - 2) / 8


def _values(configs: Iterable[Config]) -> np.ndarray[Any, Any]:
    rows = [(_value(config), float(sum(config.values()))) for config in configs]
    return np.array(rows).reshape(-1, len(_OBJECTIVES))


def _proposals(technique: Search, seed: int) -> list[list[Config]]:
    run = technique.start(_space(), _OBJECTIVES, seed)
    rounds = []
    for _ in range(4):
        configs = list(run.ask(3))
        run.tell(configs, _values(configs))
        rounds.append(configs)
    return rounds


CHECKS: tuple[Callable[[Search], None], ...] = (
    check_search_stays_inside,
    check_search_finds_the_optimum,
    check_search_repeats,
    check_search_takes_what_it_never_asked_for,
    check_search_survives_failures,
    check_search_state_is_plain,
)
