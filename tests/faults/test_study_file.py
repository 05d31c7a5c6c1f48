"""A run whose study can't be used says so in one line, and leaves the study alone."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from supple.study import store
from tests.faults.commands import refused, run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("study") / "runs"
    assert run(made).exit_code == 0
    return made


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A finished run of the test's own."""
    return Path(shutil.copytree(finished, tmp_path / "runs"))


def dumped(study: Path) -> list[str]:
    with contextlib.closing(sqlite3.connect(study)) as connection:
        return list(connection.iterdump())


def change(study: Path, words: str) -> None:
    with contextlib.closing(sqlite3.connect(study)) as connection, connection:
        assert connection.execute(words).rowcount == 1


NEWER = {
    "optuna's tables": (
        "UPDATE alembic_version SET version_num = 'v99.0.a'",
        "UPDATE alembic_version SET version_num = 'v3.2.0.a'",
        "newer version of optuna",
    ),
    "optuna's layout": (
        "UPDATE version_info SET schema_version = 99",
        "UPDATE version_info SET schema_version = 12",
        "newer version of optuna",
    ),
    "our layout": (
        "UPDATE study_user_attributes SET value_json = "
        "replace(value_json, '\"schema\": 1', '\"schema\": 2') WHERE key = 'supple'",
        "UPDATE study_user_attributes SET value_json = "
        "replace(value_json, '\"schema\": 2', '\"schema\": 1') WHERE key = 'supple'",
        "newer version of Supple",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", NEWER)
def test_a_study_of_a_newer_version_is_refused_and_left_alone(folder: Path, case: str) -> None:
    study = folder / "small" / "search" / "study.db"
    newer, back, words = NEWER[case]
    change(study, newer)
    before = dumped(study)
    refused(run(folder, "search.evaluations=5"), "study.db", words, "update")
    assert dumped(study) == before
    change(study, back)
    assert run(folder, "search.evaluations=5").exit_code == 0


@pytest.mark.slow
@pytest.mark.parametrize("lock", ["BEGIN EXCLUSIVE", "BEGIN IMMEDIATE"])
def test_a_study_that_another_program_has_locked_is_refused_and_left_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch, lock: str
) -> None:
    study = folder / "small" / "search" / "study.db"
    before = dumped(study)
    monkeypatch.setattr(store, "LOCK_SECONDS", 0.2)
    with contextlib.closing(sqlite3.connect(study)) as connection:
        connection.execute(lock)
        refused(
            run(folder, "search.evaluations=6"), "study.db", "another program has locked it"
        )
    assert dumped(study) == before
    assert run(folder, "search.evaluations=6").exit_code == 0


@pytest.mark.slow
def test_a_study_that_is_locked_in_mid_search_keeps_what_was_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "LOCK_SECONDS", 0.2)
    held: list[sqlite3.Connection] = []
    study = tmp_path / "small" / "search" / "study.db"
    real: Callable[..., bool] = store.StudyStore.finish

    def locks_at_third(self: store.StudyStore, *words: object) -> bool:
        if len(self.results()) == 2 and not held:
            held.append(sqlite3.connect(study))
            held[0].execute("BEGIN IMMEDIATE")
        return real(self, *words)

    monkeypatch.setattr(store.StudyStore, "finish", locks_at_third)
    refused(run(tmp_path), "study.db", "another program has locked it")
    held[0].close()
    assert run(tmp_path).exit_code == 0
    with contextlib.closing(sqlite3.connect(study)) as connection:
        states = [state for (state,) in connection.execute("SELECT state FROM trials")]
    assert sorted(states) == ["COMPLETE"] * 4 + ["FAIL"]
