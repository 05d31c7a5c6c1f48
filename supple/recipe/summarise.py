"""Gathers the records of a run into what the report tells."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import torch
import transformers

import supple
from supple.recipe.bench import Bench
from supple.recipe.dump import recipe_text
from supple.recipe.front import study_of
from supple.recipe.schema import Recipe
from supple.recipe.stage import Record, RunFolder
from supple.recipe.supernet import history_of
from supple.report.summary import Network, Outcome, Point, Summary
from supple.study.front import Front
from supple.study.objectives import goes_down
from supple.training.history import History

__all__ = ["summarise"]

_POINTS = 400


def summarise(
    bench: Bench,
    run: RunFolder,
    front: Front,
    deployed: Mapping[str, Record],
    compared: Mapping[str, Record],
) -> Summary:
    """Gathers what a run found.

    Args:
        bench: The run's parts.
        run: The run's folder, with the records of all stages.
        front: What the search found.
        deployed: Deploy records by size, the full one first.
        compared: Compare records by size; may be empty.

    Returns:
        The summary.
    """
    space, train = bench.net.space, run.records["train"]
    history = history_of(train)
    on_front = {point.config for point in front.points}
    return Summary(
        name=bench.recipe.name,
        metric=bench.metric,
        maximize=not goes_down(bench.metric),
        tests=bench.splits.test.examples,
        space_size=space.size(),
        sites=tuple((s.name, s.axis, " ".join(map(str, s.choices))) for s in space.sites),
        fixed=tuple((fixed.name, fixed.reason) for fixed in space.fixed),
        losses=_losses(history),
        validation=_validation(history),
        watched=tuple(history.watched),
        points=tuple(
            Point(values=dict(point.values), on_front=point.config in on_front)
            for point in front.evaluated
        ),
        costs=tuple(bench.recipe.search.costs),
        networks=tuple(
            _network(name, record, train, compared.get(name))
            for name, record in deployed.items()
        ),
        stages=tuple((r.name, r.seconds, r.reused) for r in _listed(run)),
        device=next(iter(deployed.values())).result["device"],
        facts=_facts(bench.recipe, run),
        recipe=recipe_text(bench.recipe),
    )


def _losses(history: History) -> dict[str, tuple[tuple[float, float], ...]]:
    """Losses by role, thinned out: a picture shows no more."""
    curves = {}
    for role in history.roles:
        rows = list(zip(*history.losses(role), strict=True))
        every = max(1, len(rows) // _POINTS)
        curves[role] = tuple((float(step), float(loss)) for step, loss in rows[::every])
    return curves


def _validation(history: History) -> dict[str, tuple[tuple[float, float], ...]]:
    names = dict.fromkeys(name for row in history.validation for name in row["metrics"])
    return {
        name: tuple((float(row["step"]), row["metrics"][name]) for row in history.validation)
        for name in names
    }


def _network(name: str, record: Record, train: Record, compared: Record | None) -> Network:
    found = record.result
    cost = {"passes": train.result["passes"], "seconds": train.result["train_seconds"]}
    ways = ["compressed", "elastic"] if "compressed" in found else ["elastic"]
    outcomes = [Outcome(way=way, metrics=found[way], **cost) for way in ways]
    if compared is not None:
        outcomes += _baselines(compared.result)
    return Network(
        name=name,
        config=found["config"],
        costs=found["costs"],
        latency=found["latency"],
        latency_spread=found["spread"],
        predicted=found.get("predicted"),
        memory=found["memory"],
        file_bytes=found["file_bytes"],
        where=found["where"],
        outcomes=tuple(outcomes),
        files=tuple(found["files"]),
    )


def _baselines(found: Mapping[str, Any]) -> list[Outcome]:
    alone = found["alone"]
    outcomes = [
        Outcome(
            way="alone",
            metrics=alone["metrics"],
            passes=alone["passes"],
            seconds=alone["seconds"],
            note=f"lr {alone['lr']:.3g}",
        )
    ]
    if "cut" in found:
        outcomes.append(Outcome(way="cut", **found["cut"]))
    return outcomes


def _listed(run: RunFolder) -> list[Record]:
    """The records in the order in which they were made, runs of one kind added up."""
    kinds: dict[str, list[Record]] = {}
    for record in run.records.values():
        kinds.setdefault(record.name.split("/")[0], []).append(record)
    return [
        Record(
            f"{kind} ({len(some)})" if len(some) > 1 else kind,
            "",
            {},
            sum(record.seconds for record in some),
            all(record.reused for record in some),
            run.path,
        )
        for kind, some in kinds.items()
    ]


def _facts(recipe: Recipe, run: RunFolder) -> dict[str, str]:
    return {
        "written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "seed": str(recipe.seed),
        "threads": str(torch.get_num_threads()),
        "machine": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "supple": supple.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "study": study_of(run.records["search"]),
    }
