"""The picture of a front."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from supple.errors import SettingError
from supple.files import replacing
from supple.quantity import show, unit_of
from supple.study.indicators import non_dominated
from supple.study.objectives import Objective, minimised

if TYPE_CHECKING:
    from supple.study.front import Front, Point

__all__ = ["draw"]

_INK, _SOFT, _PALE, _LINE, _ACCENT, _MARK = (
    *("#1f2733", "#5b6675", "#b9c2cf", "#e8ebf0", "#2f5fd0", "#d1495b"),
)
_WIDE = 30.0
"""From this ratio between largest and smallest on, costs are drawn on a logarithmic axis."""
_NARROW = 0.1
"""Up to this part of the width, labels stand to the right of their points."""


def draw(
    front: Front,
    path: str | os.PathLike[str],
    *,
    x: str,
    y: str,
    mark: Mapping[str, Mapping[str, int]],
) -> None:
    """Draws a front's points over two of its values; see `Front.plot`."""
    marked = {label: front.values(config) for label, config in mark.items()}
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    _style(axes, front, x, y)
    shown = [point for point in front.evaluated if x in point.values and y in point.values]
    on_front = {point.config for point in front.points}
    others = [point for point in shown if point.config not in on_front]
    _scatter(axes, others, x, y, s=14, color=_PALE, lw=0, label="evaluated", zorder=2)
    best = _projected(front, shown, x, y)
    if len(front.objectives) > 2:
        rest = [point for point in shown if point.config in on_front and point not in best]
        label = "best in another objective"
        _scatter(
            axes, rest, x, y, s=20, facecolor="white", color=_ACCENT, label=label, zorder=3
        )
    _staircase(axes, best, x, y)
    _scatter(axes, best, x, y, s=30, color=_ACCENT, label="Pareto front", zorder=4)
    _annotate(axes, front, marked, x, y)
    axes.legend(frameon=False, fontsize=9, labelcolor=_SOFT, loc="best")
    _save(figure, path)


def _objective(front: Front, name: str) -> Objective:
    for objective in front.objectives:
        if objective.name == name:
            return objective
    return Objective(name, maximize=False)


def _projected(front: Front, points: Sequence[Point], x: str, y: str) -> list[Point]:
    """Returns the points that are not dominated in the two values shown, from the left."""
    both = (_objective(front, x), _objective(front, y))
    values = minimised(both, (point.values for point in points))
    kept = [points[index] for index in non_dominated(values)]
    return sorted(kept, key=lambda point: (point.values[x], point.values[y]))


def _style(axes: Axes, front: Front, x: str, y: str) -> None:
    axes.set_title(str(front), loc="left", fontsize=10, color=_SOFT)
    axes.set_xlabel(_label(front, x), color=_INK)
    axes.set_ylabel(_label(front, y), color=_INK)
    axes.grid(color=_LINE, lw=0.8)
    axes.set_axisbelow(True)
    axes.margins(0.05, 0.09)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_PALE)
    axes.tick_params(which="both", color=_PALE, labelcolor=_SOFT, labelsize=9)
    values = [point.values[x] for point in front.evaluated if x in point.values]
    if values and min(values) > 0 and max(values) / min(values) >= _WIDE:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 2.5, 5, 10]))
    for axis, name in ((axes.xaxis, x), (axes.yaxis, y)):
        axis.set_major_formatter(FuncFormatter(_ticks(name)))


def _label(front: Front, name: str) -> str:
    for objective in front.objectives:
        if objective.name == name:
            return f"{name}  ({'more' if objective.maximize else 'less'} is better)"
    return name


def _ticks(name: str) -> Callable[[float, int | None], str]:
    unit = unit_of(name)

    def text(value: float, _: int | None = None) -> str:
        return show(float(value), unit, 4)

    return text


def _scatter(axes: Axes, points: Sequence[Point], x: str, y: str, **look: object) -> None:
    if points:
        data = np.array([[point.values[x], point.values[y]] for point in points])
        axes.scatter(data[:, 0], data[:, 1], **look)  # type: ignore[arg-type]


def _staircase(axes: Axes, points: Sequence[Point], x: str, y: str) -> None:
    # From each point to the right, nothing better is known until the next one.
    data = np.array([[point.values[x], point.values[y]] for point in points]).reshape(-1, 2)
    axes.step(data[:, 0], data[:, 1], where="post", color=_ACCENT, lw=1.4, alpha=0.7, zorder=3)


def _annotate(
    axes: Axes, front: Front, marked: Mapping[str, Mapping[str, float]], x: str, y: str
) -> None:
    for label, values in marked.items():
        if x not in values or y not in values:
            raise SettingError(f"the marked config {label!r} has no value for {x!r} or {y!r}")
    # Beyond the front there is nothing, so a label there hides no point.
    up = 8 if _objective(front, y).maximize else -16
    for label, values in marked.items():
        at = (values[x], values[y])
        axes.scatter(*at, s=80, facecolor="none", edgecolor=_MARK, lw=1.6, zorder=5)
        right, _ = axes.transAxes.inverted().transform(axes.transData.transform(at))
        axes.annotate(
            label,
            at,
            xytext=(8 if right < _NARROW else -6, up),
            textcoords="offset points",
            ha="left" if right < _NARROW else "right",
            fontsize=9,
            fontweight="bold",
            color=_MARK,
            path_effects=[withStroke(linewidth=3, foreground="white")],
            zorder=6,
        )


def _save(figure: Figure, path: str | os.PathLike[str]) -> None:
    suffix = Path(path).suffix.lstrip(".").lower()
    supported = figure.canvas.get_supported_filetypes()
    if suffix not in supported:
        raise SettingError(
            f"can't draw to {path}: use one of {', '.join(f'.{s}' for s in sorted(supported))}"
        )
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=160, format=suffix)
