"""A ranking-based search for networks that mix softmax and linear attention."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from supple.errors import SettingError
from supple.predictors import Ridge
from supple.search._genetic import allowed, fittest, offspring
from supple.search._pairwise import PairwiseRanking
from supple.search._predicted import LEAST, Price, prices
from supple.search.base import Problem, SearchAlgorithm, Told
from supple.technique import register

__all__ = ["NASEfficientAttention"]

IntArray = NDArray[np.int64]

_CHILDREN = 100
"""Children per generation of the search on scores, as in the authors' code."""
_SPARE = 500
"""Random configs to begin with, and behind the best, for where all of these are known."""


@register(title="NAS on efficient transformers", paper="arXiv:2207.13955")
@dataclass(frozen=True, kw_only=True)
class NASEfficientAttention(SearchAlgorithm):
    r"""Finds out which layers of your transformer need softmax, and which linear attention.

    Each layer holds a `supple.layers.Choice` of kinds of attention from
    `supple.layers.attention`, which share their projections; with the axis `supple.Operator`
    the kind is one more site beside widths, heads and depths, searched together with them.

    The first `first` configs are random. Then boosted trees learn from everything that was told
    which of two configs is better, nothing more, and a genetic algorithm searches on their
    scores: half of the children of the best are mutated, half crossed, and what breaks a bound
    that needs no evaluation is thrown away. The best `population` new ones are evaluated next.
    Costs that can be computed (multiply-accumulates) are.

    Args:
        population: Configs to evaluate per generation, at least 1; as many are parents in the
            search on scores.
        first: Random configs to evaluate before anything is ranked, at least 4.
        candidates: Configs to score per generation, at least 1.
        mutation_probability: Of each site to be drawn anew in half of the children, in [0, 1].
        trees: How many trees rank, at least 1.
        sites: How many sites the trees look at, those that matter most; None for all.

    Example:
        >>> from supple.space import Site, Space
        >>> kinds = [Site(f"{i}.attention", "operator", (0, 1), 1) for i in range(8)]
        >>> search = NASEfficientAttention(population=5, first=20, candidates=200, trees=30)
        >>> softmax = lambda rows: rows.sum(axis=1)
        >>> run = search.start(Space(kinds), ["loss", "softmax"], 0, exact={"softmax": softmax})
        >>> for _ in range(6):  # the first four layers gain from softmax, the others don't
        ...     rows = run.ask_rows(5)
        ...     loss = 4 - rows[:, :4].sum(axis=1)
        ...     run.tell(rows, np.stack([loss, softmax(rows)], axis=1))
        >>> bool(run.told.rows[20:, :4].mean() > run.told.rows[20:, 4:].mean() + 0.3)
        True

    Source:
        Liu et al. 2022, "Neural Architecture Search on Efficient Transformers and Beyond",
        arXiv:2207.13955, and the authors' code, OpenNLPLab/mixFormer, `ranker.py` and
        `fairseq/evolution.py`; the ranking is that of RankNAS, arXiv:2109.07383.
    Differs:
        The authors' released ranker is fitted by squared error; here it is trained on pairs, as
        the papers say. They rank once, after all evaluations; with `first` as large as the
        budget less one generation that is the same. Their sites are counted by correlation
        before ranking latencies only. A cost that can be computed is not ranked, and bounds
        that can't be are predicted by a ridge.
    Checked:
        Derivatives of the loss over pairs against autograd; scores depend on the order of the
        values alone; what is proposed against the best of the whole space; bounds are kept.
    """

    distinguishing: ClassVar[str] = "propose_for"

    population: int = 25
    first: int = 200
    candidates: int = 3000
    mutation_probability: float = 0.3
    trees: int = 100
    sites: int | None = None

    def __post_init__(self) -> None:
        least = {"population": 1, "first": LEAST, "candidates": 1, "trees": 1}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise SettingError(
                    f"{name} must be at least {bound}, got {getattr(self, name)}"
                )
        if not 0.0 <= self.mutation_probability <= 1.0:
            raise SettingError(
                f"mutation_probability must be in [0, 1], got {self.mutation_probability}"
            )
        PairwiseRanking(trees=self.trees, sites=self.sites)

    @classmethod
    def examples(cls) -> list[NASEfficientAttention]:
        return [cls(), cls(population=4, first=8, candidates=1, trees=1, sites=2)]

    @property
    def generation(self) -> int:
        return self.population

    def propose_for(
        self, problem: Problem, parents: Told, random: np.random.Generator
    ) -> IntArray:
        drawn = allowed(problem, problem.space.random_many(max(_SPARE, self.first), random))
        learned = int(np.isfinite(parents.violations).sum())
        if len(parents) < self.first or learned < LEAST:
            return drawn
        ranking = PairwiseRanking(trees=self.trees, sites=self.sites)
        price = prices(problem, parents, ranking, limits=Ridge())
        known = {row.tobytes() for row in np.ascontiguousarray(parents.rows)}
        found = self._evolved(problem, price, drawn, random)
        new = np.array([row.tobytes() not in known for row in found.rows], dtype=bool)
        best = fittest(found.take(new), self.population)
        return np.concatenate([best.rows, drawn])

    def _evolved(
        self, problem: Problem, price: Price, drawn: IntArray, random: np.random.Generator
    ) -> Told:
        """Gives everything that was scored, each config once."""
        found = price(np.unique(drawn, axis=0))
        parents = fittest(found, self.population)
        for _ in range(math.ceil(self.candidates / _CHILDREN)):
            chance = self.mutation_probability
            children = offspring(problem.space, parents.rows, _CHILDREN, chance, random)
            priced = price(np.unique(allowed(problem, children), axis=0))
            found = found.joined(priced)
            parents = fittest(_once(parents.joined(priced)), self.population)
        return _once(found)


def _once(told: Told) -> Told:
    _, places = np.unique(told.rows, axis=0, return_index=True)
    return told.take(places)
