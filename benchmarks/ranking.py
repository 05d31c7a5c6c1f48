"""How well a network trained for all sizes tells which of them are good.

Every method of `benchmarks.supernet` that trains from scratch makes the same number of passes
on the network of `benchmarks.nb_mini`, with the settings by which the table's sizes were
trained alone. Its accuracies of the table's sizes (validation set, recalibrated statistics) are
held against the table's (test set): Kendall's tau, and the regret of taking the size that
scored best, among all and among those of half the largest cost.

`python -m benchmarks.ranking` measures what is missing, one training per core at a time, and
writes `benchmarks/results/ranking.json` after each.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import statistics
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from benchmarks import nb_mini
from benchmarks.supernet import FROM_SCRATCH, SHARED, Settings, code
from supple.cost.measure import device_name
from supple.errors import SuppleWarning
from supple.files import read_json, write_json
from supple.technique import from_settings
from supple.training.loop import train

RESULT = Path(__file__).parent / "results" / "ranking.json"
PASSES = 1200
SEEDS = (0, 1, 2)
METHODS: dict[str, tuple[str, Settings, float]] = {
    "uniform": ("supernet/pa-da", {"paths": False, "data": False}, 1),
    **SHARED,
    **FROM_SCRATCH,
    "balanced-supernets": ("supernet/balanced-supernets", {"where": "*.keep"}, 1),
}


def ranked(method: str, seed: int) -> dict[str, Any]:
    """Trains by one method and scores all sizes of the table."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", SuppleWarning)
    key, settings, each = METHODS[method]
    net, used = nb_mini.net(seed), time.process_time()
    rule = from_settings(key, settings)
    history = train(
        net,
        nb_mini.data().train,
        nb_mini.loss,
        method=rule,
        steps=round(PASSES / each),
        lr=nb_mini.RATE,
        schedule=None if rule.schedule() is not None else "cosine",
        seed=seed,
        log_every=50,
        progress=False,
    )
    used = time.process_time() - used
    scores = nb_mini.score(net)
    return {
        "tau": nb_mini.tau(scores),
        "regret": nb_mini.regret(scores),
        "regret_at_half": nb_mini.regret(scores, max(nb_mini.costs()) / 2),
        "mean_accuracy": statistics.fmean(scores),
        "passes": history.rows[-1]["passes"],
        "cpu_seconds": round(used, 1),
    }


def main() -> None:
    """Measures what is missing, writes and shows all."""
    figures: dict[str, Any] = read_json(RESULT) if RESULT.exists() else {"cells": {}}
    figures |= {
        "command": "python -m benchmarks.ranking",
        "device": device_name(),
        "date": time.strftime("%Y-%m-%d"),
        "ceiling": nb_mini.ceiling(),
        "cost_tau": nb_mini.tau(nb_mini.costs()),
    }
    codes = {name: code(METHODS[name], PASSES) for name in METHODS}
    jobs = [
        (method, seed)
        for seed, method in itertools.product(SEEDS, METHODS)
        if figures["cells"].get(f"{method}/{seed}", {}).get("code") != codes[method]
    ]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=context) as pool:
        running = {pool.submit(ranked, *job): job for job in jobs}
        for done in as_completed(running):
            method, seed = running[done]
            row = done.result() | {"code": codes[method]}
            figures["cells"][f"{method}/{seed}"] = row
            write_json(RESULT, figures)
            print(
                f"{method} {seed}: tau {row['tau']:.3f}, regret {row['regret']:.4f}", flush=True
            )


if __name__ == "__main__":
    main()
