"""What a whole family of sizes costs: one training for twenty sizes, against one for each.

A MobileNetV3-like network learns all training images of CIFAR-10, at 16 x 16 pixels. *Together*
is one training by `METHOD`; *alone* trains each of twenty sizes by itself, from scratch, for
`EPOCHS`, with the same batch, optimizer, schedule, peak rate and augmentation. Together makes
`LONGER` times as many passes, most of them of smaller sizes, which is meant to cost no more
than 2.5 times the largest size alone. The sizes are a nested chain from the smallest to the
largest. All are scored on the test set, those trained together with running statistics measured
anew. Costs are seconds of one core, recalibrating the twenty sizes included.

`python -m benchmarks.family` trains what is missing, one training per core at a time, and
writes `benchmarks/results/family.json` after each and `docs/images/family.png`.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from benchmarks.supernet import loss, mobilenet, score
from supple.axes.depth import Depth
from supple.axes.width import Width
from supple.cost.measure import device_name
from supple.data.base import Splits, load
from supple.errors import SuppleWarning
from supple.files import read_json, write_json
from supple.network import Elastic, elastic
from supple.space import Config
from supple.supernet.base import nested_chain
from supple.technique import from_settings
from supple.training.loop import train
from supple.training.recalibrate import recalibrate

RESULT = Path(__file__).parent / "results" / "family.json"
PICTURE = Path(__file__).parent.parent / "docs" / "images" / "family.png"
METHOD, SETTINGS = "supernet/variant", {"levels": 20}
SIZES = 20
EPOCHS = 8
LONGER = 2.5
BATCH = 64
TRAINING: dict[str, Any] = {
    "lr": 3e-3, "schedule": "cosine", "warmup": 0.03, "weight_decay": 0.05, "clip": 5.0,
    "seed": 0, "log_every": 200, "progress": False,
}  # fmt: skip
TOGETHER = "together"


@cache
def data() -> Splits:
    """Loads all of CIFAR-10."""
    return load(
        "images",
        path="cifar10",
        size=16,
        mean=(0.491, 0.482, 0.447),
        std=(0.247, 0.243, 0.262),
        batch_size=BATCH,
    )


def network() -> Elastic:
    """Builds the network of `benchmarks.supernet`, with twenty choices of every width."""
    axes = [Width(tuple(np.linspace(0.25, 1.0, SIZES).tolist())), Depth()]
    return elastic(mobilenet(0), data().train.example()[0], axes=axes, verify=False)


def sizes(net: Elastic) -> list[Config]:
    """Gives the family, the smallest first."""
    return nested_chain(net.space, SIZES)


def setting(which: str) -> dict[str, Any]:
    """Gives what a training was run with."""
    common = {"epochs": EPOCHS, "batch": BATCH, "lr": TRAINING["lr"]}
    return common | ({"method": METHOD, "longer": LONGER} if which == TOGETHER else {})


def trained(which: str) -> dict[str, Any]:
    """Trains all sizes together, or one of them (by its number) alone, and scores."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", SuppleWarning)
    splits, net = data(), network()
    steps = EPOCHS * splits.train.examples // BATCH
    used = time.process_time()
    if which == TOGETHER:
        steps = round(LONGER * steps)
        method = from_settings(METHOD, SETTINGS)
        train(net, splits.train, loss, method=method, steps=steps, **TRAINING)
        for config in sizes(net):
            recalibrate(net, config, splits.train, batches=20)
        used = time.process_time() - used
        scores = []
        for config in sizes(net):
            with net.eval().at(config):
                scores.append(score("cifar", net.module, splits.test))
    else:
        alone = net.extract(sizes(net)[int(which)])
        train(alone, splits.train, loss, steps=steps, **TRAINING)
        used = time.process_time() - used
        scores = [score("cifar", alone, splits.test)]
    return {
        "scores": scores,
        "setting": setting(which),
        "steps": steps,
        "cpu_seconds": round(used, 1),
        "date": time.strftime("%Y-%m-%d %H:%M"),
    }


def summary(figures: dict[str, Any]) -> dict[str, Any]:
    """Gives the family's cost and its mean distance to the sizes trained alone."""
    runs = figures["runs"]
    together = runs[TOGETHER]
    alone = [runs[str(number)] for number in range(SIZES) if str(number) in runs]
    which = [number for number in range(SIZES) if str(number) in runs]
    gaps = [
        100 * (together["scores"][number] - run["scores"][0])
        for number, run in zip(which, alone, strict=True)
    ]
    return {
        "sizes": len(which),
        "mean_gap_points": statistics.fmean(gaps),
        "worst_gap_points": min(gaps),
        "best_gap_points": max(gaps),
        "times_the_largest_seconds": together["cpu_seconds"] / alone[-1]["cpu_seconds"],
        "times_all_alone_seconds": together["cpu_seconds"]
        / sum(run["cpu_seconds"] for run in alone),
    }


def picture(figures: dict[str, Any]) -> Figure:
    """Draws accuracy by multiply-accumulates, together and alone."""
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    runs, macs = figures["runs"], figures["macs"]
    which = [number for number in range(SIZES) if str(number) in runs]
    alone = [100 * runs[str(number)]["scores"][0] for number in which]
    axes.plot(macs, [100 * s for s in runs[TOGETHER]["scores"]], "o-", label="trained together")
    axes.plot([macs[number] for number in which], alone, "s", label="each trained alone")
    axes.set_xscale("log")
    axes.set_xlabel("multiply-accumulates")
    axes.set_ylabel("test accuracy, %")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def main() -> None:
    """Trains what is missing, writes and shows all."""
    figures: dict[str, Any] = read_json(RESULT) if RESULT.exists() else {"runs": {}}
    net = network()
    macs = net.costs(net.space.encode_many(sizes(net)))["macs"]
    figures |= {
        "command": "python -m benchmarks.family",
        "device": device_name(),
        "macs": [float(value) for value in macs],
    }
    # every third first: what there is when a run is cut short tells of all costs
    thirds = [number for first in range(3) for number in range(SIZES - 1 - first, -1, -3)]
    order = [TOGETHER, *map(str, thirds)]
    runs = figures["runs"]
    jobs = [w for w in order if runs.get(w, {}).get("setting") != setting(w)]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=context) as pool:
        running = {pool.submit(trained, which): which for which in jobs}
        for done in as_completed(running):
            which, row = running[done], done.result()
            runs[which] = row
            if {TOGETHER, str(SIZES - 1)} <= set(runs):
                figures["summary"] = summary(figures)
            write_json(RESULT, figures)
            scores = " ".join(f"{100 * value:.1f}" for value in row["scores"])
            print(f"{which}: {scores} ({row['cpu_seconds']:.0f} s)", flush=True)
    for name, value in figures["summary"].items():
        print(f"{name}: {value:.2f}")
    PICTURE.parent.mkdir(exist_ok=True)
    picture(figures).savefig(PICTURE, dpi=120)


if __name__ == "__main__":
    main()
