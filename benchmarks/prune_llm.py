"""A pruned language model side by side: Supple, published pruners and llm-compressor.

The small Llama (`llama-tiny`: 6 blocks, 4.4 M weights in linear layers) is pruned in one go,
nothing is trained: half of its weights, two of each four neighbours, or 30 % of its heads and
neurons. All arms of a seed see the same calibration windows of the text that it was trained on;
perplexity is that of text it has not seen. `magnitude`, `wanda`, `sparsegpt`, `flap` and
`taylor` are Supple's implementations of them; arms that begin with `supple` have more to them.
ARMOR stores more numbers than the others at 2:4: its wrappers count in `params`.

`python -m benchmarks.prune_llm` runs what is missing, each cell in a process of its own, one
per core, and writes `benchmarks/results/prune_llm.json` after each; `--fast` runs each arm on
two windows and writes nothing. Arguments choose arms, by the beginning of their names. Seconds
are of one core; `peak` is what pruning held beside the network itself. llm-compressor is
installed into `benchmarks/.envs/llm`, which sees this environment's packages; where it does not
install, its arms say why.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from statistics import fmean, stdev

from rich.console import Console
from rich.table import Table

from benchmarks._cells import Cell, Cells, environment, run_cell
from benchmarks._prune_llm_arms import ARMS, SPARSITY, STRUCTURED
from supple.technique import techniques

PEER = "llmcompressor==0.14.0.1"
SEEDS, WINDOWS, TESTED = (0, 1, 2), 64, 512
Found = Mapping[str, Cell]


def name(setting: str, arm: str, seed: int) -> str:
    """What a cell is called."""
    return f"{setting}/{arm}/{seed}"


def arms() -> Iterator[tuple[str, str]]:
    """All settings and arms; techniques that are not there are left out."""
    there = techniques("prune")
    yield "dense", "dense"
    for setting, named in ARMS.items():
        for arm in named:
            key = arm.removeprefix("supple ")
            if not key.startswith("prune/") or key in there:
                yield setting, arm


def wanted(cells: Found, chosen: list[str]) -> list[tuple[str, str, int]]:
    """The cells that are missing."""
    return [
        (setting, arm, seed)
        for seed in SEEDS
        for setting, arm in arms()
        if (not chosen or any(arm.startswith(one) for one in chosen))
        and (seed == SEEDS[0] or arm != "dense")
        and name(setting, arm, seed) not in cells
    ]


@cache
def peers() -> tuple[Path, dict[str, str]]:
    """The Python of llm-compressor's environment, and why that did not install."""
    return environment("llm", {PEER: [PEER]})


def run(setting: str, arm: str, seed: int, count: int = WINDOWS, tested: int = TESTED) -> Cell:
    """Runs a cell."""
    python = Path(sys.executable)
    if arm.startswith("llm-compressor"):
        python, failed = peers()
        if failed:
            return {"ran": False, "why": failed[PEER]}
    return run_cell(python, "_prune_llm_arms", setting, arm, seed, count, tested)


def table(cells: Found) -> Table:
    """Perplexity by arm: the mean over seeds, and how far they spread."""
    columns = ("perplexity", "params", "zeros", "seconds", "peak MB", "seeds")
    drawn = Table("what goes", "arm", *columns)
    for setting, arm in arms():
        found = [cells.get(name(setting, arm, seed)) for seed in SEEDS]
        ran = [one for one in found if one and one["ran"]]
        if not ran:
            drawn.add_row(setting, arm, *("-" for _ in columns))
            continue
        mean = {key: fmean(one[key] for one in ran) for key in ran[0] if key not in _TOLD}
        values = [one["perplexity"] for one in ran]
        spread = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
        drawn.add_row(
            setting,
            arm,
            f"{mean['perplexity']:.2f}{spread}",
            f"{mean['params'] / 1e6:.2f} M",
            f"{mean['zeros']:.1%}",
            f"{mean['seconds']:.1f}",
            f"{mean['peak_bytes'] / 1e6:.0f}",
            str(len(ran)),
        )
    return drawn


_TOLD = ("ran", "date")


def main(arguments: list[str]) -> None:
    """Runs what is missing and prints the table.

    Args:
        arguments: `--fast`, or the beginnings of names of arms; empty for all.
    """
    if "--fast" in arguments:
        for setting, arm in arms():
            print(setting, arm, run(setting, arm, 0, count=2, tested=8), flush=True)
        return
    setting = {
        "windows": WINDOWS,
        "tested": TESTED,
        "sparsity": SPARSITY,
        "structured": STRUCTURED,
    }
    cells = Cells("prune_llm", setting, [PEER])
    missing = wanted(cells.found, arguments)
    cells.fill({name(*one): partial(run, *one) for one in missing})
    Console().print(table(cells.found))


if __name__ == "__main__":
    main(sys.argv[1:])
