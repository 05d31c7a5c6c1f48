"""What engines were tried for a network, as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table

from supple.deploy.engines import Trial
from supple.report.words import seconds_text

__all__ = ["Engines", "engine_rows", "engines_table"]


@dataclass(frozen=True)
class Engines:
    """Engines that were tried for a network, and for what it was made from.

    Args:
        trials: What came of each, the fastest first.
        before: The same of the network at the start.
    """

    trials: tuple[Trial, ...]
    before: tuple[Trial, ...]


def engine_rows(trials: Sequence[Trial], before: Sequence[Trial] = ()) -> list[tuple[str, ...]]:
    """Gives the table's cells: the head, and a row for each engine.

    Args:
        trials: What came of each, as `supple.deploy.engines.deploy` gives it.
        before: The same of a network to set against this one.
    """
    was = {one.engine: one.seconds for one in before}
    rows = [("engine", *(["before"] if before else []), "latency", "difference", "note")]
    for one in trials:
        earlier = [_told(was.get(one.engine))] if before else []
        error = "" if one.error is None else f"{one.error:.1g}"
        rows.append((one.engine, *earlier, _told(one.seconds), error, one.refused))
    return rows


def _told(seconds: float | None) -> str:
    return "" if seconds is None else seconds_text(seconds)


def engines_table(trials: Sequence[Trial], before: Sequence[Trial] = ()) -> Table:
    """Gives a table of the engines that were tried, the fastest first.

    Args:
        trials: What came of each.
        before: The same of a network to set against this one.

    Returns:
        A table for `rich.print`.
    """
    head, *rows = engine_rows(trials, before)
    table = Table(
        box=box.SIMPLE_HEAD,
        caption="latency: of one forward; difference: of the outputs from the network's in "
        "PyTorch, over their largest magnitude.",
        caption_justify="left",
        pad_edge=False,
        padding=(0, 1),
    )
    for name in head:
        table.add_column(name, justify="left" if name in ("engine", "note") else "right")
    for row in rows:
        table.add_row(*row)
    return table
