"""The search stage: evaluates sizes, each one a trial of the run's study."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

import supple
from supple.files import write_text
from supple.recipe.bench import Bench
from supple.recipe.stage import Outcome, Record, RunFolder
from supple.study.front import Front
from supple.technique import from_settings

__all__ = ["front_of", "search_front", "search_inputs"]

FRONT = "front.json"


def search_inputs(bench: Bench, train: Record) -> dict[str, Any]:
    """What the search is computed from; how long it goes on is its extent."""
    search = bench.recipe.search
    return {
        "train": train.digest,
        "search": search.model_dump(mode="json", exclude={"evaluations"}),
    }


def search_front(
    bench: Bench, run: RunFolder, train: Record, *, progress: bool = True
) -> tuple[Front, Record]:
    """Searches the space, or takes the front of an earlier run; more evaluations go on.

    Args:
        bench: The run's parts, trained.
        run: The run's folder.
        train: The stage before.
        progress: Whether to show a bar.

    Returns:
        The front, and the stage's record: `evaluations`, `front` (their numbers), `study`.
    """
    search = bench.recipe.search

    def evaluate(module: nn.Module) -> dict[str, float]:
        return bench.task.evaluate(module, bench.splits.validation.batches())

    def work(folder: Path) -> Outcome:
        front = supple.pareto(
            bench.net,
            evaluate,
            list(search.costs),
            algorithm=from_settings(search.technique.key, search.technique.settings),
            evaluations=search.evaluations,
            study=folder / "study.db",
            objectives=[bench.target],
            data=bench.calibration,
            seed=bench.recipe.seed,
            progress=progress,
            name=bench.recipe.name,
        )
        write_text(folder / FRONT, front.to_json())
        numbers = {"evaluations": len(front.evaluated), "front": len(front.points)}
        return Outcome({**numbers, "study": "study.db"}, (folder / FRONT,))

    extent = {"evaluations": search.evaluations}
    record = run.perform("search", search_inputs(bench, train), work, extent=extent)
    return front_of(record), record


def front_of(record: Record) -> Front:
    """Reads the front that a search stage wrote."""
    return Front.from_json((record.folder / FRONT).read_text(encoding="utf-8"))
