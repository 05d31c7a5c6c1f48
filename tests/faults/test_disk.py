"""Full disks and folders that can't be written: one line of words, and nothing is lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import supple
import supple.recipe.run
import supple.storage
import supple.training.checkpoint
from supple.files import read_json
from supple.study.store import StudyStore
from tests.faults.commands import refused, run
from tests.faults.disks import Disk, mounted
from tests.faults.recipe import Committed, leftovers

FORMATS = ["onnx", "pt2", "xml"]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    with mounted(tmp_path / "disk") as one:
        yield one


def filling_before(
    disk: Disk, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str
) -> Callable[[], None]:
    """Makes the disk full right before a function is called; gives the way back."""
    real = getattr(owner, name)

    def called(*words: Any, **named: Any) -> Any:
        disk.fill()
        return real(*words, **named)

    monkeypatch.setattr(owner, name, called)
    return lambda: monkeypatch.setattr(owner, name, real)


CASES = {  # the function before which the disk is full, and what the message names
    "checkpoint": (supple.training.checkpoint, "save", "step-00000002"),
    "trained network": (supple.storage, "save", "supernet"),
    "study": (StudyStore, "finish", "study.db"),
    "saved network": (supple, "save", "network"),
    "onnx": (supple, "export", "network.onnx"),
    "pt2": (supple, "export", "network.pt2"),
    "xml": (supple, "export", "network.xml"),
    "report": (supple.recipe.run, "write_report", "report.html"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_full_disk_is_told_with_the_file_and_loses_nothing(
    disk: Disk, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    owner, name, file = CASES[case]
    export = f"deploy.export=[{case}]" if case in FORMATS else "deploy.export=[]"
    back = filling_before(disk, monkeypatch, owner, name)
    message = refused(run(disk.path, export), file)
    assert any(word in message for word in ("room", "full", "space"))
    folder = disk.path / "small"
    before = Committed.of(folder)
    assert not leftovers(folder)
    back()
    disk.empty()
    again = run(disk.path, export)
    assert again.exit_code == 0, again.output
    after = Committed.of(folder)
    before.is_kept_in(after)
    assert len(after.evaluations) == 4
    assert read_json(folder / "summary.json")


@pytest.mark.slow
def test_a_read_only_folder_is_told_and_stays_as_it_is(disk: Disk) -> None:
    with disk.read_only():
        refused(run(disk.path), str(disk.path / "small"), "Read-only", "--output")
    assert not list(disk.path.iterdir())
    assert run(disk.path).exit_code == 0
    before = {path: path.stat().st_mtime_ns for path in disk.path.rglob("*")}
    with disk.read_only():
        refused(run(disk.path, "search.evaluations=6"), str(disk.path / "small"))
    assert {path: path.stat().st_mtime_ns for path in disk.path.rglob("*")} == before
