"""Stages of a run: computed once, recorded, and taken from the record afterwards.

Each stage owns a folder of the run. `begun.json` says from what it is being computed,
`done.json`, written last, what came out and which files belong to it. A run that was killed
finds the folder with a beginning of the same inputs and goes on inside it (checkpoints, the
study); where the inputs changed, the folder is emptied and the stage computed anew, and so are
the stages behind it, because the hash of each stage goes into the next one's inputs.

What was computed by an older version of Supple is kept, and said to be so: nobody's finished
work is thrown away by an upgrade. Delete the folder to compute it anew.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import supple
from supple import files
from supple.errors import CheckpointError, RecipeError

__all__ = ["Outcome", "Record", "RunFolder", "written_once"]

_Prepared = TypeVar("_Prepared")


@dataclass(frozen=True)
class Outcome:
    """What the work of a stage came to.

    Args:
        result: Figures, JSON-able.
        outputs: Files that belong to the stage, below its folder; their checksums are kept.
    """

    result: Mapping[str, Any]
    outputs: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Record:
    """A finished stage.

    Args:
        name: Name of the stage, also its folder's.
        digest: Hash of its inputs; part of the inputs of the stages behind it.
        result: What its work gave.
        seconds: Wall time of the work, of the last attempt if it was interrupted.
        reused: Whether it was taken from an earlier run.
        code: Version and hash of the code of Supple that made it.
        folder: Where its files lie.
    """

    name: str
    digest: str
    result: dict[str, Any]
    seconds: float
    reused: bool
    folder: Path
    code: str = ""

    @property
    def outdated(self) -> bool:
        """Whether it was made by other code than this."""
        return self.reused and self.code != code_print()


@dataclass
class RunFolder:
    """The folder of one run.

    Args:
        path: The folder; it is created.
        guest: Whether other processes are at work in it, so that nothing may be computed anew
            that they rely on.
    """

    path: Path
    records: dict[str, Record] = field(default_factory=dict)
    guest: bool = False

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """Holds the folder for this process; the system lets go when the process ends.

        Raises:
            CheckpointError: The folder can't be written.
            RecipeError: Another process is running in it.
        """
        with self._lock_file(".lock") as lock:
            if not _taken(lock, fcntl.LOCK_EX):
                raise self._busy()
            files.sweep(self.path)
            yield

    @contextlib.contextmanager
    def shared(
        self, prepare: Callable[[], _Prepared], waiting: Callable[[], None]
    ) -> Iterator[_Prepared]:
        """Holds the folder together with other processes that search.

        Args:
            prepare: Does what comes before the search; never in two processes at once. The
                first one computes, the others find the records.
            waiting: Called where another process is preparing.

        Yields:
            What `prepare` gave.

        Raises:
            CheckpointError: The folder can't be written.
            RecipeError: A whole run is going on in it, or `prepare` would change what a search
                that is going on relies on.
        """
        with self._lock_file(".lock") as lock:
            with self._lock_file(".prepare.lock") as turn:
                if not _taken(turn, fcntl.LOCK_EX):
                    waiting()
                    fcntl.flock(turn, fcntl.LOCK_EX)
                self.guest = not _taken(lock, fcntl.LOCK_EX)
                if self.guest and not _taken(lock, fcntl.LOCK_SH):
                    raise self._busy()
                if not self.guest:
                    files.sweep(self.path)
                prepared = prepare()
                if not _taken(lock, fcntl.LOCK_SH):
                    raise self._busy()
            yield prepared

    @contextlib.contextmanager
    def _lock_file(self, name: str) -> Iterator[int]:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path / name, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise CheckpointError(
                f"can't write to the run's folder {self.path}: {error.strerror or error}; "
                "choose another with --output"
            ) from error
        try:
            yield handle
        finally:
            # A process that was started meanwhile may hold a copy of the handle for a while.
            fcntl.flock(handle, fcntl.LOCK_UN)
            os.close(handle)

    def _busy(self) -> RecipeError:
        return RecipeError(
            f"another process is running in {self.path}; wait for it, or choose another "
            "folder with --output"
        )

    def finished(
        self, name: str, inputs: Mapping[str, Any], extent: Mapping[str, Any] | None = None
    ) -> Record | None:
        """Gives a stage's record if it was computed from the same inputs and its files stand.

        Args:
            name: Name of the stage.
            inputs: What the stage is computed from, JSON-able.
            extent: How far it goes, such as a number of evaluations.

        Returns:
            The record, or None where there is something to compute.

        Raises:
            CheckpointError: The record or a file of the stage is damaged.
        """
        folder = self.path / name
        if not (folder / "done.json").exists():
            return None
        done = files.read_json(folder / "done.json")
        digest = _digest(name, inputs, extent)
        if done["digest"] != digest or not _outputs_stand(folder, done["outputs"]):
            return None
        record = Record(
            name, digest, done["result"], done["seconds"], True, folder, done["code"]
        )
        self.records[name] = record
        return record

    def perform(
        self,
        name: str,
        inputs: Mapping[str, Any],
        work: Callable[[Path], Outcome],
        *,
        extent: Mapping[str, Any] | None = None,
    ) -> Record:
        """Computes a stage, or takes it from its record.

        Args:
            name: Name of the stage.
            inputs: What it is computed from; where this changed, its folder is emptied first.
            work: Does it, given the stage's folder, which may hold an interrupted attempt.
            extent: How far it goes; where only this changed, the work goes on in the folder.

        Returns:
            The record.

        Raises:
            CheckpointError: The folder can't be written, or a file in it is damaged.
        """
        found = self.finished(name, inputs, extent)
        if found is not None:
            return found
        folder = self.begin(name, inputs)
        start = time.perf_counter()
        outcome = work(folder)
        return self.complete(name, inputs, outcome, time.perf_counter() - start, extent)

    def begin(self, name: str, inputs: Mapping[str, Any]) -> Path:
        """Prepares a stage's folder: kept if it was begun from the same inputs, else emptied.

        Args:
            name: Name of the stage.
            inputs: What it is computed from.

        Returns:
            The folder.

        Raises:
            RecipeError: It would be emptied, and other processes are at work in it.
        """
        folder = self.path / name
        identity = _digest(name, inputs, None)
        begun = folder / "begun.json"
        if not (begun.exists() and files.read_json(begun)["identity"] == identity):
            if self.guest:
                raise RecipeError(
                    f"another process searches in {self.path} by a recipe with other settings "
                    f"for '{name}'; use the same ones, or another folder with --output"
                )
            if folder.exists():
                shutil.rmtree(folder)
            files.write_json(begun, {"identity": identity, "inputs": dict(inputs)})
        # The record of a smaller extent must not outlive the start of the larger one.
        (folder / "done.json").unlink(missing_ok=True)
        return folder

    def complete(
        self,
        name: str,
        inputs: Mapping[str, Any],
        outcome: Outcome,
        seconds: float,
        extent: Mapping[str, Any] | None = None,
    ) -> Record:
        """Writes the record of a stage; from then on it is not computed again.

        Args:
            name: Name of the stage.
            inputs: What it was computed from.
            outcome: What came out.
            seconds: How long it took.
            extent: How far it went.

        Returns:
            The record.
        """
        folder = self.path / name
        digest = _digest(name, inputs, extent)
        sums = {
            str(path.relative_to(folder)): files.checksum(path.read_bytes())
            for path in outcome.outputs
        }
        done = {
            "stage": name,
            "digest": digest,
            "code": code_print(),
            "seconds": seconds,
            "result": dict(outcome.result),
            "outputs": sums,
        }
        files.write_json(folder / "done.json", done)
        result = json.loads(json.dumps(done["result"]))  # as a later run will read it
        record = Record(name, digest, result, seconds, False, folder, code_print())
        self.records[name] = record
        return record


def written_once(
    path: Path, inputs: Mapping[str, Any], write: Callable[[Path], object]
) -> Path:
    """Writes a file inside a stage, unless an interrupted attempt did from the same inputs.

    Args:
        path: The file.
        inputs: What it is made from, JSON-able.
        write: Writes it, all or nothing.

    Returns:
        The path.
    """
    note = path.with_name(f".{path.name}.json")
    digest = _digest(path.name, {**inputs, "code": code_print()}, None)
    if path.exists() and note.exists():
        sha256 = files.checksum(path.read_bytes())
        if files.read_json(note) == {"digest": digest, "file": sha256}:
            return path
    note.unlink(missing_ok=True)
    write(path)
    files.write_json(note, {"digest": digest, "file": files.checksum(path.read_bytes())})
    return path


def _taken(handle: int, kind: int) -> bool:
    """Takes or changes the lock of an open file, unless others hold it."""
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@functools.cache
def code_print() -> str:
    """Version and hash of the code that computes: all of Supple but its ways of showing."""
    root = Path(supple.__file__).parent
    shown = {root / "cli", root / "report"}
    paths = sorted(path for path in root.rglob("*.py") if not shown & set(path.parents))
    joined = b"".join(path.read_bytes() for path in paths)
    return f"{supple.__version__} {files.checksum(joined)[:12]}"


def _digest(name: str, inputs: Mapping[str, Any], extent: Mapping[str, Any] | None) -> str:
    return files.checksum({"stage": name, "inputs": inputs, "extent": extent})


def _outputs_stand(folder: Path, sums: Mapping[str, str]) -> bool:
    """Whether all files are there; one that changed is an error, not a reason to recompute."""
    for name, expected in sums.items():
        path = folder / name
        if not path.exists():
            return False
        if files.checksum(path.read_bytes()) != expected:
            raise CheckpointError(
                f"{path} is not what its stage wrote (checksum differs): put it back, or "
                f"delete {folder} to compute the stage again"
            )
    return True
