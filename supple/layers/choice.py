"""Alternatives at one place of a network, of which one runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from supple.errors import SettingError

__all__ = ["Choice", "Exits"]


class Choice(nn.Module):
    """Alternatives at one place; one of them runs.

    The axis `supple.Operator` makes the choice elastic. Alternatives take the same inputs and
    give outputs of the same shape; each has weights of its own.

    Args:
        options: The alternatives, from the cheapest to the dearest.
        active: Position of the one that runs; None for the last.

    Attributes:
        options: The alternatives.
        active: Position of the one that runs.

    Raises:
        SettingError: There are fewer than two alternatives, or none at `active`.

    Example:
        >>> layer = Choice(nn.Identity(), nn.Linear(4, 4))
        >>> layer.active
        1
    """

    def __init__(self, *options: nn.Module, active: int | None = None) -> None:
        super().__init__()
        if len(options) < 2:
            raise SettingError(f"a choice needs at least two options, got {len(options)}")
        place = len(options) - 1 if active is None else active
        if not 0 <= place < len(options):
            raise SettingError(
                f"active must be from 0 to {len(options) - 1}, the last option, got {active}"
            )
        self.options = nn.ModuleList(options)
        self.active = place

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.options[self.active](*args, **kwargs)


class Exits(Choice):
    """A classifier with others that take its place when the network stops early.

    The axis `supple.Exit` leaves out the blocks behind an exit, and lets its classifier run.

    Args:
        early: Number of blocks that run before the exit, and the classifier there.
        last: The classifier behind all blocks.

    Attributes:
        counts: Number of blocks before each early exit, ascending.

    Raises:
        SettingError: There is no early exit, or a count is not positive.

    Example:
        >>> Exits({2: nn.Linear(4, 3), 4: nn.Linear(4, 3)}, nn.Linear(4, 3)).counts
        (2, 4)
    """

    def __init__(self, early: Mapping[int, nn.Module], last: nn.Module) -> None:
        if not early or min(early) < 1:
            raise SettingError(
                "early must map numbers of blocks, from 1 on, to classifiers, "
                f"got {list(early) or 'none'}"
            )
        self.counts = tuple(sorted(early))
        super().__init__(*(early[count] for count in self.counts), last)
