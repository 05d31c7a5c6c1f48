"""What an earlier study of the same sizes saves a new one."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import optuna

from supple.errors import SettingError, nearest
from supple.quantity import unit_of
from supple.space import Config, Space
from supple.study.database import MEMORY, file_of, shown
from supple.study.front import Front, Point
from supple.study.store import Evaluation, StudyStore, quiet

__all__ = ["Earlier", "WarmStart", "read_earlier"]

WarmStart = str | os.PathLike[str] | Front

_ELSEWHERE = ("s", "J", "W", "B")
"""Units of what depends on the device."""
_ALIKE = 0.01
"""How far the largest size's figures may differ between two devices, relative."""


@dataclass(frozen=True)
class Earlier:
    """What is taken over from an earlier study.

    Args:
        shown: Where that is.
        front: The configs of its front, the cheapest first: to be evaluated before others.
        metrics: What its evaluations gave, by config; empty if it was of other weights, or if
            its metrics depend on the device.
    """

    shown: str = ""
    front: tuple[Config, ...] = ()
    metrics: Mapping[Config, Mapping[str, float]] = field(default_factory=dict)

    def check(self, first: Evaluation) -> None:
        """Checks that evaluations mean the same as they did in the earlier study.

        Args:
            first: A size that was evaluated anew.

        Raises:
            SettingError: The metrics have other names, or the same size other figures.
        """
        known = self.metrics.get(first.config)
        if known is None:
            return
        if set(known) != set(first.metrics):
            raise SettingError(
                f"warm_start: {self.shown} has the metrics {', '.join(known)}, this evaluation "
                f"gives {', '.join(first.metrics)}; leave warm_start out, or evaluate as there"
            )
        for name, value in first.metrics.items():
            if not math.isclose(value, known[name], rel_tol=_ALIKE, abs_tol=1e-12):
                raise SettingError(
                    f"warm_start: the largest size has {name} {value:.6g} here and "
                    f"{known[name]:.6g} in {self.shown}, with the same weights: it was "
                    "evaluated otherwise there (on other data?); leave warm_start out"
                )


def read_earlier(where: WarmStart | None, *, name: str, space: Space, weights: str) -> Earlier:
    """Reads what an earlier study can tell.

    Args:
        where: Its file or URL, or the front that its search gave; None for none.
        name: Its name, where several studies are there.
        space: The space that is searched now.
        weights: The fingerprint of the weights that are evaluated now.

    Raises:
        SettingError: There is no such study, or it is of another space.
        CheckpointError: It can't be read.
    """
    if where is None:
        return Earlier()
    place = where.study if isinstance(where, Front) else os.fspath(where)
    _check_there(place)
    try:
        return _read(place, _name(place, name), space, weights)
    except SettingError as error:
        raise SettingError(f"warm_start: {error}") from error


def _check_there(place: str) -> None:
    if place in ("", MEMORY):
        raise SettingError(
            "warm_start must be the file or URL of an earlier study, or a front whose study is "
            "one; that one was kept in memory only"
        )
    try:
        path = file_of(place)
    except SettingError as error:
        raise SettingError(f"warm_start: {error}") from error
    if path is not None and not path.is_file():
        raise SettingError(f"warm_start: there is no study {path}")


def _name(place: str, name: str) -> str:
    """Returns the name of the study that is meant: that of this search, or the only one."""
    path = file_of(place)
    url = place if path is None else f"sqlite:///{path}"
    try:
        with quiet():
            names = optuna.get_all_study_names(url)
    except Exception:  # whatever is wrong there, opening it as a study says it best
        return name
    if name in names or not names:
        return name
    if len(names) > 1:
        raise SettingError(
            f"{shown(place)} holds the studies {', '.join(map(repr, sorted(names)))} and none "
            f"is called {name!r}{nearest(name, names)}; give name= as it was there"
        )
    return names[0]


def _read(place: str, name: str, space: Space, weights: str) -> Earlier:
    with StudyStore(place, name=name, space=space, weights=None) as store:
        if not store.exists:
            raise SettingError(f"{store.shown} holds no study")
        finite = [
            one
            for one in store.results()
            if all(math.isfinite(value) for value in one.values.values())
        ]
        points = tuple(Point(one.config, one.values) for one in finite)
        front = Front(store.objectives, points).points
        same = store.made_with == weights
        metrics = {one.config: one.metrics for one in finite} if same else {}
        return Earlier(
            store.shown,
            tuple(point.config for point in front),
            metrics if _anywhere(list(metrics.values())) else {},
        )


def _anywhere(metrics: Sequence[Mapping[str, float]]) -> bool:
    """Says whether metrics are the same on every device, as their names tell."""
    return not any(unit_of(name) in _ELSEWHERE for one in metrics for name in one)
