from __future__ import annotations

import gc
import subprocess
import sys
import time
from pathlib import Path

import pytest

from supple.testing.timing import charged, collections

SOURCE = """
import time
import pytest

def burn(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass

@pytest.mark.cpu_budget("greedy", 0.2)
@pytest.mark.parametrize("part", range(3))
def test_greedy(part):
    burn(0.3)

@pytest.mark.cpu_budget("modest", 0.2)
@pytest.mark.parametrize("part", range(2))
def test_modest(part):
    burn(0.02)

@pytest.mark.cpu_budget("sleepy", 0.2)
def test_sleepy():
    time.sleep(0.3)
"""


def _run(tmp_path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "test_budgets.py").write_text(SOURCE, encoding="utf-8")
    (tmp_path / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-p", "supple.testing.timing", *options]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("options", [(), ("-n", "2")], ids=["one process", "two workers"])
def test_a_group_over_its_budget_of_cpu_time_fails_the_run(
    tmp_path: Path, options: tuple[str, ...]
) -> None:
    done = _run(tmp_path, *options)
    assert done.returncode == 1, done.stdout
    assert "6 passed" in done.stdout
    (line,) = [line for line in done.stdout.splitlines() if "s of CPU" in line]
    assert line.startswith("greedy: 0.")
    assert line.endswith("at most 0.2 s allowed")


def test_groups_within_their_budgets_pass(tmp_path: Path) -> None:
    done = _run(tmp_path, "-k", "modest or sleepy")
    assert done.returncode == 0, done.stdout
    assert "s of CPU" not in done.stdout


def test_a_slow_machine_is_charged_less_and_a_fast_one_not_more() -> None:
    assert charged(1.2, before=1e-3, after=2e-3) == pytest.approx(0.8)
    assert charged(0.5, before=0.5e-3, after=0.5e-3) == 0.5


def test_a_garbage_collection_is_timed_apart() -> None:
    cycles: list[object] = []
    for _ in range(100_000):
        cycle: list[object] = []
        cycle.append(cycle)
        cycles.append(cycle)
    started = time.process_time()
    with collections() as seconds:
        gc.collect()
    assert len(seconds) == 1
    assert 0 < seconds[0] <= time.process_time() - started
    gc.collect()
    assert len(seconds) == 1
