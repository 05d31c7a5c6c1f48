"""A search with Ray workers, in a process of its own: `python -m tests.faults.ray_search`.

Each evaluation notes in a file that it begins, in which process, and that it has ended.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from torch import nn

from supple.study.pareto import pareto
from tests.study.stub import Net, Toy, accuracy

SECONDS = 0.3
"""How long an evaluation takes: long enough to be killed in."""


class Traced:
    """The stub's accuracy, slowly, with a trace.

    Args:
        trace: The file.
    """

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __call__(self, module: nn.Module) -> dict[str, float]:
        assert isinstance(module, Toy)
        self._note("begin", module)
        time.sleep(SECONDS)
        value = accuracy(module)
        self._note("end", module)
        return {"accuracy": value}

    def _note(self, what: str, module: Toy) -> None:
        handle = os.open(self.trace, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(handle, f"{what} {os.getpid()} {module.config.to_json()}\n".encode())
        os.close(handle)


def main() -> None:
    """Searches in a folder, until its study holds so many evaluations, with such workers."""
    folder, evaluations, workers = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    front = pareto(
        Net(),
        Traced(folder / "trace"),
        ["params"],
        evaluations=evaluations,
        study=folder / "study.db",
        workers=workers,
        progress=False,
    )
    print(f"{len(front.evaluated)} evaluated")


if __name__ == "__main__":
    main()
