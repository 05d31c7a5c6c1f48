"""MkDocs hook: the page of the zoo, from what `python -m benchmarks.zoo` wrote.

The page is made while the site is built and is not kept in the repository.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from supple.files import read_json

RESULT = Path(__file__).parent.parent / "benchmarks" / "results" / "zoo.json"
INTRODUCTION = """# The zoo

Small members of {count} model families, each made elastic by the same call,
`supple.elastic(model, args)`, with the default axes. No line of Supple is about any of them:
what can vary is read from a recorded run, and everything that is offered was verified.
`tests/zoo/` builds them and states what somebody who knows the architecture would expect;
`tests/test_zoo.py` compares.

A name with a star stands for all names with a number in its place. Sites are given with their
smallest and full size. Seconds are of one thread ({device}) and include the run of the model
itself: analysis alone, and with verification.
"""
SHOWN = 3


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the generated page.

    Args:
        files: All pages of the site.
        config: The site's settings.

    Returns:
        The pages and ours.
    """
    files.append(File.generated(config, "zoo.md", content=page(read_json(RESULT))))
    return files


def page(result: dict[str, Any]) -> str:
    """Gives the page: a table of all families, then each with what is fixed and why."""
    families = result["families"]
    text = INTRODUCTION.format(count=len(families), device=result["device"])
    for kind in dict.fromkeys(row["kind"] for row in families.values()):
        text += f"\n## {kind.rstrip('.')}\n"
        rows = {name: row for name, row in families.items() if row["kind"] == kind}
        text += table(rows)
        text += "".join(details(name, row) for name, row in rows.items())
    return text


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Gives one line a family: how many sites by axis, how many configurations, seconds."""
    text = "\n| family | sites | configurations | seconds |\n|---|---|---|---|\n"
    for name, row in rows.items():
        if "refused" in row:
            text += f"| {name} | refused | | |\n"
            continue
        counts = ", ".join(
            f"{sum(site['count'] for site in found)} {axis}"
            for axis, found in row["sites"].items()
        )
        seconds = f"{row['seconds']['analysis']:.2f}, {row['seconds']['with verification']:.2f}"
        text += f"| [{name}](#{name}) | {counts} | {row['configs']} | {seconds} |\n"
    return text


def details(name: str, row: dict[str, Any]) -> str:
    """Gives the sites of one family and what is fixed in it."""
    text = f"\n### {name}\n\n{row['parameters']:,} parameters.\n\n"
    if "refused" in row:
        return text + f"Refused: {row['refused']}\n"
    text += "| axis | sites |\n|---|---|\n"
    for axis, found in row["sites"].items():
        text += f"| {axis} | {', '.join(map(described, found))} |\n"
    text += "\n| fixed | because |\n|---|---|\n"
    for reason, names in row["fixed"].items():
        listed = ", ".join(f"`{n}`" for n in names[:SHOWN])
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        text += f"| {listed}{more} | {reason.replace('|', chr(92) + '|')} |\n"
    return text


def described(site: dict[str, Any]) -> str:
    """Gives one entry: the name, how often, and the sizes."""
    times = f"{site['count']} x " if site["count"] > 1 else ""
    return f"{times}`{site['name']}` ({site['least']} to {site['full']})"
