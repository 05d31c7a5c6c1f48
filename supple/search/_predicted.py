"""What searches on predictors share: prices of configs, and an evolution that costs nothing."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from supple.predictors import Fitted, Predictor, out_of_fold
from supple.search.base import Exact, Problem, Told
from supple.search.nsga2 import NSGA2
from supple.space import Space

__all__ = ["LEAST", "Price", "evolved", "prices"]

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
Price = Callable[[IntArray], Told]

LEAST = 4
"""Configs whose evaluation did not fail, below which nothing can be learned."""


def prices(
    problem: Problem,
    told: Told,
    predictor: Predictor,
    optimism: float = 0.0,
    limits: Predictor | None = None,
) -> Price:
    """Fits a predictor to each value that only an evaluation tells.

    Args:
        problem: What is searched, and for what.
        told: What is known, at least `LEAST` configs that did not fail.
        predictor: How to predict.
        optimism: How many standard deviations objectives are taken to be better than they
            are predicted, where the predictor gives any.
        limits: How to predict violations; None as the objectives.

    Returns:
        What gives the values and violations of encoded configs, exact where they can be.
    """
    good = told.take(np.isfinite(told.violations))
    objectives = [
        problem.exact.get(name)
        or _bound(predictor.fit(problem.space, good.rows, good.values[:, place]), optimism)
        for place, name in enumerate(problem.objectives)
    ]
    violation = problem.violation or _violation(problem.space, good, limits or predictor)

    def price(rows: IntArray) -> Told:
        values = [np.asarray(function(rows), dtype=np.float64) for function in objectives]
        return Told(rows, np.stack(values, axis=1), violation(rows))

    return price


def _bound(fitted: Fitted, optimism: float) -> Exact:
    """Gives the lower end of what a value may be."""

    def bound(rows: IntArray) -> FloatArray:
        spread = fitted.uncertainty(rows) if optimism else None
        predicted = fitted.predict(rows)
        return predicted if spread is None else predicted - optimism * spread

    return bound


def _violation(space: Space, told: Told, predictor: Predictor) -> Exact:
    """Predicts violations; what lies within the predictor's error counts as none."""
    if not told.violations.any():
        return lambda rows: np.zeros(len(rows))
    off = np.abs(out_of_fold(predictor, space, told.rows, told.violations) - told.violations)
    fitted = predictor.fit(space, told.rows, told.violations)
    return lambda rows: np.maximum(fitted.predict(rows) - off.mean(), 0.0)


def evolved(
    space: Space,
    price: Price,
    method: NSGA2,
    candidates: int,
    random: np.random.Generator,
    known: IntArray,
    start: IntArray | None = None,
) -> Told:
    """Evolves configs on prices; none is priced twice.

    Args:
        space: What is searched.
        price: What gives values and violations of encoded configs.
        method: How to evolve.
        candidates: How many configs to go through.
        random: Source of all randomness.
        known: Encoded configs that were evaluated. They take part, but are not returned.
        start: Encoded configs to begin with; random ones if None.

    Returns:
        The best configs that are not known, at most a population of them, best first.
    """
    evaluated = {row.tobytes() for row in np.ascontiguousarray(known)}
    seen: set[bytes] = set()
    parents = new = price(space.random_many(1, random)).take(slice(0))
    if start is not None:
        parents = price(_first_seen(start, seen))
    for _ in range(math.ceil(candidates / method.population)):
        rows = _first_seen(method.propose(space, parents, random), seen)
        if not len(rows):
            continue
        children = price(rows)
        parents = method.select(parents.joined(children))
        unknown = np.array([row.tobytes() not in evaluated for row in rows], dtype=bool)
        new = method.select(new.joined(children.take(unknown)))
    return new


def _first_seen(rows: IntArray, seen: set[bytes]) -> IntArray:
    """Keeps the rows that come for the first time, and remembers them."""
    kept = []
    for place, row in enumerate(np.ascontiguousarray(rows)):
        key = row.tobytes()
        if key not in seen:
            seen.add(key)
            kept.append(place)
    return rows[kept]
