"""Several `supple search` commands share one study, and one of them is killed."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.faults.command import Command
from tests.faults.postgres import running
from tests.faults.recipe import RECIPE, trials

SIZES = 40


def search(folder: Path, *more: object, evaluations: int = SIZES) -> Command:
    """A worker on the run in a folder."""
    (folder / "recipe.yaml").write_text(RECIPE)
    words = ["search", folder / "recipe.yaml", "train.steps=30", "-o", folder, "-q"]
    return Command([*words, f"search.evaluations={evaluations}", *more], folder)


def kill_in_search(worker: Command, evaluations: int) -> None:
    """Kills a worker as soon as it has begun so many evaluations."""
    while len(worker.did("evaluate")) < evaluations:
        assert not worker.wait(0), worker.log.read_text()
        time.sleep(0.002)
    worker.kill()


def assert_shared(workers: list[Command], failed: tuple[str, ...]) -> None:
    """Asserts that nothing was evaluated twice but what the killed worker was at."""
    times = Counter(config for worker in workers for config in worker.did("evaluate"))
    assert {config for config, number in times.items() if number > 1} == set(failed)
    assert set(times.values()) <= {1, 2}


@pytest.mark.slow
@pytest.mark.parametrize("killed_at", [2, 5, 8])
def test_workers_on_one_machine_go_on_when_one_is_killed(
    tmp_path: Path, killed_at: int
) -> None:
    workers = [search(tmp_path) for _ in range(3)]
    kill_in_search(workers[0], killed_at)
    for worker in workers[1:]:
        worker.succeeded()
    complete, failed, still = trials(tmp_path / "killed" / "search" / "study.db")
    assert len(complete) == SIZES
    assert still == 0
    assert set(failed) <= set(complete)
    assert len(failed) <= 1
    assert_shared(workers, failed)
    assert sum(bool(worker.did("step")) for worker in workers) == 1
    front = json.loads((tmp_path / "killed" / "search" / "front.json").read_text())
    assert len(front["evaluated"]) == SIZES
    again = search(tmp_path)
    again.succeeded()
    assert not again.did("evaluate")


@pytest.mark.slow
def test_workers_on_two_machines_share_a_database(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    with (
        tempfile.TemporaryDirectory(prefix="supple-postgres-") as folder,
        running(Path(folder)) as server,
    ):
        study = ("--study", server.url)
        search(here, *study, evaluations=2).succeeded()
        shutil.copytree(here, there)
        workers = [search(one, *study) for one in (here, there)]
        kill_in_search(workers[0], 6)
        workers[1].succeeded()
        states = Counter(state for (state,) in server.query("SELECT state FROM trials"))
        names = server.query("SELECT study_name FROM studies")
        last = search(here, *study)
        last.succeeded()
    assert [str(name).rpartition("-")[0] for (name,) in names] == ["killed"]
    assert states["COMPLETE"] == SIZES
    assert states["RUNNING"] == 0
    assert states["FAIL"] <= 1
    times = Counter(config for worker in workers for config in worker.did("evaluate"))
    assert sum(number - 1 for number in times.values()) == states["FAIL"]
    assert not last.did("evaluate")
    fronts = [(one / "killed/search/front.json").read_text() for one in (here, there)]
    assert fronts[0] == fronts[1]
