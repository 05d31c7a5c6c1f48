"""How the learning rate goes over a run: a factor for each step, computed from the step alone.

A schedule is a function `(step, steps) -> factor` with `step` counted from 0. Having no state
it needs no checkpoint, and a resumed run can't drift from an uninterrupted one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from supple.errors import SettingError, nearest

__all__ = [
    "Constant",
    "Cosine",
    "Cyclic",
    "Exponential",
    "Scaled",
    "Schedule",
    "WarmUp",
    "schedule_of",
]

Schedule = Callable[[int, int], float]


@dataclass(frozen=True)
class Constant:
    """The same learning rate all along."""

    def __call__(self, step: int, steps: int) -> float:
        """Gives 1."""
        return 1.0


@dataclass(frozen=True)
class Cosine:
    """Half a cosine from 1 down to a floor.

    Args:
        floor: Where it ends, in [0, 1].

    Example:
        >>> [round(Cosine()(step, 4), 3) for step in range(5)]
        [1.0, 0.854, 0.5, 0.146, 0.0]
    """

    floor: float = 0.0

    def __post_init__(self) -> None:
        _check_fraction("floor", self.floor)

    def __call__(self, step: int, steps: int) -> float:
        """Gives the factor of a step."""
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * step / steps))


@dataclass(frozen=True)
class Cyclic:
    """Triangles from a floor up to a peak and down again, each half as high as the last.

    Args:
        cycles: How many there are in a run, at least 1.
        floor: The lowest factor, in [0, 1].
        decay: The height of a triangle relative to the one before, in (0, 1].

    Example:
        >>> [Cyclic(cycles=2, floor=0.0)(step, 8) for step in range(8)]
        [0.0, 0.5, 1.0, 0.5, 0.0, 0.25, 0.5, 0.25]

    Source:
        Smith 2017, "Cyclical Learning Rates for Training Neural Networks", arXiv:1506.01186.
    """

    cycles: int = 4
    floor: float = 1e-5
    decay: float = 0.5

    def __post_init__(self) -> None:
        _check_fraction("floor", self.floor)
        _check_fraction("decay", self.decay)
        if self.cycles < 1 or not self.decay:
            raise SettingError(
                f"cycles must be at least 1 and decay above 0, got {self.cycles} and "
                f"{self.decay}"
            )

    def __call__(self, step: int, steps: int) -> float:
        """Gives the factor of a step."""
        cycle, place = divmod(step * self.cycles / steps, 1)
        height = float(self.decay**cycle) * (1 - abs(2 * place - 1))
        return self.floor + (1 - self.floor) * height


@dataclass(frozen=True)
class Exponential:
    """Exponential decay that stops at a constant floor.

    Args:
        floor: The lowest factor, in (0, 1].
        until: The share of the steps after which the floor is reached, in (0, 1].

    Example:
        >>> [round(Exponential(floor=0.25, until=0.5)(step, 8), 3) for step in (0, 2, 4, 7)]
        [1.0, 0.5, 0.25, 0.25]
    """

    floor: float = 0.05
    until: float = 0.75

    def __post_init__(self) -> None:
        for name in ("floor", "until"):
            _check_fraction(name, getattr(self, name))
            if not getattr(self, name):
                raise SettingError(f"{name} must be above 0, got 0")

    def __call__(self, step: int, steps: int) -> float:
        """Gives the factor of a step."""
        return float(self.floor ** min(1.0, step / (self.until * steps)))


@dataclass(frozen=True)
class Scaled:
    """Another schedule times a number.

    Args:
        of: The other one.
        factor: The number, above 0.

    Example:
        >>> Scaled(Constant(), 0.5)(3, 4)
        0.5
    """

    of: Schedule
    factor: float

    def __post_init__(self) -> None:
        if not self.factor > 0:
            raise SettingError(f"factor must be above 0, got {self.factor}")

    def __call__(self, step: int, steps: int) -> float:
        """Gives the factor of a step."""
        return self.of(step, steps) * self.factor


@dataclass(frozen=True)
class WarmUp:
    """Grows linearly to 1 over the first steps, then follows another schedule.

    Args:
        then: What follows, over the steps that are left.
        warmup: Number of steps (an int), or a share of all steps (a float in [0, 1)).
    """

    then: Schedule
    warmup: int | float

    def __post_init__(self) -> None:
        share = isinstance(self.warmup, float)
        if self.warmup < 0 or (share and self.warmup >= 1):
            raise SettingError(
                "warmup must be a number of steps (an int, at least 0) or a share of them "
                f"(a float in [0, 1)), got {self.warmup!r}"
            )

    def __call__(self, step: int, steps: int) -> float:
        """Gives the factor of a step."""
        length = round(self.warmup * steps) if isinstance(self.warmup, float) else self.warmup
        if step < length:
            return (step + 1) / (length + 1)
        return self.then(step - length, max(1, steps - length))


def _check_fraction(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise SettingError(f"{name} must lie in [0, 1], got {value}")


_NAMED: dict[str, Schedule] = {
    "constant": Constant(),
    "cosine": Cosine(),
    "exponential": Exponential(),
}


def schedule_of(schedule: str | Schedule | None, warmup: int | float = 0) -> Schedule:
    """Makes a schedule from a name or a function.

    Args:
        schedule: `"constant"`, `"cosine"`, `"exponential"`, a function `(step, steps) ->
            factor`, or None for a constant one.
        warmup: Steps (int) or share of the steps (float) of linear growth before it.

    Returns:
        The schedule.

    Raises:
        SettingError: The name is unknown, or `warmup` is out of range.
    """
    if isinstance(schedule, str):
        if schedule not in _NAMED:
            raise SettingError(
                f"there is no schedule '{schedule}'{nearest(schedule, _NAMED)} (schedules: "
                f"{', '.join(_NAMED)}, or a function (step, steps) -> factor)"
            )
        schedule = _NAMED[schedule]
    base = Constant() if schedule is None else schedule
    return WarmUp(base, warmup) if warmup else base
