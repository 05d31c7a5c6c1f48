"""Searches whose proposals are drawn from a policy that learns from what was told.

A policy learns generation by generation, in order, and from what was told alone, so that a
search that is rebuilt by telling it everything again has the same policy. `AskTell` proposes
no config twice, while a policy may draw one again: what is drawn in vain makes the next draws
flatter, and an update counts known configs again (`drawn_again`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from supple.search.base import AskTell, Exact, Problem, SearchAlgorithm, Told
from supple.space import Randomness, Space, numpy_generator

__all__ = ["HEAT", "LearnedRun", "LearnedSearch", "Learner", "drawn_again"]

IntArray = NDArray[np.int64]

_BATCH = 32
HEAT = 1.5
"""What logits are divided by once more after each round of draws that was not enough."""
_HOTTEST = 1e3


class Learner:
    """What proposes and learns; this one draws at random, and learns nothing.

    Args:
        space: What is searched.
    """

    def __init__(self, space: Space) -> None:
        self.space = space

    def learn(self, before: Told, new: Told) -> None:
        """Learns from one generation.

        Args:
            before: What was told before it.
            new: The generation.
        """

    def propose(self, random: np.random.Generator, heat: float) -> IntArray:
        """Draws canonical encoded configs, at least one, shape (candidates, sites).

        Args:
            random: Source of all randomness.
            heat: 1 at first; what logits are divided by where too few configs were new.
        """
        return self.space.random_many(_BATCH, random)


@dataclass(frozen=True, kw_only=True)
class LearnedSearch(SearchAlgorithm):
    """Base of searches with a policy: they give their learner."""

    def learner(self, problem: Problem, seed: int) -> Learner:
        """Gives what proposes and learns, as it is before anything was told.

        Args:
            problem: What is searched, and for what.
            seed: Of the policy's weights and of everything that learning draws.
        """
        return Learner(problem.space)

    def start(
        self,
        space: Space,
        objectives: Sequence[str],
        generator: Randomness,
        *,
        exact: Mapping[str, Exact] | None = None,
        violation: Exact | None = None,
    ) -> AskTell:
        seed = int(numpy_generator(generator).integers(2**62))
        problem = Problem(space, tuple(objectives), dict(exact or {}), violation)
        return LearnedRun(self, problem, seed)


class LearnedRun(AskTell):
    """A search whose policy learns, before it proposes, what was told meanwhile."""

    algorithm: LearnedSearch

    def _reset(self) -> None:
        self._learner = self.algorithm.learner(self.problem, self.seed)
        self._learned = 0
        super()._reset()

    def _candidates(self) -> Iterator[IntArray]:
        while self._learned < self._generation:
            size = self.algorithm.generation
            begin = self._learned * size
            new = self.told.take(slice(begin, begin + size))
            self._learner.learn(self.told.take(slice(begin)), new)
            self._learned += 1
        for step in itertools.count():
            random = np.random.default_rng([self.seed, self._generation, step])
            heat = min(HEAT**step, _HOTTEST)
            yield from np.ascontiguousarray(self._learner.propose(random, heat))


def drawn_again(drawn: IntArray, before: Told) -> IntArray:
    """Finds what a policy draws that is known already.

    An update that counts it again, beside what is new, is about what it would be if configs
    were evaluated as often as they are drawn.

    Args:
        drawn: Canonical encoded configs, shape (draws, sites).
        before: What is known.

    Returns:
        Positions in `before`, as often as they were drawn, shape (known draws,).

    Example:
        >>> told = Told(np.array([[0], [1]]), np.zeros((2, 1)), np.zeros(2))
        >>> drawn_again(np.array([[1], [3], [1], [4]]), told).tolist()
        [1, 1]
    """
    place = {row.tobytes(): i for i, row in enumerate(np.ascontiguousarray(before.rows))}
    found = [place.get(row.tobytes(), -1) for row in np.ascontiguousarray(drawn)]
    return np.array([i for i in found if i >= 0], dtype=np.int64)
