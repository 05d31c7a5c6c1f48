"""Where a study can be: files, servers, their drivers and locks, and words for what fails."""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import sqlalchemy
from sqlalchemy.exc import (
    ArgumentError,
    InterfaceError,
    OperationalError,
    PendingRollbackError,
)

from supple.errors import CheckpointError, SettingError, import_extra

__all__ = [
    "MEMORY",
    "POSTGRES_DRIVER",
    "cause_of",
    "check_file",
    "fault_text",
    "file_lock",
    "file_of",
    "is_away",
    "one_line",
    "shown",
    "with_driver",
]

MEMORY = ":memory:"
"""The study that is kept in memory only."""

POSTGRES_DRIVER = "postgresql+psycopg"

_SUFFIXES = (".db", ".sqlite", ".sqlite3")
_AWAY = (OperationalError, InterfaceError, PendingRollbackError)


def file_of(where: str) -> Path | None:
    """Returns the SQLite file that a place stands for; None for memory and databases.

    Raises:
        SettingError: It is none of these.
    """
    if where == MEMORY:
        return None
    if "://" in where:
        return (
            Path(where.removeprefix("sqlite:///")) if where.startswith("sqlite:///") else None
        )
    if not where.endswith(_SUFFIXES):
        raise SettingError(
            f"a study must be a file that ends in {', '.join(_SUFFIXES)}, a database URL or "
            f"'{MEMORY}', got {where!r}"
        )
    return Path(where)


def check_file(path: Path, patience: float) -> None:
    """Checks that a study file can be read and written, before anything relies on it.

    Args:
        path: The file; missing folders are created.
        patience: Seconds to wait for another program's lock.

    Raises:
        CheckpointError: It can't; the message names it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(sqlite3.connect(path, timeout=patience)) as connection:
            connection.isolation_level = None
            connection.execute("BEGIN IMMEDIATE")
            found = connection.execute("PRAGMA integrity_check").fetchone()[0]
            connection.execute("ROLLBACK")
    except (OSError, sqlite3.Error) as error:
        raise CheckpointError(fault_text(str(path), error)) from error
    except UnicodeDecodeError as error:  # SQLite's own words for the damage quote from the file
        raise CheckpointError(f"the study {path} is damaged; use another file") from error
    if found != "ok":
        why = " ".join(found.split())[:120]
        raise CheckpointError(f"the study {path} is damaged ({why}); use another file")


def with_driver(url: str) -> str:
    """Names the driver of a PostgreSQL URL that names none, and says how to get it.

    Raises:
        SettingError: This is no database URL.
        MissingExtraError: The driver is not installed.
    """
    try:
        parsed = sqlalchemy.make_url(url)
    except (ArgumentError, ValueError) as error:
        raise SettingError(
            f"{shown(url)} is no database URL; one looks like "
            "postgresql://user:password@host:5432/database"
        ) from error
    if parsed.drivername in ("postgresql", "postgres", POSTGRES_DRIVER):
        import_extra("psycopg", "postgres")
        parsed = parsed.set(drivername=POSTGRES_DRIVER)
    return parsed.render_as_string(hide_password=False)


def shown(where: str) -> str:
    """Returns a place as messages may show it: without a password."""
    hidden = re.sub(r"(://[^:/@]*):[^@]*@", r"\1:***@", where)
    return re.sub(r"([?&]password=)[^&]*", r"\1***", hidden)


_FAULTS = {
    "locked": "another program has locked it; wait for that to end or use another file",
    "readonly": "it can't be written; use another folder or change the permissions",
    "read-only": "it can't be written; use another folder or change the permissions",
    "unable to open": "it can't be opened; use a folder that you may write to",
    "disk is full": "the disk is full; make room, then run the same command again",
    "no space left": "the disk is full; make room, then run the same command again",
    "not a database": "it is no SQLite database; use another file",
    "malformed": "it is damaged; use another file",
    "connection refused": "no server answers there; start it, or correct host and port",
    "authentication failed": "the server refused user or password; correct them in the URL",
}


def fault_text(where: str, error: BaseException) -> str:
    """Words what a database refused, and what would do."""
    text = " ".join(str(cause) for cause in _chain(error)).lower()
    hint = next((hint for sign, hint in _FAULTS.items() if sign in text), cause_of(error))
    return f"can't use the study {where}: {hint}"


def _chain(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def cause_of(error: BaseException) -> str:
    """Returns the words of an error's first cause."""
    return one_line(str(list(_chain(error))[-1]))


def one_line(text: str) -> str:
    """Returns a text without line breaks."""
    return " ".join(text.split())


def is_away(error: BaseException) -> bool:
    """Says whether the connection to a server broke or can't be made."""
    return any(isinstance(cause, _AWAY) for cause in _chain(error))


@contextlib.contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Holds a lock that the system releases when the process ends, however it ends."""
    try:
        import fcntl
    except ModuleNotFoundError:  # not a POSIX system: workers may repeat the first evaluation
        yield
        return
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise CheckpointError(f"can't write {path}: {error.strerror}") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
