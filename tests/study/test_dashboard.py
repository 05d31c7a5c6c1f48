"""Optuna's dashboard shows a study as `supple.pareto` writes it."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from supple.study.growing import Batchwise
from supple.study.pareto import pareto
from tests.study.stub import Net
from tests.study.test_growing import Noisy

pytest.importorskip("optuna_dashboard")


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    """A dashboard of a small study, on the loopback."""
    growing: Batchwise = Noisy().growing()
    study = tmp_path / "a.db"
    pareto(Net(), growing, ["params"], evaluations=20, study=study, progress=False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path / "log"
    command = [sys.executable, "-c", "from optuna_dashboard._cli import main; main()"]
    words = ["--host", "127.0.0.1", "--port", str(port), f"sqlite:///{study}"]
    with log.open("wb") as out:
        server = subprocess.Popen([*command, *words], stdout=out, stderr=out)
    try:
        _wait(server, port, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


def _wait(server: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + 120
    while server.poll() is None and time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            time.sleep(0.1)
    raise AssertionError(log.read_text())


def read(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=60) as answer:
        return json.loads(answer.read())


@pytest.mark.slow
def test_the_dashboard_shows_objectives_choices_and_what_became_of_each_trial(url: str) -> None:
    (summary,) = read(f"{url}/api/studies")["study_summaries"]
    assert summary["study_name"] == "pareto"
    assert summary["directions"] == ["maximize", "minimize"]
    study = read(f"{url}/api/studies/{summary['study_id']}?after=0")
    assert study["objective_names"] == ["accuracy", "params"]
    trials = study["trials"]
    assert len(trials) == 20
    states = {trial["state"] for trial in trials}
    assert states == {"Complete", "Pruned"}
    whole = next(trial for trial in trials if trial["state"] == "Complete")
    assert {one["name"] for one in whole["params"]} >= {"depth", "a"}
    assert len(whole["values"]) == 2
    attributes = {one["key"] for one in whole["user_attrs"]}
    assert attributes >= {"config", "metrics", "costs"}
    stopped = next(trial for trial in trials if trial["state"] == "Pruned")
    assert not stopped.get("values")
    assert {one["key"] for one in stopped["user_attrs"]} >= {"errors", "share", "winner"}
    with urllib.request.urlopen(f"{url}/dashboard", timeout=60) as page:
        assert b"<html" in page.read().lower()
