"""Local search: the neighbours of what is best so far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from supple.search._ranking import front, ranked
from supple.search.base import SearchAlgorithm, Told
from supple.space import Space
from supple.technique import register

__all__ = ["LocalSearch"]

IntArray = NDArray[np.int64]

_ENOUGH = 2000
"""Neighbours proposed at once, far more than are known already."""


@register(title="Local search", paper="arXiv:2005.02960")
@dataclass(frozen=True, kw_only=True)
class LocalSearch(SearchAlgorithm):
    """Tries the neighbours of the best configs of your network so far.

    A neighbour differs in one site, which may take any other choice. Neighbours of the best
    (with several objectives: of all that no other beats) are tried in random order until one
    is better; then its neighbours come first. When all of them are known, those of the next
    best follow. The first config is random.

    Example:
        >>> from supple.space import Site, Space
        >>> space = Space([Site(f"s{i}", "width", tuple(range(4)), 3) for i in range(10)])
        >>> run = LocalSearch().start(space, ["loss"], 0)
        >>> for _ in range(100):
        ...     rows = run.ask_rows(1)
        ...     run.tell(rows, rows.sum(axis=1, keepdims=True))
        >>> int(run.told.values.min())
        0

    Source:
        White, Nolen and Savani 2021, "Exploring the Loss Landscape in Neural Architecture
        Search", UAI, arXiv:2005.02960: the variant that moves on at the first better neighbour.
    Differs:
        With several objectives it is Pareto local search (Paquete, Chiarandini and Stützle
        2004). It starts at one random config, not at the best of ten; in a local optimum it
        goes on at the next best config, where the paper begins anew at random. A site that
        comes to exist by a step takes its full choice.
    Checked:
        Neighbours against a full listing; what follows a local optimum by hand; more
        hypervolume than random search on a known front.
    """

    distinguishing: ClassVar[str] = "propose"

    @property
    def generation(self) -> int:
        return 1

    def propose(self, space: Space, parents: Told, random: np.random.Generator) -> IntArray:
        if not len(parents) or not (space.counts > 1).any():
            return super().propose(space, parents, random)
        best = front(parents)
        rows = random.permutation(_neighbours(space, parents.rows[best]))[:_ENOUGH]
        if len(rows) < _ENOUGH:
            rank, crowding = ranked(parents)
            order = np.lexsort((-crowding, rank))
            each = (space.counts - 1).sum()
            few = order[len(best) :][: (_ENOUGH - len(rows)) // each + 1]
            rows = np.concatenate([rows, _neighbours(space, parents.rows[few])])
        return rows


def _neighbours(space: Space, rows: IntArray) -> IntArray:
    """Gives all configs that differ from one of the configs in one site."""
    column = np.repeat(np.arange(len(space.counts)), space.counts)
    choice = np.concatenate([np.arange(count) for count in space.counts])
    wanted = space.present(rows)[:, column] & (rows[:, column] != choice)
    which, change = np.nonzero(wanted)
    moved = rows[which]
    moved[np.arange(len(which)), column[change]] = choice[change]
    return space.canonical_many(moved)
