"""Pruned networks side by side: Supple, Torch-Pruning and only-train-once on CIFAR-10.

The published ResNet-20, 32 and 56 lose half or three quarters of their multiply-accumulates and
are trained for `STEPS` steps of 128 images, all by the same data, optimizer, rate and
schedule; arms that prune while they train do so within these steps. A cell is one arm on one
network with one seed, in a process of its own (`benchmarks/_prune_arms.py`). Every arm runs
with the first seed; of each tool the arm that was best there runs with the others, too.

`python -m benchmarks.prune` runs what is missing, one process per core, and writes
`benchmarks/results/prune.json` after each; `--fast` makes ten steps of one cell per arm and
writes nothing. Arguments choose arms, by the beginning of their names. Seconds are of one core.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from statistics import fmean, stdev

from rich.console import Console
from rich.table import Table

from benchmarks._cells import Cell, Cells, run_cell
from benchmarks._prune_arms import ARMS, DECAY, LR
from benchmarks.any_model import PEERS, environment

DEPTHS, LEFT, SEEDS, STEPS = (20, 32, 56), (0.5, 0.25), (0, 1, 2), 100
TOOLS = ("supple", "torch-pruning", "only-train-once")
Found = Mapping[str, Cell]


def tool_of(arm: str) -> str:
    """The tool that an arm belongs to."""
    return next((tool for tool in TOOLS if arm.startswith(tool)), arm)


def name(arm: str, depth: int, left: float, seed: int) -> str:
    """What a cell is called."""
    return f"{arm}/resnet{depth}/{left:.0%}/{seed}"


def best(tool: str, depth: int, left: float, cells: Found) -> str | None:
    """A tool's arm with the highest accuracy with the first seed, if all of them have run."""
    names = {arm: name(arm, depth, left, SEEDS[0]) for arm in ARMS if tool_of(arm) == tool}
    if any(cell not in cells for cell in names.values()):
        return None
    done = {arm: cells[cell]["accuracy"] for arm, cell in names.items() if cells[cell]["ran"]}
    return max(done, key=lambda arm: done[arm]) if done else None


def wanted(cells: Found, chosen: list[str]) -> Iterator[tuple[str, int, float, int]]:
    """The cells that are missing and can be run now."""
    for seed in SEEDS:
        for depth in DEPTHS:
            for arm in ARMS:
                if chosen and not any(arm.startswith(one) for one in chosen):
                    continue
                for left in (1.0,) if arm == "dense" else LEFT:
                    tool = tool_of(arm)
                    first = seed == SEEDS[0] or best(tool, depth, left, cells) == arm
                    if (first or arm == "dense") and name(arm, depth, left, seed) not in cells:
                        yield arm, depth, left, seed


def run(arm: str, depth: int, left: float, seed: int, steps: int = STEPS) -> Cell:
    """Runs a cell in the peers' environment."""
    python, _ = environment_once()
    return run_cell(python, "_prune_arms", arm, depth, left, seed, steps)


@cache
def environment_once() -> tuple[Path, dict[str, str]]:
    """The peers' Python, and what did not install."""
    return environment()


def table(cells: Found) -> Table:
    """Accuracy by arm and network: the mean over seeds, and how far they spread."""
    columns = [(depth, left) for depth in DEPTHS for left in LEFT]
    drawn = Table("arm", *(f"resnet{depth} {left:.0%}" for depth, left in columns))
    for arm in ARMS:
        drawn.add_row(arm, *(told(cells, arm, depth, left) for depth, left in columns))
    return drawn


def told(cells: Found, arm: str, depth: int, left: float) -> str:
    """One cell of the table."""
    left = 1.0 if arm == "dense" else left
    found = [cells.get(name(arm, depth, left, seed)) for seed in SEEDS]
    ran = [one for one in found if one and one["ran"]]
    if not ran:
        return "-"
    values = [one["accuracy"] for one in ran]
    spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
    share = fmean(one["macs"] for one in ran)
    return f"{fmean(values):.1f}{spread} ({len(values)}; {share:.0%})"


def main(arguments: list[str]) -> None:
    """Runs what is missing and prints the table.

    Args:
        arguments: `--fast`, or the beginnings of names of arms; empty for all.
    """
    if "--fast" in arguments:
        for arm in ARMS:
            print(arm, run(arm, DEPTHS[0], LEFT[0], 0, steps=10), flush=True)
        return
    setting = {"steps": STEPS, "lr": LR, "weight_decay": DECAY}
    packages = sorted({one for tool in TOOLS[1:] for one in PEERS[tool] if "==" in one})
    cells = Cells("prune", setting, packages, environment_once()[1])
    while missing := list(wanted(cells.found, arguments)):
        cells.fill({name(*one): partial(run, *one) for one in missing})
    Console().print(table(cells.found))


if __name__ == "__main__":
    main(sys.argv[1:])
