"""Runs that are killed again and again end as if nothing had happened."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest

from tests.faults.command import Command
from tests.faults.recipe import CHECKPOINT_EVERY, RECIPE, Committed, leftovers, outcome

RUNS, KILLS = 3, 10
"""How many runs, and how often each is killed."""


def command(folder: Path) -> Command:
    """The command, always the same."""
    (folder / "recipe.yaml").write_text(RECIPE)
    return Command(["run", folder / "recipe.yaml", "-o", folder, "-q"], folder)


@dataclass(frozen=True)
class Whole:
    """A run that was left alone.

    Args:
        folder: Its folder.
        seconds: How long it took.
        again: How long the same command takes when there is nothing left to do.
    """

    folder: Path
    seconds: float
    again: float


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = tmp_path_factory.mktemp("whole")
    Command(["version"], folder).succeeded()  # starts the process that the others start from
    seconds = command(folder).succeeded()
    again = command(folder).succeeded()
    return Whole(folder / "killed", seconds, again)


class KilledRun:
    """A run whose processes are killed one after the other.

    Args:
        folder: An empty folder.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        self.run = folder / "killed"
        self.committed = Committed.of(self.run)
        self.hit: list[str] = []

    def kill_after(self, seconds: float) -> bool:
        """Starts the command and kills it, unless it ended before; says whether it was."""
        process = command(self.folder)
        if process.wait(seconds):
            assert process.process.exitcode == 0, process.log.read_text()
            self._check(process, killed=False)
            return False
        process.kill()
        self._check(process, killed=True)
        return True

    def finish(self) -> None:
        """Lets the command come to its end."""
        process = command(self.folder)
        process.succeeded()
        self._check(process, killed=False)

    def _check(self, process: Command, *, killed: bool) -> None:
        before, after = self.committed, Committed.of(self.run)
        before.is_kept_in(after)
        steps = [int(step) for step in process.did("step")]
        assert steps == list(range(before.checkpoint + 1, before.checkpoint + 1 + len(steps)))
        evaluated = process.did("evaluate")
        assert not set(evaluated) & set(before.evaluations)
        assert len(evaluated) == len(set(evaluated))
        assert not set(process.did("export")) & set(before.exported)
        lost = [config for config in evaluated if config not in after.evaluations]
        assert len(lost) <= killed
        if killed and "train" not in after.stages:
            assert len(steps) - (after.checkpoint - before.checkpoint) <= CHECKPOINT_EVERY
        if killed:
            self.hit.append(after.stage)
        self.committed = after


@pytest.mark.slow
def test_runs_killed_at_random_moments_end_as_if_they_had_not_been(
    whole: Whole, tmp_path: Path
) -> None:
    runs: list[KilledRun] = []
    for seed in range(RUNS):
        # Each start costs time in which nothing is done, so a killed run takes longer.
        length = whole.seconds + KILLS * whole.again / 2
        drawn = random.Random(seed)
        moments = sorted(drawn.uniform(0, length) for _ in range(KILLS))
        run = KilledRun(tmp_path / f"run-{len(runs)}")
        for gap in (end - start for start, end in pairwise([0.0, *moments])):
            if not run.kill_after(gap):
                # It is done already: what is left of the kills meets another run.
                runs.append(run)
                run = KilledRun(tmp_path / f"run-{len(runs)}")
                assert run.kill_after(min(gap, whole.seconds / 2))
        run.finish()
        runs.append(run)
    for run in runs:
        assert_equal(run, whole)
    hit = Counter(stage for run in runs for stage in run.hit)
    print(f"{hit.total()} kills of {len(runs)} runs: {dict(hit)}")
    assert hit.total() == RUNS * KILLS
    assert {"train", "search", "deploy"} <= set(hit)


@pytest.mark.slow
def test_a_run_killed_between_two_exports_makes_only_the_second_one(
    whole: Whole, tmp_path: Path
) -> None:
    shutil.copytree(whole.folder, tmp_path / "killed")
    half = tmp_path / "killed" / "deploy" / "half"
    for lost in ("done.json", "network.pt2", ".network.pt2.json"):
        (half / lost).unlink()
    onnx = (half / "network.onnx").stat().st_mtime_ns
    process = command(tmp_path)
    process.succeeded()
    assert process.did("export") == [str(half / "network.pt2")]
    assert (half / "network.onnx").stat().st_mtime_ns == onnx
    assert not process.did("step")
    assert not process.did("evaluate")


def assert_equal(killed: KilledRun, whole: Whole) -> None:
    """Asserts that a run ended as the one that was left alone."""
    final, expected = killed.committed, Committed.of(whole.folder)
    assert list(final.evaluations.items()) == list(expected.evaluations.items())
    assert final.running == 0
    assert set(final.interrupted) <= set(final.evaluations)
    assert len(final.interrupted) <= len(killed.hit)
    assert outcome(killed.run) == outcome(whole.folder)
    assert not leftovers(killed.run)
