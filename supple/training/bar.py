"""The progress bar of everything that takes its time."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn

__all__ = ["Bar"]


class Bar:
    """One line: what is done, a bar, how many of how many, and further columns.

    Args:
        description: What the line begins with.
        total: How many there will be; None if that is not known yet.
        columns: Further columns.
        shown: Whether to show it at all.
        done: How many were done before.
        console: Where it is drawn; standard error by default.
        transient: Whether it vanishes at the end.
        fields: What the columns show, by name.
    """

    def __init__(
        self,
        description: str,
        total: int | None,
        *columns: ProgressColumn,
        shown: bool,
        done: int = 0,
        console: Console | None = None,
        transient: bool = False,
        **fields: Any,
    ) -> None:
        self.shown = shown
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            *columns,
            console=console or Console(stderr=True),
            transient=transient,
            disable=not shown,
        )
        self._task = self._progress.add_task(description, total=total, completed=done, **fields)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def update(self, **values: Any) -> None:
        """Shows what is `completed` so far, a new `total`, and the fields of its columns."""
        self._progress.update(self._task, **values)
