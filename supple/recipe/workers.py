"""Jobs in processes of their own: spawned, one thread each, gone when the parent is gone."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from supple.errors import SuppleError

__all__ = ["run_jobs"]


def run_jobs(
    function: Callable[[Any], Any], jobs: Sequence[Any], workers: int = 2
) -> Iterator[tuple[int, Any]]:
    """Runs jobs side by side; whoever is free takes the next.

    Args:
        function: Does one job; a function of a module, since it is sent by name.
        jobs: What can be sent to another process.
        workers: Number of processes; each computes with one thread.

    Yields:
        Place of the job in `jobs` and what `function` gave, in the order of completion.

    Raises:
        SuppleError: A job raised one; it is raised here with the same type and words.
        RuntimeError: A job raised another exception (the message holds its traceback), or a
            process died.
    """
    pool = _Pool(function, min(workers, len(jobs)))
    waiting = list(enumerate(jobs))
    try:
        for connection in list(pool.running):
            pool.send(connection, waiting.pop(0))
        while pool.busy:
            for index, value in pool.answers():
                yield index, value
                if waiting:
                    pool.send(pool.idle.pop(), waiting.pop(0))
    finally:
        pool.close()


class _Pool:
    """The processes and what each is busy with."""

    def __init__(self, function: Callable[[Any], Any], size: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.running: dict[Connection, BaseProcess] = {}
        self.busy: dict[Connection, int] = {}
        self.idle: list[Connection] = []
        for _ in range(size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(function, there), daemon=True)
            process.start()
            there.close()
            self.running[here] = process

    def send(self, connection: Connection, job: tuple[int, Any]) -> None:
        self.busy[connection] = job[0]
        connection.send(job)

    def answers(self) -> Iterator[tuple[int, Any]]:
        """Waits for at least one answer; its sender is idle then."""
        for connection in wait(list(self.busy)):
            assert isinstance(connection, Connection)
            index = self.busy.pop(connection)
            try:
                error, value = connection.recv()
            except EOFError as end:
                self.running[connection].join()
                code = self.running[connection].exitcode
                raise RuntimeError(
                    f"the process of job {index} died, exit code {code}"
                ) from end
            if error is not None:
                raise error
            self.idle.append(connection)
            yield index, value

    def close(self) -> None:
        for connection, process in self.running.items():
            process.kill()
            process.join()
            connection.close()


def _serve(function: Callable[[Any], Any], connection: Connection) -> None:
    """What a process does: job after job, until the parent is gone."""
    import torch

    # An interrupt from the keyboard goes to the whole group; the parent ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_follow_parent, daemon=True).start()
    torch.set_num_threads(1)
    while True:
        try:
            index, job = connection.recv()
        except EOFError:
            return
        connection.send(_answer(function, job, index))


def _answer(
    function: Callable[[Any], Any], job: Any, index: int
) -> tuple[Exception | None, Any]:
    try:
        return None, function(job)
    except SuppleError as error:
        return type(error)(str(error)), None
    except Exception:
        return RuntimeError(f"job {index} failed:\n{traceback.format_exc()}"), None


def _follow_parent() -> None:
    """Ends this process at once when its parent is gone, whatever it is doing."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
