"""MkDocs hook: the page of figures of quantized networks, from what benchmarks wrote."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from supple.files import read_json

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
IMAGES = Path(__file__).parent / "images"
QUALITY = """## What few bits cost

Three kinds of networks with published or pretrained weights: the small Llama (6 blocks) and
its *outlier twin*, which computes the same with a few channels 30 times as large (perplexity
of {tested} windows of text that it has not seen; groups of {group} weights); ResNets for
CIFAR-10 (accuracy on 2,000 test images; *trained* arms go on for {steps} steps of 64 images);
and the sentence encoder MiniLM (cosine to its own embeddings in full precision, and of how
many texts of 400 the second half is found by the first, in %). Figures are means over the
seeds (in brackets) of the calibration data, with the standard deviation. *Bits* are those of
the file for each weight, with scales, zero points, codebooks and whatever else a method adds;
none are given for peers that hold rounded weights. *Seconds* are of one core, *peak* is what
quantizing held beside the network. Names that begin with `quantize/` are techniques; other
arms without a tool's name are Supple's implementations of published quantizers. {packages}.
"""
SPEED = """## How fast they are

One forward in milliseconds on one thread, random weights. *Supple* ways are named by the
quantizer and the engine that runs them; `supple export --engine auto` tries the engines in
the same way. Bytes are copied at {copied:.1f} GB a second here (`memcpy`, one thread); what of
that reading the weights' codes comes to stands beside the linear layers. {packages}.
"""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the page.

    Args:
        files: All pages of the site.
        config: The site's settings.

    Returns:
        The pages and ours.
    """
    found = {path.stem: read_json(path) for path in sorted(RESULTS.glob("quantize*.json"))}
    files.append(File.generated(config, "quantization.md", content=page(found)))
    return files


def page(found: dict[str, dict[str, Any]]) -> str:
    """Gives the text of the page, with what was measured so far.

    Args:
        found: Contents of the result files by name.
    """
    text = "# Fewer bits, measured\n"
    if "quantize" in found:
        text += "\n" + quality(found["quantize"])
    if "quantize_speed" in found:
        text += "\n" + speed(found["quantize_speed"])
    return text


def quality(result: dict[str, Any]) -> str:
    """Gives the tables and pictures of `benchmarks.quantize`."""
    setting = result["setting"]
    steps = " or ".join(str(one) for one in sorted(set(setting["steps"].values())))
    text = QUALITY.format(
        tested=setting["tested"],
        group=setting["group"],
        steps=steps,
        packages=", ".join(result["packages"]),
    )
    text += f"\n`{result['command']}` on {result['machine']}.\n"
    rows: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
    for name, cell in result["cells"].items():
        network, told, rest = name.split("/", 2)
        arm = rest.rpartition("/")[0]
        rows.setdefault((network, told), {}).setdefault(arm, []).append(cell)
    for network in dict.fromkeys(network for network, _ in rows):
        text += f"\n### {network}\n"
        if (IMAGES / f"quantize-{network}.png").exists():
            text += f"\n![{network}](images/quantize-{network}.png)\n"
        whole = rows.get((network, "none"), {}).get("none", [])
        for (own, told), arms in rows.items():
            if own == network and told != "none":
                text += _table(told, {"as it was": whole, **arms})
    return text


def _table(told: str, arms: dict[str, list[dict[str, Any]]]) -> str:
    """The arms of one setting, the best first."""
    ran = {arm: [one for one in cells if one["ran"]] for arm, cells in arms.items()}
    ran = {arm: cells for arm, cells in ran.items() if cells}
    figures = [key for key in _FIGURES if any(key in cells[0] for cells in ran.values())]
    if not figures:
        return ""
    up = figures[0] != "perplexity"
    best = sorted(ran, key=lambda arm: fmean(c[figures[0]] for c in ran[arm]), reverse=up)
    text = f"\n**{told}**\n\n| arm | {' | '.join(figures)} | bits | seconds | peak |\n"
    text += f"|{'---|' * (len(figures) + 4)}\n"
    for arm in best:
        cells = [_mean([one[key] for one in ran[arm]]) for key in figures]
        bits = [one["bits"] for one in ran[arm] if one["bits"] is not None]
        text += (
            f"| {arm} | {' | '.join(cells)} | {f'{fmean(bits):.2f}' if bits else ''} | "
            f"{fmean(one['seconds'] for one in ran[arm]):.1f} | "
            f"{fmean(one['peak_bytes'] for one in ran[arm]) / 1e6:.0f} MB |\n"
        )
    failed = {arm: one["why"] for arm, cells in arms.items() for one in cells if not one["ran"]}
    return text + "".join(f"\n{arm} failed: `{why}`\n" for arm, why in failed.items())


_FIGURES = ("perplexity", "accuracy", "cosine", "retrieved")


def _mean(values: list[float]) -> str:
    spread = f" ± {stdev(values):.2g}" if len(values) > 1 else ""
    return f"{fmean(values):.4g}{spread} ({len(values)})"


def speed(result: dict[str, Any]) -> str:
    """Gives the tables of `benchmarks.quantize_speed`."""
    copied = result["bytes per second copied"]
    text = SPEED.format(copied=copied / 1e9, packages=", ".join(result["packages"]))
    text += f"\n`{result['command']}` on {result['machine']}.\n"
    if (IMAGES / "quantize-speed.png").exists():
        text += "\n![speed by bits](images/quantize-speed.png)\n"
    for row in result["rows"]:
        linear = row["name"].startswith("linear")
        heads = ["way", "milliseconds", "PyTorch's float32 over it"]
        heads += ["weights read, GB a second (share of copying)"] * linear
        text += f"\n### {row['name']}\n\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}\n"
        times = row["milliseconds"]
        base = times.get("PyTorch", times.get("fp32, pytorch"))
        for way, time in sorted(times.items(), key=lambda one: one[1]):
            cells = [way, f"{time:.3f}", f"{base / time:.2f}"]
            if linear:
                read = result["width"] ** 2 * row["bits"][way] / 8 / (time / 1e3)
                cells.append(f"{read / 1e9:.1f} ({read / copied:.0%})")
            text += f"| {' | '.join(cells)} |\n"
        text += "".join(f"\n{way} failed: `{why}`\n" for way, why in row["refused"].items())
    return text
