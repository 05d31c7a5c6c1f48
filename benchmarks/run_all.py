"""Runs every benchmark of this folder, each in a process of its own.

A benchmark is a file with `main()`, run as `python -m benchmarks.NAME`. Arguments choose some:
`python -m benchmarks.run_all digits overhead`.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent


def names() -> list[str]:
    """Gives the names of all benchmarks."""
    return sorted(
        path.stem
        for path in HERE.glob("*.py")
        if path.stem != Path(__file__).stem and not path.stem.startswith("_")
    )


def main(chosen: list[str]) -> int:
    """Runs the chosen benchmarks, or all, and gives an exit status.

    Args:
        chosen: Names; empty for all.

    Returns:
        0 if all of them ran, 2 for an unknown name, else 1.
    """
    unknown = sorted(set(chosen) - set(names()))
    if unknown:
        print(f"no benchmark named {', '.join(unknown)}; there are: {', '.join(names())}")
        return 2
    failed = []
    for name in chosen or names():
        print(f"== {name}", flush=True)
        started = time.perf_counter()
        command = [sys.executable, "-m", f"benchmarks.{name}"]
        if subprocess.run(command, cwd=HERE.parent, check=False).returncode:
            failed.append(name)
        print(f"== {name}: {time.perf_counter() - started:.0f} s", flush=True)
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
