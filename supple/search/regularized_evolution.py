"""Regularized evolution: the oldest config dies, not the worst."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from supple.errors import SettingError
from supple.search._ranking import winner
from supple.search.base import SearchAlgorithm, Told
from supple.space import Space
from supple.technique import register

__all__ = ["RegularizedEvolution"]

IntArray = NDArray[np.int64]

_CHILDREN = 8
"""Proposed at once: the first that is new is asked for, more only by several workers."""


@register(title="Regularized evolution", paper="arXiv:1802.01548")
@dataclass(frozen=True, kw_only=True)
class RegularizedEvolution(SearchAlgorithm):
    """Evolves configs of your network one by one; the oldest of the population dies.

    Each step draws a sample of the population, takes the best of it as the parent, and changes
    one of its sites to another choice. The child joins the population and the oldest leaves,
    good or not, so that what was lucky once has to prove itself in its descendants.

    Args:
        population: Configs that live at a time, at least 2. The first ones are random.
        sample: Configs that compete for being the parent, from 1 to `population`.

    Example:
        >>> from supple.space import Site, Space
        >>> space = Space([Site(f"s{i}", "width", tuple(range(4)), 3) for i in range(10)])
        >>> run = RegularizedEvolution(population=20, sample=5).start(space, ["loss"], 0)
        >>> for _ in range(200):
        ...     rows = run.ask_rows(1)
        ...     run.tell(rows, rows.sum(axis=1, keepdims=True))
        >>> int(run.told.values[:20].min()) > 5, int(run.told.values.min())
        (True, 0)

    Source:
        Real, Aggarwal, Huang and Le 2019, "Regularized Evolution for Image Classifier
        Architecture Search", AAAI, arXiv:1802.01548, algorithm 1.
    Differs:
        With several objectives the best of a sample is of the lowest rank, then of the largest
        crowding distance, as in NSGA-II. No child is the parent itself, and a config that was
        tried is never proposed again. A site that comes to exist draws its choice.
    Checked:
        The choice of the parent and the death of the oldest by hand; children differ from
        their parent in one site; more hypervolume than random search on a known front.
    """

    distinguishing: ClassVar[str] = "propose"

    population: int = 100
    sample: int = 25

    def __post_init__(self) -> None:
        if self.population < 2:
            raise SettingError(f"population must be at least 2, got {self.population}")
        if not 1 <= self.sample <= self.population:
            raise SettingError(
                f"sample must be from 1 to the population of {self.population}, got "
                f"{self.sample}"
            )

    @property
    def generation(self) -> int:
        return 1

    def select(self, pool: Told) -> Told:
        return pool.take(slice(-self.population, None))

    def propose(self, space: Space, parents: Told, random: np.random.Generator) -> IntArray:
        if len(parents) < self.population or not space.sites:
            return space.random_many(_CHILDREN, random)
        best = [winner(parents, self.sample, random) for _ in range(_CHILDREN)]
        return _changed(space, parents.rows[best], random)


def _changed(space: Space, rows: IntArray, random: np.random.Generator) -> IntArray:
    """Gives each config another choice at one of the sites that exist in it."""
    here = space.present(rows)
    genes = np.where(here, rows, random.integers(space.counts, size=rows.shape))
    free = here & (space.counts > 1)
    site = np.where(free, random.random(rows.shape), -1.0).argmax(axis=1)
    which = np.arange(len(rows))
    steps = random.integers(1, np.maximum(space.counts[site], 2))
    genes[which, site] = (genes[which, site] + steps) % space.counts[site]
    return space.canonical_many(genes)
