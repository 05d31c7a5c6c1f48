"""What a whole family of sizes costs: one training for twenty sizes, against one for each.

A MobileNetV3-like network learns all training images of CIFAR-10, at 16 x 16 pixels. *Together*
is one training by `METHOD`; *alone* trains each of twenty sizes by itself, from scratch, for
`EPOCHS`, with the same batch, optimizer, peak rate and augmentation. Together takes `LONGER`
times as many steps, which is meant to cost no more than 2.5 times the largest size alone. The
sizes are the smallest, the largest, and one drawn at random from each of 18 bands of cost
between them. All are scored on the test set, those trained together with running statistics
measured anew. Costs are seconds of one core, recalibrating the twenty sizes included.

`python -m benchmarks.family` trains what is missing, one training per core at a time, and
writes `benchmarks/results/family.json` after each and `docs/images/family.png`.
"""

from __future__ import annotations

import itertools
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

from benchmarks.supernet import loss, network, score
from supple.cost.measure import device_name
from supple.data.base import Splits, load
from supple.errors import SuppleWarning
from supple.files import read_json, write_json
from supple.network import Elastic
from supple.space import Config
from supple.technique import from_settings
from supple.training.loop import train
from supple.training.recalibrate import recalibrate

RESULT = Path(__file__).parent / "results" / "family.json"
PICTURE = Path(__file__).parent.parent / "docs" / "images" / "family.png"
METHOD = "supernet/deps"
SIZES = 20
EPOCHS = 8
LONGER = 1.55
BATCH = 64
TRAINING: dict[str, Any] = {
    "lr": 3e-3, "weight_decay": 0.05, "warmup": 0.03, "clip": 5.0, "seed": 0,
    "log_every": 200, "progress": False,
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


def sizes(net: Elastic) -> list[Config]:
    """Gives the family, the cheapest first."""
    drawn = net.space.random_many(20_000, 0)
    logs = np.log(net.costs(drawn)["macs"])
    ends = [net.space.smallest(), net.space.largest()]
    low, high = np.log(net.costs(net.space.encode_many(ends))["macs"])
    edges = np.linspace(low, high, SIZES - 1)
    between = [
        net.space.decode(drawn[np.flatnonzero((logs > a) & (logs <= b))[0]])
        for a, b in itertools.pairwise(edges)
    ]
    return [ends[0], *between, ends[1]]


def trained(which: str) -> dict[str, Any]:
    """Trains all sizes together, or one of them (by its number) alone, and scores."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", SuppleWarning)
    splits, net = data(), network("cifar", 0)
    steps = EPOCHS * splits.train.examples // BATCH
    used = time.process_time()
    if which == TOGETHER:  # the method brings its schedule
        steps = round(LONGER * steps)
        run: dict[str, Any] = {"method": from_settings(METHOD, {}), "steps": steps}
        history = train(net, splits.train, loss, **run, **TRAINING)
        for config in sizes(net):
            recalibrate(net, config, splits.train, batches=20)
        used = time.process_time() - used
        scores = []
        for config in sizes(net):
            with net.eval().at(config):
                scores.append(score("cifar", net.module, splits.test))
        passes = history.rows[-1]["passes"]
    else:
        alone = net.extract(sizes(net)[int(which)])
        train(alone, splits.train, loss, steps=steps, schedule="cosine", **TRAINING)
        used = time.process_time() - used
        scores, passes = [score("cifar", alone, splits.test)], steps
    return {
        "scores": scores,
        "steps": steps,
        "passes": passes,
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
    setting = {
        "method": METHOD,
        "longer": LONGER,
        "epochs": EPOCHS,
        "batch": BATCH,
        "lr": TRAINING["lr"],
    }
    if figures.get("setting") != setting:
        figures = {"runs": {}}
    net = network("cifar", 0)
    macs = net.costs(net.space.encode_many(sizes(net)))["macs"]
    figures |= {
        "setting": setting,
        "command": "python -m benchmarks.family",
        "device": device_name(),
        "macs": [float(value) for value in macs],
    }
    # the largest first: with it the first figures of the promise are known
    order = [TOGETHER, *(str(number) for number in reversed(range(SIZES)))]
    jobs = [which for which in order if which not in figures["runs"]]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=context) as pool:
        running = {pool.submit(trained, which): which for which in jobs}
        for done in as_completed(running):
            which, row = running[done], done.result()
            figures["runs"][which] = row
            write_json(RESULT, figures)
            scores = " ".join(f"{100 * value:.1f}" for value in row["scores"])
            print(f"{which}: {scores} ({row['cpu_seconds']:.0f} s)", flush=True)
    figures["summary"] = summary(figures)
    write_json(RESULT, figures)
    for name, value in figures["summary"].items():
        print(f"{name}: {value:.2f}")
    PICTURE.parent.mkdir(exist_ok=True)
    picture(figures).savefig(PICTURE, dpi=120)


if __name__ == "__main__":
    main()
