"""How fast an inner search is, and two workers beside one: parts of `benchmarks.search`.

`python -m benchmarks._search_speed STUDY` is one worker: it searches the sizes of a small
network, with evaluations that keep a core busy for `BUSY` seconds each, until the study holds
`EVALUATIONS`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import Ridge as RidgeRegressor
from sklearn.svm import SVR

from benchmarks import _analytic, _ofa_mbv3
from supple.axes.width import Width
from supple.models.base import build
from supple.network import elastic
from supple.predictors import GaussianProcess, Predictor, Ridge, SupportVectors
from supple.search._predicted import evolved, prices
from supple.search.base import Problem, Told
from supple.search.nsga2 import NSGA2
from supple.study.pareto import pareto
from supple.training.seeds import kept

__all__ = ["inner", "workers"]

KNOWN, CANDIDATES, ONE_BY_ONE = 300, 100_000, 2_000
BUSY, EVALUATIONS = 0.5, 60
REPEATS = 3


def inner(
    names: Collection[str] = ("ridge", "svr", "gaussian-process"),
) -> dict[str, dict[str, float]]:
    """Times searches of 100,000 candidates on predictors that know 300 configs.

    `one by one` is how DyNAS-T calls scikit-learn, written anew: each candidate is encoded by
    itself and predicted by a call of its own, for both objectives; the rest of its search is
    left out. It is timed on 2,000 candidates.

    Args:
        names: The predictors.

    Returns:
        Seconds for 100,000 candidates by predictor: of the whole search, with exact costs and
        with both objectives predicted, and one by one.
    """
    space = _ofa_mbv3.space()
    rows = space.random_many(KNOWN, 0)
    values = np.stack([100 - _analytic.accuracy(rows), _ofa_mbv3.macs(rows)], axis=1)
    told = Told(rows, values, np.zeros(KNOWN))
    features = space.one_hot(rows)
    exact = Problem(space, ("error", "macs"), {"macs": _ofa_mbv3.macs})
    blind = Problem(space, ("error", "macs"))
    ours: dict[str, tuple[Predictor, Callable[[], Any] | None]] = {
        "ridge": (Ridge(), lambda: RidgeRegressor(alpha=1.0)),
        "svr": (SupportVectors(), lambda: SVR(C=10.0, epsilon=0.0, gamma="auto")),
        "gaussian-process": (GaussianProcess(), None),
    }
    found = {}
    for name in names:
        method, theirs = ours[name]
        row = {
            "exact": _fastest(lambda m=method: _search(exact, told, m)),  # type: ignore[misc]
            "predicted": _fastest(lambda m=method: _search(blind, told, m)),  # type: ignore[misc]
        }
        if theirs is not None:
            models = [theirs().fit(features, values[:, i] / values[:, i].max()) for i in (0, 1)]
            sample = space.random_many(ONE_BY_ONE, 1)
            share = CANDIDATES / ONE_BY_ONE
            row["one_by_one"] = share * _fastest(lambda: _one_by_one(models, sample))  # noqa: B023
        found[name] = {key: round(value, 3) for key, value in row.items()}
    return found


def _search(problem: Problem, told: Told, method: Predictor) -> None:
    price = prices(problem, told, method)
    evolution = NSGA2(population=500)
    evolved(problem.space, price, evolution, CANDIDATES, np.random.default_rng(0), told.rows)


def _one_by_one(models: list[Any], rows: NDArray[np.int64]) -> None:
    space = _ofa_mbv3.space()
    for row in rows:
        features = space.one_hot(row[None])
        for model in models:
            model.predict(features)


def _fastest(work: Callable[[], None]) -> float:
    times = []
    for _ in range(REPEATS):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


# --- workers ----------------------------------------------------------------------------------


def workers() -> dict[str, float]:
    """Counts the evaluations a second of one process and of two that share a study.

    Returns:
        Evaluations a second between the first evaluations and the last,
        by one worker and by two, and their ratio.
    """
    rates = {str(count): _rate(count) for count in (1, 2)}
    return rates | {"ratio": rates["2"] / rates["1"], "busy_seconds": BUSY}


def _rate(count: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        study = Path(folder) / "study.db"
        command = [sys.executable, "-m", "benchmarks._search_speed", str(study)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        running = [
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
            for _ in range(count)
        ]
        moments = sorted(
            float(line) for each in running for line in each.communicate()[0].split()
        )
    if any(each.returncode for each in running):
        raise RuntimeError("a worker failed; what it printed stands above")
    # Starting up takes each as long as it does: the first fifth is not counted.
    skipped = len(moments) // 5
    return (len(moments) - 1 - skipped) / (moments[-1] - moments[skipped])


def _work(study: str) -> None:
    """Is one worker: prints the time at which each of its evaluations ended."""
    torch.set_num_threads(1)
    with kept(0):  # all workers have the same weights, or they could not share a study
        model = build("digits-cnn", widths=(16, 32, 48), blocks=(1, 1, 1))
    net = elastic(model, torch.zeros(2, 1, 8, 8), axes=[Width((0.25, 0.5, 0.75, 1.0))])

    def score(module: torch.nn.Module) -> float:
        start = time.process_time()
        while time.process_time() - start < BUSY:
            module(torch.zeros(32, 1, 8, 8))
        print(time.time(), flush=True)
        return float(next(module.parameters()).mean())

    data = [torch.zeros(8, 1, 8, 8)]
    pareto(net, score, "macs", evaluations=EVALUATIONS, study=study, data=data, progress=False)


if __name__ == "__main__":
    _work(sys.argv[1])
