"""`supple.pareto`: the evaluation loop."""

from __future__ import annotations

import functools
import math
import os
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray
from torch import nn

from supple.errors import SettingError, nearest
from supple.quantity import Bound, bound, unit_of
from supple.space import Config, Randomness
from supple.study.evaluate import (
    CostNames,
    Costs,
    Evaluator,
    Network,
    RowFunction,
    fingerprint,
)
from supple.study.front import Front, Point
from supple.study.objectives import Objective, minimised, objectives_of
from supple.study.progress import SearchProgress
from supple.study.store import Claim, Evaluation, StudyStore
from supple.technique import Search, technique

__all__ = ["pareto"]

POLL_SECONDS = 0.5
"""How often a worker with nothing to do looks whether the others are done."""

_DEFAULT = "search/nsga2"


class AskTell(Protocol):
    """What the loop needs of a search in progress.

    Its proposals must follow from its seed and from what it was told: it is rebuilt by telling
    it the study's results again.
    """

    def ask(self, n: int = 1) -> list[Config]:
        """Proposes configs that were neither told nor asked before."""

    def tell(self, configs: list[Config], values: Any, violations: Any = None) -> None:
        """Takes the values of configs, less is better."""


def pareto(
    net: Network,
    evaluate: Callable[[nn.Module], Any],
    costs: CostNames,
    *,
    algorithm: Search | None = None,
    evaluations: int = 100,
    study: str | os.PathLike[str] | None = None,
    name: str = "pareto",
    maximize: str | Sequence[str] | None = None,
    objectives: Sequence[str] | None = None,
    where: Mapping[str, str] | None = None,
    data: Any = None,
    seed: Randomness = 0,
    progress: bool = True,
) -> Front:
    """Searches the sizes of a network for the Pareto front of quality and costs.

    The largest and the smallest size are evaluated first, then what the algorithm proposes.
    Every evaluation is a trial of an optuna study, kept by its canonical config: no config is
    evaluated twice, a search that was killed goes on where it stopped when called again with
    the same study, and several processes that are given the same study share the work.

    Args:
        net: An elastic network.
        evaluate: `evaluate(module) -> dict | float`, called with the network's own module at
            one size, in eval mode, without gradients, after its running statistics were
            measured anew. Each number it gives is a metric; a single one is called after the
            function (`score` if that says nothing).
        costs: Names of costs that `net.costs` gives (`"params"`, `"macs"`, `"weight_bytes"`,
            `"activation_bytes"`) and of such that are measured on the extracted network
            (`"latency[batch=1]"` in seconds, `"memory"` in bytes), among them latency models
            (`supple.cost.latency.fit`), whose error the front shows; or name to
            `function(configs) -> array`. Costs always go down.
        algorithm: What proposes configs; `NSGA2()` by default.
        evaluations: How many evaluations the study is to hold in the end, at least 1, those
            of earlier calls and of other workers included.
        study: A path that ends in `.db`, `.sqlite` or `.sqlite3`, a database URL, or
            `":memory:"`. None makes a new file in the folder `runs`, which `Front.study`
            names.
        name: The study's name; a file may hold several.
        maximize: The metrics that go up; the others go down. By default all go up whose names
            don't say otherwise (loss, error, perplexity and the like go down).
        objectives: The metrics that are objectives; the others are only recorded. All by
            default.
        where: Bounds such as `{"params": "<= 1 M"}` that steer the search: a config that
            breaks them is worse than any that doesn't. They limit nothing that is returned.
        data: Batches to measure running statistics with; needed with batch normalization.
        seed: Of the search: an integer, or a generator.
        progress: Shows hypervolume, evaluations a minute and the time left.

    Returns:
        Everything that was evaluated, with its Pareto front.

    Raises:
        SettingError: An argument is wrong, or the study was made for another space, other
            weights or other objectives.
        CheckpointError: The study can't be read or written, or its server was away for longer
            than a minute; the message names it.
        MissingExtraError: The study lies in a database whose driver is not installed.

    Example:
        ```python
        front = supple.pareto(
            net, evaluate=accuracy, costs=["latency[batch=1]", "params"], study="runs/a.db"
        )
        config = front.best(where={"latency[batch=1]": "<= 2 ms"}, maximize="accuracy")
        ```
    """
    if evaluations < 1:
        raise SettingError(f"evaluations must be at least 1, got {evaluations}")
    _check_algorithm(algorithm)
    priced = Costs(net, costs)
    evaluator = Evaluator(net, evaluate, priced, data)
    sought = functools.partial(_sought, priced.names, maximize, objectives)
    place = _new_file(name) if study is None else study
    weights = fingerprint(net.module)
    with StudyStore(place, name=name, space=net.space, weights=weights) as store:
        _begin(store, net, evaluator, sought, evaluations)
        for known in store.results()[:1]:
            priced.check_predicted(known.config, known.values)
        bounds = {name: bound(text, unit_of(name)) for name, text in (where or {}).items()}
        search = _started(algorithm, net, store, seed, priced.exact(), bounds)
        loop = _Loop(store, search, evaluator, sought, evaluations, bounds)
        loop.offer([net.space.largest(), net.space.smallest()])
        with SearchProgress(evaluations, store.objectives, name, shown=progress) as shown:
            loop.run(shown)
        return _front(store, priced.errors)


def _check_algorithm(algorithm: object) -> None:
    if algorithm is None or isinstance(algorithm, Search):
        return
    raise SettingError(
        f"algorithm must be a search such as NSGA2(), got {type(algorithm).__name__}; what "
        "can't be rebuilt from its results (Optuna's TPE and GP samplers, say) is not offered, "
        "because a search that was killed could not go on exactly"
    )


def _sought(
    costs: Sequence[str],
    maximize: str | Sequence[str] | None,
    only: Sequence[str] | None,
    evaluation: Evaluation,
) -> tuple[Objective, ...]:
    """What is sought, as the metrics of an evaluation tell."""
    return objectives_of(evaluation.metrics, costs, maximize=maximize, only=only)


def _started(
    algorithm: Search | None,
    net: Network,
    store: StudyStore,
    seed: Randomness,
    exact: Mapping[str, RowFunction],
    bounds: Mapping[str, Bound],
) -> AskTell:
    """Starts the search, which is told what costs and bounds need no evaluation."""
    names = [objective.name for objective in store.objectives]
    algorithm = algorithm or technique(_DEFAULT)()
    known = {name: function for name, function in exact.items() if name in names}
    priced = set(bounds) <= set(exact)
    violation = functools.partial(_violations, exact, bounds) if priced else None
    started = algorithm.start(net.space, names, seed, exact=known, violation=violation)
    return cast(AskTell, started)


def _violations(
    exact: Mapping[str, RowFunction], bounds: Mapping[str, Bound], rows: NDArray[Any]
) -> NDArray[np.float64]:
    """How far encoded configs are beyond bounds of costs that need no evaluation."""
    total = np.zeros(len(rows))
    for name, limit in bounds.items():
        total += [limit.excess(float(value)) for value in np.asarray(exact[name](rows))]
    return total


def _new_file(name: str) -> Path:
    stamp = time.strftime("%Y%m%d-%H%M%S")
    return Path("runs") / f"{name}-{stamp}-{uuid.uuid4().hex[:4]}.db"


def _begin(
    store: StudyStore,
    net: Network,
    evaluator: Evaluator,
    sought: Callable[[Evaluation], tuple[Objective, ...]],
    limit: int,
) -> None:
    """Creates the study or joins it. What its objectives are, the first evaluation tells."""
    if not store.exists:
        with store.alone() as needed:
            if needed:
                first = evaluator(net.space.largest())
                store.create(sought(first))
                trial = store.claim(first.config, limit)
                if isinstance(trial, int):
                    store.finish(trial, first)
    known = store.results()
    if known:
        store.check(sought(known[0]))


class _Loop:
    """One worker: claims a config, evaluates it, stores it, tells the search."""

    def __init__(
        self,
        store: StudyStore,
        search: AskTell,
        evaluator: Evaluator,
        sought: Callable[[Evaluation], tuple[Objective, ...]],
        limit: int,
        bounds: Mapping[str, Bound],
    ) -> None:
        self._store = store
        self._search = search
        self._evaluator = evaluator
        self._sought = sought
        self._limit = limit
        self._bounds = bounds
        self._told: set[Config] = set()
        self._first: deque[Config] = deque()

    def offer(self, configs: Sequence[Config]) -> None:
        """Puts configs before those that the search proposes."""
        self._first.extend(configs)

    def run(self, shown: SearchProgress) -> None:
        """Works until the study holds as many evaluations as wanted, or the whole space."""
        self._first.extendleft(self._store.fail_interrupted())
        while self._sync(shown) < self._limit:
            config = self._next()
            if config is None:
                if not self._store.busy():
                    return
                self._wait()
                continue
            trial = self._store.claim(config, self._limit)
            if isinstance(trial, int):
                self._evaluate(config, trial)
            elif trial is Claim.FULL:
                # Should another worker die, its evaluation is this one's to repeat.
                self._first.appendleft(config)
                self._wait()

    def _wait(self) -> None:
        time.sleep(POLL_SECONDS)
        self._first.extendleft(self._store.fail_interrupted())

    def _sync(self, shown: SearchProgress) -> int:
        """Tells the search what is new, from all workers; returns how much there is."""
        results = self._store.results()
        new = [result for result in results if result.config not in self._told]
        if new:
            values = minimised(self._store.objectives, (result.values for result in new))
            configs = [result.config for result in new]
            if self._bounds:
                beyond = np.array([self._violation(result) for result in new])
                self._search.tell(configs, values, violations=beyond)
            else:
                self._search.tell(configs, values)
            self._told.update(result.config for result in new)
        shown.show(results)
        return len(results)

    def _violation(self, result: Evaluation) -> float:
        return sum(_excess(result, name, limit) for name, limit in self._bounds.items())

    def _next(self) -> Config | None:
        while self._first:
            config = self._first.popleft()
            if config not in self._told:
                return config
        asked = self._search.ask(1)
        return asked[0] if asked else None

    def _evaluate(self, config: Config, trial: int) -> None:
        try:
            with self._store.working_on(trial):
                evaluation = self._evaluator(config)
            self._store.check(self._sought(evaluation))
        except BaseException as error:
            self._store.fail(trial, repr(error))
            raise
        if not self._store.finish(trial, evaluation):
            # Another machine took this worker for dead; the result still counts, once.
            again = self._store.claim(config, self._limit)
            if isinstance(again, int):
                self._store.finish(again, evaluation)


def _excess(result: Evaluation, name: str, limit: Bound) -> float:
    if name not in result.values:
        raise SettingError(
            f"where= names {name!r}, which is not evaluated{nearest(name, result.values)} "
            f"(there are: {', '.join(result.values)})"
        )
    return limit.excess(result.values[name])


def _front(store: StudyStore, errors: Mapping[str, float]) -> Front:
    points = [
        Point(result.config, result.values)
        for result in store.results()
        if all(math.isfinite(result.values[o.name]) for o in store.objectives)
    ]
    return Front(store.objectives, tuple(points), store.shown, errors)
