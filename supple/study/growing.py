"""Evaluations on growing parts of the data, which end early where nothing can come of them.

A size whose estimate is so far behind that another one surely beats it in every objective
needs no exact figures. What *surely* means is one number, the confidence: of the sizes that
would have been on the front, at most a share of one minus that is given up, however often one
looks.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student
from torch import Tensor, nn

from supple.errors import SettingError
from supple.space import Config
from supple.study.indicators import non_dominated
from supple.study.objectives import Objective, minimised

__all__ = ["Batchwise", "Estimate", "Race", "Tally", "name_of", "numbers", "size_of"]

FloatArray = NDArray[np.float64]

_GROWTH = 1.5
"""How much more data there is from one look to the next."""


@dataclass(frozen=True)
class Estimate:
    """What part of the data says of a size.

    Args:
        values: Metrics by name.
        share: Of the data, above 0; 1 for all of it, which ends the evaluation.
        errors: Standard errors of the metrics by name, at least 0: how far they may be from
            what the whole of the data would say. A metric without one is exact.
        freedom: Degrees of freedom that the errors are estimated with; infinite if they are
            known.

    Raises:
        SettingError: An error is negative or of no metric, or the share is not in (0, 1].

    Example:
        >>> Estimate({"accuracy": 0.7}, share=0.25, errors={"accuracy": 0.02}).share
        0.25
    """

    values: Mapping[str, float]
    share: float
    errors: Mapping[str, float] = field(default_factory=dict)
    freedom: float = math.inf

    def __post_init__(self) -> None:
        for name, error in self.errors.items():
            if name not in self.values or not error >= 0:
                raise SettingError(
                    f"errors must be at least 0 and of metrics ({', '.join(self.values)}), got "
                    f"{name!r}: {error}"
                )
        if not (0 < self.share <= 1 and self.freedom > 0):
            raise SettingError(
                f"share must be in (0, 1] and freedom above 0, got {self.share} and "
                f"{self.freedom}"
            )


class Race:
    """Tells when a size is given up: it is beaten by what was evaluated to the end, or halved.

    Args:
        objectives: What is sought.
        finished: The values of configs that were evaluated to the end, by config.
        confidence: In (0, 1): one minus the largest chance that a size is given up although
            the whole of the data would have put it on the front. None compares with nothing.
        halving: Of sizes that are evaluated together, one in so many goes on after each look,
            at least 2; None for all (successive halving: Jamieson and Talwalkar 2016,
            arXiv:1502.07943).

    Raises:
        SettingError: The confidence is not in (0, 1), or `halving` below 2.
    """

    def __init__(
        self,
        objectives: Sequence[Objective],
        finished: Mapping[Config, Mapping[str, float]],
        confidence: float | None,
        halving: int | None = None,
    ) -> None:
        if confidence is not None and not 0 < confidence < 1:
            raise SettingError(f"confidence must be in (0, 1), got {confidence}")
        if halving is not None and halving < 2:
            raise SettingError(f"halving must be at least 2, got {halving}")
        self._objectives = tuple(objectives)
        self._finished = finished
        self._risk = None if confidence is None else 1 - confidence
        self._halving = halving

    def winner(
        self, estimate: Estimate, costs: Mapping[str, float], look: int
    ) -> Config | None:
        """Returns a config that beats a size in every objective with confidence, if any.

        Look `k` of a size may err with probability `6 risk / (pi k)^2` in total, shared by its
        metrics; the sum over all looks is the risk.

        Args:
            estimate: What is known of the size.
            costs: Its costs by name, which are exact.
            look: How often it was looked at, this time included, at least 1.
        """
        if self._risk is None:
            return None
        best = self._at_best(estimate, costs, look, self._risk)
        if best is None:
            return None
        beats = (self._values <= best).all(axis=1) & (self._values < best).any(axis=1)
        return list(self._finished)[int(beats.argmax())] if beats.any() else None

    @functools.cached_property
    def _values(self) -> FloatArray:
        # Most evaluations don't grow and never ask.
        return minimised(self._objectives, self._finished.values())

    def _at_best(
        self, estimate: Estimate, costs: Mapping[str, float], look: int, risk: float
    ) -> FloatArray | None:
        """The best that the size may turn out to be; less is better."""
        values = {**estimate.values, **costs}
        if any(o.name not in values for o in self._objectives):
            return None
        errors = [estimate.errors.get(o.name, 0.0) for o in self._objectives]
        uncertain = max(1, sum(error > 0 for error in errors))
        each = 6 * risk / (math.pi * look) ** 2 / uncertain
        margin = float(student.isf(each, estimate.freedom)) * np.array(errors)
        best: FloatArray = minimised(self._objectives, [values])[0] - margin
        return best

    def halved(self, together: Mapping[Config, Mapping[str, float]]) -> dict[Config, Config]:
        """Tells which of the sizes that are evaluated together don't go on.

        One front after the other goes on; of the last one that has room, sizes that are spread
        along it.

        Args:
            together: The values by now, estimates and costs, by config.

        Returns:
            Config to one that goes on and is on the first front.
        """
        if self._halving is None or not together:
            return {}
        configs = list(together)
        values = minimised(self._objectives, together.values())
        values = np.where(np.isfinite(values), values, np.finfo(float).max)
        kept = _spread_best(values, math.ceil(len(configs) / self._halving))
        return {config: configs[kept[0]] for at, config in enumerate(configs) if at not in kept}


def _spread_best(values: FloatArray, count: int) -> list[int]:
    """The places of the best: one front after the other, and the last one evenly."""
    left, kept = np.arange(len(values)), list[int]()
    while len(kept) < count:
        front = left[non_dominated(values[left])]
        if len(kept) + len(front) > count:
            along = front[np.argsort(values[front, 0], kind="stable")]
            steps = np.linspace(0, len(along) - 1, count - len(kept))
            front = along[np.round(steps).astype(int)]
        kept.extend(front.tolist())
        left = np.setdiff1d(left, front)
    return kept


class Tally:
    """Means over the batches so far, with their standard errors.

    Batches are drawn without replacement from a known number of them, so nothing is uncertain
    once all were seen. They differ in size, so a mean is a ratio of two sums, whose variance is
    that of the batches' shares in it:

    `(1 - k / K) / (k (k - 1)) * sum_b (n_b / n)^2 (x_b - mean)^2`, with `n` the mean size.

    Args:
        total: How many batches there are, at least 1.
    """

    def __init__(self, total: int) -> None:
        self._total = total
        self._sizes: list[float] = []
        self._means: list[Mapping[str, float]] = []

    def __len__(self) -> int:
        return len(self._sizes)

    def add(self, means: Mapping[str, float], size: int) -> None:
        """Takes the mean of each metric over a batch of so many examples."""
        self._means.append(means)
        self._sizes.append(float(size))

    def estimate(self) -> Estimate:
        """Returns what the batches so far say."""
        sizes = np.array(self._sizes)
        weights = sizes / sizes.mean()
        count = len(sizes)
        left = 1 - count / self._total
        values, errors = {}, {}
        for name in self._means[0]:
            seen = np.array([means[name] for means in self._means])
            values[name] = float((weights * seen).mean())
            spread = float((weights**2 * (seen - values[name]) ** 2).sum())
            errors[name] = math.sqrt(left * spread / (count * max(count - 1, 1)))
        if not left:
            errors = {}
        return Estimate(values, count / self._total, errors, max(count - 1, 0.5))


class Batchwise:
    """An evaluation that goes batch by batch: it can end early, and take several sizes at once.

    Use it as `evaluate` of `supple.pareto`. Batches are taken in an order of their own that is
    the same for all sizes, and are what errors are estimated from, so that examples of one
    batch may be alike. Of a loader the batches come as it gives them: it must shuffle if the
    data are sorted.

    Args:
        score: `score(module, batch) -> dict | float`: means over the examples of the batch.
        data: Batches: a sequence, or what gives them anew each time and has a length.
        first: Batches before anything is judged, at least 2.
        seed: Of the order.

    Raises:
        SettingError: `data` has no length or no batch, or `first` is below 2.

    Example:
        >>> import torch
        >>> batches = [(torch.full((4, 1), float(i)),) for i in range(4)]
        >>> growing = Batchwise(lambda module, batch: module(batch[0]).mean(), batches, first=2)
        >>> [round(e.share, 2) for e in growing(nn.Identity())]
        [0.5, 0.75, 1.0]
    """

    def __init__(
        self,
        score: Callable[[nn.Module, Any], Any],
        data: Any,
        *,
        first: int = 4,
        seed: int = 0,
    ) -> None:
        if first < 2:
            raise SettingError(f"first must be at least 2, got {first}")
        if not hasattr(data, "__len__") or not len(data):
            raise SettingError(
                f"data must be batches of which it is known how many there are, at least one, "
                f"got {type(data).__name__}"
            )
        self.score = score
        self.__name__ = name_of(score)
        self._data = data
        self._first = first
        self._order = np.random.default_rng(seed).permutation(len(data)).tolist()

    def __len__(self) -> int:
        return len(self._order)

    def batches(self) -> Iterator[Any]:
        """Gives the batches, in the same order each time."""
        if isinstance(self._data, Sequence):
            return (self._data[place] for place in self._order)
        return iter(self._data)

    def looks(self) -> set[int]:
        """After how many batches sizes are judged: at growing distances, and at the end."""
        looks, count = {len(self)}, float(self._first)
        while count < len(self):
            looks.add(math.ceil(count))
            count *= _GROWTH
        return looks

    def __call__(self, module: nn.Module) -> Iterator[Estimate]:
        """Evaluates one size by itself."""
        tally, looks = Tally(len(self)), self.looks()
        for batch in self.batches():
            tally.add(self.means(module, batch), size_of(batch))
            if len(tally) in looks:
                yield tally.estimate()

    def means(self, module: nn.Module, batch: Any) -> dict[str, float]:
        """Scores a batch.

        Raises:
            SettingError: The score is neither a number nor numbers by name.
        """
        return numbers(self.score(module, batch), self.__name__, "score")


def numbers(given: Any, name: str, what: str) -> dict[str, float]:
    """Reads one number, or numbers by name, that a function of the user's gave.

    Raises:
        SettingError: It is something else.
    """
    named = given if isinstance(given, Mapping) else {name: given}
    try:
        return {str(name): float(value) for name, value in named.items()}
    except (TypeError, ValueError, RuntimeError) as error:
        raise SettingError(
            f"{what} must return a number or a mapping of names to numbers, got {given!r}"
        ) from error


def name_of(function: Any) -> str:
    """Names the one number that a function returns: after the function, if that tells."""
    while isinstance(function, functools.partial):
        function = function.func
    name = getattr(function, "__name__", "")
    return name if name.isidentifier() and not name.startswith(("eval", "_")) else "score"


def size_of(batch: Any) -> int:
    """Returns how many examples a batch has: the length of its first tensor, else 1."""
    if isinstance(batch, Tensor):
        return len(batch)
    parts = batch.values() if isinstance(batch, Mapping) else batch
    return next((len(part) for part in parts if isinstance(part, Tensor)), 1)
