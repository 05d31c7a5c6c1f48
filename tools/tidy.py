"""For pre-commit: text files end in one newline, and none is large."""

from __future__ import annotations

import sys
from pathlib import Path

LARGEST = 500_000
"""Bytes; figures and results belong in git, data and weights don't."""


def faults(path: Path) -> list[str]:
    """Gives what is wrong with a file, and mends its end."""
    content = path.read_bytes()
    found = []
    if len(content) > LARGEST:
        found.append(f"{path}: {len(content)} bytes, at most {LARGEST}")
    tidy = content.rstrip(b"\n") + b"\n"
    if content and content != tidy:
        path.write_bytes(tidy)
        found.append(f"{path}: mended its end")
    return found


def main() -> int:
    """Looks at the files named on the command line."""
    found = [line for name in sys.argv[1:] for line in faults(Path(name))]
    print("\n".join(found))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
