"""Workers of a Ray cluster, each with a copy of the network, that evaluate configs.

The process that searches keeps the study: it claims configs, gives each to a worker that is
free, and stores what comes back. So workers need no access to the study, and one that dies
loses nothing but the evaluation it was at. A cluster that is started here ends with the process
that started it, however that ends.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from typing import Any

import torch

from supple.errors import SuppleError, WorkerError, import_extra
from supple.space import Config
from supple.study.crew import Answer, Evaluate, Place, evaluated
from supple.study.growing import Race
from supple.study.store import Evaluation, Stopped

__all__ = ["RayCrew"]

_WAIT_SECONDS = 1.0
_CONNECTING = (
    "; a cluster that asks for a token needs RAY_AUTH_MODE=token and the token in "
    "RAY_AUTH_TOKEN or ~/.ray/auth_token here, too, and its Ray and Python must be of the same "
    "version"
)


class RayCrew:
    """Workers of a Ray cluster, one for each of its cores.

    Args:
        place: Where the cluster is.
        evaluate: Evaluates a config; a copy of it goes to each worker.

    Raises:
        MissingExtraError: Ray is not installed.
        WorkerError: The cluster can't be used, or no worker can take over the search.
    """

    def __init__(self, place: Place, evaluate: Evaluate) -> None:
        self._ray = import_extra("ray", "ray")
        self._ours = not self._ray.is_initialized()
        self._workers: list[Any] = []
        self._idle: list[Any] = []
        self._tasks: dict[Any, tuple[Any, list[tuple[int, Config]]]] = {}
        try:
            if self._ours:
                self._connect(place)
            self._shared = self._sent(evaluate)
            self._class = self._ray.remote(num_cpus=1, max_restarts=0)(_Evaluating)
            number = place.number or int(self._ray.cluster_resources().get("CPU", 1)) or 1
            for _ in range(number):
                self._hire()
            self._check()
        except BaseException:
            self.close()
            raise

    @property
    def free(self) -> bool:
        return bool(self._idle)

    @property
    def busy(self) -> bool:
        return bool(self._tasks)

    def give(self, claimed: Sequence[tuple[int, Config]], race: Race | None) -> None:
        worker = self._idle.pop(0)
        task = worker.evaluate.remote([config for _, config in claimed], race)
        self._tasks[task] = (worker, list(claimed))

    def answers(self) -> list[Answer]:
        if not self._tasks:
            return []
        waiting = list(self._tasks)
        ready, _ = self._ray.wait(waiting, num_returns=1, timeout=_WAIT_SECONDS)
        if ready:  # and whatever else is there already
            ready, _ = self._ray.wait(waiting, num_returns=len(waiting), timeout=0)
        return [answer for task in ready for answer in self._answers(task)]

    def close(self) -> None:
        """Ends the workers, and the cluster if it was started here."""
        if not self._ray.is_initialized():
            return
        for worker in self._workers:
            with contextlib.suppress(Exception):  # it is gone already, or the cluster is
                self._ray.kill(worker)
        if self._ours:
            self._ray.shutdown()

    # ------------------------------------------------------------------------- internals

    def _connect(self, place: Place) -> None:
        options: dict[str, Any] = {"logging_level": "error", "log_to_driver": False}
        if place.address is None:
            options |= {
                "address": "local",
                "num_cpus": place.number or len(os.sched_getaffinity(0)),
                "include_dashboard": False,
            }
        else:
            options |= {"address": place.address}
        try:
            self._ray.init(**options)
        except Exception as error:  # Ray has no common base for what can go wrong here
            where = place.address or "this machine"
            hint = _CONNECTING if place.address else ""
            raise WorkerError(
                f"no Ray workers on {where}: {_first_line(error)}{hint}"
            ) from error

    def _sent(self, evaluate: Evaluate) -> Any:
        try:
            return self._ray.put(evaluate)
        except SuppleError:
            raise
        except Exception as error:
            raise WorkerError(
                f"this search can't be sent to workers: {_first_line(error)}; what `evaluate`, "
                "`data` and `costs` hold on to (open files, locks, lambdas of a library) must "
                "be made where it is used, or start the same search several times instead"
            ) from error

    def _hire(self) -> None:
        worker = self._class.remote(self._shared)
        self._workers.append(worker)
        self._idle.append(worker)

    def _check(self) -> None:
        """Waits for the first worker: what it can't do, none can."""
        try:
            self._ray.get(self._workers[0].ready.remote())
        except self._ray.exceptions.RayError as error:
            raise WorkerError(
                f"the workers can't take over this search: {_first_line(error)}; what it uses "
                "(your model's and your evaluation's modules) must be importable where they run"
            ) from error

    def _answers(self, task: Any) -> list[Answer]:
        worker, given = self._tasks.pop(task)
        try:
            outcomes = self._ray.get(task)
        except self._ray.exceptions.RayTaskError as error:
            self._idle.append(worker)
            cause = getattr(error, "cause", None)
            return [Answer(*given[0], error=cause if cause is not None else error)]
        except self._ray.exceptions.RayError as error:
            self._workers.remove(worker)
            self._hire()
            return [Answer(*one, lost=_first_line(error)) for one in given]
        self._idle.append(worker)
        return [Answer(*one, outcome) for one, outcome in zip(given, outcomes, strict=True)]


class _Evaluating:
    """A worker: it computes with one thread, as there is one worker for each core."""

    def __init__(self, evaluate: Evaluate) -> None:
        torch.set_num_threads(1)
        self._evaluate = evaluate

    def ready(self) -> bool:
        """Says that it could be started."""
        return True

    def evaluate(self, configs: list[Config], race: Race | None) -> list[Evaluation | Stopped]:
        """Evaluates configs together."""
        return evaluated(self._evaluate, configs, race)


def _first_line(error: BaseException) -> str:
    """Words an error of Ray's, whose message may be a page: its last line says the cause."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, BaseException):
        error = cause
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
