"""A search whose Ray workers, or whose own process, are killed: nothing finished is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.faults.command import Command
from tests.faults.recipe import RECIPE, trials
from tests.guards import ROOT

pytest.importorskip("ray")
pytestmark = pytest.mark.slow

SIZES, WORKERS = 24, "ray:2"
PATIENCE = 300.0


@dataclass(frozen=True)
class Step:
    """A line of a trace."""

    what: str
    pid: int
    config: str


class Search:
    """A search in a process of its own, with a cluster of its own.

    Args:
        folder: Where its study and its trace are.
        evaluations: How many the study is to hold.
    """

    def __init__(self, folder: Path, evaluations: int = SIZES) -> None:
        self.folder = folder
        self.log = folder / "log"
        words = [sys.executable, "-m", "tests.faults.ray_search"]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*words, str(folder), str(evaluations), WORKERS],
                stdout=log,
                stderr=log,
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            )
        self.family: set[psutil.Process] = set()

    def steps(self) -> list[Step]:
        """What all evaluations noted so far."""
        trace = self.folder / "trace"
        if not trace.exists():
            return []
        lines = [line.split(maxsplit=2) for line in trace.read_text().splitlines()]
        return [Step(what, int(pid), config) for what, pid, config in lines]

    def until(self, holds: Callable[[list[Step]], bool]) -> list[Step]:
        """Waits until something holds for what was noted; returns that."""
        deadline = time.monotonic() + PATIENCE
        while not holds(self.steps()):
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.01)
        self.family |= set(psutil.Process(self.process.pid).children(recursive=True))
        return self.steps()

    def succeeded(self) -> None:
        """Waits for its good end."""
        assert self.process.wait(PATIENCE) == 0, self.log.read_text()
        assert f"{SIZES} evaluated" in self.log.read_text()

    def leaves_nothing(self) -> None:
        """Asserts that no process of its cluster is left; Ray's agents take a minute to go."""
        _, alive = psutil.wait_procs(self.family, timeout=120)
        left = [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
        assert not left
        assert self.family


@pytest.fixture
def search(tmp_path: Path) -> Iterator[Callable[[], Search]]:
    begun: list[Search] = []

    def begin() -> Search:
        begun.append(Search(tmp_path))
        return begun[-1]

    yield begin
    for one in begun:
        if one.process.poll() is None:
            one.process.kill()
            one.process.wait()
        for process in one.family:
            if process.is_running():
                process.kill()


def begun_by_workers(search: Search, number: int) -> Callable[[list[Step]], bool]:
    """So many evaluations were begun by workers, one of which is not done with its last."""

    def holds(steps: list[Step]) -> bool:
        mine = [step for step in steps if step.pid != search.process.pid]
        return len([s for s in mine if s.what == "begin"]) >= number and bool(
            mine and mine[-1].what == "begin"
        )

    return holds


def test_a_killed_worker_loses_the_evaluation_it_was_at_and_no_other(
    search: Callable[[], Search], tmp_path: Path
) -> None:
    running = search()
    victim = running.until(begun_by_workers(running, 6))[-1]
    os.kill(victim.pid, signal.SIGKILL)
    running.until(lambda steps: len(steps) > 30)  # the worker that took its place is there, too
    running.succeeded()
    running.leaves_nothing()
    complete, failed, still = trials(tmp_path / "study.db")
    assert (len(complete), still) == (SIZES, 0)
    assert failed == (victim.config,)
    assert victim.config in complete
    begun = Counter(s.config for s in running.steps() if s.what == "begin")
    assert {config for config, times in begun.items() if times > 1} == {victim.config}
    assert len({step.pid for step in running.steps()}) == 4  # itself, two, and one more


def test_a_killed_search_goes_on_with_all_that_was_finished(
    search: Callable[[], Search], tmp_path: Path
) -> None:
    running = search()
    running.until(begun_by_workers(running, 8))
    os.kill(running.process.pid, signal.SIGKILL)
    running.process.wait()
    running.leaves_nothing()
    before, _, under_way = trials(tmp_path / "study.db")
    seen = len(running.steps())
    assert 1 <= under_way <= 2
    assert len(before) >= 6
    again = search()
    again.until(lambda steps: len(steps) > seen + 4)
    again.succeeded()
    again.leaves_nothing()
    complete, failed, still = trials(tmp_path / "study.db")
    assert (len(complete), still) == (SIZES, 0)
    assert {config: complete[config] for config in before} == before
    repeated = {s.config for s in again.steps()[seen:]} & set(before)
    assert not repeated
    assert len(failed) == under_way
    assert set(failed) <= set(complete)


def test_a_recipe_searches_with_ray(tmp_path: Path) -> None:
    # Random search asks for the same sizes, however many workers it has.
    recipe = RECIPE.replace("search/nsga2: {population: 8}", "search/random-search: {}")
    assert recipe != RECIPE
    (tmp_path / "recipe.yaml").write_text(recipe)
    words = ["search", tmp_path / "recipe.yaml", "train.steps=30", "search.evaluations=12"]
    alone, crew = tmp_path / "alone", tmp_path / "crew"
    for folder in (alone, crew):
        folder.mkdir()
    Command([*words, "-q", "-o", alone], alone).succeeded()
    Command([*words, "-q", "-o", crew, "--workers", "ray:2"], crew).succeeded()
    fronts = [
        json.loads((one / "killed/search/front.json").read_text()) for one in (alone, crew)
    ]
    values = [
        {json.dumps(p["config"]): p["values"] for p in front["evaluated"]} for front in fronts
    ]
    assert values[0] == values[1]
    assert len(values[0]) == 12
