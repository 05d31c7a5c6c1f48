"""What a report tells: plain values, so that a page can be written anew from one JSON file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Network", "Outcome", "Point", "Summary", "summary_from_json", "summary_to_json"]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One way in which a network got its weights, and what came of it.

    Args:
        way: `"elastic"`, `"compressed"`, `"alone"` or `"cut"`.
        metrics: Figures on the test set by name, such as `{"accuracy": 0.97}`.
        passes: Forward-backward passes that it took; for `elastic` all sizes share them.
        seconds: Seconds of training that it took, shared likewise.
        note: What readers should know, such as the learning rate that was chosen.
    """

    way: str
    metrics: Mapping[str, float]
    passes: int
    seconds: float
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Network:
    """A size: what it costs, and how well it does by each way of getting its weights.

    Args:
        name: `"full"` or a budget's name.
        config: Choice by site.
        costs: `params`, `macs` and the rest by name; bytes and seconds in SI units.
        latency: Median seconds of a forward, measured.
        latency_spread: Spread of the measurements in seconds.
        predicted: What a latency model said before: `seconds`, and its median relative
            `error`; or None.
        memory: Peak bytes of a forward, measured, or None.
        file_bytes: Size of the weights' file.
        where: The budget, by cost.
        outcomes: Ways, the deployed one first.
        files: Files that belong to it, relative to the run's folder.
    """

    name: str
    config: Mapping[str, int]
    costs: Mapping[str, float]
    latency: float
    latency_spread: float
    file_bytes: int
    memory: float | None = None
    predicted: Mapping[str, float] | None = None
    where: Mapping[str, str] = field(default_factory=dict)
    outcomes: tuple[Outcome, ...] = ()
    files: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Point:
    """One evaluated network of the search.

    Args:
        values: Metric and costs by name.
        on_front: Whether no other one is better in every objective.
    """

    values: Mapping[str, float]
    on_front: bool


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A whole run.

    Args:
        name: Name of the run.
        metric: The figure that the networks are compared by.
        maximize: Whether more of it is better.
        tests: Number of test examples behind each figure.
        space_size: Number of sizes, exact.
        sites: Rows `(name, axis, choices as text)`.
        fixed: Rows `(name, reason)`.
        losses: Training loss by role, as lists of `(step, loss)`.
        validation: The metric on validation by size, as lists of `(step, value)`.
        watched: What the sizes of some training steps were like (`supple.training.watch`).
        points: Evaluated networks.
        costs: Names of the searched costs; the first is the plot's axis.
        networks: The full network and the deployed ones.
        stages: Rows `(stage, seconds, whether taken from an earlier run)`.
        device: What was measured on, in words.
        facts: Provenance by name: versions, seed, threads, and so on.
        recipe: The recipe as YAML text.
    """

    name: str
    metric: str
    maximize: bool
    tests: int
    space_size: int
    sites: tuple[tuple[str, str, str], ...]
    fixed: tuple[tuple[str, str], ...]
    losses: Mapping[str, tuple[tuple[float, float], ...]]
    validation: Mapping[str, tuple[tuple[float, float], ...]]
    watched: tuple[Mapping[str, Any], ...]
    points: tuple[Point, ...]
    costs: tuple[str, ...]
    networks: tuple[Network, ...]
    stages: tuple[tuple[str, float, bool], ...]
    device: str
    facts: Mapping[str, str]
    recipe: str


def summary_to_json(summary: Summary) -> dict[str, Any]:
    """Gives a summary as a JSON-able mapping."""
    return dataclasses.asdict(summary)


def summary_from_json(data: Mapping[str, Any]) -> Summary:
    """Reads what `summary_to_json` gave, also after a round trip through JSON."""
    networks = tuple(
        Network(**{**item, "outcomes": tuple(Outcome(**one) for one in item["outcomes"]),
                   "files": tuple(item["files"])})
        for item in data["networks"]
    )  # fmt: skip
    curves = {
        kind: {name: tuple((x, y) for x, y in rows) for name, rows in data[kind].items()}
        for kind in ("losses", "validation")
    }
    plain: dict[str, Any] = {
        "sites": tuple((a, b, c) for a, b, c in data["sites"]),
        "fixed": tuple((a, b) for a, b in data["fixed"]),
        "watched": tuple(data["watched"]),
        "points": tuple(Point(**item) for item in data["points"]),
        "costs": tuple(data["costs"]),
        "stages": tuple((a, b, c) for a, b, c in data["stages"]),
    }
    return Summary(**{**data, **curves, **plain, "networks": networks})
