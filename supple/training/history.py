"""What happened in training: a table, a progress bar, TensorBoard's files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from rich.progress import TextColumn, TimeElapsedColumn, TimeRemainingColumn

from supple.errors import CheckpointError, SettingError, import_extra, nearest
from supple.training.bar import Bar

__all__ = ["Display", "History"]


@dataclass
class History:
    """The record of a training run, as plain numbers and texts.

    Args:
        rows: One per logged step: `step` and `epoch` (counted from 0), `lr`, `losses` (by
            role), `passes` (forward and backward passes so far) and `seconds` (of training so
            far, pauses between resumed runs apart).
        validation: One per epoch: `step` (how many were done), `epoch` and `metrics`.
        watched: One per watched step, as `Watch.row` gives it: which sizes ran, and what their
            losses and gradients were like.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    validation: list[dict[str, Any]] = field(default_factory=list)
    watched: list[dict[str, Any]] = field(default_factory=list)

    @property
    def roles(self) -> list[str]:
        """The roles that have a loss, in the order in which they first ran."""
        return list(dict.fromkeys(role for row in self.rows for role in row["losses"]))

    def losses(self, role: str) -> tuple[list[int], list[float]]:
        """Gives a role's losses, to plot or to average.

        Args:
            role: One of `roles`.

        Returns:
            The steps in which it ran, and its losses there.

        Raises:
            SettingError: There is no such role.
        """
        if role not in self.roles:
            raise SettingError(
                f"no pass had the role '{role}'{nearest(role, self.roles)} (roles: "
                f"{', '.join(self.roles) or 'none'})"
            )
        rows = [row for row in self.rows if role in row["losses"]]
        return [row["step"] for row in rows], [row["losses"][role] for row in rows]

    def to_json(self) -> dict[str, Any]:
        """Gives what JSON can hold."""
        return {
            "rows": list(self.rows),
            "validation": list(self.validation),
            "watched": list(self.watched),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Reads what `to_json` gave.

        Raises:
            CheckpointError: It isn't that.
        """
        try:
            watched = list(content.get("watched", []))
            return cls(list(content["rows"]), list(content["validation"]), watched)
        except (AttributeError, KeyError, TypeError) as error:
            raise CheckpointError(f"this is no training history: {error}") from error


class Display:
    """Shows a run while it goes: a progress bar, and TensorBoard's files.

    Args:
        progress: Whether to draw the bar.
        log_dir: Folder for TensorBoard's files; None for none.
        steps: How many steps there will be.
        start: How many were done before.

    Raises:
        MissingExtraError: `log_dir` is given and TensorBoard is not installed.
    """

    def __init__(
        self,
        *,
        progress: bool,
        log_dir: str | os.PathLike[str] | None,
        steps: int,
        start: int = 0,
    ) -> None:
        self._writer: Any = None
        if log_dir is not None:
            import_extra("tensorboard", "tensorboard")
            from torch.utils.tensorboard import SummaryWriter

            # What was logged after the checkpoint belongs to a run that was killed.
            self._writer = SummaryWriter(os.fspath(log_dir), purge_step=start)
        self._bar = Bar(
            "train",
            steps,
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[losses]}"),
            shown=progress,
            done=start,
            losses="",
        )

    def __enter__(self) -> Self:
        self._bar.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.__exit__(kind, error, trace)
        if self._writer is not None:
            self._writer.close()

    def step(self, done: int, losses: Mapping[str, float]) -> None:
        """Moves the bar on."""
        shown = "  ".join(f"{role} {loss:.3f}" for role, loss in list(losses.items())[:4])
        self._bar.update(completed=done, losses=shown)

    def row(self, row: Mapping[str, Any]) -> None:
        """Logs a row of the history."""
        if self._writer is None:
            return
        for role, loss in row["losses"].items():
            self._writer.add_scalar(f"loss/{role}", loss, row["step"])
        self._writer.add_scalar("lr", row["lr"], row["step"])

    def metrics(self, row: Mapping[str, Any]) -> None:
        """Logs a row of validation."""
        if self._writer is None:
            return
        for name, value in row["metrics"].items():
            if isinstance(value, int | float):
                self._writer.add_scalar(f"validation/{name}", value, row["step"])
