"""What a search found: every evaluated config with its values, and the Pareto front."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from supple.errors import BudgetError, SettingError, nearest
from supple.quantity import Bound, bound, show, unit_of
from supple.space import Config
from supple.study.indicators import hypervolume, non_dominated
from supple.study.objectives import Objective, minimised

__all__ = ["Front", "Point"]


@dataclass(frozen=True)
class Point:
    """An evaluated config.

    Args:
        config: The canonical config.
        values: Metrics and costs by name, in base units (seconds, bytes, plain numbers).
    """

    config: Config
    values: Mapping[str, float]


@dataclass(frozen=True)
class Front:
    """What a search found.

    Args:
        objectives: What was maximised and minimised.
        evaluated: Every config that was evaluated, in the order of evaluation.
        study: Where the study is stored.
        errors: Of values that a model predicted its median relative error, by name.
        stopped: What is known of configs whose evaluation was given up, since another one beats
            them: their metrics are estimates, so they are no candidates for anything.

    Raises:
        SettingError: A point lacks an objective.

    Example:
        >>> front = Front(
        ...     (Objective("accuracy", True), Objective("params", False)),
        ...     (
        ...         Point(Config({"w": 1}), {"accuracy": 0.8, "params": 1e6}),
        ...         Point(Config({"w": 2}), {"accuracy": 0.9, "params": 2e6}),
        ...         Point(Config({"w": 3}), {"accuracy": 0.9, "params": 3e6}),
        ...     ),
        ... )
        >>> [dict(point.config) for point in front.points]
        [{'w': 1}, {'w': 2}]
        >>> front.best(where={"params": "<= 1.5 M"}, maximize="accuracy")
        Config({'w': 1})
    """

    objectives: tuple[Objective, ...]
    evaluated: tuple[Point, ...]
    study: str = ""
    errors: Mapping[str, float] = field(default_factory=dict)
    stopped: tuple[Point, ...] = ()

    def __post_init__(self) -> None:
        for point in self.evaluated:
            for objective in self.objectives:
                if objective.name not in point.values:
                    raise SettingError(
                        f"{point.config} was evaluated without objective {objective.name!r}"
                    )

    @cached_property
    def points(self) -> tuple[Point, ...]:
        """The Pareto front: points that no other one dominates, by the last objective.

        The last objective is the last cost, so the cheapest point comes first. Of points
        with equal values the one evaluated first is kept.
        """
        values = minimised(self.objectives, (point.values for point in self.evaluated))
        _, first = np.unique(values, axis=0, return_index=True)
        kept = sorted(set(non_dominated(values).tolist()) & set(first.tolist()))
        order = sorted(kept, key=lambda index: tuple(values[index][::-1]))
        return tuple(self.evaluated[index] for index in order)

    def __len__(self) -> int:
        return len(self.points)

    def values(self, config: Mapping[str, int]) -> Mapping[str, float]:
        """Returns the values of an evaluated config.

        Raises:
            SettingError: The config was not evaluated.
        """
        wanted = Config(config)
        for point in self.evaluated:
            if point.config == wanted:
                return point.values
        raise SettingError(f"{wanted} was not evaluated in this study")

    def best(
        self,
        where: Mapping[str, str] | None = None,
        *,
        maximize: str | None = None,
        minimize: str | None = None,
    ) -> Config:
        """Returns the best evaluated config within budgets.

        Args:
            where: Name to bound, such as `{"params": "<= 1 M", "latency[batch=1]": "<= 2 ms"}`.
            maximize: The value to make large; by default the first objective that goes up.
            minimize: The value to make small, instead of `maximize`.

        Returns:
            The config; where several are equally good, one that no other dominates.

        Raises:
            SettingError: A name or a bound is wrong, or both directions are given.
            BudgetError: No evaluated config meets the budgets; the message names the nearest.
        """
        target = self._target(maximize, minimize)
        bounds = self.bounds(where)
        fitting = [p for p in self._with(target.name, *bounds) if _meets(p, bounds)]
        if not fitting:
            raise BudgetError(self._nobody_meets(bounds))
        order = minimised((target, *self.objectives), [p.values for p in fitting]).tolist()
        first: Point = fitting[order.index(min(order))]
        return first.config

    def bounds(self, where: Mapping[str, str] | None) -> dict[str, Bound]:
        """Reads bounds on values of this front.

        Raises:
            SettingError: A name or a bound is wrong.
        """
        return {
            self._known(name): bound(text, unit_of(name))
            for name, text in (where or {}).items()
        }

    def hypervolume(self, reference: Mapping[str, float] | Sequence[float]) -> float:
        """Returns the exact hypervolume of the front.

        Args:
            reference: The worst corner: a value for each objective, by name or in order, as
                they are (an accuracy below all, a latency above all).

        Returns:
            The volume, in the product of the objectives' units.

        Raises:
            SettingError: The reference doesn't name each objective.
        """
        if not isinstance(reference, Mapping):
            reference = dict(zip((o.name for o in self.objectives), reference, strict=True))
        for objective in self.objectives:
            if objective.name not in reference:
                raise SettingError(f"the reference needs a value for {objective.name!r}")
        corner = minimised(self.objectives, [reference])[0]
        values = minimised(self.objectives, (point.values for point in self.evaluated))
        return hypervolume(values, corner)

    def table(self, names: Sequence[str] | None = None) -> str:
        """Returns the front as a table in plain text, the cheapest config first.

        Args:
            names: The values to show; by default all.
        """
        console = Console(file=io.StringIO(), width=200, color_system=None)
        console.print(self.rich_table(names))
        assert isinstance(console.file, io.StringIO)
        return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())

    def rich_table(self, names: Sequence[str] | None = None) -> Table:
        """Returns the front as a `rich` table.

        Args:
            names: The values to show; by default all.

        Raises:
            SettingError: A name is not a value of this front.
        """
        shown = [self._known(name) for name in names] if names else self.names
        table = Table(box=box.SIMPLE_HEAD, title=Text(str(self)), title_justify="left")
        table.add_column("config")
        for name in shown:
            table.add_column(Text(name), justify="right")
        for point in self.points:
            cells = [
                _cell(point.values.get(name), unit_of(name), self.errors.get(name))
                for name in shown
            ]
            table.add_row(point.config.digest, *cells)
        return table

    def __rich__(self) -> Table:
        return self.rich_table()

    def __str__(self) -> str:
        sought = ", ".join(
            f"{o.name} {'up' if o.maximize else 'down'}" for o in self.objectives
        )
        early = f" ({len(self.stopped)} more were stopped early)" if self.stopped else ""
        evaluated = f"{len(self.evaluated)} configs{early}"
        return f"{len(self.points)} of {evaluated} on the front of {sought}"

    @property
    def names(self) -> list[str]:
        """The names of all values: objectives first, then the others by name."""
        first = [objective.name for objective in self.objectives]
        others = {name for point in self.evaluated for name in point.values} - set(first)
        return first + sorted(others)

    def plot(
        self,
        path: str | os.PathLike[str],
        *,
        x: str | None = None,
        y: str | None = None,
        mark: Mapping[str, Mapping[str, int]] | None = None,
    ) -> None:
        """Draws the evaluated configs and the front to a file.

        Args:
            path: The file; its suffix gives the format (`.png`, `.svg`, `.pdf`).
            x: The value to the right; by default the first objective that goes down, other
                than `y`.
            y: The value upwards; by default the first objective.
            mark: Label to config: these are drawn larger, with their labels. A config that
                was not evaluated is refused.

        Raises:
            SettingError: A name, a marked config or the format is wrong.
            CheckpointError: The file can't be written.
        """
        from supple.study.plot import draw

        up = self._known(y) if y else self.objectives[0].name
        others = [o.name for o in self.objectives if o.name != up]
        right = self._known(x) if x else (others or [up])[0]
        draw(self, path, x=right, y=up, mark=mark or {})

    def to_json(self) -> str:
        """Returns the front as JSON text."""
        objectives = [{"name": o.name, "maximize": o.maximize} for o in self.objectives]
        return json.dumps(
            {
                "objectives": objectives,
                "evaluated": _described(self.evaluated),
                "study": self.study,
                "errors": dict(self.errors),
                **({"stopped": _described(self.stopped)} if self.stopped else {}),
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Front:
        """Reads a front from the text that `to_json` gives.

        Raises:
            SettingError: `text` does not describe a front.
        """
        try:
            read = json.loads(text)
            return cls(
                tuple(Objective(o["name"], o["maximize"]) for o in read["objectives"]),
                _points(read["evaluated"]),
                read["study"],
                {name: float(error) for name, error in read.get("errors", {}).items()},
                _points(read.get("stopped", ())),
            )
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise SettingError(
                f"this JSON text does not describe a front: {error!r}"
            ) from error

    # ------------------------------------------------------------------------- internals

    def _known(self, name: str) -> str:
        if name not in self.names:
            raise SettingError(
                f"no value is called {name!r}{nearest(name, self.names)} "
                f"(there are: {', '.join(self.names)})"
            )
        return name

    def _target(self, maximize: str | None, minimize: str | None) -> Objective:
        if maximize is not None and minimize is not None:
            raise SettingError("give maximize= or minimize=, not both")
        if maximize is not None or minimize is not None:
            name = self._known(str(maximize if minimize is None else minimize))
            return Objective(name, maximize=minimize is None)
        rising = [objective for objective in self.objectives if objective.maximize]
        return (rising or list(self.objectives))[0]

    def _with(self, *names: str) -> list[Point]:
        return [p for p in self.evaluated if all(name in p.values for name in names)]

    def _nobody_meets(self, bounds: Mapping[str, Bound]) -> str:
        asked = " and ".join(
            f"{name} {b.comparison} {show(b.limit, unit_of(name))}"
            for name, b in bounds.items()
        )
        candidates = self._with(*bounds)
        if not candidates:
            return "no config was evaluated, so there is none to choose from"
        closest = min(candidates, key=lambda point: _excess(point, bounds))
        has = ", ".join(f"{n} = {show(closest.values[n], unit_of(n), 4)}" for n in bounds)
        return (
            f"none of {len(candidates)} evaluated configs meets {asked}; the nearest has {has} "
            f"(relax the budget, search longer, or offer smaller choices)"
        )


def _described(points: Sequence[Point]) -> list[dict[str, Any]]:
    return [{"config": dict(p.config), "values": dict(p.values)} for p in points]


def _points(described: Sequence[Mapping[str, Any]]) -> tuple[Point, ...]:
    return tuple(Point(Config(p["config"]), dict(p["values"])) for p in described)


def _meets(point: Point, bounds: Mapping[str, Bound]) -> bool:
    return all(b.holds(point.values[name]) for name, b in bounds.items())


def _excess(point: Point, bounds: Mapping[str, Bound]) -> float:
    return sum(b.excess(point.values[name]) for name, b in bounds.items())


def _cell(value: Any, unit: str, error: float | None) -> str:
    if value is None:
        return ""
    text = show(float(value), unit, 4)
    return text if error is None else f"{text} ±{show(100 * error, digits=2)} %"
