"""The search stage: evaluates sizes, each one a trial of the run's study."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

import supple
from supple.files import checksum, write_text
from supple.recipe.bench import Bench
from supple.recipe.cost_models import cost_models
from supple.recipe.latency import costs_of, latency_inputs
from supple.recipe.stage import Outcome, Record, RunFolder
from supple.study.front import Front
from supple.technique import from_settings

__all__ = ["front_of", "search_extent", "search_front", "search_inputs", "study_of"]

FRONT, LOCAL = "front.json", "study.db"
# How far a search goes is its extent, a latency model is known by what it holds, and who
# evaluates changes nothing.
_ELSEWHERE = {"evaluations", "latency", "workers"}


def search_inputs(bench: Bench, train: Record) -> dict[str, Any]:
    """What the search is computed from; how long it goes on is its extent."""
    search = bench.recipe.search
    return {
        "train": train.digest,
        "search": search.model_dump(mode="json", exclude=_ELSEWHERE),
        **latency_inputs(bench.recipe),
    }


def search_extent(bench: Bench) -> dict[str, Any]:
    """How far the search goes on."""
    return {"evaluations": bench.recipe.search.evaluations}


def search_front(
    bench: Bench,
    run: RunFolder,
    train: Record,
    *,
    study: str | None = None,
    progress: bool = True,
) -> tuple[Front, Record]:
    """Searches the space, or takes the front of an earlier run; more evaluations go on.

    Args:
        bench: The run's parts, trained.
        run: The run's folder.
        train: The stage before.
        study: URL of a database that workers on several machines share; None keeps the study
            in the run's folder.
        progress: Whether to show a bar.

    Returns:
        The front, and the stage's record: `evaluations`, `front` (their numbers), `study`, and
        `models`, by cost how far off it is when it is computed instead of measured.
    """
    search, inputs = bench.recipe.search, search_inputs(bench, train)
    # A database serves many runs: what was trained or sought otherwise is another study there.
    name = bench.recipe.name
    name = name if study is None else f"{name}-{checksum(inputs)[:8]}"

    # Nothing else of the bench: a copy of what is used here goes to every worker.
    task, validation = bench.task, bench.splits.validation

    def evaluate(module: nn.Module) -> dict[str, float]:
        return task.evaluate(module, validation.batches())

    def work(folder: Path) -> Outcome:
        front = supple.pareto(
            bench.net,
            evaluate,
            costs_of(bench),
            algorithm=from_settings(search.technique.key, search.technique.settings),
            evaluations=search.evaluations,
            study=folder / LOCAL if study is None else study,
            objectives=[bench.target],
            data=bench.calibration,
            seed=bench.recipe.seed,
            progress=progress,
            name=name,
            workers=search.workers,
        )
        write_text(folder / FRONT, front.to_json())
        numbers = {"evaluations": len(front.evaluated), "front": len(front.points)}
        place = LOCAL if study is None else front.study
        # Other machines may have measured what a database holds: one model can't fit all.
        models = cost_models(bench, front, folder) if study is None else {}
        files = [folder / str(model["file"]) for model in models.values() if "file" in model]
        result = {**numbers, "study": place, "models": models}
        return Outcome(result, (folder / FRONT, *files))

    record = run.perform("search", inputs, work, extent=search_extent(bench))
    return front_of(record), record


def front_of(record: Record) -> Front:
    """Reads the front that a search stage wrote."""
    return Front.from_json((record.folder / FRONT).read_text(encoding="utf-8"))


def study_of(record: Record) -> str:
    """Says where the study of a search stage is."""
    place = str(record.result["study"])
    return str(record.folder / LOCAL) if place == LOCAL else place
