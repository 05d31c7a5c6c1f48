"""The study: every evaluation of a search as a trial of an optuna study.

The study is the only record; whoever opens it can go on from it. A trial is written as
running, with its config, before the evaluation begins (`claim`), and becomes complete with
its values at the end (`finish`). Several workers may do so at once: of two that claim the same
config the one with the lower trial number has it.

What optuna's dashboard shows: the objectives as values with their directions, the choices as
parameters, and config, metrics and costs as user attributes.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sqlite3
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.storages import BaseStorage, InMemoryStorage, RDBStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from supple.errors import CheckpointError, SettingError
from supple.files import checksum
from supple.space import Config, Space
from supple.study.objectives import Objective
from supple.study.workers import Worker, beating

__all__ = ["MEMORY", "Claim", "Evaluation", "StudyStore"]

MEMORY = ":memory:"
"""The study that is kept in memory only."""

LOCK_SECONDS = 30.0
"""How long to wait for a study file that another program has locked."""

_RACES, _RACE_SECONDS = 20, 0.1
_BEAT_SECONDS = 20
_GRACE_SECONDS = 120
_SUFFIXES = (".db", ".sqlite", ".sqlite3")
_SCHEMA = 1
_ABOUT = "supple"
_NOT_FINITE = "not finite"


class Claim(Enum):
    """Why a config could not be claimed."""

    TAKEN = "another worker has it, or it was evaluated"
    FULL = "as many evaluations as wanted are done or under way"


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation gave.

    Args:
        config: The canonical config.
        metrics: What the user's function gave, by name.
        costs: Costs in base units, by name.
    """

    config: Config
    metrics: Mapping[str, float]
    costs: Mapping[str, float]

    @property
    def values(self) -> dict[str, float]:
        """Metrics and costs together."""
        return {**self.metrics, **self.costs}


class StudyStore:
    """An open study.

    Args:
        where: A path that ends in `.db`, `.sqlite` or `.sqlite3`, a database URL, or
            `MEMORY`.
        name: The study's name; one file may hold several.
        space: What is searched.
        weights: A fingerprint of the weights that are evaluated.

    Raises:
        SettingError: `where` is neither, or the study was made for something else.
        CheckpointError: The file can't be read or written.
    """

    def __init__(
        self, where: str | os.PathLike[str], *, name: str, space: Space, weights: str = ""
    ) -> None:
        self.where = os.fspath(where)
        self.name = name
        self.space = space
        self.weights = weights
        self.objectives: tuple[Objective, ...] = ()
        self._worker = Worker()
        self._read_before: dict[int, Evaluation] = {}
        self._study: optuna.Study | None = None
        self._file = _file_of(self.where)
        if self._file is not None:
            _check_file(self._file)
        with self._guard():
            self._storage = self._opened()
        try:
            self._join()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends the connection; what was finished stays."""
        self._worker.close()
        if isinstance(self._storage, RDBStorage):
            self._storage.scoped_session.remove()
            self._storage.engine.dispose()

    def __enter__(self) -> StudyStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def exists(self) -> bool:
        """Whether the study was created already, so that its objectives are known."""
        return self._study is not None

    @contextlib.contextmanager
    def alone(self) -> Iterator[bool]:
        """Keeps other workers on this machine waiting, where the study is a file.

        The first evaluation tells what the objectives are, so it comes before the study;
        without this, workers that start together would all make it.

        Yields:
            Whether the study is still to be created.
        """
        if self._file is None:
            yield not self.exists
            return
        lock = self._file.with_name(f".{self._file.name}.lock")
        with _locked(lock):
            self._join()
            yield not self.exists

    def create(self, objectives: Sequence[Objective]) -> None:
        """Creates the study, or joins it if another worker was faster.

        Raises:
            SettingError: The study exists for something else.
            CheckpointError: The file can't be written.
        """
        up, down = StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE
        with self._guard(), _without_experimental_warnings():
            study = optuna.create_study(
                storage=self._storage,
                study_name=self.name,
                directions=[up if o.maximize else down for o in objectives],
                load_if_exists=True,
            )
            if _ABOUT not in study.user_attrs and not study.get_trials(deepcopy=False):
                study.set_user_attr(_ABOUT, self._about(objectives))
                study.set_metric_names([o.name for o in objectives])
        self._join()
        self.check(objectives)

    def check(self, objectives: Sequence[Objective]) -> None:
        """Checks that the study is of these objectives.

        Raises:
            SettingError: It is of others.
        """
        if tuple(objectives) != self.objectives:
            raise SettingError(
                f"study {self.name!r} in {self.where} was made for the objectives "
                f"{_worded(self.objectives)}, not {_worded(objectives)}; choose another file "
                f"or name="
            )

    # -------------------------------------------------------------------------- evaluations

    def results(self) -> list[Evaluation]:
        """Returns what was evaluated, by trial number.

        An evaluation whose values were not finite is among them.

        Raises:
            CheckpointError: The file can't be read, or is damaged.
        """
        counting = [trial for trial in self._trials() if _counts(trial)]
        for trial in counting:
            if trial.number not in self._read_before:
                self._read_before[trial.number] = self._read(trial)
        return [self._read_before[trial.number] for trial in counting]

    def claim(self, config: Config, limit: int) -> int | Claim:
        """Marks a config as under evaluation by this worker.

        Args:
            config: A canonical config.
            limit: How many evaluations the study is to hold.

        Returns:
            The trial to `finish` or `fail`, or why there is none.

        Raises:
            CheckpointError: The file can't be read or written.
        """
        text = config.to_json()
        refusal = _refusal(self._trials(), text, limit)
        if refusal is not None:
            return refusal
        with self._guard():
            trial = self._storage.create_new_trial(self._study_id, self._running(config))
        # Another worker may have claimed at the same moment: the lower number goes first.
        trials = self._trials()
        number = next(t.number for t in trials if t._trial_id == trial)
        refusal = _refusal([t for t in trials if t.number < number], text, limit)
        if refusal is not None:
            self.fail(trial, refusal.value)
            return refusal
        return trial

    def finish(self, trial: int, evaluation: Evaluation) -> bool:
        """Stores the values of a claimed config.

        Values that are not finite make the trial failed, but it counts and is not repeated.

        Args:
            trial: What `claim` returned.
            evaluation: What came out.

        Returns:
            Whether it was stored; False if the trial had been given up as interrupted.

        Raises:
            CheckpointError: The file can't be written.
        """
        attributes = {
            "metrics": dict(evaluation.metrics),
            "costs": dict(evaluation.costs),
            "sha256": _seal(evaluation),
        }
        values = [float(evaluation.values[o.name]) for o in self.objectives]
        finite = all(abs(value) < float("inf") for value in values)
        if not finite:
            attributes["reason"] = _NOT_FINITE
        state = TrialState.COMPLETE if finite else TrialState.FAIL
        with self._guard():
            try:
                for key, value in attributes.items():
                    self._storage.set_trial_user_attr(trial, key, value)
                self._storage.set_trial_state_values(trial, state, values if finite else None)
            except optuna.exceptions.UpdateFinishedTrialError:
                return False
        return True

    def fail(self, trial: int, reason: str) -> None:
        """Marks a claimed config as not evaluated; it may be claimed again.

        Raises:
            CheckpointError: The file can't be written.
        """
        with (
            self._guard(),
            contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError),
        ):
            self._storage.set_trial_user_attr(trial, "reason", reason)
            self._storage.set_trial_state_values(trial, TrialState.FAIL)

    def fail_interrupted(self) -> list[Config]:
        """Marks the trials of workers that live no more as failed.

        Returns:
            Their configs, which are to be evaluated again.

        Raises:
            CheckpointError: The file can't be read or written.
        """
        before = [t for t in self._trials() if t.state == TrialState.RUNNING]
        for trial in before:
            if Worker.is_gone(trial.user_attrs.get("worker", {})):
                self.fail(trial._trial_id, "interrupted")
        self._fail_silent()
        running = {t.number for t in self._trials() if t.state == TrialState.RUNNING}
        return [self._config(trial) for trial in before if trial.number not in running]

    def busy(self) -> bool:
        """Says whether any worker is evaluating.

        Raises:
            CheckpointError: The file can't be read.
        """
        return any(trial.state == TrialState.RUNNING for trial in self._trials())

    def working_on(self, trial: int) -> contextlib.AbstractContextManager[None]:
        """Tells other machines that this worker lives, as long as the context is open."""
        storage = self._storage
        if not isinstance(storage, RDBStorage):
            return contextlib.nullcontext()

        def beat() -> None:
            # A beat that is lost to a busy database does not matter, the next one counts.
            with contextlib.suppress(optuna.exceptions.StorageInternalError), _quiet():
                storage.record_heartbeat(trial)

        return beating(beat, _BEAT_SECONDS)

    # ----------------------------------------------------------------------------- internals

    def _opened(self) -> BaseStorage:
        if self.where == MEMORY:
            return InMemoryStorage()
        url = self.where if self._file is None else f"sqlite:///{self._file}"
        for _ in range(_RACES):
            try:
                return self._connected(url)
            except SQLAlchemyError as error:
                # Another worker may be creating the tables at this moment.
                if "already exists" not in str(error) and not isinstance(error, IntegrityError):
                    raise
                time.sleep(_RACE_SECONDS)
        return self._connected(url)

    def _connected(self, url: str) -> RDBStorage:
        timeout = (
            {"connect_args": {"timeout": LOCK_SECONDS}} if url.startswith("sqlite") else None
        )
        with _without_experimental_warnings():
            return RDBStorage(
                url,
                engine_kwargs=timeout,
                heartbeat_interval=_BEAT_SECONDS,
                grace_period=_GRACE_SECONDS,
            )

    def _join(self) -> None:
        """Takes up the study if it is there, and checks what it was made for."""
        with self._guard():
            try:
                study = optuna.load_study(study_name=self.name, storage=self._storage)
            except KeyError:
                return
            about = study.user_attrs.get(_ABOUT)
            if about is None and not study.get_trials(deepcopy=False):
                return  # its maker was stopped before saying what it is; `create` will
        self.objectives = self._checked(about)
        self._study = study

    def _about(self, objectives: Sequence[Objective]) -> dict[str, Any]:
        return {
            "schema": _SCHEMA,
            "space": self.space.digest,
            "weights": self.weights,
            "objectives": [[o.name, o.maximize] for o in objectives],
        }

    def _checked(self, about: Any) -> tuple[Objective, ...]:
        """Returns the objectives of a study that was made for this space and these weights."""
        made = f"study {self.name!r} in {self.where} was made"
        instead = "; choose another file or name="
        if not isinstance(about, Mapping) or about.get("schema") != _SCHEMA:
            raise SettingError(f"{made} by another program or version{instead}")
        if about.get("space") != self.space.digest:
            raise SettingError(f"{made} for another space than this network's{instead}")
        if about.get("weights") != self.weights:
            raise SettingError(
                f"{made} with other weights than this network has now, so its values don't "
                f"hold any more{instead}"
            )
        return tuple(Objective(name, up) for name, up in about["objectives"])

    @property
    def _study_id(self) -> int:
        assert self._study is not None
        return int(self._study._study_id)

    def _trials(self) -> list[FrozenTrial]:
        assert self._study is not None
        with self._guard():
            return self._study.get_trials(deepcopy=False)

    def _running(self, config: Config) -> FrozenTrial:
        return FrozenTrial(
            number=-1,
            trial_id=-1,
            state=TrialState.RUNNING,
            value=None,
            values=None,
            datetime_start=datetime.now(),
            datetime_complete=None,
            params=dict(config),
            distributions=self._distributions(config),
            user_attrs={"config": config.to_json(), "worker": self._worker.signature()},
            system_attrs={},
            intermediate_values={},
        )

    def _distributions(self, config: Config) -> dict[str, BaseDistribution]:
        return {name: self._by_site[name] for name in config}

    @functools.cached_property
    def _by_site(self) -> dict[str, BaseDistribution]:
        return {site.name: CategoricalDistribution(site.choices) for site in self.space.sites}

    def _fail_silent(self) -> None:
        if isinstance(self._storage, RDBStorage) and self._study is not None:
            with self._guard(), _without_experimental_warnings():
                optuna.storages.fail_stale_trials(self._study)

    def _config(self, trial: FrozenTrial) -> Config:
        try:
            return self.space.canonical(Config.from_json(trial.user_attrs["config"]))
        except (KeyError, SettingError) as error:
            raise self._damaged(f"trial {trial.number}: {error!r}") from error

    def _read(self, trial: FrozenTrial) -> Evaluation:
        try:
            attributes = trial.user_attrs
            evaluation = Evaluation(
                self._config(trial), attributes["metrics"], attributes["costs"]
            )
            stored = [evaluation.values[o.name] for o in self.objectives]
            intact = attributes["sha256"] == _seal(evaluation)
        except (KeyError, TypeError, AttributeError) as error:
            raise self._damaged(f"trial {trial.number}: {error!r}") from error
        if not intact or (trial.state == TrialState.COMPLETE and trial.values != stored):
            raise self._damaged(f"trial {trial.number} doesn't match its checksum")
        return evaluation

    def _damaged(self, why: str) -> CheckpointError:
        return CheckpointError(f"the study {self.where} is damaged ({why}); use another file")

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        """Names the file in whatever the database raises, and keeps optuna quiet."""
        try:
            with _quiet():
                yield
        except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
            raise CheckpointError(_database_fault(self.where, error)) from error
        except (ValueError, LookupError, TypeError, AttributeError, AssertionError) as error:
            # Only optuna runs in here, on arguments that are right: what it read is wrong.
            raise self._damaged(repr(error)) from error
        except RuntimeError as error:
            # optuna's way to say that the tables are of another version.
            raise CheckpointError(f"can't use the study {self.where}: {error}") from error


def _counts(trial: FrozenTrial) -> bool:
    """Says whether a trial counts as an evaluation: also if its values were not finite."""
    if trial.state == TrialState.COMPLETE:
        return True
    return trial.state == TrialState.FAIL and trial.user_attrs.get("reason") == _NOT_FINITE


def _refusal(trials: Sequence[FrozenTrial], config: str, limit: int) -> Claim | None:
    """Returns why a config can't be claimed beside these trials."""
    held = [t for t in trials if t.state == TrialState.RUNNING or _counts(t)]
    if any(trial.user_attrs.get("config") == config for trial in held):
        return Claim.TAKEN
    return Claim.FULL if len(held) >= limit else None


def _seal(evaluation: Evaluation) -> str:
    content = [dict(evaluation.config), dict(evaluation.metrics), dict(evaluation.costs)]
    return checksum(content)


def _worded(objectives: Sequence[Objective]) -> str:
    return (
        ", ".join(f"{o.name} ({'up' if o.maximize else 'down'})" for o in objectives) or "none"
    )


def _file_of(where: str) -> Path | None:
    """Returns the SQLite file that a place stands for; None for memory and databases."""
    if where == MEMORY:
        return None
    if "://" in where:
        return (
            Path(where.removeprefix("sqlite:///")) if where.startswith("sqlite:///") else None
        )
    if not where.endswith(_SUFFIXES):
        raise SettingError(
            f"a study must be a file that ends in {', '.join(_SUFFIXES)}, a database URL or "
            f"'{MEMORY}', got {where!r}"
        )
    return Path(where)


def _check_file(path: Path) -> None:
    """Checks that a study file can be read and written, before anything relies on it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(sqlite3.connect(path, timeout=LOCK_SECONDS)) as connection:
            connection.isolation_level = None
            connection.execute("BEGIN IMMEDIATE")
            found = connection.execute("PRAGMA integrity_check").fetchone()[0]
            connection.execute("ROLLBACK")
    except (OSError, sqlite3.Error) as error:
        raise CheckpointError(_database_fault(str(path), error)) from error
    if found != "ok":
        why = " ".join(found.split())[:120]
        raise CheckpointError(f"the study {path} is damaged ({why}); use another file")


_FAULTS = {
    "locked": "another program has locked it; wait for that to end or use another file",
    "readonly": "it can't be written; use another folder or change the permissions",
    "unable to open": "it can't be opened; use a folder that you may write to",
    "disk is full": "the disk is full",
    "not a database": "it is no SQLite database; use another file",
    "malformed": "it is damaged; use another file",
}


def _database_fault(where: str, error: BaseException) -> str:
    chain: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        chain.append(str(cause))
        cause = cause.__cause__
    text = " ".join(chain).lower()
    hint = next((hint for sign, hint in _FAULTS.items() if sign in text), chain[-1])
    return f"can't use the study {where}: {hint}"


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a lock that the system releases when the process ends, however it ends."""
    try:
        import fcntl
    except ModuleNotFoundError:  # not a POSIX system: workers may repeat the first evaluation
        yield
        return
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise CheckpointError(f"can't write {path}: {error.strerror}") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def _without_experimental_warnings() -> Iterator[None]:
    # Heartbeats and names of metrics are marked experimental since optuna 2.6 and 3.2.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps optuna from logging every step, and leaves its setting as it was."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
