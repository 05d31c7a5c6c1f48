"""The command line in processes of their own, to be killed.

A process that imports everything takes seconds, so these are forked from one that did it once.
What each does is noted in a trace as it happens: each step of training, each evaluation, each
export. A line of the trace survives the process's death as everything does that was written.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["Command"]

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.faults.preloaded"])


class Command:
    """`supple WORDS...` in another process.

    Args:
        words: What follows `supple`.
        folder: Where its output goes (`log`, after what is there) and what it did.
    """

    def __init__(self, words: list[object], folder: Path) -> None:
        self.log = folder / "log"
        self.trace = Path(tempfile.mkstemp(dir=folder, prefix="trace-")[1])
        arguments = ([str(word) for word in words], str(self.log), str(self.trace))
        self.process = _context.Process(target=_run, args=arguments)
        self.began = time.monotonic()
        self.process.start()

    def wait(self, seconds: float) -> bool:
        """Waits so long or until it has ended; says whether it has."""
        self.process.join(max(0.0, seconds - (time.monotonic() - self.began)))
        return self.process.exitcode is not None

    def did(self, kind: str) -> list[str]:
        """What it did of one kind: `"step"`, `"evaluate"` or `"export"`."""
        lines = [line.split(maxsplit=1) for line in self.trace.read_text().splitlines()]
        return [what for one, what in lines if one == kind]

    def kill(self) -> None:
        """Kills it as the system does when memory is short: without any warning."""
        os.kill(self.process.pid or 0, signal.SIGKILL)
        self.process.join()

    def succeeded(self, seconds: float = 300) -> float:
        """Waits for its end, which must be a good one; returns how long it took."""
        assert self.wait(seconds), self.log.read_text()
        assert self.process.exitcode == 0, self.log.read_text()
        return time.monotonic() - self.began


def _run(words: list[str], log: str, trace: str) -> None:
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    _traced(os.open(trace, os.O_WRONLY | os.O_CREAT | os.O_APPEND))
    from supple.cli.main import app

    app(words)


def _traced(trace: int) -> None:
    """Makes this process note what it does."""
    import supple
    from supple.study.evaluate import Evaluator
    from supple.training.history import Display

    def note(*words: object) -> None:
        os.write(trace, f"{' '.join(map(str, words))}\n".encode())

    _before(Display, "step", lambda _, done, *rest: note("step", done))
    _before(Evaluator, "__call__", lambda _, config: note("evaluate", config.to_json()))
    _before(supple, "export", lambda module, path, *rest: note("export", path))


def _before(owner: Any, name: str, note: Callable[..., None]) -> None:
    real = getattr(owner, name)

    def noted(*words: Any, **named: Any) -> Any:
        note(*words)
        return real(*words, **named)

    setattr(owner, name, noted)
