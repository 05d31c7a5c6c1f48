"""A plain genetic algorithm: the best are parents, children are mutated or crossed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from supple.errors import SettingError
from supple.search._ranking import ranked
from supple.search.base import Problem, SearchAlgorithm, Told
from supple.space import Space

__all__ = ["Genetic", "allowed", "fittest", "offspring"]

IntArray = NDArray[np.int64]

_CANDIDATES = 500
"""Random configs from which the first generation takes such that meet the constraints."""
_TRIES = 10
"""Children made for each that is wanted."""


@dataclass(frozen=True, kw_only=True)
class Genetic(SearchAlgorithm):
    """Base: the best so far are parents; half of their children are mutated, half crossed.

    What is known to break a constraint without an evaluation is not proposed.

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

    @property
    def generation(self) -> int:
        return self.population

    def select(self, pool: Told) -> Told:
        return fittest(pool, self.parents)

    def propose(self, space: Space, parents: Told, random: np.random.Generator) -> IntArray:
        drawn = space.random_many(_CANDIDATES, random)
        if not len(parents):
            return drawn
        count, chance = _TRIES * self.population, self.mutation_probability
        children = offspring(space, parents.rows, count, chance, random)
        # Random ones fill up where most children are known or beyond a bound.
        return np.concatenate([random.permutation(children), drawn])

    def propose_for(
        self, problem: Problem, parents: Told, random: np.random.Generator
    ) -> IntArray:
        return allowed(problem, self.propose(problem.space, parents, random))


def fittest(pool: Told, count: int) -> Told:
    """Keeps the best configs, best first: by rank, then by crowding distance."""
    rank, crowding = ranked(pool)
    return pool.take(np.lexsort((-crowding, rank))[:count])


def offspring(
    space: Space, parents: IntArray, count: int, probability: float, random: np.random.Generator
) -> IntArray:
    """Gives children of parents that are drawn uniformly.

    Args:
        space: The space.
        parents: Encoded configs, shape (parents, sites), at least one.
        count: How many children: half are mutated, each site drawn anew with a probability;
            the others take each site from one of two parents.
        probability: Of each site of the first half.
        random: Source of all randomness.

    Returns:
        Canonical encoded configs, shape (count, sites).
    """
    here = space.present(parents)
    pairs = random.integers(len(parents), size=(2, count))
    first, second = parents[pairs]
    drawn = random.integers(space.counts, size=first.shape)
    # A site that does not exist in a parent has nothing to hand on.
    first = np.where(here[pairs[0]], first, drawn)
    second = np.where(here[pairs[1]], second, first)
    changes = np.where(
        (np.arange(count) < count // 2)[:, None],
        np.where(random.random(first.shape) < probability, drawn, first),
        np.where(random.random(first.shape) < 0.5, first, second),
    )
    return space.canonical_many(changes)


def allowed(problem: Problem, rows: IntArray) -> IntArray:
    """Keeps configs that meet the constraints, where these need no evaluation.

    Where none does, the one that is least beyond them is kept.
    """
    if problem.violation is None or not len(rows):
        return rows
    beyond = np.asarray(problem.violation(rows))
    good = np.flatnonzero(beyond == 0)
    return rows[good] if len(good) else rows[[beyond.argmin()]]
