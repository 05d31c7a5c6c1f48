"""Searches side by side: what each finds with how many evaluations.

Problems, each a space and values that cost nothing, so that only the searches take time:

- `ofa-kernel`, `ofa-trees`: two surrogates of recorded ImageNet evaluations of once-for-all's
  sizes (`benchmarks._ofa_mbv3`); accuracy up, exact multiply-accumulates down;
- `analytic`: the same space with an accuracy that is a formula (`benchmarks._analytic`);
- `nats`: NATS-Bench's 15,625 trained cells, accuracy on CIFAR-10 alone (`benchmarks._nats`).

A cell is one search with one seed on one problem. With two objectives it holds the hypervolume
(up to 70 % and 600 M) after so many evaluations; 100 % is that of the best front over all runs
and over a search of a million candidates that knows the true values. With one objective it
holds the regret. A config that was tried before is never counted again.

`python -m benchmarks.search` measures the cells that are missing or of other code, seed by
seed, and writes `benchmarks/results/search.json` after each; then it writes the pictures. Words
choose problems and algorithms, or parts (`predictors`, `inner`, `workers`, `recorded`,
`pictures`): `python -m benchmarks.search analytic linas`.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.stats import kendalltau

from benchmarks import _analytic, _nats, _ofa_mbv3
from benchmarks import _search_speed as speed
from benchmarks._rivals import DynasNSGA2
from supple.cost.measure import device_name
from supple.files import read_json, write_json
from supple.predictors import PREDICTORS
from supple.search._predicted import evolved
from supple.search.base import SearchAlgorithm, Told
from supple.search.front_search import FrontSearch
from supple.search.hardware_aware_search import HardwareAwareSearch
from supple.search.local_search import LocalSearch
from supple.search.nsga2 import NSGA2
from supple.search.random_search import RandomSearch
from supple.search.regularized_evolution import RegularizedEvolution
from supple.search.tpe import TPE
from supple.search.weaknas import WeakNAS
from supple.space import Space
from supple.study.indicators import non_dominated

HERE = Path(__file__).parent
RESULT = HERE / "results" / "search.json"
IMAGES = HERE.parent / "docs" / "images"
SEEDS = tuple(range(10))
LEVELS = (0.90, 0.95, 0.98, 0.99)
MARKS = (*range(10, 500, 10), *range(500, 5001, 50))
"""Numbers of evaluations at which a cell is looked at."""
CANDIDATES = 1_000_000
LEARNED, HELD = (20, 50, 100, 200, 500, 1000), 3000
"""How many cells of NATS-Bench a predictor learns from, and how many judge it."""
TOP = 16
"""The best 0.1 % of NATS-Bench's cells."""

Floats = NDArray[np.float64]
Accuracy = Callable[[NDArray[Any]], Floats]


# --- problems ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """What is searched.

    Args:
        space: The configs.
        objectives: Their names; all go down.
        values: What gives the objectives of encoded configs.
        exact: Objectives that a search may compute by itself.
        digest: Changes with the values.
    """

    space: Space
    objectives: tuple[str, ...]
    values: Callable[[NDArray[Any]], Floats]
    exact: Mapping[str, Callable[[NDArray[Any]], Floats]]
    digest: str


@cache
def problem(name: str) -> Problem:
    """Gives the problem of this name."""
    if name == "nats":
        values = _nats.regrets
        table = _nats.accuracies().tobytes()
        digest = hashlib.sha256(table).hexdigest()[:12]
        return Problem(_nats.space(), ("regret",), lambda r: values(r)[:, None], {}, digest)
    if name.startswith("ofa-"):
        family = name.removeprefix("ofa-")
        return _two(_ofa_mbv3.surrogate(family), _ofa_mbv3.digest(family))
    seed = _analytic.VARIANT if name == "variant" else _analytic.SEED
    return _two(lambda rows: _analytic.accuracy(rows, seed), _analytic.digest(seed))


def _two(accuracy: Accuracy, digest: str) -> Problem:
    """Gives a problem over once-for-all's sizes."""

    def values(rows: NDArray[Any]) -> Floats:
        return np.stack([100 - accuracy(rows), _ofa_mbv3.macs(rows)], axis=1)

    exact = {"macs": _ofa_mbv3.macs}
    return Problem(_ofa_mbv3.space(), ("error", "macs"), values, exact, digest)


PROBLEMS = ("ofa-kernel", "ofa-trees", "analytic", "nats")
CORNER = (100 - _ofa_mbv3.CORNER[0], _ofa_mbv3.CORNER[1])


def volumes(values: Floats) -> Floats:
    """Gives the hypervolume after each evaluation, of two objectives, up to `CORNER`."""
    front: list[tuple[float, float]] = []
    found, volume = np.zeros(len(values)), 0.0
    for place, (error, macs) in enumerate(values.tolist()):
        inside = error < CORNER[0] and macs < CORNER[1]
        if inside and not any(e <= error and m <= macs for e, m in front):
            kept = [(e, m) for e, m in front if e < error or m < macs]
            front = sorted([*kept, (error, macs)], key=lambda pair: pair[1])
            ends = [m for _, m in front[1:]] + [CORNER[1]]
            volume = sum(
                (CORNER[0] - e) * (end - m) for (e, m), end in zip(front, ends, strict=True)
            )
        found[place] = volume
    return found


def volume(values: Floats) -> float:
    """Gives the hypervolume of many points at once, of two objectives, up to `CORNER`."""
    inside = values[(values < CORNER).all(axis=1)]
    error, macs = inside[np.argsort(inside[:, 1], kind="stable")].T
    ends = np.append(macs[1:], CORNER[1])
    return float(((CORNER[0] - np.minimum.accumulate(error)) * (ends - macs)).sum())


def reference(name: str) -> list[list[float]]:
    """Gives the front of a search of a million candidates by their true values."""
    here = problem(name)
    method = NSGA2(population=500)

    def price(rows: NDArray[np.int64]) -> Told:
        return Told(rows, here.values(rows), np.zeros(len(rows)))

    random = np.random.default_rng(0)
    nothing = np.zeros((0, len(here.space.sites)), dtype=np.int64)
    best = evolved(here.space, price, method, CANDIDATES, random, nothing).values
    return sorted(best[non_dominated(best)].tolist())


# --- algorithms -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Algorithm:
    """A search and how long it runs.

    Args:
        search: What proposes.
        evaluations: With two objectives; with one it is always 500.
        batch: How many are asked for at a time.
    """

    search: SearchAlgorithm | DynasNSGA2
    evaluations: int
    batch: int = 10


ALGORITHMS = {
    "random": Algorithm(RandomSearch(), 5000, 50),
    "nsga2-dynas": Algorithm(DynasNSGA2(), 5000, 50),
    "nsga2": Algorithm(NSGA2(population=50), 5000, 50),
    "regularized-evolution": Algorithm(RegularizedEvolution(), 2000, 1),
    "local-search": Algorithm(LocalSearch(), 1000, 1),
    "tpe": Algorithm(TPE(), 200, 10),
    "weaknas": Algorithm(WeakNAS(), 500, 10),
    "linas": Algorithm(HardwareAwareSearch(), 500, 50),
    "front-search": Algorithm(FrontSearch(), 500, 10),
}
MOST_ALONE = 500
"""Evaluations with one objective."""


def cell(name: str, algorithm: str, seed: int) -> dict[str, Any]:
    """Runs one search and says what it had found after so many evaluations."""
    here, arm = problem(name), ALGORITHMS[algorithm]
    alone = len(here.objectives) == 1
    most = MOST_ALONE if alone else arm.evaluations
    start = time.process_time()
    run = arm.search.start(here.space, here.objectives, seed, exact=here.exact)
    while len(run.told) < most:
        rows = run.ask_rows(min(arm.batch, most - len(run.told)))
        run.tell(rows, here.values(rows))
    values = run.told.values[:most]
    row: dict[str, Any] = {"seconds": round(time.process_time() - start, 1)}
    row["date"] = time.strftime("%Y-%m-%d %H:%M")
    marks = [mark for mark in MARKS if mark <= most]
    if alone:
        regret = np.minimum.accumulate(values[:, 0])
        good = np.sort(_nats.regrets(here.space.every()))[TOP - 1]
        reached = np.flatnonzero(regret <= good)
        row["first"] = int(reached[0]) + 1 if len(reached) else None
        row["regret"] = [round(float(regret[mark - 1]), 4) for mark in marks]
    else:
        found = volumes(values)
        row["volume"] = [float(f"{found[mark - 1]:.8g}") for mark in marks]
        row["front"] = values[non_dominated(values)].tolist()
    return row


def code_of(name: str, algorithm: str) -> str:
    """Says of which code a cell is: the search without its texts, settings and the problem."""
    arm = ALGORITHMS[algorithm]
    text = f"{problem(name).digest} {arm} {MARKS}"
    file = importlib.import_module(type(arm.search).__module__).__file__
    tree = ast.parse(Path(str(file)).read_text("utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value = ast.Constant("")
    return hashlib.sha256((text + ast.dump(tree)).encode()).hexdigest()[:12]


def missing(words: Sequence[str], figures: Mapping[str, Any]) -> Iterator[tuple[str, str, int]]:
    """Yields the cells that were asked for and are not there, or are of other code."""
    problems = [word for word in words if word in PROBLEMS] or PROBLEMS
    algorithms = [word for word in words if word in ALGORITHMS] or ALGORITHMS
    for seed, name, algorithm in itertools.product(SEEDS, problems, algorithms):
        old = figures["cells"].get(f"{name}/{algorithm}/{seed}", {})
        if old.get("code") != code_of(name, algorithm):
            yield name, algorithm, seed


# --- predictors -------------------------------------------------------------------------------


def correlations(name: str, seed: int) -> list[float]:
    """Gives Kendall's tau of a predictor on cells of NATS-Bench held back, by `LEARNED`."""
    random = np.random.default_rng(seed)
    rows = random.permutation(_nats.space().every())
    known, held = rows[: LEARNED[-1]], rows[-HELD:]
    truth = _nats.regrets(held)
    found = []
    for count in LEARNED:
        values = _nats.regrets(known[:count])
        fitted = PREDICTORS[name].fit(_nats.space(), known[:count], 100 - values)
        found.append(float(-kendalltau(fitted.predict(held), truth).statistic))
    return [round(tau, 4) for tau in found]


def predictors() -> None:
    """Measures the predictors that the file lacks."""
    for seed, name in itertools.product(SEEDS, PREDICTORS):
        if f"{name}/{seed}" not in read()["taus"]:
            keep("taus", f"{name}/{seed}", correlations(name, seed))
    taus = read()["taus"]
    for name in PREDICTORS:
        draws = np.array([taus[f"{name}/{seed}"] for seed in SEEDS])
        row = {str(n): quartiles(draws[:, i].tolist()) for i, n in enumerate(LEARNED)}
        keep("predictors", name, row)


# --- what is shown ----------------------------------------------------------------------------


def whole(figures: Mapping[str, Any], name: str) -> float:
    """Gives the hypervolume that counts as 100 %."""
    return volume(np.array(figures["references"][name]["front"]))


def quartiles(values: Sequence[float]) -> list[float]:
    """Gives the lower quartile, the median and the upper quartile; `inf` stands for never."""
    ordered = np.sort(np.array(values, dtype=float))
    return [float(np.quantile(ordered, q, method="inverted_cdf")) for q in (0.25, 0.5, 0.75)]


def summary(figures: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """Gives a row per algorithm: evaluations to each level, or regrets; None is never."""
    rows = []
    for algorithm in ALGORITHMS:
        cells = [
            figures["cells"][f"{name}/{algorithm}/{seed}"]
            for seed in SEEDS
            if f"{name}/{algorithm}/{seed}" in figures["cells"]
        ]
        if cells:
            found = _alone(cells) if "regret" in cells[0] else _levels(figures, name, cells)
            rows.append({"algorithm": algorithm, "seeds": len(cells)} | found)
    return rows


def _levels(
    figures: Mapping[str, Any], name: str, cells: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    full = whole(figures, name)
    shares = np.array([cell["volume"] for cell in cells]) / full
    reached: dict[str, Any] = {}
    for level in LEVELS:
        first = [
            float(MARKS[int(np.argmax(row >= level))]) if row[-1] >= level else np.inf
            for row in shares
        ]
        reached[f"{level:.2f}"] = [None if np.isinf(v) else int(v) for v in quartiles(first)]
    marks = MARKS[: shares.shape[1]]
    at = {str(m): quartiles(shares[:, i]) for i, m in enumerate(marks) if m in (100, 200, 500)}
    return {
        "evaluations": marks[-1],
        "levels": reached,
        "shares": at,
        "last": quartiles(shares[:, -1]),
        "seconds": statistics.median(cell["seconds"] for cell in cells),
    }


def _alone(cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    marks = [mark for mark in MARKS if mark <= MOST_ALONE]
    regrets = np.array([cell["regret"] for cell in cells])
    first = quartiles([cell["first"] or np.inf for cell in cells])
    return {
        "evaluations": MOST_ALONE,
        "first": [None if np.isinf(v) else int(v) for v in first],
        "regrets": {
            str(m): quartiles(regrets[:, i])
            for i, m in enumerate(marks)
            if m in (50, 100, 200, 500)
        },
        "seconds": statistics.median(cell["seconds"] for cell in cells),
    }


def trajectories() -> dict[str, dict[str, float]]:
    """Gives the recorded searches' shares of the front of all recorded rows."""
    parts = {name: _ofa_mbv3.recorded(name) for name in _ofa_mbv3.FILES}
    points = {
        name: np.stack([100 - part.accuracy, part.macs], axis=1) for name, part in parts.items()
    }
    full = volume(np.concatenate(list(points.values())))
    found = {name: volumes(values) / full for name, values in points.items()}
    return {
        name: {str(mark): float(row[mark - 1]) for mark in MARKS if mark <= len(row)}
        for name, row in found.items()
    }


def picture(figures: Mapping[str, Any], name: str) -> Figure:
    """Draws what is missing to 100 %, or the regret, by evaluations."""
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.subplots()
    alone = name == "nats"
    full = 1.0 if alone else whole(figures, name)
    for algorithm in ALGORITHMS:
        cells = [
            figures["cells"][f"{name}/{algorithm}/{seed}"]
            for seed in SEEDS
            if f"{name}/{algorithm}/{seed}" in figures["cells"]
        ]
        if cells:
            values = np.array([cell["regret" if alone else "volume"] for cell in cells])
            missing = values if alone else 100 * (1 - values / full)
            low, middle, high = np.quantile(missing, (0.25, 0.5, 0.75), axis=0)
            marks = MARKS[: missing.shape[1]]
            (line,) = axes.plot(marks, middle, lw=1.5, label=algorithm)
            axes.fill_between(marks, low, high, alpha=0.15, color=line.get_color(), lw=0)
    axes.set_xscale("log")
    if not alone:
        axes.set_yscale("log")
    axes.set_xlabel("evaluations")
    axes.set_ylabel("regret (points)" if alone else "hypervolume missing (%)")
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False, fontsize=8, ncols=2)
    return figure


def read() -> dict[str, Any]:
    """Reads the results so far."""
    parts = ("cells", "references", "surrogates", "tables", "taus", "predictors")
    figures: dict[str, Any] = {part: {} for part in (*parts, "recorded", "inner", "workers")}
    return figures | (read_json(RESULT) if RESULT.exists() else {})


def keep(part: str, name: str, row: Any) -> dict[str, Any]:
    """Adds one result to the file, which another process may have changed meanwhile.

    What a run found joins the front that counts as 100 %.
    """
    figures = read()
    figures |= {"command": "python -m benchmarks.search", "device": device_name()}
    if part == "cells" and "front" in row:
        known = figures["references"][name.partition("/")[0]]
        joined = np.concatenate([np.array(known["front"]), np.array(row.pop("front"))])
        known["front"] = sorted(joined[non_dominated(joined)].tolist())
    figures[part][name] = row
    for each in PROBLEMS:
        if each == "nats" or each in figures["references"]:
            figures["tables"][each] = summary(figures, each)
    write_json(RESULT, figures)
    return figures


PARTS = {"inner": speed.inner, "workers": speed.workers, "recorded": trajectories}
"""What is measured once, and only when it is missing or asked for."""


def prepare() -> None:
    """Measures what all cells need and the file lacks."""
    for family in _ofa_mbv3.FAMILIES:
        if read()["surrogates"].get(family, {}).get("digest") != _ofa_mbv3.digest(family):
            found = _ofa_mbv3.quality(family) | {"digest": _ofa_mbv3.digest(family)}
            keep("surrogates", family, found)
    for name in PROBLEMS:
        digest = problem(name).digest
        known = read()["references"].get(name, {})
        if name != "nats" and known.get("digest") != digest:
            keep("references", name, {"digest": digest, "front": reference(name)})
            print(f"reference {name}", flush=True)


def main(words: Sequence[str]) -> None:
    """Measures what is missing, writes and draws all."""
    for part, measure in PARTS.items():
        if part in words or not (words or read()[part]):
            for name, row in measure().items():
                keep(part, name, row)
    if "predictors" in words or not words:
        predictors()
    if words and not {*words} & {*PROBLEMS, *ALGORITHMS, "pictures"}:
        return
    prepare()
    jobs = list(missing(words, read())) if "pictures" not in words else []
    workers = len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        running = {pool.submit(cell, *job): job for job in jobs}
        for done in as_completed(running):
            name, algorithm, seed = running[done]
            row = done.result() | {"code": code_of(name, algorithm)}
            keep("cells", f"{name}/{algorithm}/{seed}", row)
            print(f"{name} {algorithm} {seed}: {row['seconds']} s", flush=True)
    IMAGES.mkdir(exist_ok=True)
    for name in read()["tables"]:
        picture(read(), name).savefig(IMAGES / f"search-{name}.png", dpi=120)


if __name__ == "__main__":
    main(sys.argv[1:])
