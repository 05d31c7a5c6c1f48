"""A real PostgreSQL server of a test's own: in a temporary folder, on the loopback only."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

_DEBIAN = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
_USER = "postgres"
_UNAVAILABLE = "run `make postgres` (as root), or install the package `postgresql`"


class Server:
    """A server that can be killed and started again.

    Args:
        binaries: Folder of `initdb` and `postgres`.
        folder: An empty folder.
    """

    def __init__(self, binaries: Path, folder: Path) -> None:
        self.binaries, self.data = binaries, folder / "data"
        self.log = folder / "log"
        self.port = _free_port()
        self.process: subprocess.Popen[bytes] | None = None
        self._own(folder)
        self._run("initdb", "-A", "trust", "-U", _USER, "-N", "-D", self.data)

    @property
    def url(self) -> str:
        """What a study is given."""
        return f"postgresql://{_USER}@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        """Starts the server and waits until it answers."""
        words = ["-D", self.data, "-p", self.port, "-h", "127.0.0.1", "-k", ""]
        command = [self.binaries / "postgres", *words]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [str(word) for word in command],
                stdout=log,
                stderr=log,
                start_new_session=True,
                **_as_user(),
            )
        deadline = time.monotonic() + 60
        while not self._answers():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)

    def kill(self) -> None:
        """Kills the server and all that it started, without any warning."""
        assert self.process is not None
        # Its backends have sessions of their own, and end when they see that it is gone; a
        # machine that loses power takes them along at once.
        processes = [self.process.pid, *_children(self.process.pid)]
        for pid in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        self.process = None
        while any(Path(f"/proc/{pid}").exists() for pid in processes):
            time.sleep(0.01)

    def stop(self) -> None:
        """Ends the server."""
        if self.process is not None:
            self.process.send_signal(signal.SIGINT)
            self.process.wait(60)
            self.process = None

    def query(self, text: str) -> list[tuple[object, ...]]:
        """Asks the database."""
        import psycopg

        with psycopg.connect(self.url) as connection:
            return connection.execute(text).fetchall()

    def _answers(self) -> bool:
        import psycopg

        try:
            psycopg.connect(self.url).close()
        except psycopg.OperationalError:
            return False
        return True

    def _run(self, program: str, *words: object) -> None:
        command = [str(self.binaries / program), *map(str, words)]
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=self.data.parent, **_as_user()
        )
        assert done.returncode == 0, done.stderr

    def _own(self, folder: Path) -> None:
        if os.geteuid() == 0:
            user = pwd.getpwnam(_USER)
            os.chown(folder, user.pw_uid, user.pw_gid)


@contextlib.contextmanager
def running(folder: Path) -> Iterator[Server]:
    """Runs a server for the time of the context; skips the test where there is none.

    Args:
        folder: An empty folder that every user may reach.
    """
    server = Server(_binaries(), folder)
    try:
        server.start()
        yield server
    finally:
        server.stop()


def _binaries() -> Path:
    pytest.importorskip("psycopg", reason="needs the extra `postgres`")
    found = shutil.which("initdb")
    folders = _DEBIAN or ([Path(found).resolve().parent] if found else [])
    if not folders:
        pytest.skip(f"needs a PostgreSQL server: {_UNAVAILABLE}")
    if os.geteuid() == 0 and _USER not in {user.pw_name for user in pwd.getpwall()}:
        pytest.skip(f"PostgreSQL does not run as root and there is no user {_USER}")
    return folders[-1]


def _as_user() -> dict[str, object]:
    # PostgreSQL refuses to run as root.
    return {"user": _USER, "group": _USER, "extra_groups": []} if os.geteuid() == 0 else {}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _children(pid: int) -> list[int]:
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
