import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from supple.errors import SettingError
from supple.recipe.workers import run_jobs


def square(number):
    return number * number


def fail_with(kind):
    if kind == "ours":
        raise SettingError("lr must be above 0, got -1")
    if kind == "die":
        os._exit(3)
    raise ZeroDivisionError("by nought")


@pytest.mark.slow
def test_every_job_is_done_once_and_its_answer_keeps_its_place():
    assert dict(run_jobs(square, [3, 5, 7, 11])) == {0: 9, 1: 25, 2: 49, 3: 121}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "error", "words"),
    [
        ("ours", SettingError, "^lr must be above 0, got -1$"),
        ("other", RuntimeError, "by nought"),
        ("die", RuntimeError, "died, exit code 3"),
    ],
)
def test_a_failing_job_raises_here_and_leaves_no_process(kind, error, words):
    with pytest.raises(error, match=words):
        list(run_jobs(fail_with, [kind], workers=1))
    assert not __import__("multiprocessing").active_children()


SLEEPER = """
import os, sys, time
sys.path.insert(0, {folder!r})
from supple.recipe.workers import run_jobs
from test_workers import sleep_and_tell
if __name__ == "__main__":
    list(run_jobs(sleep_and_tell, [{out!r}], workers=1))
"""


def sleep_and_tell(path):
    Path(path).write_text(str(os.getpid()))
    time.sleep(60)


@pytest.mark.slow
def test_workers_end_when_their_parent_is_killed(tmp_path):
    out, script = tmp_path / "pid", tmp_path / "parent.py"
    script.write_text(SLEEPER.format(folder=str(Path(__file__).parent), out=str(out)))
    parent = subprocess.Popen([sys.executable, str(script)])
    deadline = time.monotonic() + 60
    while not (out.exists() and out.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    worker = int(out.read_text())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    while _alive(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(worker)


def _alive(process):
    try:
        state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
