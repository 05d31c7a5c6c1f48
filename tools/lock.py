"""Writes the exact versions of everything in this environment to requirements.lock."""

from __future__ import annotations

import re
from importlib.metadata import distributions
from pathlib import Path

LOCK = Path(__file__).parents[1] / "requirements.lock"
HEADER = """\
# Exact versions that Supple is tested with (Python 3.11, Linux). Written by `make lock`.
"""
LEFT_OUT = {"pip", "supple"}


def pins() -> list[str]:
    """Gives one line per distribution; builds such as `+cpu` are the user's choice."""
    found = {}
    for distribution in distributions():
        name = distribution.metadata["Name"]
        if re.sub(r"[-_.]+", "-", name).lower() not in LEFT_OUT:
            found[name] = distribution.version.partition("+")[0]
    return [f"{name}=={found[name]}" for name in sorted(found, key=str.lower)]


def main() -> None:
    """Writes the file."""
    LOCK.write_text(HEADER + "\n".join(pins()) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
