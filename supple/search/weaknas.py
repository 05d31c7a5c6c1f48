"""WeakNAS: weak predictors that know one region better and better."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from supple.errors import SettingError
from supple.predictors import predictor
from supple.search._predicted import LEAST, prices
from supple.search._ranking import best
from supple.search.base import Problem, SearchAlgorithm, Told
from supple.technique import register

__all__ = ["WeakNAS"]

IntArray = NDArray[np.int64]

_SPARE = 500
"""Random configs behind those of the best, for where all of these are known."""


@register(title="WeakNAS", paper="arXiv:2102.10490")
@dataclass(frozen=True, kw_only=True)
class WeakNAS(SearchAlgorithm):
    """Tries sizes of your network that are random among the best predicted ones.

    A regressor is fitted to all that was told and ranks `candidates` random configs, or the
    whole space where it has no more. The next `population` configs are drawn from the best
    `sample` of them: the predictor has to be good only where the search goes, and learns
    there.

    Args:
        population: Configs told before the predictor is fitted anew, at least 1.
        first: Random configs told before anything is predicted, at least 4.
        candidates: Configs to rank, at least `sample`.
        sample: The best of them, from which is drawn, at least 1.
        predictor: What predicts: `"gradient-boosting"`, `"mlp"`, `"ridge"`, `"svr"`,
            `"ridge-svr"` or `"gaussian-process"`.

    Example:
        >>> from supple.space import Site, Space
        >>> space = Space([Site(f"s{i}", "width", tuple(range(4)), 3) for i in range(10)])
        >>> run = WeakNAS(first=20, sample=50, predictor="ridge").start(space, ["loss"], 0)
        >>> for _ in range(6):
        ...     rows = run.ask_rows(10)
        ...     run.tell(rows, rows.sum(axis=1, keepdims=True))
        >>> bool(run.told.values[-10:].mean() < run.told.values[:10].mean() - 5)
        True

    Source:
        Wu et al. 2021, "Stronger NAS with Weaker Predictors", NeurIPS, arXiv:2102.10490, and
        the authors' code, VITA-Group/WeakNAS.
    Differs:
        The default predictor is boosted trees, one of the paper's three, where the authors'
        scripts train an MLP of four layers of 1,000 units. With several objectives the best
        are the first fronts; costs that can be computed are.
    Checked:
        What is drawn is of the best by a hand-made order, and not always the same; a small
        space is ranked wholly.
    """

    distinguishing: ClassVar[str] = "propose_for"

    population: int = 10
    first: int = 50
    candidates: int = 10_000
    sample: int = 100
    predictor: str = "gradient-boosting"

    def __post_init__(self) -> None:
        least = {"population": 1, "first": LEAST, "sample": 1, "candidates": self.sample}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise SettingError(
                    f"{name} must be at least {bound}, got {getattr(self, name)}"
                )
        predictor(self.predictor)

    @property
    def generation(self) -> int:
        return self.population

    def propose_for(
        self, problem: Problem, parents: Told, random: np.random.Generator
    ) -> IntArray:
        space = problem.space
        learned = int(np.isfinite(parents.violations).sum())
        if len(parents) < self.first or learned < LEAST:
            return space.random_many(self.first, random)
        small = space.size() <= self.candidates
        rows = space.every() if small else space.random_many(self.candidates, random)
        known = {row.tobytes() for row in parents.rows}
        rows = np.ascontiguousarray(rows)
        rows = rows[[row.tobytes() not in known for row in rows]]
        priced = prices(problem, parents, predictor(self.predictor))(rows)
        drawn = random.permutation(priced.rows[best(priced, self.sample)[: self.sample]])
        return np.concatenate([drawn, space.random_many(_SPARE, random)])
