"""The report of a run: one HTML file without any link to a network, and PNG pictures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from matplotlib.figure import Figure

from supple import files
from supple.report.plots import (
    curves_figure,
    front_figure,
    sizes_figure,
    svg_text,
    write_png,
)
from supple.report.style import STYLE
from supple.report.summary import Network, Outcome, Summary, summary_to_json
from supple.report.words import (
    bytes_text,
    count_text,
    metric_text,
    predicted_text,
    seconds_text,
    way_text,
)

__all__ = ["page_html", "write_report"]


def write_report(summary: Summary, folder: Path) -> tuple[Path, ...]:
    """Writes `report.html`, the pictures as PNG files, and the figures as `summary.json`.

    Args:
        summary: The run.
        folder: Where the files go.

    Returns:
        The files, the page first.

    Raises:
        CheckpointError: The folder can't be written.
    """
    pictures = _pictures(summary)
    page = folder / "report.html"
    files.write_text(page, page_html(summary))
    files.write_json(folder / "summary.json", summary_to_json(summary))
    images = [write_png(figure, folder / f"{name}.png") for name, figure in pictures.items()]
    return (page, folder / "summary.json", *images)


def page_html(summary: Summary) -> str:
    """Gives the page as text.

    Args:
        summary: The run.

    Returns:
        A complete HTML document.
    """
    figures = "".join(
        f'<figure id="{name}">{svg_text(figure)}</figure>'
        for name, figure in _pictures(summary).items()
    )
    body = "".join(
        [
            _head(summary),
            _tiles(summary),
            _networks(summary),
            f'<div class="plots">{figures}</div>',
            _measured(summary),
            _space(summary),
            _stages(summary),
            _provenance(summary),
        ]
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(summary.name)} · Supple</title><style>{STYLE}</style></head>"
        f"<body><main>{body}</main></body></html>\n"
    )


def _pictures(summary: Summary) -> dict[str, Figure]:
    """The figures by file name; one front for each searched cost."""
    longest = max((len(points) for points in summary.losses.values()), default=0)
    pictures = {
        f"front-{_slug(cost)}": front_figure(summary, cost) for cost in summary.costs[:3]
    }
    pictures["losses"] = curves_figure(
        summary.losses,
        title="Training loss by size",
        label="loss",
        smooth=max(1, longest // 40),
    )
    if any(size["cost"] is not None for row in summary.watched for size in row["sizes"]):
        pictures["sizes"] = sizes_figure(summary.watched)
    if summary.validation:
        pictures["validation"] = curves_figure(
            summary.validation, title="Validation by size", label=summary.metric
        )
    return pictures


def _slug(text: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in text).strip("-")


def _head(summary: Summary) -> str:
    deployed = [network.name for network in summary.networks if network.name != "full"]
    return (
        f'<header><div class="brand">Supple</div><h1>{escape(summary.name)}</h1>'
        f"<p>One network was trained once to work at {_exact(summary.space_size)} sizes; "
        f"{len(summary.points)} of them were evaluated and {len(deployed)} deployed "
        f"({escape(', '.join(deployed))}). Every figure below comes from this run.</p></header>"
    )


def _exact(number: int) -> str:
    return f"{number:,}" if number < 10**9 else f"{float(number):.2e}"


def _tiles(summary: Summary) -> str:
    full, *others = summary.networks
    tiles = [
        ("sizes in one set of weights", _exact(summary.space_size)),
        (f"{summary.metric} of the full network", _headline(summary, full)),
    ]
    if others:
        smallest = min(others, key=lambda network: network.costs["params"])
        share = full.costs["params"] / max(smallest.costs["params"], 1)
        tiles += [
            (f"{summary.metric} of {smallest.name}", _headline(summary, smallest)),
            (f"fewer parameters in {smallest.name}", f"{share:.1f} x"),
        ]
    seconds = full.outcomes[0].seconds
    tiles.append(("of training for all sizes at once", seconds_text(seconds)))
    cells = (f'<div class="tile"><b>{escape(b)}</b><span>{escape(a)}</span></div>'
             for a, b in tiles)  # fmt: skip
    return f'<div class="tiles">{"".join(cells)}</div>'


def _headline(summary: Summary, network: Network) -> str:
    return metric_text(summary.metric, network.outcomes[0].metrics[summary.metric])


def _networks(summary: Summary) -> str:
    head = ("network", "weights", summary.metric, "latency", "params", "MACs", "file",
            "passes", "training")  # fmt: skip
    rows = "".join(_network_rows(summary, network) for network in summary.networks)
    return (
        "<section><h2>Deployed networks</h2><p>"
        f"{escape(summary.metric.capitalize())} on {summary.tests:,} test examples that "
        "neither training nor search has seen. Passes count forward and backward through one "
        "network of that row; those of the supernet are shared by all its sizes.</p>"
        f'<div class="scroll"><table id="networks"><thead>{_row(head, "th")}</thead>'
        f"<tbody>{rows}</tbody></table></div></section>"
    )


def _network_rows(summary: Summary, network: Network) -> str:
    best = _best(summary, network.outcomes)
    rows = []
    for index, outcome in enumerate(network.outcomes):
        last = index == len(network.outcomes) - 1
        classes = " ".join(["base"] * (index > 0) + ["more"] * (not last))
        rows.append(f'<tr class="{classes}">{_cells(summary, network, outcome, best)}</tr>')
    return "".join(rows)


def _cells(summary: Summary, network: Network, outcome: Outcome, best: Outcome) -> str:
    first = outcome is network.outcomes[0]
    value = escape(metric_text(summary.metric, outcome.metrics[summary.metric]))
    where = ", ".join(f"{cost} {bound}" for cost, bound in network.where.items())
    small = f"<small>{escape(where)}</small>" if where and first else ""
    note = f" <small>({escape(outcome.note)})</small>" if outcome.note else ""
    cells = [
        f'<td class="name">{escape(network.name) if first else ""}{small}</td>',
        f'<td class="left">{escape(way_text(outcome.way))}{note}</td>',
        f"<td>{f'<b>{value}</b>' if outcome is best else value}</td>",
        f"<td>{_latency(network) if first else ''}</td>",
        f"<td>{count_text(network.costs['params']) if first else ''}</td>",
        f"<td>{count_text(network.costs['macs']) if first else ''}</td>",
        f"<td>{bytes_text(network.file_bytes) if first else ''}</td>",
        f"<td>{outcome.passes:,}</td>",
        f"<td>{seconds_text(outcome.seconds)}</td>",
    ]
    return "".join(cells)


def _latency(network: Network) -> str:
    measured = f"{seconds_text(network.latency)} ± {seconds_text(network.latency_spread)}"
    said = predicted_text(network.predicted).strip()
    return f"{measured}<small>{escape(said)}</small>" if said else measured


def _best(summary: Summary, outcomes: Sequence[Outcome]) -> Outcome:
    choose = max if summary.maximize else min
    return choose(outcomes, key=lambda outcome: outcome.metrics[summary.metric])


def _measured(summary: Summary) -> str:
    rows = [
        ("latency, memory", f"measured on {summary.device}; median ± spread, after a warm-up"),
        ("params, MACs", "counted on the extracted network"),
        ("file", "the saved weights (safetensors)"),
        (summary.metric, f"measured on {summary.tests:,} test examples"),
        ("passes, training", "counted and timed in this run"),
    ]
    items = "".join(f"<dt>{escape(a)}</dt><dd>{escape(b)}</dd>" for a, b in rows)
    return f"<section><h2>What was measured where</h2><dl>{items}</dl></section>"


def _space(summary: Summary) -> str:
    sites = _table(("site", "axis", "choices"), summary.sites)
    fixed = _table(("fixed", "why"), summary.fixed) if summary.fixed else ""
    return (
        f"<section><h2>The space</h2><p>{_exact(summary.space_size)} sizes from "
        f"{len(summary.sites)} sites; {len(summary.fixed)} places are fixed.</p>"
        f"<details><summary>Sites, choices and what is fixed</summary>{sites}{fixed}"
        "</details></section>"
    )


def _stages(summary: Summary) -> str:
    rows = [
        (name, seconds_text(seconds), "taken from an earlier run" if reused else "computed")
        for name, seconds, reused in summary.stages
    ]
    return (
        "<section><h2>Stages</h2><p>Seconds of work by stage; sizes alone are trained side by "
        "side, and theirs are added up.</p><details><summary>Time by stage</summary>"
        f"{_table(('stage', 'time', 'this run'), rows)}</details></section>"
    )


def _provenance(summary: Summary) -> str:
    facts = "".join(
        f"<dt>{escape(a)}</dt><dd>{escape(b)}</dd>" for a, b in summary.facts.items()
    )
    networks = "".join(
        f"<dt>{escape(network.name)}</dt><dd>{_links(network.files)}</dd>"
        for network in summary.networks
        if network.files
    )
    return (
        f"<section><h2>Provenance</h2><dl>{facts}{networks}</dl>"
        f"<details><summary>Recipe</summary><pre>{escape(summary.recipe)}</pre></details>"
        "</section><footer>Written by Supple. This page needs no network.</footer>"
    )


def _links(paths: Iterable[str]) -> str:
    return ", ".join(f'<a href="{escape(path)}">{escape(path)}</a>' for path in paths)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    body = "".join(_row(row, "td") for row in rows)
    return f'<div class="scroll"><table class="wrap">{_row(head, "th")}{body}</table></div>'


def _row(cells: Sequence[str], tag: str) -> str:
    return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>"
