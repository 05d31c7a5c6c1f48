"""How the command line ends when something is wrong: one message, no traceback."""

from __future__ import annotations

import functools
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import typer
from rich.console import Console

from supple.errors import SuppleError

__all__ = ["FAILED", "INTERRUPTED", "plain_errors", "plain_warnings"]

FAILED, INTERRUPTED = 2, 130
_Command = TypeVar("_Command", bound=Callable[..., Any])


def plain_errors(command: _Command) -> _Command:
    """Makes a command end with a message on stderr and exit code 2 where it can't go on.

    That is so for every `SuppleError` and for what the system refuses (a missing file, a folder
    that can't be written). An interrupt from the keyboard ends with 130. Anything else is a
    fault of ours and keeps its traceback.

    Args:
        command: The function behind a command.
    """

    @functools.wraps(command)
    def told(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except BrokenPipeError as error:
            # Whoever read our output has gone; nothing is left to be told.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from error
        except SuppleError as error:
            raise _failed(str(error)) from error
        except OSError as error:
            name = f"{error.filename}: " if error.filename else ""
            raise _failed(f"{name}{error.strerror or error}") from error
        except KeyboardInterrupt as error:
            _console().print("interrupted; run the same command again to go on from here")
            raise typer.Exit(INTERRUPTED) from error

    return told  # type: ignore[return-value]


def plain_warnings() -> None:
    """Shows warnings as one line on stderr, without the place in the code."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        _console().print(f"[yellow]warning:[/yellow] {message}", markup=True, highlight=False)

    warnings.showwarning = show


def _failed(message: str) -> typer.Exit:
    console = _console()
    console.print("[bold red]error:[/bold red] ", end="", highlight=False)
    console.print(message, markup=False, highlight=False)
    return typer.Exit(FAILED)


def _console() -> Console:
    # Made anew each time, since a test or a caller may have replaced sys.stderr; soft, because
    # a message that names a path must stay whole.
    return Console(stderr=True, soft_wrap=True)
