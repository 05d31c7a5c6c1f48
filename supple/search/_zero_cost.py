"""What searches have in common that score sizes without any training."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from supple import proxies
from supple.errors import SettingError
from supple.search._genetic import allowed, fittest, offspring
from supple.search.base import Problem, SearchAlgorithm, Told
from supple.technique import key_of

__all__ = ["ZeroCostSearch"]

IntArray = NDArray[np.int64]

_CANDIDATES = 500
"""Random configs from which the first generation takes such that meet the constraints."""
_TRIES = 10
"""Children made for each that is wanted."""


@dataclass(frozen=True, kw_only=True)
class ZeroCostSearch(SearchAlgorithm):
    """Base: a genetic algorithm, and a proxy for `evaluate=`. The default proxy is the size.

    Args:
        population: Configs per generation, at least 2. The first ones are random.
        parents: The best of all so far, from which the next generation descends, at least 1.
        mutation_probability: Of each site to be drawn anew in half of the children, in [0, 1].
    """

    population: int = 50
    parents: int = 10
    mutation_probability: float = 0.1

    def __post_init__(self) -> None:
        for name, least in (("population", 2), ("parents", 1)):
            if getattr(self, name) < least:
                raise SettingError(
                    f"{name} must be at least {least}, got {getattr(self, name)}"
                )
        if not 0.0 <= self.mutation_probability <= 1.0:
            raise SettingError(
                f"mutation_probability must be in [0, 1], got {self.mutation_probability}"
            )

    def score(self, module: nn.Module, batch: Any) -> float:
        """Scores a network at the size that is active, the more the better.

        Args:
            module: The network; it need not be trained.
            batch: What it is run on.

        Returns:
            The proxy.
        """
        return proxies.params(module, batch)

    def evaluate(self, batches: Iterable[Any]) -> Callable[[nn.Module], dict[str, float]]:
        """Gives what `supple.pareto` takes as `evaluate`: the mean score over batches.

        Args:
            batches: Some batches; they are kept.

        Returns:
            A function of a module; the score is called after the technique.

        Raises:
            SettingError: There are no batches.
        """
        kept = list(batches)
        if not kept:
            raise SettingError("batches must hold at least one batch, got none")
        name = key_of(type(self)).rpartition("/")[2].replace("-", "_")
        return lambda module: {name: statistics.fmean(self.score(module, b) for b in kept)}

    @property
    def generation(self) -> int:
        return self.population

    def select(self, pool: Told) -> Told:
        return fittest(pool, self.parents)

    def propose_for(
        self, problem: Problem, parents: Told, random: np.random.Generator
    ) -> IntArray:
        space = problem.space
        drawn = space.random_many(_CANDIDATES, random)
        if len(parents):
            count, chance = _TRIES * self.population, self.mutation_probability
            children = offspring(space, parents.rows, count, chance, random)
            # Random ones fill up where most children are known or beyond the bound.
            drawn = np.concatenate([random.permutation(children), drawn])
        return allowed(problem, drawn)
