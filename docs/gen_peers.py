"""MkDocs hook: the page that compares Supple with its peers on the zoo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from supple.files import read_json

RESULT = Path(__file__).parent.parent / "benchmarks" / "results" / "any_model.json"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the page, if the benchmark was run.

    Args:
        files: All pages of the site.
        config: The site's settings.

    Returns:
        The pages and ours.
    """
    if RESULT.exists():
        files.append(File.generated(config, "peers.md", content=page(read_json(RESULT))))
    return files


def page(result: dict[str, Any]) -> str:
    """Gives the text of the page."""
    tools, families = result["tools"], result["families"]
    text = (
        "# Side by side\n\nEvery family of the [zoo](zoo.md), built small, is given to each "
        "tool, which is to prune it to about half of its parameters (20 to 75 % left) so that "
        f"a forward still works. `{result['command']}`, {result['date']}, "
        f"{result['machine']}; {', '.join(result['packages'])}.\n\nA cell is the part of the "
        "parameters left and the seconds that it took.\n\n"
    )
    text += "| family | " + " | ".join(tools) + " |\n|" + "---|" * (len(tools) + 1) + "\n"
    for family in families:
        cells = [tools[tool].get(family) for tool in tools]
        text += f"| {family} | " + " | ".join(map(cell, cells)) + " |\n"
    works = [str(sum(row["works"] for row in rows.values())) for rows in tools.values()]
    text += f"| **of {len(families)}** | " + " | ".join(f"**{n}**" for n in works) + " |\n"
    for tool, why in result["not installed"].items():
        text += f"\n{tool} was not installed: {why}\n"
    return (
        text + "\n## Why not\n" + "".join(reasons(tool, rows) for tool, rows in tools.items())
    )


def cell(row: dict[str, Any] | None) -> str:
    """Gives one cell of the table."""
    return f"{row['left']:.0%}, {row['seconds']:.1f} s" if row and row["works"] else "-"


def reasons(tool: str, rows: dict[str, dict[str, Any]]) -> str:
    """Gives what a tool said of each family that did not work."""
    failed = {family: row["why"] for family, row in rows.items() if not row["works"]}
    if not failed:
        return ""
    lines = (f"| {family} | {plain(why)} |\n" for family, why in failed.items())
    return f"\n### {tool}\n\n| family | reason |\n|---|---|\n" + "".join(lines)


def plain(text: str) -> str:
    """Gives text that a table can hold."""
    return text.replace("|", "/").replace("<", "&lt;")
