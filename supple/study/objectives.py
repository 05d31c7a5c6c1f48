"""What a search is after: named values, each to be maximised or minimised."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from supple.errors import SettingError, nearest
from supple.quantity import unit_of

__all__ = ["Objective", "goes_down", "minimised", "objectives_of"]

FloatArray = NDArray[np.float64]

_DOWN = {
    *("loss", "error", "err", "perplexity", "ppl", "nll", "wer", "cer", "mse", "mae", "rmse"),
    *("bpb", "bpc", "fid", "divergence", "distance", "latency", "memory", "energy", "seconds"),
    *("bytes", "params", "macs", "flops"),
}


@dataclass(frozen=True)
class Objective:
    """A value to be made as large or as small as possible.

    Args:
        name: Such as `"accuracy"` or `"latency[batch=1]"`.
        maximize: Whether more is better.
    """

    name: str
    maximize: bool

    @property
    def unit(self) -> str:
        """The base unit, from the name: `"s"`, `"B"`, `"J"`, `"W"` or `""`."""
        return unit_of(self.name)


def goes_down(name: str) -> bool:
    """Says whether less is better, from the words in a metric's name.

    Args:
        name: Such as `"accuracy"` or `"val_loss"`.

    Example:
        >>> goes_down("accuracy"), goes_down("val_loss"), goes_down("top1 error")
        (False, True, True)
    """
    return bool(_DOWN & set(re.split(r"[^a-z]+", name.lower())))


def objectives_of(
    metrics: Iterable[str],
    costs: Sequence[str],
    *,
    maximize: str | Sequence[str] | None = None,
    only: Sequence[str] | None = None,
) -> tuple[Objective, ...]:
    """Returns the objectives: metrics in the order given, then costs, which always go down.

    Args:
        metrics: Names that the evaluation gives.
        costs: Names of costs.
        maximize: The metrics that go up; the others go down. None decides by name.
        only: The metrics that are objectives; None for all.

    Raises:
        SettingError: A name is not a metric, or is a metric and a cost.
    """
    metrics = tuple(metrics)
    up = (maximize,) if isinstance(maximize, str) else maximize
    for name in (*(up or ()), *(only or ())):
        if name not in metrics:
            raise SettingError(
                f"the evaluation gives no metric {name!r}{nearest(name, metrics)} "
                f"(it gives: {', '.join(metrics) or 'none'})"
            )
    for name in metrics:
        if name in costs:
            raise SettingError(f"{name!r} is a cost and a metric of the evaluation; rename one")
    chosen = [name for name in metrics if only is None or name in only]
    found = [Objective(n, not goes_down(n) if up is None else n in up) for n in chosen]
    found += [Objective(name, maximize=False) for name in costs]
    if not found:
        raise SettingError("there is nothing to search for: no metric and no cost")
    return tuple(found)


def minimised(
    objectives: Sequence[Objective], values: Iterable[Mapping[str, float]]
) -> FloatArray:
    """Returns values such that less is better, shape (values, objectives)."""
    rows = [[-v[o.name] if o.maximize else v[o.name] for o in objectives] for v in values]
    return np.array(rows, dtype=np.float64).reshape(len(rows), len(objectives))
