"""MkDocs hook: the page of figures of smaller networks, from what benchmarks wrote."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from supple.files import read_json

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
PRUNE = """## Half and a quarter of a ResNet

The published ResNet-20, 32 and 56 for CIFAR-10 lose half or three quarters of their
multiply-accumulates and are trained for {steps} steps of 128 images, all with the same data,
optimizer, rate ({lr}) and schedule; arms that prune while they train do so within these steps.
Accuracy on the 5,000 test images in %, the mean over the seeds (in brackets) with the standard
deviation; every arm runs with the first seed, of each tool the arm that was best there with the
others too. *At once* is the accuracy before any training, *seconds* what pruning alone takes on
one core, with the median over all cells.

Torch-Pruning and only-train-once can't prune what shortcuts that pad with zeros join (one
raises, the other's network doesn't run): they prune the inner width of every block, Supple all
widths. {packages}.
"""


PRUNE_LLM = """## A pruned language model

The small Llama (6 blocks, 5.5 M parameters) is pruned in one go, nothing is trained: half of
its weights, two of each four neighbours, or 30 % of its heads and neurons. All arms of a seed
see the same {windows} windows of the text that the network was trained on. Perplexity is that
of {tested} windows that it has not seen, the mean over the seeds (in brackets) with the
standard deviation. *Seconds* are of one core, *peak* is what pruning held beside the network.
`magnitude`, `wanda`, `sparsegpt`, `flap` and `taylor` are Supple's implementations of them;
arms that begin with *supple* have more to them. Of ARMOR's parameters the zeros are not
stored, but its wrappers are. {packages}.
"""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the page.

    Args:
        files: All pages of the site.
        config: The site's settings.

    Returns:
        The pages and ours.
    """
    found = {path.stem: read_json(path) for path in sorted(RESULTS.glob("*.json"))}
    files.append(File.generated(config, "compression.md", content=page(found)))
    return files


def page(found: dict[str, dict[str, Any]]) -> str:
    """Gives the text of the page, with what was measured so far.

    Args:
        found: Contents of the result files by name.
    """
    text = "# Smaller networks, measured\n"
    if "prune" in found:
        text += "\n" + prune(found["prune"])
    if "prune_llm" in found:
        text += "\n" + prune_llm(found["prune_llm"])
    return text


def prune(result: dict[str, Any]) -> str:
    """Gives the tables of `benchmarks.prune`."""
    setting = result["setting"]
    text = PRUNE.format(
        steps=setting["steps"], lr=setting["lr"], packages=", ".join(result["packages"])
    )
    text += f"\n`{result['command']}` on {result['machine']}.\n"
    rows = [(name.split("/"), cell) for name, cell in result["cells"].items()]
    networks = sorted({network for (_, network, _, _), _ in rows})
    arms = list(dict.fromkeys(arm for (arm, *_), _ in rows))
    for left, told in (("50%", "Half"), ("25%", "A quarter")):
        text += f"\n### {told} of the multiply-accumulates left\n\n"
        text += f"| arm | {' | '.join(networks)} | at once | seconds | peak memory |\n"
        text += f"|{'---|' * (len(networks) + 4)}\n"
        for arm in arms:
            share = "100%" if arm == "dense" else left
            mine = [(n, c) for (a, n, s, _), c in rows if a == arm and s == share and c["ran"]]
            if not mine:
                continue
            cells = [_accuracy([c for n, c in mine if n == network]) for network in networks]
            once = [c["at_once"] for _, c in mine if "at_once" in c]
            text += (
                f"| {arm} | {' | '.join(cells)} | {f'{fmean(once):.0f}' if once else ''} | "
                f"{median(c['seconds'] for _, c in mine):.1f} | "
                f"{median(c['peak_bytes'] for _, c in mine) / 1e9:.1f} GB |\n"
            )
    failed = {arm: c["why"] for (arm, *_), c in rows if not c["ran"]}
    return text + "".join(f"\n{arm} failed: `{why}`\n" for arm, why in failed.items())


def prune_llm(result: dict[str, Any]) -> str:
    """Gives the tables of `benchmarks.prune_llm`."""
    setting = result["setting"]
    text = PRUNE_LLM.format(
        windows=setting["windows"],
        tested=setting["tested"],
        packages=", ".join(result["packages"]),
    )
    text += f"\n`{result['command']}` on {result['machine']}.\n"
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for name, cell in result["cells"].items():
        what, _, rest = name.partition("/")
        rows.setdefault((what, rest.rpartition("/")[0]), []).append(cell)
    (dense,) = rows.pop(("dense", "dense"))
    for told in dict.fromkeys(what for what, _ in rows):
        text += f"\n### {told}\n\n| arm | perplexity | parameters | zeros | seconds | peak |\n"
        text += f"|---|---|---|---|---|---|\n| dense | {dense['perplexity']:.2f} | | | | |\n"
        for (what, arm), cells in rows.items():
            ran = [cell for cell in cells if cell["ran"]]
            if what != told or not ran:
                continue
            values = [cell["perplexity"] for cell in ran]
            spread = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
            mean = {key: fmean(cell[key] for cell in ran) for key in _MEANT}
            text += (
                f"| {arm} | {fmean(values):.2f}{spread} ({len(values)}) | "
                f"{mean['params'] / 1e6:.2f} M | {mean['zeros']:.0%} | {mean['seconds']:.1f} | "
                f"{mean['peak_bytes'] / 1e6:.0f} MB |\n"
            )
    failed = {arm: c["why"] for (_, arm), cells in rows.items() for c in cells if not c["ran"]}
    return text + "".join(f"\n{arm} failed: `{why}`\n" for arm, why in failed.items())


_MEANT = ("params", "zeros", "seconds", "peak_bytes")


def _accuracy(cells: list[dict[str, Any]]) -> str:
    if not cells:
        return "-"
    values = [cell["accuracy"] for cell in cells]
    spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
    return f"{fmean(values):.1f}{spread} ({len(values)})"
