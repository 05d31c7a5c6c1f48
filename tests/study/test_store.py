"""Truths about the study store."""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest

from supple.errors import CheckpointError, SettingError
from supple.space import Config, Site, Space
from supple.study import store as module
from supple.study.database import shown
from supple.study.objectives import Objective
from supple.study.store import MEMORY, Claim, Evaluation, StudyStore
from supple.study.workers import Worker

SPACE = Space([Site("a", "width", (2, 4, 8), 8), Site("b", "width", (1, 3), 3)])
OBJECTIVES = (Objective("accuracy", True), Objective("params", False))
ONE, TWO = SPACE.config(a=2), SPACE.config(a=4)


def evaluation(config: Config, accuracy: float = 0.5) -> Evaluation:
    return Evaluation(config, {"accuracy": accuracy}, {"params": 7.0, "macs": 9.0})


@contextlib.contextmanager
def opened(where: Path | str, name: str = "s", weights: str = "w") -> Iterator[StudyStore]:
    with StudyStore(where, name=name, space=SPACE, weights=weights) as store:
        if not store.exists:
            store.create(OBJECTIVES)
        yield store


def taken(store: StudyStore, config: Config, limit: int = 100) -> int:
    trial = store.claim(config, limit)
    assert isinstance(trial, int)
    return trial


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "study.db"


@pytest.fixture
def filled(path: Path) -> Path:
    with opened(path) as store:
        store.finish(taken(store, ONE), evaluation(ONE))
    return path


@pytest.mark.parametrize("where", ["file", MEMORY])
def test_what_is_finished_is_read_back(path: Path, where: str) -> None:
    with opened(path if where == "file" else MEMORY) as store:
        assert store.finish(taken(store, ONE), evaluation(ONE))
        assert store.results() == [evaluation(ONE)]
        assert not store.busy()


def test_a_study_is_there_when_opened_again(filled: Path) -> None:
    with StudyStore(filled, name="s", space=SPACE, weights="w") as store:
        assert store.objectives == OBJECTIVES
        assert store.results() == [evaluation(ONE)]


def test_a_config_is_claimed_once(path: Path) -> None:
    with opened(path) as store, opened(path) as other:
        trial = taken(store, ONE)
        assert store.claim(ONE, 100) is Claim.TAKEN
        assert other.claim(ONE, 100) is Claim.TAKEN
        assert isinstance(other.claim(TWO, 100), int)
        store.finish(trial, evaluation(ONE))
        assert other.claim(ONE, 100) is Claim.TAKEN


def test_of_two_claims_at_the_same_moment_the_earlier_trial_wins(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(path) as store, opened(path) as other:
        look = other._trials
        blind = iter([[], None])

        def late() -> list[optuna.trial.FrozenTrial]:
            # The first look is made before the other claim, the second after it.
            seen = next(blind, None)
            return look() if seen is None else seen

        monkeypatch.setattr(other, "_trials", late)
        first = taken(store, ONE)
        assert other.claim(ONE, 100) is Claim.TAKEN
        assert store.finish(first, evaluation(ONE))
        assert [r.config for r in store.results()] == [ONE]


def test_no_more_are_claimed_than_wanted(path: Path) -> None:
    with opened(path) as store:
        trial = taken(store, ONE, limit=1)
        assert store.claim(TWO, 1) is Claim.FULL
        store.fail(trial, "error")
        assert isinstance(store.claim(TWO, 1), int)


def test_a_failed_config_may_be_claimed_again(path: Path) -> None:
    with opened(path) as store:
        store.fail(taken(store, ONE), "error")
        assert store.results() == []
        store.finish(taken(store, ONE), evaluation(ONE))
        assert len(store.results()) == 1


def test_values_that_are_not_finite_count_and_are_not_repeated(path: Path) -> None:
    with opened(path) as store:
        store.finish(taken(store, ONE), evaluation(ONE, float("nan")))
        assert store.claim(ONE, 100) is Claim.TAKEN
        (result,) = store.results()
        assert result.config == ONE
        assert result.metrics["accuracy"] != result.metrics["accuracy"]


def test_trials_of_workers_that_are_gone_fail_and_others_stay(path: Path) -> None:
    with opened(path) as store:
        trial = taken(store, ONE)
        with opened(path) as other:
            assert other.fail_interrupted() == []
            store._worker.close()
            assert other.fail_interrupted() == [ONE]
            assert not other.busy()
            assert not store.finish(trial, evaluation(ONE))
            assert other.results() == []


def test_a_process_that_ended_or_whose_number_went_to_another_one_is_gone() -> None:
    worker = Worker()
    mine = worker.signature()
    assert not Worker.is_gone(mine)
    assert Worker.is_gone({**mine, "pid": 2**22 + 1})
    assert Worker.is_gone({**mine, "started": mine["started"] - 1})
    assert not Worker.is_gone({**mine, "pid": os.getppid(), "machine": "elsewhere"})
    worker.close()
    assert Worker.is_gone(mine)


def test_workers_elsewhere_that_stop_beating_fail(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signature = {"machine": "elsewhere", "pid": 1, "started": 0.0, "token": ""}
    monkeypatch.setattr(Worker, "signature", lambda _: signature)
    with opened(path) as store:
        trial = taken(store, ONE)
        with store.working_on(trial):
            assert store.fail_interrupted() == []
        with contextlib.closing(sqlite3.connect(path)) as connection, connection:
            connection.execute(
                "UPDATE trial_heartbeats SET heartbeat = datetime('now', '-200 seconds')"
            )
        assert store.fail_interrupted() == [ONE]


def test_a_study_for_something_else_is_refused(filled: Path) -> None:
    larger = Space([*SPACE.sites, Site("c", "width", (1, 2), 2)])
    with pytest.raises(
        SettingError, match=r"study 's' in .*study.db was made for another space"
    ):
        StudyStore(filled, name="s", space=larger, weights="w")
    with pytest.raises(SettingError, match="with other weights"):
        StudyStore(filled, name="s", space=SPACE, weights="x")
    with opened(filled) as store, pytest.raises(SettingError, match=r"accuracy \(up\), params"):
        store.check(OBJECTIVES[:1])
    with opened(filled, name="another") as store:
        assert store.results() == []


def test_a_study_of_another_program_is_refused(path: Path) -> None:
    path.parent.mkdir()
    storage = optuna.storages.RDBStorage(f"sqlite:///{path}")
    study = optuna.create_study(storage=storage, study_name="s")
    study.add_trial(optuna.trial.create_trial(value=1.0))
    storage.scoped_session.remove()
    storage.engine.dispose()
    with pytest.raises(SettingError, match="made by another program"):
        StudyStore(path, name="s", space=SPACE)


def test_a_study_of_a_newer_layout_is_refused_as_such(filled: Path) -> None:
    with contextlib.closing(sqlite3.connect(filled)) as connection, connection:
        connection.execute(
            "UPDATE study_user_attributes "
            "SET value_json = replace(value_json, '\"schema\": 1', '\"schema\": 2')"
        )
    with pytest.raises(SettingError, match=r"newer version of Supple .*update Supple"):
        StudyStore(filled, name="s", space=SPACE, weights="w")


@pytest.mark.parametrize(
    ("table", "column", "value"),
    [("version_info", "schema_version", "99"), ("alembic_version", "version_num", "'v99.0.a'")],
)
def test_tables_of_a_newer_optuna_are_refused_and_left_alone(
    filled: Path, table: str, column: str, value: str
) -> None:
    with contextlib.closing(sqlite3.connect(filled)) as connection, connection:
        connection.execute(f"UPDATE {table} SET {column} = {value}")
    before = dumped(filled)
    with pytest.raises(CheckpointError, match=r"study\.db: .*newer.*\d\.\d.*update") as caught:
        StudyStore(filled, name="s", space=SPACE, weights="w")
    assert "\n" not in str(caught.value)
    assert dumped(filled) == before


def dumped(path: Path) -> list[str]:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        return list(connection.iterdump())


@pytest.mark.parametrize(
    "place", ["postgresql://u:secret@h:5432/d", "mysql://h/d?user=u&password=secret&x=1"]
)
def test_a_password_is_not_shown(place: str) -> None:
    assert "secret" not in shown(place)
    assert "***" in shown(place)
    assert shown("runs/a.db") == "runs/a.db"


@pytest.mark.parametrize("where", ["study", "study.txt", "study.json"])
def test_a_place_that_is_no_study_is_refused(where: str) -> None:
    with pytest.raises(SettingError, match=r"ends in \.db"):
        StudyStore(where, name="s", space=SPACE)


def test_a_file_that_is_no_database_is_named(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"no database at all, just words" * 100)
    with pytest.raises(CheckpointError, match=r"study\.db: it is no SQLite database"):
        StudyStore(path, name="s", space=SPACE)


def test_a_folder_that_cannot_be_is_named(path: Path) -> None:
    path.parent.touch()
    with pytest.raises(CheckpointError, match=r"study\.db"):
        StudyStore(path, name="s", space=SPACE)
    path.parent.unlink()
    path.mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"study\.db: it can't be opened"):
        StudyStore(path, name="s", space=SPACE)


def test_a_locked_file_is_named(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOCK_SECONDS", 0.05)
    with contextlib.closing(sqlite3.connect(filled)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        with pytest.raises(CheckpointError, match=r"study\.db: another program has locked it"):
            StudyStore(filled, name="s", space=SPACE, weights="w")


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE trial_values SET value = value + 0.25",
        "UPDATE trial_user_attributes SET value_json = replace(value_json, '0.5', '0.7')",
        "UPDATE trial_user_attributes SET value_json = replace(value_json, '\"', '')",
        "DELETE FROM trial_user_attributes WHERE key = 'costs'",
        "UPDATE trial_user_attributes SET value_json = '7' WHERE key = 'config'",
    ],
)
def test_values_that_were_changed_on_the_disk_are_not_believed(
    filled: Path, change: str
) -> None:
    with contextlib.closing(sqlite3.connect(filled)) as connection, connection:
        assert connection.execute(change).rowcount > 0
    with pytest.raises(CheckpointError, match=r"study\.db"), opened(filled) as store:
        store.results()


def test_optuna_stays_quiet_and_keeps_its_own_setting(
    path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    before = optuna.logging.get_verbosity()
    with caplog.at_level(logging.DEBUG), opened(path) as store:
        store.finish(taken(store, ONE), evaluation(ONE))
    assert optuna.logging.get_verbosity() == before
    assert capfd.readouterr() == ("", "")


def test_optuna_reads_the_study_as_its_own(filled: Path) -> None:
    storage = optuna.storages.RDBStorage(f"sqlite:///{filled}")
    study = optuna.load_study(study_name="s", storage=storage)
    (trial,) = study.best_trials
    assert [d.name for d in study.directions] == ["MAXIMIZE", "MINIMIZE"]
    assert trial.values == [0.5, 7.0]
    assert trial.params == {"a": 2, "b": 3}
    assert trial.distributions["a"] == optuna.distributions.CategoricalDistribution((2, 4, 8))
    assert trial.user_attrs["config"] == '{"a":2,"b":3}'
    assert trial.user_attrs["metrics"] == {"accuracy": 0.5}
    assert trial.user_attrs["costs"] == {"params": 7.0, "macs": 9.0}
    assert study.metric_names == ["accuracy", "params"]
    storage.scoped_session.remove()
    storage.engine.dispose()
