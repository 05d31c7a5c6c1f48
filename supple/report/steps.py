"""What a compression came to, step by step: a table, a picture and a page."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from supple import files
from supple.report.engines import Engines, engine_rows
from supple.report.plots import steps_figure, svg_text, write_png
from supple.report.style import STYLE
from supple.report.words import bytes_text, count_text, metric_text, seconds_text, step_text

__all__ = ["StepsSummary", "steps_html", "steps_table", "write_steps"]

_HEAD = ("params", "zeros", "MACs", "file", "latency")


@dataclass(frozen=True, kw_only=True)
class StepsSummary:
    """A whole compression.

    Args:
        name: Name of the run.
        metric: The figure that networks are judged by.
        tests: Number of test examples behind each figure.
        steps: For the start and each step: `name`, `what`, `figures` (on the test set),
            `costs`, `zeros` (share of the weights), `latency` and `spread` (seconds),
            `file_bytes`, `seconds` (of the step's work).
        files: What the last network was exported to, relative to the run's folder.
        engines: What came of the engines that were tried; None where none were.
        device: What was measured on.
        recipe: The recipe as YAML text.
    """

    name: str
    metric: str
    tests: int
    steps: tuple[Mapping[str, Any], ...]
    files: tuple[str, ...]
    engines: Engines | None
    device: str
    recipe: str


def steps_table(summary: StepsSummary) -> Table:
    """Gives the table that a compression ends with.

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
        caption=f"zeros: share of the weights that are exactly zero; latency: median for one "
        f"example on {summary.device}.",
        caption_justify="left",
        pad_edge=False,
        padding=(0, 1),
    )
    table.add_column("step", style="bold", no_wrap=True)
    for name in (summary.metric, *_HEAD, "took"):
        table.add_column(name, justify="right", no_wrap=True)
    for step in summary.steps:
        table.add_row(
            step_text(step["name"]), *_cells(summary, step), seconds_text(step["seconds"])
        )
    return table


def _cells(summary: StepsSummary, step: Mapping[str, Any]) -> list[str]:
    first = summary.steps[0]

    def beside(text: str, value: float, whole: float) -> str:
        return text if step is first or not whole else f"{text} ({value / whole:.0%})"

    params, macs = step["costs"]["params"], step["costs"]["macs"]
    return [
        metric_text(summary.metric, step["figures"][summary.metric]),
        beside(count_text(params), params, first["costs"]["params"]),
        f"{step['zeros']:.1%}",
        beside(count_text(macs), macs, first["costs"]["macs"]),
        bytes_text(step["file_bytes"]),
        beside(seconds_text(step["latency"]), step["latency"], first["latency"]),
    ]


def write_steps(summary: StepsSummary, folder: Path) -> tuple[Path, ...]:
    """Writes `report.html`, the picture as a PNG file, and the figures as `summary.json`.

    Args:
        summary: The run.
        folder: Where the files go.

    Returns:
        The files, the page first.

    Raises:
        CheckpointError: The folder can't be written.
    """
    page, data = folder / "report.html", folder / "summary.json"
    files.write_text(page, steps_html(summary))
    files.write_json(data, dataclasses.asdict(summary))
    picture = steps_figure(summary.steps, summary.metric)
    return page, data, write_png(picture, folder / "steps.png")


def steps_html(summary: StepsSummary) -> str:
    """Gives the page as text.

    Args:
        summary: The run.

    Returns:
        A complete HTML document.
    """
    rows = []
    for step in summary.steps:
        figures = (*_cells(summary, step), seconds_text(step["seconds"]))
        unbroken = (text.replace(" ", "\u00a0") for text in (step_text(step["name"]), *figures))
        name, *cells = unbroken
        rows.append((name, step["what"], *cells))
    head = ("step", "what", summary.metric, *_HEAD, "took")
    links = ", ".join(f'<a href="{escape(f)}">{escape(f)}</a>' for f in summary.files)
    figure = svg_text(steps_figure(summary.steps, summary.metric))
    count = len(summary.steps) - 1
    body = (
        f'<header><div class="brand">Supple</div><h1>{escape(summary.name)}</h1><p>One trained '
        f"network made smaller in {count} step{'s' * (count > 1)}. Every figure below comes "
        "from this run.</p></header>"
        f"<section><h2>Step by step</h2><p>{escape(summary.metric.capitalize())} on "
        f"{summary.tests:,} test examples; zeros are the share of the weights that are exactly "
        f"zero; latency is the median for one example on {escape(summary.device)}.</p>"
        f'<div class="scroll"><table class="wrap">{_row(head, "th")}'
        f"{''.join(_row(row, 'td') for row in rows)}</table></div></section>"
        f'<div class="plots" style="max-width: 660px"><figure>{figure}</figure></div>'
        f"{_engines(summary)}<section><h2>Files</h2><p>{links or 'not exported'}</p>"
        f"<details><summary>Recipe</summary><pre>{escape(summary.recipe)}</pre></details>"
        "</section><footer>Written by Supple. This page needs no network.</footer>"
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(summary.name)} · Supple</title><style>{STYLE}</style></head>"
        f"<body><main>{body}</main></body></html>\n"
    )


def _engines(summary: StepsSummary) -> str:
    """A table of the engines that were tried, if any."""
    if summary.engines is None:
        return ""
    head, *rows = engine_rows(summary.engines.trials, summary.engines.before)
    cells = "".join(_row(row, "td") for row in rows)
    return (
        "<section><h2>Engines</h2><p>One forward of one example of the last network, that of "
        "the one at the start, and the largest difference of an output from what the last "
        "network gives in PyTorch, over the largest magnitude.</p>"
        f'<div class="scroll"><table class="wrap">{_row(head, "th")}{cells}</table></div>'
        "</section>"
    )


def _row(cells: Sequence[str], tag: str) -> str:
    return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>"
