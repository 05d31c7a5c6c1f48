"""A plain genetic algorithm: the best are parents, children are mutated or crossed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from supple.search._ranking import ranked
from supple.search.base import Problem, Told
from supple.space import Space

__all__ = ["allowed", "fittest", "offspring"]

IntArray = NDArray[np.int64]


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
