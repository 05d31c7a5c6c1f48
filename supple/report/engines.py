"""What engines were tried for a network, as a table."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table

from supple.deploy.engines import Trial
from supple.report.words import seconds_text

__all__ = ["engine_rows", "engines_table"]

HEAD = ("engine", "latency", "difference", "note")


def engine_rows(trials: Sequence[Trial]) -> list[tuple[str, ...]]:
    """Gives the table's cells, a row for each engine.

    Args:
        trials: What came of each, as `supple.deploy.engines.deploy` gives it.
    """
    return [
        (
            one.engine,
            "" if one.seconds is None else seconds_text(one.seconds),
            "" if one.error is None else f"{one.error:.1g}",
            one.refused,
        )
        for one in trials
    ]


def engines_table(trials: Sequence[Trial]) -> Table:
    """Gives a table of the engines that were tried, the fastest first.

    Args:
        trials: What came of each.

    Returns:
        A table for `rich.print`.
    """
    table = Table(
        box=box.SIMPLE_HEAD,
        caption="latency: of one forward; difference: of the outputs from the network's, over "
        "their largest magnitude.",
        caption_justify="left",
        pad_edge=False,
        padding=(0, 1),
    )
    for name in HEAD:
        table.add_column(name, justify="right" if name in HEAD[1:3] else "left")
    for row in engine_rows(trials):
        table.add_row(*row)
    return table
