"""Who is working on a study, and whether they still live.

An evaluation that was interrupted must be repeated, one that another worker is busy with must
not. On the same machine a worker lives if its process does; of workers elsewhere only a
heartbeat tells, which `supple.study.store` leaves to optuna.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import psutil

__all__ = ["Worker", "beating"]

_BUSY: set[str] = set()
"""Tokens of the searches that run in this process."""


class Worker:
    """One search in this process, as it signs the evaluations it is busy with."""

    def __init__(self) -> None:
        self.token = uuid.uuid4().hex
        _BUSY.add(self.token)

    def close(self) -> None:
        """Says that this worker is busy with nothing any more."""
        _BUSY.discard(self.token)

    def signature(self) -> dict[str, Any]:
        """Returns what identifies this worker, as JSON."""
        return {
            "machine": _machine(),
            "pid": os.getpid(),
            "started": _started(os.getpid()),
            "token": self.token,
        }

    @staticmethod
    def is_gone(signature: object) -> bool:
        """Says whether the worker surely lives no more.

        Args:
            signature: What `signature` gave; of a worker on another machine nothing is known.
        """
        if not isinstance(signature, Mapping) or signature.get("machine") != _machine():
            return False
        pid, started = signature.get("pid"), signature.get("started")
        if pid == os.getpid() and started == _started(os.getpid()):
            return signature.get("token") not in _BUSY
        # A process that is another one by now has another start time.
        return not isinstance(pid, int) or _started(pid) != started


def _machine() -> str:
    """Names the machine as processes see it: two containers of one name differ."""
    with contextlib.suppress(OSError):
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


def _started(pid: int) -> float | None:
    """Returns when a process started, in seconds; None if it does not run."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        if process.status() != psutil.STATUS_ZOMBIE:
            return float(process.create_time())
    return None


@contextlib.contextmanager
def beating(beat: Callable[[], None], seconds: float) -> Iterator[None]:
    """Calls `beat` at once and then every so many seconds until the end of the context.

    Args:
        beat: Runs in a thread of its own, except for the first time.
        seconds: Between two calls.
    """
    over = threading.Event()

    def repeat() -> None:
        while not over.wait(seconds):
            beat()

    beat()
    thread = threading.Thread(target=repeat, daemon=True, name="supple-heartbeat")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
