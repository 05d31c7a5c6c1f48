"""What a search shows while it runs."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from rich.progress import TextColumn, TimeRemainingColumn

from supple.study.indicators import hypervolume
from supple.study.objectives import Objective, minimised
from supple.study.store import Evaluation
from supple.training.bar import Bar

__all__ = ["SearchProgress", "scaled_hypervolume"]

_MARGIN = 0.1


class SearchProgress(Bar):
    """A line with the evaluations done, hypervolume, evaluations a minute and time left.

    Args:
        total: How many evaluations are wanted.
        objectives: What is sought.
        description: What the line begins with.
        shown: Whether to show it at all.
    """

    def __init__(
        self, total: int, objectives: Sequence[Objective], description: str, *, shown: bool
    ) -> None:
        self._objectives = tuple(objectives)
        self._start = time.monotonic()
        self._before: int | None = None
        super().__init__(
            description,
            total,
            TextColumn("hypervolume {task.fields[volume]}"),
            TextColumn("{task.fields[rate]} evaluations/min"),
            TextColumn("left"),
            TimeRemainingColumn(),
            shown=shown,
            volume="-",
            rate="-",
        )

    def show(self, done: Sequence[Evaluation], count: int | None = None) -> None:
        """Shows what was evaluated so far, by all workers.

        Args:
            done: To the end.
            count: How many evaluations that makes, with those that were given up and without
                what an earlier study knew; by default as many as are done.
        """
        if not self.shown:
            return
        count = len(done) if count is None else count
        if self._before is None:
            self._before = count
        minutes = (time.monotonic() - self._start) / 60
        fresh = count - self._before
        values = minimised(self._objectives, (evaluation.values for evaluation in done))
        volume = scaled_hypervolume(values)
        self.update(
            completed=count,
            volume="-" if volume is None else f"{volume:.4f}",
            rate=f"{fresh / minutes:.1f}" if fresh and minutes > 0 else "-",
        )


def scaled_hypervolume(values: NDArray[np.float64]) -> float | None:
    """Returns the hypervolume in a box that the first two evaluations span.

    A search begins with the largest and the smallest config, so the box is the same for all
    searches of one network, and the figure can be compared between them.

    Args:
        values: Less is better, shape (evaluations, objectives).

    Returns:
        The volume beneath a corner a tenth of the box beyond it; None with fewer than two
        finite evaluations.
    """
    finite = values[np.isfinite(values).all(axis=1)]
    if len(finite) < 2:
        return None
    low, high = finite[:2].min(axis=0), finite[:2].max(axis=0)
    # Where both are nearly equal, a tenth of the value stands in for their distance.
    floor = _MARGIN * np.maximum(np.abs(low), np.abs(high))
    width = np.maximum(high - low, np.where(floor > 0, floor, 1.0))
    scaled = (finite - low) / width
    return hypervolume(scaled, np.full(len(width), 1.0 + _MARGIN))
