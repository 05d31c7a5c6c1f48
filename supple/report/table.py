"""The networks of a run as a table for the terminal."""

from __future__ import annotations

from rich import box
from rich.table import Table

from supple.report.summary import Network, Outcome, Summary
from supple.report.words import (
    bytes_text,
    count_text,
    metric_text,
    predicted_text,
    seconds_text,
)

__all__ = ["networks_table"]

_CAPTION = (
    "supernet: cut from the one network that was trained at all sizes at once (its passes and "
    "seconds are shared); alone: a network of that size, trained alone with its best learning "
    "rate; cut: the full network trained alone, cut to size. Latency: median on {device}."
)
_WAYS = {"elastic": "supernet", "alone": "alone", "cut": "cut"}


def networks_table(summary: Summary) -> Table:
    """Gives the table that a run ends with: every network by every way it was trained.

    Args:
        summary: The run.

    Returns:
        A table for `rich.print`.
    """
    table = Table(
        box=box.SIMPLE_HEAD,
        title=f"{summary.name}: {summary.metric} on {summary.tests:,} test examples",
        title_justify="left",
        title_style="bold",
        caption=_CAPTION.format(device=summary.device),
        caption_justify="left",
        pad_edge=False,
        padding=(0, 1),
    )
    table.add_column("network", style="bold", no_wrap=True)
    table.add_column("trained", no_wrap=True)
    for name in (summary.metric, "latency", "params", "MACs", "file", "passes", "seconds"):
        table.add_column(name, justify="right", no_wrap=True)
    for network in summary.networks:
        for outcome in network.outcomes:
            first = outcome is network.outcomes[0]
            table.add_row(*_cells(summary, network, outcome), style="" if first else "dim")
        table.add_section()
    return table


def _cells(summary: Summary, network: Network, outcome: Outcome) -> tuple[str, ...]:
    return (
        network.name if outcome is network.outcomes[0] else "",
        _WAYS.get(outcome.way, outcome.way) + (f", {outcome.note}" if outcome.note else ""),
        metric_text(summary.metric, outcome.metrics[summary.metric]),
        seconds_text(network.latency) + predicted_text(network.predicted),
        count_text(network.costs["params"]),
        count_text(network.costs["macs"]),
        bytes_text(network.file_bytes),
        f"{outcome.passes:,}",
        f"{outcome.seconds:.1f}",
    )
