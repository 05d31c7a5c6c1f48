"""NSGA-III: the genetic algorithm for many objectives, by reference directions."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from pymoo.algorithms.moo.nsga3 import (
    HyperplaneNormalization,
    associate_to_niches,
    calc_niche_count,
    niching,
)
from pymoo.util.nds.non_dominated_sorting import NonDominatedSorting
from pymoo.util.ref_dirs import get_reference_directions

from supple.search.base import Told
from supple.search.nsga2 import NSGA2
from supple.technique import register

__all__ = ["NSGA3"]

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]


@register(title="NSGA-III", paper="doi:10.1109/TEVC.2013.2281535")
@dataclass(frozen=True, kw_only=True)
class NSGA3(NSGA2):
    r"""Evolves configs of your network towards a front of three objectives or more.

    With many objectives almost every config is on the front, and crowding distances tell
    little. Here evenly spread directions tell which configs to keep: values are scaled such
    that the ideal point is 0 and the intercepts of the plane through the extreme points are 1,
    each config belongs to the direction that it is nearest to (by perpendicular distance), and
    of the last rank that fits in part those are kept that belong to directions with the fewest
    so far, the nearest first where a direction has none. Parents are drawn evenly, those that
    meet the constraints before others. Crossing and mutation are those of `search/nsga2`.

    Args:
        population: Configs per generation, at least 4; as many directions are used as fit into
            it: the largest number `C(p + m - 1, m - 1)` for `m` objectives.
        crossover_probability: Of a pair to be crossed, in [0, 1].
        crossover_eta: Distribution index, at least 1.
        mutation_probability: Of each site to be mutated, in [0, 1]; None is one over the
            number of sites.
        mutation_eta: Distribution index, at least 1.

    Example:
        >>> from supple.space import Site, Space
        >>> space = Space([Site(f"s{i}", "width", tuple(range(4)), 3) for i in range(9)])
        >>> run = NSGA3(population=12).start(space, ["a", "b", "c"], 0)
        >>> for _ in range(15):
        ...     rows = run.ask_rows(12)
        ...     parts = rows[:, 1:3].sum(axis=1), rows[:, 3:6].sum(axis=1)
        ...     values = [*parts, 30 - parts[0] - parts[1] + rows[:, 0]]
        ...     run.tell(rows, np.stack(values, axis=1))
        >>> bool((run.told.rows[-24:, 0] == 0).mean() > 0.5)  # what only harms dies out
        True

    Source:
        Deb and Jain 2014, "An Evolutionary Many-Objective Optimization Algorithm Using
        Reference-Point-Based Nondominated Sorting Approach, Part I", IEEE Transactions on
        Evolutionary Computation 18(4), 577-601, doi:10.1109/TEVC.2013.2281535. Survival,
        normalization and directions of pymoo.
    Differs:
        Ideal and extreme points are those of the present population and its children, not of
        all generations, so that a search can be rebuilt from what it was told. The default
        indices of crossing and mutation are those of `search/nsga2` (15 and 20; there 30 and
        20). As there, results are rounded and configs that were tried never proposed again.
    Checked:
        Directions against their number; which configs a direction keeps by hand; violations
        come last; more hypervolume than random search on a known front of three objectives.
    """

    distinguishing: ClassVar[str] = "select"

    def select(self, pool: Told) -> Told:
        good = np.flatnonzero(pool.violations == 0)
        bad = np.flatnonzero(pool.violations > 0)
        bad = bad[np.argsort(pool.violations[bad], kind="stable")]
        if len(good) > self.population:
            good = good[self._survivors(pool.values[good])]
        return pool.take(np.concatenate([good, bad])[: self.population])

    def _survivors(self, values: FloatArray) -> IntArray:
        """Returns the indices of a population, best rank first."""
        fronts = NonDominatedSorting().do(values, n_stop_if_ranked=self.population)
        sure: IntArray = np.concatenate([np.zeros(0, dtype=np.int64), *fronts[:-1]])
        last = np.asarray(fronts[-1])
        missing = self.population - len(sure)
        if missing >= len(last):
            return np.concatenate([sure, last])
        directions = directions_of(values.shape[1], self.population)
        scale = HyperplaneNormalization(values.shape[1])
        scale.update(values, nds=fronts[0])
        niche, distance, _ = associate_to_niches(
            values, directions, scale.ideal_point, scale.nadir_point
        )
        kept = niching(
            last,
            missing,
            calc_niche_count(len(directions), niche[sure]),
            niche[last],
            distance[last],
            # Ties are broken the same way each time, as a search that is rebuilt must.
            random_state=np.random.default_rng(0),
        )
        return np.concatenate([sure, last[kept]])

    def _tournament(self, parents: Told, random: np.random.Generator) -> IntArray:
        """Returns the indices of the pairs to cross: the better one only by constraints."""
        rivals = random.integers(len(parents), size=(2, 2, (self.population + 1) // 2))
        beyond = parents.violations[rivals]
        return np.where(beyond[0] <= beyond[1], rivals[0], rivals[1])


@functools.lru_cache
def directions_of(objectives: int, most: int) -> FloatArray:
    """Returns evenly spread directions, as many as there are at most, or those of the axes.

    Args:
        objectives: Their number.
        most: How many directions are wanted at most.

    Returns:
        Points of the simplex, shape (directions, objectives).
    """
    steps = 1
    while objectives > 1 and math.comb(steps + objectives, objectives - 1) <= most:
        steps += 1
    found: FloatArray = get_reference_directions("das-dennis", objectives, n_partitions=steps)
    return found
