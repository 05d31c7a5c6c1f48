"""The page that maps promises to tests names tests that exist."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "contracts.md"
SECTIONS = (
    "Technique",
    "Axis and Patch",
    "`at`",
    "Depth",
    "Running statistics",
    "Optimizers",
    "Several processes",
    "Callbacks",
    "Costs",
    "Files",
    "Operators",
)


def test_every_test_named_exists() -> None:
    named = re.findall(r"(tests/[\w/]+\.py)::(test_\w+)", PAGE.read_text())
    assert len(named) > 80
    missing = [
        f"{path}::{name}"
        for path, name in named
        if f"def {name}(" not in (ROOT / path).read_text()
    ]
    assert missing == []


def test_every_section_has_rows_and_every_row_a_test() -> None:
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")][1:]
    sections = [row.strip("| ").strip("*") for row in rows if row.startswith("| **")]
    assert tuple(sections) == SECTIONS
    for above, row in itertools.pairwise(rows):
        assert not (above.startswith("| **") and row.startswith("| **")), above
        assert row.startswith("| **") or "::test_" in row, row
