"""Which of the known configs are better, in any number of objectives and with constraints."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from pymoo.operators.survival.rank_and_crowding.metrics import calc_crowding_distance
from pymoo.util.nds.non_dominated_sorting import NonDominatedSorting

from supple.search.base import Told

__all__ = ["best", "front", "ranked", "winner"]

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]


def ranked(told: Told) -> tuple[IntArray, FloatArray]:
    """Returns the rank (0 is best) and crowding distance of each config.

    Configs that break a constraint come after all others, the least violation first (Deb's
    constraint domination); among them crowding plays no part.
    """
    rank = np.zeros(len(told), dtype=np.int64)
    crowding = np.zeros(len(told))
    good = np.flatnonzero(told.violations == 0)
    fronts = NonDominatedSorting().do(told.values[good]) if len(good) else []
    for number, front in enumerate(fronts):
        rank[good[front]] = number
        crowding[good[front]] = _crowding(told.values[good[front]])
    bad = np.flatnonzero(told.violations > 0)
    _, place = np.unique(told.violations[bad], return_inverse=True)
    rank[bad] = len(fronts) + place
    return rank, crowding


def front(told: Told) -> IntArray:
    """Returns the indices of the configs of rank 0, ascending; cheap where they are few."""
    left = np.flatnonzero(told.violations == told.violations.min(initial=np.inf))
    if len(left) and told.violations[left[0]] > 0:
        return left
    # A point whose sum is the least of those left is dominated by none of them.
    left = left[np.argsort(told.values[left].sum(axis=1), kind="stable")]
    kept = []
    while len(left):
        best = told.values[left[0]]
        same = (told.values[left] == best).all(axis=1)
        kept.append(left[same])
        left = left[(told.values[left] < best).any(axis=1)]
    return np.sort(np.concatenate(kept)) if kept else left


def best(told: Told, count: int) -> IntArray:
    """Returns the indices of whole fronts, the best first, until there are so many or more."""
    left, taken = np.arange(len(told)), np.zeros(0, dtype=np.int64)
    while len(taken) < count and len(left):
        first = front(told.take(left))
        taken = np.concatenate([taken, left[first]])
        left = np.delete(left, first)
    return taken


def winner(told: Told, sample: int, random: np.random.Generator) -> int:
    """Returns the index of the best of a drawn sample; ties are drawn."""
    drawn = random.choice(len(told), sample, replace=False)
    rank, crowding = ranked(told.take(drawn))
    return int(drawn[np.lexsort((-crowding, rank))[0]])


def _crowding(values: FloatArray) -> FloatArray:
    if len(values) <= 2:
        return np.full(len(values), np.inf)
    distance: FloatArray = calc_crowding_distance(values)
    return distance
