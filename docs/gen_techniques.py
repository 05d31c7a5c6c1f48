"""MkDocs hook: a page per technique and an index, from cards, docstrings and results.

The pages are made while the site is built and are not kept in the repository.
"""

from __future__ import annotations

from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from supple.technique import technique
from supple.testing.reproduce import listing, stale, verdict

KINDS = {
    "transform": "changes a model",
    "rule": "trains",
    "search": "searches a space",
    "merge": "merges models",
    "decode": "generates",
    "study": "runs an experiment",
    "build": "builds a module or optimizer",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the generated pages.

    Args:
        files: All pages of the site.
        config: The site's settings.

    Returns:
        The pages and ours.
    """
    rows = listing()
    pages = {"techniques/index.md": index(rows)}
    pages |= {f"techniques/{row['key']}.md": page(row) for row in rows}
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    return files


def index(rows: list[dict[str, Any]]) -> str:
    """Gives the page that lists all techniques by room."""
    text = "# Techniques\n\nEach is one file, one paper and one reproduction.\n"
    for room in dict.fromkeys(row["room"] for row in rows):
        text += f"\n## {room}\n\n| key | title | kind | status |\n|---|---|---|---|\n"
        for row in rows:
            if row["room"] == room:
                text += (
                    f"| [{row['key']}]({row['key']}.md) | {row['title']} | "
                    f"{KINDS[row['kind']]} | {row['status']} |\n"
                )
    return text


def page(row: dict[str, Any]) -> str:
    """Gives the page of one technique."""
    cls = technique(row["key"])
    extras = ", ".join(f"`supple[{extra}]`" for extra in row["requires"]) or "nothing more"
    return (
        f"# {row['title']}\n\n"
        f"| | |\n|---|---|\n| key | `{row['key']}` |\n| kind | {KINDS[row['kind']]} |\n"
        f"| paper | {row['paper']} |\n| needs | {extras} |\n| status | {row['status']} |\n\n"
        f"::: {cls.__module__}.{cls.__name__}\n    options:\n      heading_level: 2\n\n"
        f"## Reproduction\n\n{reproduction(row)}"
    )


def reproduction(row: dict[str, Any]) -> str:
    """Gives the last result of a technique's reproduction, as a table."""
    last = row["reproduction"]
    if last is None:
        return f"Not tried yet: `supple reproduce {row['key']}`.\n"
    changed = ", ".join(stale(row["key"]))
    text = f"**{verdict(last['holds'])}**, in {last['seconds']:.0f} s."
    text += f" Stale: {changed} changed since.\n" if changed else "\n"
    text += (
        "\n| claim | effect | spread | needs | holds | idea off |\n|---|---|---|---|---|---|\n"
    )
    for claim in last["claims"]:
        text += (
            f"| {claim['name']} | {claim['effect']:+.4g} {claim['unit']} | "
            f"{claim['spread']:.2g} | > {claim['threshold']:g} | {verdict(claim['holds'])} | "
            f"{verdict(claim['switched_off']['holds'])} |\n"
        )
    return text
