"""Quantized networks side by side: Supple, llm-compressor, HQQ and torchao.

Three kinds of networks, all with published or pretrained weights:

- the small Llama, and its *outlier twin*, which computes the same with a few channels 30 times
  as large: weights of 4, 3 and 2 bits in groups of 64, and weights and inputs of 4 bits;
  perplexity of text that it has not seen;
- the ResNet-20 and 56 for CIFAR-10, weights and inputs of 8, 4, 3 and 2 bits, at once and with
  steps of training of 64 images; accuracy;
- the sentence encoder MiniLM, weights and inputs of 8 bits, and weights of 4: cosine to its
  embeddings in full precision, and of how many of 400 texts the second half is found by the
  first.

All arms of a seed see the same calibration data. Bits are those of the files: codes, scales,
zero points, codebooks and what else a method adds, over the number of weights; for peers that
hold rounded weights there is none. Seconds are of one core; `peak` is what quantizing held
beside the network.

`python -m benchmarks.quantize` runs what is missing, one process per core, writes
`benchmarks/results/quantize.json` after each, and draws quality by bits in the end; `--fast`
runs one arm of each network and writes nothing. Arguments choose cells, by the beginning of
their names, such as `llama-twin/W2`. Peers are installed into `benchmarks/.envs/llm`; where one
does not install, its arms say why.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from statistics import fmean, stdev

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from rich.console import Console
from rich.table import Table

from benchmarks._cells import HERE, Cell, Cells, environment, run_cell
from benchmarks._quantize_arms import GROUP, TESTED, WINDOWS, arms

PEERS = {
    "llm-compressor": ["llmcompressor==0.14.0.1"],
    "hqq": ["hqq==0.2.8.post1"],
    "torchao": ["torchao==0.18.0"],
}
NETWORKS = {
    "llama": (0, 1, 2),
    "llama-twin": (0, 1, 2),
    "resnet20": (0,),
    "resnet56": (0,),
    "minilm": (0,),
}
"""Networks, and the seeds of their calibration data."""
ONCE = ("quantize/awq", "quantize/flatquant", "quantize/flexround", "llm-compressor awq")
"""Arms that take minutes, and run with the first seed only."""
STEPS = {"resnet20": 300, "resnet56": 100}
PICTURES = {
    "llama": "perplexity",
    "llama-twin": "perplexity",
    "resnet20": "accuracy, weights and inputs of so many bits",
    "resnet56": "accuracy, weights and inputs of so many bits",
}
"""Networks whose quality is drawn, and what it is."""
IMAGES = HERE.parent / "docs" / "images"
FIGURES = ("perplexity", "accuracy", "cosine", "retrieved")


def name(network: str, setting: str, arm: str, seed: int) -> str:
    """What a cell is called."""
    return f"{network}/{setting}/{arm}/{seed}"


def everything() -> Iterator[tuple[str, str, str, int]]:
    """All cells, first seeds first."""
    for turn in range(3):
        for network, seeds in NETWORKS.items():
            for setting, named in arms(network, 0).items():
                for arm in named:
                    once = setting == "none" or arm in ONCE
                    if turn < (1 if once else len(seeds)):
                        yield network, setting, arm, seeds[turn]


@cache
def peers() -> tuple[Path, dict[str, str]]:
    """The peers' Python, and what did not install."""
    return environment("llm", PEERS)


def run(network: str, setting: str, arm: str, seed: int) -> Cell:
    """Runs a cell; a peer's in the peers' environment."""
    python: str | Path = sys.executable
    peer = next((one for one in PEERS if arm.startswith(one) and arm != one), None)
    if peer is not None:
        python, failed = peers()
        if peer in failed:
            return {"ran": False, "why": failed[peer]}
    return run_cell(
        python, "_quantize_arms", network, setting, arm, seed, STEPS.get(network, 0)
    )


def tables(cells: Cells) -> Iterator[Table]:
    """A table for each network and setting: means over seeds."""
    for network, seeds in NETWORKS.items():
        for setting, named in arms(network, 0).items():
            drawn = Table(
                "arm", "figure", "bits", "seconds", "peak MB", title=f"{network} {setting}"
            )
            for arm in named:
                found = [cells.found.get(name(network, setting, arm, seed)) for seed in seeds]
                ran = [one for one in found if one and one["ran"]]
                if ran:
                    drawn.add_row(arm, *told(ran))
            if drawn.rows:
                yield drawn


def points(cells: Cells, network: str) -> dict[str, list[tuple[float, float]]]:
    """Bits of a weight and what the network is like, by arm; arms of one setting have no line.

    What peers hold rounded, not packed, has no bits, and weights and inputs of 4 bits are
    another matter than weights alone.
    """
    lines: dict[str, list[tuple[float, float]]] = {}
    for setting, named in arms(network, 0).items():
        if setting in ("none", "W4A4") and network.startswith("llama"):
            continue
        for arm in named:
            found = [
                cells.found.get(name(network, setting, arm, seed)) for seed in NETWORKS[network]
            ]
            ran = [one for one in found if one and one["ran"] and one["bits"] is not None]
            if ran:
                figure = next(one for one in FIGURES if one in ran[0])
                bits = fmean(one["bits"] for one in ran)
                lines.setdefault(arm, []).append((bits, fmean(one[figure] for one in ran)))
    return {arm: sorted(line) for arm, line in lines.items() if len(line) > 1}


def picture(lines: Mapping[str, Sequence[tuple[float, float]]], title: str) -> Figure:
    """Draws quality by bits, a line for each arm, what few bits spoil least named first."""
    figure = Figure(figsize=(7.6, 4.6), layout="constrained")
    axes = figure.subplots()
    perplexity = title.endswith("perplexity")
    sign = 1 if perplexity else -1
    best = sorted(lines, key=lambda arm: sign * lines[arm][0][1])
    for i, arm in enumerate(best):
        bits, values = zip(*lines[arm], strict=True)
        axes.plot(bits, values, "os^Dv"[i // 10] + "-", label=arm, ms=4, lw=1.3)
    if perplexity:
        axes.set_yscale("log")
        # Lines of what breaks down leave the picture: else no others could be told apart.
        least = min(value for line in lines.values() for _, value in line)
        axes.set_ylim(0.98 * least, 1.8 * least)
        for of_ticks in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            of_ticks(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.set_xlabel("bits of a weight, everything counted")
    axes.set_ylabel(title)
    axes.grid(alpha=0.3, which="both")
    figure.legend(frameon=False, fontsize=7, loc="outside right upper")
    return figure


def told(ran: list[Cell]) -> list[str]:
    """The figures of an arm."""
    figures = []
    for figure in FIGURES:
        if figure in ran[0]:
            values = [one[figure] for one in ran]
            spread = f" ± {stdev(values):.3g}" if len(values) > 1 else ""
            figures.append(f"{fmean(values):.5g}{spread}")
    bits = [one["bits"] for one in ran if one["bits"] is not None]
    return [
        ", ".join(figures),
        f"{fmean(bits):.2f}" if bits else "",
        f"{fmean(one['seconds'] for one in ran):.1f}",
        f"{fmean(one['peak_bytes'] for one in ran) / 1e6:.0f}",
    ]


def main(arguments: list[str]) -> None:
    """Runs what is missing and prints the tables.

    Args:
        arguments: `--fast`, or the beginnings of names of cells; empty for all.
    """
    if "--fast" in arguments:
        for network, setting in (("llama-twin", "W4"), ("resnet20", "W4A4"), ("minilm", "W4")):
            arm = next(iter(arms(network, 0)[setting]))
            print(network, setting, arm, run(network, setting, arm, 0), flush=True)
        return
    setting = {"group": GROUP, "windows": WINDOWS, "tested": TESTED, "steps": STEPS}
    packages = [one for wanted in PEERS.values() for one in wanted]
    cells = Cells("quantize", setting, packages)
    missing = {
        name(*one): partial(run, *one) for one in everything() if name(*one) not in cells.found
    }
    cells.fill(
        {
            one: work
            for one, work in missing.items()
            if not arguments or any(one.startswith(start) for start in arguments)
        }
    )
    for drawn in tables(cells):
        Console().print(drawn)
    for network, title in PICTURES.items():
        if lines := points(cells, network):
            picture(lines, title).savefig(IMAGES / f"quantize-{network}.png", dpi=120)


if __name__ == "__main__":
    main(sys.argv[1:])
