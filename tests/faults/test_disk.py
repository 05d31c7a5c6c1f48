"""Full disks and folders that can't be written: one line of words, and nothing is lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import supple
import supple.recipe.run
import supple.storage
import supple.training.checkpoint
from supple.cli.main import app
from supple.files import read_json
from supple.study.store import StudyStore
from tests.faults.disks import Disk, mounted
from tests.faults.recipe import Committed, leftovers
from tests.recipe.small_recipe import SMALL

FORMATS = ["onnx", "pt2", "xml"]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    with mounted(tmp_path / "disk") as one:
        yield one


def run(disk: Disk, *overrides: str) -> Result:
    recipe = disk.path.parent / "recipe.yaml"
    recipe.write_text(SMALL)
    words = ["run", str(recipe), *overrides, "compare={alone: false, cut: false}"]
    return CliRunner().invoke(app, [*words, "-o", str(disk.path), "--quiet"])


def refused(result: Result, *words: str) -> str:
    """Asserts a clean refusal in one line that says these words."""
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert result.stderr.rstrip().endswith(errors[0]), result.stderr
    assert "Traceback" not in result.output
    for word in words:
        assert word in errors[0]
    return errors[0]


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


CASES = {
    "checkpoint": (supple.training.checkpoint, "save", "step-00000002", "train/checkpoint"),
    "trained network": (supple.storage, "save", "supernet", "train"),
    "study": (StudyStore, "finish", "study.db", "search"),
    "saved network": (supple, "save", "network", "deploy"),
    "onnx": (supple, "export", "network.onnx", "deploy"),
    "pt2": (supple, "export", "network.pt2", "deploy"),
    "xml": (supple, "export", "network.xml", "deploy"),
    "report": (supple.recipe.run, "write_report", "report.html", "."),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_full_disk_is_told_with_the_file_and_loses_nothing(
    disk: Disk, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    owner, name, file, _ = CASES[case]
    export = f"deploy.export=[{case}]" if case in FORMATS else "deploy.export=[]"
    back = filling_before(disk, monkeypatch, owner, name)
    message = refused(run(disk, export), file)
    print(message)
    assert any(word in message for word in ("room", "full", "space"))
    folder = disk.path / "small"
    before = Committed.of(folder)
    assert not leftovers(folder)
    back()
    disk.empty()
    again = run(disk, export)
    assert again.exit_code == 0, again.output
    after = Committed.of(folder)
    before.is_kept_in(after)
    assert len(after.evaluations) == 4
    assert read_json(folder / "summary.json")


@pytest.mark.slow
def test_a_read_only_folder_is_told_and_stays_as_it_is(disk: Disk) -> None:
    with disk.read_only():
        refused(run(disk), str(disk.path / "small"), "Read-only", "--output")
    assert not list(disk.path.iterdir())
    assert run(disk).exit_code == 0
    before = {path: path.stat().st_mtime_ns for path in disk.path.rglob("*")}
    with disk.read_only():
        refused(run(disk, "search.evaluations=6"), str(disk.path / "small"))
    assert {path: path.stat().st_mtime_ns for path in disk.path.rglob("*")} == before
