"""`supple.pareto`: the evaluation loop."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray
from torch import nn

from supple.errors import CheckpointError, SettingError, WorkerError, nearest
from supple.quantity import Bound, bound, unit_of
from supple.space import Config, Randomness
from supple.study.crew import Answer, Crew, crew_of, place_of
from supple.study.evaluate import (
    CostNames,
    Costs,
    Evaluator,
    Network,
    RowFunction,
    fingerprint,
)
from supple.study.front import Front, Point
from supple.study.growing import Batchwise, Race
from supple.study.objectives import Objective, minimised, objectives_of
from supple.study.progress import SearchProgress
from supple.study.store import Claim, Evaluation, Stopped, StudyStore
from supple.study.warm import Earlier, WarmStart, read_earlier
from supple.technique import Search, technique

__all__ = ["pareto"]

POLL_SECONDS = 0.5
"""How often a worker with nothing to do looks whether the others are done."""

PATIENCE = 3
"""How often a config's worker may die before the search gives up."""

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
    workers: str | None = None,
    confidence: float | None = 0.99,
    together: int = 1,
    halving: int | None = None,
    warm_start: WarmStart | None = None,
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
            function (`score` if that says nothing). It may also yield a `supple.Estimate` for
            each of several growing parts of the data, as `supple.Batchwise` does.
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
        workers: Who evaluates: None is this process; `"ray"` are workers on this machine, one
            for each core, `"ray:4"` four of them; `"ray://host:10001"` or `"host:6379"` are
            those of a Ray cluster. Each has a copy of the network and computes with one thread;
            the study stays here. One that dies loses the evaluation it was at, which is
            repeated.
        confidence: Where `evaluate` yields estimates, a size is given up as soon as one that
            was evaluated to the end beats it in every objective with this confidence: of the
            sizes that belong on the front at most one minus it is lost. Such a trial is pruned
            and counts as an evaluation. None evaluates all to the end.
        together: How many sizes are evaluated on each batch that is loaded, at least 1; more
            than one needs `supple.Batchwise`. They are proposed without knowing each other.
        halving: Of the sizes that are evaluated together one in so many goes on after each
            look at the estimates, by fronts (successive halving); the others are pruned, with
            no confidence in it. At least 2; None lets all go on.
        warm_start: An earlier study of the same sizes, maybe on another device: its file, its
            URL, or the front that it gave. Where it was of the same weights, its metrics are
            taken over and only costs are found anew, which does not count as an evaluation;
            where costs are measured, that is done for its front at once and for others when
            they are proposed. Of other weights, its front is evaluated first. Metrics that
            are times, energies or bytes are never taken over.

    Returns:
        Everything that was evaluated, with its Pareto front.

    Raises:
        SettingError: An argument is wrong, or the study was made for another space, other
            weights or other objectives.
        CheckpointError: The study can't be read or written, or its server was away for longer
            than a minute; the message names it.
        MissingExtraError: The study lies in a database whose driver is not installed, or Ray
            is not.
        WorkerError: The workers can't be reached, can't take over the search (what `evaluate`
            needs is not there), or die each time at the same config.

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
    _check_growing(evaluate, confidence, together, halving)
    place_of_workers = place_of(workers)
    priced = Costs(net, costs)
    evaluator = Evaluator(net, evaluate, priced, data)
    sought = functools.partial(_sought, priced.names, maximize, objectives)
    place = _new_file(name) if study is None else study
    weights = fingerprint(net.module)
    earlier = read_earlier(warm_start, name=name, space=net.space, weights=weights)
    with StudyStore(place, name=name, space=net.space, weights=weights) as store:
        _begin(store, net, evaluator, sought, evaluations)
        for known in store.results()[:1]:
            priced.check_predicted(known.config, known.values)
        bounds = {name: bound(text, unit_of(name)) for name, text in (where or {}).items()}
        search = _started(algorithm, net, store, seed, priced.exact(), bounds)
        loop = _Loop(store, search, sought, evaluations, bounds)
        loop.offer([net.space.largest(), net.space.smallest()])
        _take_over(earlier, evaluator, loop, net, store, priced.free)
        loop.growing(confidence, together, halving)
        left = _count(store.known()) < evaluations
        crew = crew_of(place_of_workers if left else None, evaluator)
        shown = SearchProgress(evaluations, store.objectives, name, shown=progress)
        with contextlib.closing(crew), shown:
            loop.run(crew, shown)
        return _front(store, priced.errors)


def _check_algorithm(algorithm: object) -> None:
    if algorithm is None or isinstance(algorithm, Search):
        return
    raise SettingError(
        f"algorithm must be a search such as NSGA2(), got {type(algorithm).__name__}; what "
        "can't be rebuilt from its results (Optuna's TPE and GP samplers, say) is not offered, "
        "because a search that was killed could not go on exactly"
    )


def _check_growing(
    evaluate: object, confidence: float | None, together: int, halving: int | None
) -> None:
    Race((), {}, confidence, halving)
    if halving is not None and halving > together:
        raise SettingError(
            f"halving={halving} keeps one in {halving} of the sizes that are evaluated "
            f"together; give together={halving} or more, got {together}"
        )
    if together < 1:
        raise SettingError(f"together must be at least 1, got {together}")
    if together > 1 and not isinstance(evaluate, Batchwise):
        raise SettingError(
            f"together={together} needs an evaluation that goes batch by batch: "
            f"evaluate=supple.Batchwise(score, batches), got {type(evaluate).__name__}"
        )


def _sought(
    costs: Sequence[str],
    maximize: str | Sequence[str] | None,
    only: Sequence[str] | None,
    evaluation: Evaluation | Stopped,
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
    sought: Callable[[Evaluation | Stopped], tuple[Objective, ...]],
    limit: int,
) -> None:
    """Creates the study or joins it. What its objectives are, the first evaluation tells."""
    if not store.exists:
        with store.alone() as needed:
            if needed:
                first = evaluator(net.space.largest())
                assert isinstance(first, Evaluation)  # nothing races yet
                store.create(sought(first))
                trial = store.claim(first.config, limit)
                if isinstance(trial, int):
                    store.finish(trial, first)
    known = store.results()
    if known:
        store.check(sought(known[0]))


def _take_over(
    earlier: Earlier,
    evaluator: Evaluator,
    loop: _Loop,
    net: Network,
    store: StudyStore,
    free: bool,
) -> None:
    """Makes use of an earlier study, once it is known that evaluations mean the same."""
    largest = net.space.largest()
    for one in store.results():
        if one.config == largest and not one.source:
            earlier.check(one)
    evaluator.remember(earlier.metrics, earlier.shown)
    loop.remember(earlier)
    loop.offer(earlier.front)
    if free:
        loop.offer(list(earlier.metrics))


def _count(known: Sequence[Evaluation | Stopped]) -> int:
    """Counts evaluations; what was taken over from an earlier study is none."""
    return sum(isinstance(one, Stopped) or not one.source for one in known)


class _Loop:
    """Claims configs, has them evaluated, stores what comes out, tells the search."""

    def __init__(
        self,
        store: StudyStore,
        search: AskTell,
        sought: Callable[[Evaluation | Stopped], tuple[Objective, ...]],
        limit: int,
        bounds: Mapping[str, Bound],
    ) -> None:
        self._store = store
        self._search = search
        self._sought = sought
        self._limit = limit
        self._bounds = bounds
        self._told: set[Config] = set()
        self._finished: dict[Config, Mapping[str, float]] = {}
        self._first: deque[Config] = deque()
        self._lost: Counter[Config] = Counter()
        self._beats: dict[int, contextlib.AbstractContextManager[None]] = {}
        self._confidence: float | None = None
        self._together = 1
        self._halving: int | None = None
        self._earlier = Earlier()

    def growing(
        self, confidence: float | None, together: int, halving: int | None = None
    ) -> None:
        """Gives up sizes that are beaten with such confidence; evaluates several at once."""
        self._confidence, self._together, self._halving = confidence, together, halving

    def offer(self, configs: Sequence[Config]) -> None:
        """Puts configs before those that the search proposes."""
        self._first.extend(configs)

    def remember(self, earlier: Earlier) -> None:
        """Takes configs whose metrics are known for no evaluations."""
        self._earlier = earlier

    def run(self, crew: Crew, shown: SearchProgress) -> None:
        """Works until the study holds as many evaluations as wanted, or the whole space."""
        self._first.extendleft(self._store.fail_interrupted())
        try:
            while self._sync(shown) < self._limit:
                while crew.free and (claimed := self._claimed(shown)):
                    crew.give(claimed, self._race())
                if crew.busy:
                    for answer in crew.answers():
                        self._take(answer)
                elif self._store.busy():
                    self._wait()
                elif not self._first:
                    return
        finally:
            for trial in list(self._beats):
                self._end(trial)
                with contextlib.suppress(CheckpointError):  # the first error is the one to show
                    self._store.fail(trial, "interrupted")

    def _claimed(self, shown: SearchProgress) -> list[tuple[int, Config]]:
        """Claims what one worker is to evaluate; nothing if there is nothing at present."""
        claimed: list[tuple[int, Config]] = []
        while len(claimed) < self._together:
            config = self._next()
            if config is None:
                break
            source = self._earlier.shown if config in self._earlier.metrics else ""
            trial = self._store.claim(config, self._limit, source=source)
            if isinstance(trial, int):
                self._begin(trial)
                claimed.append((trial, config))
            elif trial is Claim.FULL:
                # Should another worker die, its evaluation is this one's to repeat.
                self._first.appendleft(config)
                break
            else:
                self._sync(shown)  # another worker is ahead
        return claimed

    def _race(self) -> Race | None:
        """What sizes are judged by that are evaluated from now on."""
        if self._confidence is None and self._halving is None:
            return None
        finished = dict(self._finished)
        return Race(self._store.objectives, finished, self._confidence, self._halving)

    def _wait(self) -> None:
        time.sleep(POLL_SECONDS)
        self._first.extendleft(self._store.fail_interrupted())

    def _sync(self, shown: SearchProgress) -> int:
        """Tells the search what is new, from all workers; returns how much there is."""
        results = self._store.known()
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
            self._finished.update(
                (result.config, result.values)
                for result in new
                if isinstance(result, Evaluation) and _is_finite(self._store, result)
            )
        done = [result for result in results if isinstance(result, Evaluation)]
        count = _count(results)
        shown.show(done, count)
        return count

    def _violation(self, result: Evaluation | Stopped) -> float:
        return sum(_excess(result, name, limit) for name, limit in self._bounds.items())

    def _next(self) -> Config | None:
        while self._first:
            config = self._first.popleft()
            if config not in self._told:
                return config
        asked = self._search.ask(1)
        return asked[0] if asked else None

    def _begin(self, trial: int) -> None:
        beating = self._store.working_on(trial)
        beating.__enter__()
        self._beats[trial] = beating

    def _end(self, trial: int) -> None:
        self._beats.pop(trial).__exit__(None, None, None)

    def _take(self, answer: Answer) -> None:
        self._end(answer.trial)
        try:
            if answer.error is not None:
                raise answer.error
            if answer.evaluation is None:
                self._again(answer)
                return
            self._store.check(self._sought(answer.evaluation))
        except BaseException as error:
            self._store.fail(answer.trial, repr(error))
            raise
        if not self._keep(answer.trial, answer.evaluation):
            # Another machine took this worker for dead; the result still counts, once.
            source = "" if isinstance(answer.evaluation, Stopped) else answer.evaluation.source
            again = self._store.claim(answer.config, self._limit, source=source)
            if isinstance(again, int):
                self._keep(again, answer.evaluation)

    def _keep(self, trial: int, outcome: Evaluation | Stopped) -> bool:
        if isinstance(outcome, Stopped):
            return self._store.stop(trial, outcome)
        return self._store.finish(trial, outcome)

    def _again(self, answer: Answer) -> None:
        """Has a config evaluated again whose worker died, but not for ever."""
        self._lost[answer.config] += 1
        if self._lost[answer.config] == PATIENCE:
            raise WorkerError(
                f"the worker died {PATIENCE} times while it evaluated {answer.config} "
                f"({answer.lost}); if memory is short, use fewer workers"
            )
        self._store.fail(answer.trial, f"interrupted: {answer.lost}")
        self._first.appendleft(answer.config)


def _is_finite(store: StudyStore, result: Evaluation) -> bool:
    return all(math.isfinite(result.values[o.name]) for o in store.objectives)


def _excess(result: Evaluation | Stopped, name: str, limit: Bound) -> float:
    if name not in result.values:
        raise SettingError(
            f"where= names {name!r}, which is not evaluated{nearest(name, result.values)} "
            f"(there are: {', '.join(result.values)})"
        )
    return limit.excess(result.values[name])


def _front(store: StudyStore, errors: Mapping[str, float]) -> Front:
    known = store.known()
    points = [
        Point(one.config, one.values)
        for one in known
        if isinstance(one, Evaluation) and _is_finite(store, one)
    ]
    stopped = [Point(one.config, one.values) for one in known if isinstance(one, Stopped)]
    return Front(store.objectives, tuple(points), store.shown, errors, tuple(stopped))
