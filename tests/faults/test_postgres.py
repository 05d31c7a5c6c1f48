"""Searches that share a study in PostgreSQL, through a server that is killed and comes back."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy

from supple.errors import CheckpointError, MissingExtraError, SuppleWarning
from supple.study import pareto as loop
from supple.study import store as module
from supple.study.objectives import Objective
from supple.study.pareto import pareto
from supple.study.store import Evaluation, StudyStore
from tests.faults.postgres import Server, running
from tests.study.stub import Net, Toy, accuracy

fork = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def home() -> Iterator[Server]:
    # Not in pytest's folder: the server's user may not enter that of root.
    with (
        tempfile.TemporaryDirectory(prefix="supple-postgres-") as folder,
        running(Path(folder)) as server,
    ):
        yield server


@pytest.fixture
def server(home: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(loop, "POLL_SECONDS", 0.05)
    yield home
    if home.process is None:
        home.start()


def start(work: Callable[[], object]) -> Any:
    def quietly() -> None:
        warnings.simplefilter("ignore", SuppleWarning)
        work()

    process = fork.Process(target=quietly)
    process.start()
    return process


class Noted:
    """Tells a file what it evaluates, and takes its time."""

    def __init__(self, log: Path, seconds: float = 0.05, hang: bool = False) -> None:
        self.log, self.seconds, self.hang = log, seconds, hang

    def __call__(self, module: Any) -> dict[str, float]:
        assert isinstance(module, Toy)
        with self.log.open("a") as file:
            file.write(f"{os.getpid()} {module.config.to_json()}\n")
        time.sleep(60 if self.hang and len(self.configs()) >= 4 else self.seconds)
        return {"accuracy": accuracy(module)}

    def lines(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []

    def configs(self) -> list[str]:
        return [line.split(maxsplit=1)[1] for line in self.lines()]


def search(server: Server, name: str, evaluate: Any, evaluations: int) -> Any:
    return functools.partial(
        pareto,
        Net(widths=6),
        evaluate,
        ["params"],
        evaluations=evaluations,
        study=server.url,
        name=name,
        progress=False,
    )


def trials(server: Server, name: str) -> dict[str, list[str]]:
    """The configs of a study's trials, by state."""
    rows = server.query(
        "SELECT t.state, a.value_json FROM trials t JOIN trial_user_attributes a "
        "ON a.trial_id = t.trial_id AND a.key = 'config' JOIN studies s "
        f"ON s.study_id = t.study_id WHERE s.study_name = '{name}' ORDER BY t.number"
    )
    found: dict[str, list[str]] = {}
    for state, config in rows:
        found.setdefault(str(state), []).append(str(config))
    return found


def wait_for(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 40
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def joined(*workers: Any) -> None:
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0


def one_each(configs: list[str], number: int) -> None:
    assert len(configs) == len(set(configs)) == number


@pytest.mark.slow
def test_two_workers_share_a_study_and_repeat_nothing(server: Server, tmp_path: Path) -> None:
    noted = Noted(tmp_path / "log")
    work = search(server, "share", noted, 24)
    joined(*[start(work) for _ in range(2)])
    found = trials(server, "share")
    one_each(found["COMPLETE"], 24)
    one_each(noted.configs(), 24)  # the first evaluation, before there is a study, included
    shares = Counter(line.split()[0] for line in noted.lines())
    assert len(shares) == 2
    assert min(shares.values()) >= 6


@pytest.mark.slow
def test_what_a_killed_worker_was_at_fails_and_is_repeated(
    server: Server, tmp_path: Path
) -> None:
    noted, hangs = Noted(tmp_path / "log"), Noted(tmp_path / "log", hang=True)
    victim = start(search(server, "killed", hangs, 16))
    wait_for(lambda: len(noted.lines()) >= 4)
    other = start(search(server, "killed", noted, 16))
    wait_for(lambda: len(trials(server, "killed").get("COMPLETE", [])) >= 8)
    os.kill(victim.pid, signal.SIGKILL)
    victim.join()
    joined(other)
    found = trials(server, "killed")
    one_each(found["COMPLETE"], 16)
    assert len(found["FAIL"]) == 1
    assert found["FAIL"][0] in found["COMPLETE"]
    assert "RUNNING" not in found
    repeated = [config for config, times in Counter(noted.configs()).items() if times > 1]
    assert len(repeated) == 1


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_workers_wait_for_a_server_that_was_killed(
    server: Server, tmp_path: Path, seed: int
) -> None:
    name, noted = f"server-{seed}", Noted(tmp_path / "log", seconds=0.03)
    workers = [start(search(server, name, noted, 40)) for _ in range(2)]
    wait_for(lambda: len(noted.lines()) >= 6 + 7 * seed)
    before = trials(server, name).get("COMPLETE", [])
    server.kill()
    time.sleep(1.0)
    assert all(worker.is_alive() for worker in workers)
    server.start()
    joined(*workers)
    found = trials(server, name)
    assert set(before) <= set(found["COMPLETE"])
    one_each(found["COMPLETE"], 40)
    assert "RUNNING" not in found


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["create_new_trial", "set_trial_state_values"])
def test_what_was_done_before_the_connection_broke_is_not_done_again(
    server: Server, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    space = Net().space
    with StudyStore(server.url, name=lost, space=space) as store:
        store.create([Objective("accuracy", True)])
        real, broken = getattr(store._storage, lost), []

        def breaks_after(*words: Any, **named: Any) -> Any:
            result = real(*words, **named)
            if not broken:
                broken.append(result)
                raise sqlalchemy.exc.OperationalError("COMMIT", {}, Exception("gone"))
            return result

        monkeypatch.setattr(store._storage, lost, breaks_after)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SuppleWarning)
            trial = store.claim(space.largest(), 5)
            assert isinstance(trial, int)
            store.finish(trial, Evaluation(space.largest(), {"accuracy": 0.5}, {}))
        assert len(store.results()) == 1
        assert not store.busy()
    assert {state: len(some) for state, some in trials(server, lost).items()} == {"COMPLETE": 1}


@pytest.mark.slow
def test_a_server_that_stays_away_ends_the_search_and_loses_nothing(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "AWAY_SECONDS", 1.0)
    noted = Noted(tmp_path / "log")

    def kills_at_ninth(model: Any) -> dict[str, float]:
        if len(noted.lines()) == 8:
            server.kill()
        return noted(model)

    began = time.monotonic()
    with (
        pytest.warns(SuppleWarning, match="waiting for it, 1 s at most"),
        pytest.raises(CheckpointError, match=r"was away for 1 s .*refused.* kept: start it"),
    ):
        search(server, "away", kills_at_ninth, 12)()
    assert time.monotonic() - began < 20
    server.start()
    assert len(trials(server, "away")["COMPLETE"]) == 8
    front = search(server, "away", noted, 12)()
    assert len(front.evaluated) == 12
    found = trials(server, "away")
    one_each(found["COMPLETE"], 12)
    assert len(found["FAIL"]) == 1


@pytest.mark.slow
def test_a_server_that_is_not_there_is_named_without_its_password(server: Server) -> None:
    server.kill()
    url = server.url.replace("postgres@", "postgres:secret@")
    with pytest.raises(CheckpointError, match="no server answers there") as caught:
        pareto(Net(), accuracy, ["params"], study=url, progress=False)
    assert "secret" not in str(caught.value)
    assert str(server.port) in str(caught.value)


def test_a_missing_driver_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    real = importlib.import_module

    def without(name: str, *rest: Any) -> Any:
        if name == "psycopg":
            raise ModuleNotFoundError("No module named 'psycopg'", name="psycopg")
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(MissingExtraError, match=r"'psycopg'.*supple\[postgres\]"):
        pareto(Net(), accuracy, ["params"], study="postgresql://u:p@host/db", progress=False)
