"""Non-dominated points and the hypervolume, in any number of objectives."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pymoo.indicators.hv import HV
from pymoo.util.nds.non_dominated_sorting import NonDominatedSorting

from supple.errors import SettingError

__all__ = ["hypervolume", "non_dominated"]


def non_dominated(values: NDArray[Any]) -> NDArray[np.int64]:
    """Returns the indices of the points that no other point dominates, ascending.

    A point dominates another if it is nowhere worse and somewhere better. Equal points do not
    dominate each other.

    Args:
        values: Less is better, finite, shape (points, objectives).

    Example:
        >>> non_dominated(np.array([[1.0, 2.0], [2.0, 1.0], [2.0, 2.0]])).tolist()
        [0, 1]
    """
    if not len(values):
        return np.zeros(0, dtype=np.int64)
    front = NonDominatedSorting().do(values, only_non_dominated_front=True)
    return np.sort(np.asarray(front, dtype=np.int64))


def hypervolume(values: NDArray[Any], reference: ArrayLike) -> float:
    """Returns the exact volume that is dominated by the points and bounded by a reference.

    Args:
        values: Less is better, shape (points, objectives), in any number of objectives.
        reference: The worst corner, shape (objectives,). Points that are not better than it
            everywhere add nothing.

    Returns:
        The volume, in the product of the objectives' units.

    Raises:
        SettingError: The reference has another length, or a number is not finite.

    Example:
        >>> hypervolume(np.array([[1.0, 2.0], [2.0, 1.0]]), [3.0, 3.0])
        3.0
    """
    points = np.asarray(values, dtype=np.float64)
    corner = np.asarray(reference, dtype=np.float64)
    if points.ndim != 2 or corner.shape != points.shape[1:]:
        raise SettingError(
            f"the reference must have one value per objective, shape {points.shape[1:]}, got "
            f"{corner.shape}"
        )
    if not (np.isfinite(points).all() and np.isfinite(corner).all()):
        raise SettingError("the hypervolume needs finite values and a finite reference")
    inside = points[(points < corner).all(axis=1)]
    if not len(inside):
        return 0.0
    # Shifted, so that large offsets (bytes, parameters) cost no digits.
    return float(HV(ref_point=np.zeros(len(corner)))(inside - corner))
