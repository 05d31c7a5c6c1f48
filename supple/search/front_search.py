"""Search along the whole front on a Gaussian process, by hypervolume."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from supple.errors import SettingError
from supple.predictors import predictor
from supple.search._predicted import LEAST, evolved, prices
from supple.search._ranking import front
from supple.search.base import Problem, SearchAlgorithm, Told
from supple.search.nsga2 import NSGA2
from supple.study.indicators import hypervolume
from supple.technique import register

__all__ = ["FrontSearch"]

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]


@register(title="Front search by hypervolume", paper="doi:10.1007/s10898-018-0609-2")
@dataclass(frozen=True, kw_only=True)
class FrontSearch(SearchAlgorithm):
    r"""Finds the front of sizes of your network with very few evaluations.

    After each `population` evaluations a Gaussian process is fitted to each objective that only
    an evaluation tells; costs that can be computed are. NSGA-II searches from the known front,
    on values taken `optimism` standard deviations better than predicted. Of what it finds, the
    config is asked for that would add the most hypervolume to the known front, then the one
    that would add most to both, and so on: configs of one batch spread along the front.

    It needs fewer evaluations than `search/hardware-aware-search`, and more time for each: use
    it where an evaluation takes longer than some tenths of a second.

    Args:
        population: Configs to evaluate before the predictions are made anew, at least 1.
        first: Configs to evaluate before anything is predicted, at least 4: the smallest, the
            largest, and random ones that are small, middling or large all over.
        candidates: Configs to predict for each batch, at least 100.
        predictor: What predicts: `"gaussian-process"`, or one of those of
            `search/hardware-aware-search`.
        optimism: Standard deviations, at least 0.

    Example:
        >>> from supple.space import Site, Space
        >>> space = Space([Site(f"s{i}", "width", tuple(range(4)), 3) for i in range(10)])
        >>> search = FrontSearch(first=10, candidates=500)
        >>> size = lambda rows: rows.sum(axis=1)
        >>> run = search.start(space, ["size", "loss"], 0, exact={"size": size})
        >>> for _ in range(4):
        ...     rows = run.ask_rows(10)
        ...     run.tell(rows, np.stack([size(rows), 30 - size(rows) + rows[:, 0]], axis=1))
        >>> bool((run.told.rows[-10:, 0] == 0).mean() > 0.8)  # what only harms dies out
        True

    Source:
        Bradford, Schweidtmann and Lapkin 2018, "Efficient Multiobjective Optimization Employing
        Gaussian Processes, Spectral Sampling and a Genetic Algorithm", Journal of Global
        Optimization 71, 407-438, doi:10.1007/s10898-018-0609-2.
    Differs:
        The genetic algorithm searches on lower confidence bounds, not on functions drawn from
        the process. The covariance is that of one-hot features, linear and Gaussian. Costs
        are computed where they can be. The volume is bounded by the worst known values.
    Checked:
        The choice of a batch against a slow reference and by hand; on an additive problem the
        second batch is on the true front; more hypervolume than random search on a known
        front.
    """

    distinguishing: ClassVar[str] = "propose_for"

    population: int = 10
    first: int = 20
    candidates: int = 4000
    predictor: str = "gaussian-process"
    optimism: float = 0.5

    def __post_init__(self) -> None:
        least = {"population": 1, "first": LEAST, "candidates": _EVOLVING, "optimism": 0}
        for name, bound in least.items():
            if not getattr(self, name) >= bound:
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
        good = parents.take(np.isfinite(parents.violations))
        if len(parents) < self.first or len(good) < LEAST:
            ends = space.encode_many([space.smallest(), space.largest()])
            return np.concatenate([ends, space.leaning_many(self.first, random)])
        price = prices(problem, parents, predictor(self.predictor), self.optimism)
        method = NSGA2(population=_EVOLVING)
        known = good.rows[front(good)]
        start = np.concatenate([known, space.random_many(_EVOLVING, random)])
        found = evolved(
            space, price, method, self.candidates, random, parents.rows, start=start
        )
        best = found.rows[_batch(good, found, self.population)]
        return np.concatenate([best, space.random_many(_SPARE, random)])


_EVOLVING = 100
"""Configs per generation of the inner search."""
_SPARE = 500
"""Random configs behind those that were found, for where all of these are known."""


def _batch(known: Told, found: Told, count: int) -> list[int]:
    """Chooses configs one by one by the hypervolume each adds to those before it.

    What a config adds can only shrink as others are chosen, so that a bound from before saves
    most computations. Those that add nothing come last, as they are ordered.
    """
    met = known.take(front(known))
    if met.violations.any():
        return list(range(min(count, len(found))))
    corner = known.values.max(axis=0)
    volume = hypervolume(met.values, corner)
    points = met.values
    left = [place for place in range(len(found)) if not found.violations[place]]
    gains = dict.fromkeys(left, np.inf)
    chosen: list[int] = []
    while len(chosen) < count and gains:
        fresh: set[int] = set()
        while (best := max(gains, key=gains.__getitem__)) not in fresh:
            joined = np.concatenate([points, found.values[best : best + 1]])
            gains[best] = hypervolume(joined, corner) - volume
            fresh.add(best)
        if gains[best] <= 0:
            break
        volume += gains.pop(best)
        points = np.concatenate([points, found.values[best : best + 1]])
        chosen.append(best)
    rest = [place for place in range(len(found)) if place not in chosen]
    return (chosen + rest)[:count]
