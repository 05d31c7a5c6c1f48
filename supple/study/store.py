"""The study: every evaluation of a search as a trial of an optuna study.

The study is the only record; whoever opens it can go on from it. A trial is written as
running, with its config, before the evaluation begins (`claim`), and becomes complete with
its values at the end (`finish`). Several workers may do so at once: of two that claim the same
config the one with the lower trial number has it.

A database server that goes away in mid-search is waited for, `AWAY_SECONDS` at most. What was
asked of it may or may not have been done when the connection broke, so everything that is asked
again does no harm if it was done before.

An evaluation that was given up because another config surely beats this one is a pruned trial,
with what was known of it; it is never told as finished.

What optuna's dashboard shows: the objectives as values with their directions, the choices as
parameters, and config, metrics and costs as user attributes.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from typing import Any, TypeVar

import optuna
import sqlalchemy
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.storages import BaseStorage, InMemoryStorage, RDBStorage
from optuna.storages._rdb.models import SCHEMA_VERSION
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from supple.errors import (
    CheckpointError,
    MissingExtraError,
    SettingError,
    SuppleError,
    SuppleWarning,
)
from supple.files import checksum
from supple.space import Config, Space
from supple.study.database import (
    MEMORY,
    POSTGRES_DRIVER,
    cause_of,
    check_file,
    fault_text,
    file_lock,
    file_of,
    is_away,
    one_line,
    shown,
    with_driver,
)
from supple.study.objectives import Objective
from supple.study.workers import Worker, beating

__all__ = ["MEMORY", "Claim", "Evaluation", "Stopped", "StudyStore"]

LOCK_SECONDS = 30.0
"""How long to wait for a study file that another program has locked."""

AWAY_SECONDS = 60.0
"""How long to wait for a database server that went away in mid-search."""

_RACES, _RACE_SECONDS = 20, 0.1
_BEAT_SECONDS = 20
_GRACE_SECONDS = 120
_SCHEMA = 1
_ABOUT = "supple"
_NOT_FINITE = "not finite"
_AWAY_POLL_SECONDS = 0.5
# A server that vanishes without a word (a cable, a dead machine) is noticed within 40 s.
_POSTGRES = {"connect_timeout": 10, "keepalives_idle": 20, "tcp_user_timeout": 40_000}
_Result = TypeVar("_Result")


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
        source: The earlier study that the metrics were taken from; empty for one made here.
    """

    config: Config
    metrics: Mapping[str, float]
    costs: Mapping[str, float]
    source: str = ""

    @property
    def values(self) -> dict[str, float]:
        """Metrics and costs together."""
        return {**self.metrics, **self.costs}


@dataclass(frozen=True)
class Stopped:
    """An evaluation that was given up, since another config beats this one.

    Args:
        config: The canonical config.
        metrics: What was known of it: estimates from a part of the data, by name.
        costs: Costs in base units, by name.
        errors: Standard errors of the metrics, by name.
        share: Which part of the data was used.
        winner: The config that beats it in every objective, or went on in its place.
    """

    config: Config
    metrics: Mapping[str, float]
    costs: Mapping[str, float]
    errors: Mapping[str, float]
    share: float
    winner: Config

    @property
    def values(self) -> dict[str, float]:
        """Metrics (estimates) and costs together."""
        return {**self.metrics, **self.costs}


class StudyStore:
    """An open study.

    Args:
        where: A path that ends in `.db`, `.sqlite` or `.sqlite3`, a database URL, or
            `MEMORY`.
        name: The study's name; one file may hold several.
        space: What is searched.
        weights: A fingerprint of the weights that are evaluated; None to read a study of any,
            whose own is `made_with`.

    Raises:
        SettingError: `where` is neither, or the study was made for something else.
        CheckpointError: The file can't be read or written, or the database can't be reached.
        MissingExtraError: The database's driver is not installed.
    """

    def __init__(
        self,
        where: str | os.PathLike[str],
        *,
        name: str,
        space: Space,
        weights: str | None = "",
    ) -> None:
        self.where = os.fspath(where)
        self.name = name
        self.space = space
        self.weights = weights
        self.made_with = ""
        self.objectives: tuple[Objective, ...] = ()
        self._worker = Worker()
        self._read_before: dict[int, Evaluation | Stopped] = {}
        self._study: optuna.Study | None = None
        self._file = file_of(self.where)
        self.shown = shown(self.where)
        if self._file is not None:
            check_file(self._file, LOCK_SECONDS)
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
        """Keeps other workers waiting, where the study is a file or lies in PostgreSQL.

        The first evaluation tells what the objectives are, so it comes before the study;
        without this, workers that start together would all make it.

        Yields:
            Whether the study is still to be created.
        """
        with self._lock("create"):
            self._join()
            yield not self.exists

    def _lock(self, what: str) -> contextlib.AbstractContextManager[None]:
        """Keeps other workers from doing the same, where the study can be locked."""
        if self._file is not None:
            return file_lock(self._file.with_name(f".{self._file.name}.{what}.lock"))
        return self._advisory_lock(what) if self._is_postgres else contextlib.nullcontext()

    @contextlib.contextmanager
    def _advisory_lock(self, what: str) -> Iterator[None]:
        """Holds a lock that PostgreSQL releases when the connection ends, however it ends."""
        assert isinstance(self._storage, RDBStorage)
        engine = self._storage.engine
        key = int(checksum(f"{self.name} {what}".encode())[:15], 16)

        def taken() -> sqlalchemy.Connection:
            connection = engine.connect()
            connection.execute(sqlalchemy.text("SELECT pg_advisory_lock(:key)"), {"key": key})
            return connection

        connection = self._ask(taken)
        try:
            yield
        finally:
            with contextlib.suppress(SQLAlchemyError):  # it is gone, and the lock with it
                connection.invalidate()
                connection.close()

    def create(self, objectives: Sequence[Objective]) -> None:
        """Creates the study, or joins it if another worker was faster.

        Raises:
            SettingError: The study exists for something else.
            CheckpointError: The file can't be written.
        """
        up, down = StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE

        def made() -> None:
            study = optuna.create_study(
                storage=self._storage,
                study_name=self.name,
                directions=[up if o.maximize else down for o in objectives],
                load_if_exists=True,
            )
            if _ABOUT not in study.user_attrs and not study.get_trials(deepcopy=False):
                study.set_user_attr(_ABOUT, self._about(objectives))
                study.set_metric_names([o.name for o in objectives])

        with _without_experimental_warnings():
            self._ask(made)
        self._join()
        self.check(objectives)

    def check(self, objectives: Sequence[Objective]) -> None:
        """Checks that the study is of these objectives.

        Raises:
            SettingError: It is of others.
        """
        if tuple(objectives) != self.objectives:
            raise SettingError(
                f"study {self.name!r} in {self.shown} was made for the objectives "
                f"{_worded(self.objectives)}, not {_worded(objectives)}; choose another file "
                f"or name="
            )

    # -------------------------------------------------------------------------- evaluations

    def results(self) -> list[Evaluation]:
        """Returns what was evaluated to the end, by trial number.

        An evaluation whose values were not finite is among them.

        Raises:
            CheckpointError: The file can't be read, or is damaged.
        """
        return [one for one in self.known() if isinstance(one, Evaluation)]

    def known(self) -> list[Evaluation | Stopped]:
        """Returns what was evaluated, to the end or not, by trial number.

        Raises:
            CheckpointError: The file can't be read, or is damaged.
        """
        counting = [trial for trial in self._trials() if _counts(trial)]
        for trial in counting:
            if trial.number not in self._read_before:
                self._read_before[trial.number] = self._read(trial)
        return [self._read_before[trial.number] for trial in counting]

    def claim(self, config: Config, limit: int, *, source: str = "") -> int | Claim:
        """Marks a config as under evaluation by this worker.

        Args:
            config: A canonical config.
            limit: How many evaluations the study is to hold.
            source: The earlier study that knows its metrics: it does not count then.

        Returns:
            The trial to `finish` or `fail`, or why there is none.

        Raises:
            CheckpointError: The file can't be read or written.
        """
        text, running = config.to_json(), self._running(config, source)
        with self._lock("claim"):
            limit = limit if not source else -1
            refusal = _refusal(self._trials(), text, limit)
            if refusal is not None:
                return refusal
            trial = self._ask(
                lambda: self._storage.create_new_trial(self._study_id, running),
                done=lambda: self._claimed(text),
            )
        # Where nothing can be locked, another worker may have claimed at the same moment: the
        # lower number goes first.
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
        return self._close_trial(trial, state, attributes, values if finite else None)

    def stop(self, trial: int, stopped: Stopped) -> bool:
        """Stores what was known of a claimed config when its evaluation was given up.

        The trial is pruned: it counts as one of the evaluations, and is not repeated.

        Args:
            trial: What `claim` returned.
            stopped: What was known.

        Returns:
            Whether it was stored; False if the trial had been given up as interrupted.

        Raises:
            CheckpointError: The file can't be written.
        """
        attributes = {
            "metrics": dict(stopped.metrics),
            "costs": dict(stopped.costs),
            "errors": dict(stopped.errors),
            "share": stopped.share,
            "winner": stopped.winner.to_json(),
            "sha256": _seal(stopped),
            "reason": "another config beats it",
        }
        return self._close_trial(trial, TrialState.PRUNED, attributes, None)

    def fail(self, trial: int, reason: str) -> None:
        """Marks a claimed config as not evaluated; it may be claimed again.

        Raises:
            CheckpointError: The file can't be written.
        """

        def failed() -> None:
            with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
                self._storage.set_trial_user_attr(trial, "reason", reason)
                self._storage.set_trial_state_values(trial, TrialState.FAIL)

        self._ask(failed)

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
            # A beat that a busy database or an absent one loses does not matter: the next
            # one counts.
            lost = (optuna.exceptions.StorageInternalError, SQLAlchemyError)
            with contextlib.suppress(*lost), quiet():
                storage.record_heartbeat(trial)

        return beating(beat, _BEAT_SECONDS)

    # ----------------------------------------------------------------------------- internals

    def _opened(self) -> BaseStorage:
        if self.where == MEMORY:
            return InMemoryStorage()
        url = with_driver(self.where) if self._file is None else f"sqlite:///{self._file}"
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
        options: dict[str, Any] = {"pool_pre_ping": True}
        if url.startswith("sqlite"):
            options = {"connect_args": {"timeout": LOCK_SECONDS}}
        elif url.startswith(POSTGRES_DRIVER):
            options["connect_args"] = _POSTGRES
        try:
            with _without_experimental_warnings():
                storage = RDBStorage(
                    url,
                    engine_kwargs=options,
                    heartbeat_interval=_BEAT_SECONDS,
                    grace_period=_GRACE_SECONDS,
                )
        except ImportError as error:
            raise MissingExtraError(
                f"the driver of {self.shown} is not installed ({error.__cause__ or error}); "
                "install it, or use PostgreSQL (pip install 'supple[postgres]') or a file"
            ) from error

        self._check_layout(storage)
        return storage

    def _check_layout(self, storage: RDBStorage) -> None:
        # optuna itself compares the revisions of its tables, not the number of their layout.
        with storage.engine.connect() as connection:
            words = "SELECT schema_version, library_version FROM version_info"
            layout, maker = connection.execute(sqlalchemy.text(words)).one()
        if layout > SCHEMA_VERSION:
            raise CheckpointError(self._newer(maker))

    def _newer(self, maker: str) -> str:
        return (
            f"can't use the study {self.shown}: its tables are of a newer version of optuna "
            f"(it was made by {maker}, this is {optuna.__version__}); update optuna, or use "
            "another file"
        )

    def _join(self) -> None:
        """Takes up the study if it is there, and checks what it was made for."""

        def found() -> tuple[optuna.Study, Any] | None:
            try:
                study = optuna.load_study(study_name=self.name, storage=self._storage)
            except KeyError:
                return None
            about = study.user_attrs.get(_ABOUT)
            if about is None and not study.get_trials(deepcopy=False):
                return None  # its maker was stopped before saying what it is; `create` will
            return study, about

        joined = self._ask(found)
        if joined is not None:
            self.objectives = self._checked(joined[1])
            self._study = joined[0]

    def _about(self, objectives: Sequence[Objective]) -> dict[str, Any]:
        return {
            "schema": _SCHEMA,
            "space": self.space.digest,
            "weights": self.weights,
            "objectives": [[o.name, o.maximize] for o in objectives],
        }

    def _checked(self, about: Any) -> tuple[Objective, ...]:
        """Returns the objectives of a study that was made for this space and these weights."""
        made = f"study {self.name!r} in {self.shown} was made"
        instead = "; choose another file or name="
        schema = about.get("schema") if isinstance(about, Mapping) else None
        if isinstance(schema, int) and schema > _SCHEMA:
            raise SettingError(
                f"{made} by a newer version of Supple (its layout is {schema}, this version "
                f"knows {_SCHEMA}); update Supple, or choose another file or name="
            )
        if not isinstance(about, Mapping) or schema != _SCHEMA:
            raise SettingError(f"{made} by another program or version{instead}")
        if about.get("space") != self.space.digest:
            raise SettingError(f"{made} for another space than this network's{instead}")
        self.made_with = str(about.get("weights"))
        if self.weights is not None and self.made_with != self.weights:
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
        study = self._study
        assert study is not None
        return self._ask(lambda: study.get_trials(deepcopy=False))

    def _claimed(self, config: str) -> int | None:
        """Returns the trial of a claim by this worker whose acknowledgement was lost."""
        for trial in self._trials():
            signature = trial.user_attrs.get("worker", {})
            mine = signature.get("token") == self._worker.token
            if (
                mine
                and trial.state == TrialState.RUNNING
                and trial.user_attrs["config"] == config
            ):
                return trial._trial_id
        return None

    def _running(self, config: Config, source: str) -> FrozenTrial:
        about: dict[str, Any] = {"source": source} if source else {}
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
            user_attrs={
                "config": config.to_json(),
                "worker": self._worker.signature(),
                **about,
            },
            system_attrs={},
            intermediate_values={},
        )

    def _distributions(self, config: Config) -> dict[str, BaseDistribution]:
        return {name: self._by_site[name] for name in config}

    @functools.cached_property
    def _by_site(self) -> dict[str, BaseDistribution]:
        return {site.name: CategoricalDistribution(site.choices) for site in self.space.sites}

    def _fail_silent(self) -> None:
        study = self._study
        if isinstance(self._storage, RDBStorage) and study is not None:
            with _without_experimental_warnings():
                self._ask(lambda: optuna.storages.fail_stale_trials(study))

    def _close_trial(
        self,
        trial: int,
        state: TrialState,
        attributes: Mapping[str, Any],
        values: Sequence[float] | None,
    ) -> bool:
        def stored() -> bool:
            try:
                for key, value in attributes.items():
                    self._storage.set_trial_user_attr(trial, key, value)
                self._storage.set_trial_state_values(trial, state, values)
            except optuna.exceptions.UpdateFinishedTrialError:
                return False
            return True

        return self._ask(stored)

    def _config(self, trial: FrozenTrial) -> Config:
        try:
            return self.space.canonical(Config.from_json(trial.user_attrs["config"]))
        except (KeyError, SettingError) as error:
            raise self._damaged(f"trial {trial.number}: {error!r}") from error

    def _read(self, trial: FrozenTrial) -> Evaluation | Stopped:
        try:
            attributes = trial.user_attrs
            measured = (self._config(trial), attributes["metrics"], attributes["costs"])
            source = attributes.get("source", "")
            evaluation: Evaluation | Stopped = Evaluation(*measured, source)
            if trial.state == TrialState.PRUNED:
                winner = Config.from_json(attributes["winner"])
                known = (attributes["errors"], attributes["share"], winner)
                evaluation = Stopped(*measured, *known)
            stored = [evaluation.values[o.name] for o in self.objectives]
            intact = attributes["sha256"] == _seal(evaluation)
        except (KeyError, TypeError, AttributeError, SettingError) as error:
            raise self._damaged(f"trial {trial.number}: {error!r}") from error
        if not intact or (trial.state == TrialState.COMPLETE and trial.values != stored):
            raise self._damaged(f"trial {trial.number} doesn't match its checksum")
        return evaluation

    def _damaged(self, why: str) -> CheckpointError:
        return CheckpointError(f"the study {self.shown} is damaged ({why}); use another file")

    @property
    def _is_postgres(self) -> bool:
        return isinstance(self._storage, RDBStorage) and (
            self._storage.engine.dialect.name == "postgresql"
        )

    def _ask(
        self, work: Callable[[], _Result], *, done: Callable[[], _Result | None] | None = None
    ) -> _Result:
        """Asks the database, again if its server was away for a while.

        Args:
            work: What to do; it does no harm to do it twice, unless `done` is given.
            done: After a connection broke, finds the result if the work was done all the same.
        """
        deadline: float | None = None
        while True:
            with self._guard():
                try:
                    return work()
                except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
                    if self._file is not None or not is_away(error):
                        raise
                    deadline = self._patience(deadline, error)
            time.sleep(_AWAY_POLL_SECONDS)
            self._forget_connections()
            found = None if done is None else done()
            if found is not None:
                return found

    def _patience(self, deadline: float | None, error: Exception) -> float:
        """Returns until when to wait for the server; said once, and not for ever."""
        if deadline is None:
            warnings.warn(
                f"the database {self.shown} is away; waiting for it, "
                f"{AWAY_SECONDS:.0f} s at most",
                SuppleWarning,
                stacklevel=2,
            )
            return time.monotonic() + AWAY_SECONDS
        if time.monotonic() > deadline:
            raise CheckpointError(
                f"the database {self.shown} was away for {AWAY_SECONDS:.0f} s "
                f"({cause_of(error)}); what was finished is kept: start it, then run the same "
                "command again"
            ) from error
        return deadline

    def _forget_connections(self) -> None:
        assert isinstance(self._storage, RDBStorage)
        self._storage.scoped_session.remove()
        self._storage.engine.dispose()

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        """Names the file in whatever the database raises, and keeps optuna quiet."""
        try:
            with quiet():
                yield
        except SuppleError:
            raise
        except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
            raise CheckpointError(fault_text(self.shown, error)) from error
        except (ValueError, LookupError, TypeError, AttributeError, AssertionError) as error:
            # Only optuna runs in here, on arguments that are right: what it read is wrong.
            raise self._damaged(repr(error)) from error
        except RuntimeError as error:
            # optuna's way to say that the tables are of another version.
            maker = re.search(r"set up by optuna ([^)]+)\).*updating optuna", str(error))
            if maker:
                raise CheckpointError(self._newer(maker[1])) from error
            raise CheckpointError(
                f"can't use the study {self.shown}: {one_line(str(error))}"
            ) from error


def _counts(trial: FrozenTrial) -> bool:
    """Says whether a trial counts as an evaluation: also if it was stopped, or not finite."""
    if trial.state in (TrialState.COMPLETE, TrialState.PRUNED):
        return True
    return trial.state == TrialState.FAIL and trial.user_attrs.get("reason") == _NOT_FINITE


def _refusal(trials: Sequence[FrozenTrial], config: str, limit: int) -> Claim | None:
    """Returns why a config can't be claimed beside these trials; a limit below 0 is none."""
    held = [t for t in trials if t.state == TrialState.RUNNING or _counts(t)]
    if any(trial.user_attrs.get("config") == config for trial in held):
        return Claim.TAKEN
    own = [trial for trial in held if not trial.user_attrs.get("source")]
    return Claim.FULL if 0 <= limit <= len(own) else None


def _seal(evaluation: Evaluation | Stopped) -> str:
    content: list[Any] = [dict(evaluation.config), dict(evaluation.metrics)]
    content.append(dict(evaluation.costs))
    if isinstance(evaluation, Stopped):
        content += [dict(evaluation.errors), evaluation.share, dict(evaluation.winner)]
    return checksum(content)


def _worded(objectives: Sequence[Objective]) -> str:
    return (
        ", ".join(f"{o.name} ({'up' if o.maximize else 'down'})" for o in objectives) or "none"
    )


@contextlib.contextmanager
def _without_experimental_warnings() -> Iterator[None]:
    # Heartbeats and names of metrics are marked experimental since optuna 2.6 and 3.2.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps optuna from logging every step, and leaves its setting as it was."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
