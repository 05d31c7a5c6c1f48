"""A small table of sizes trained alone, to judge what a supernet or a predictor says of them.

`python -m benchmarks.nb_mini` writes `benchmarks/results/nb_mini.json`: 92 sizes of one elastic
network on real digits, each trained alone from scratch with three seeds. The sizes are spread
evenly over the logarithm of their cost, so that cheap ones count as much as dear ones.

A supernet is judged by how well its accuracies of these sizes, measured on the validation set,
order the accuracies of the table, measured on the test set: `tau(score(net))`. Two things to
hold it against are `ceiling()`, how well one training alone orders another one with another
seed, and `tau(costs())`, how well the bare cost does.

The data are 2,000 of MNIST's images, shrunk to 8 x 8, of which training alone sees 150 batches
of 50: few enough that sizes differ. A pilot with 25 sizes and two seeds came before anything
was judged by it: with 500 images the seeds agreed less (Kendall's tau 0.76 against 0.87).
"""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import kendalltau

from reproductions.supernet._mnist8 import DATA, accuracy, digits, loss
from supple.axes.depth import Depth
from supple.axes.kernel import Kernel
from supple.axes.width import Width
from supple.cost.measure import device_name
from supple.data.base import Splits
from supple.files import read_json, write_json
from supple.models.base import build
from supple.network import Elastic, elastic
from supple.space import Config
from supple.testing.reproduce import across
from supple.training.loop import train
from supple.training.recalibrate import recalibrate
from supple.training.seeds import kept

__all__ = [
    "DATA",
    "STEPS",
    "ceiling",
    "configs",
    "costs",
    "data",
    "loss",
    "net",
    "regret",
    "score",
    "table",
    "tau",
]

RESULT = Path(__file__).parent / "results" / "nb_mini.json"
BANDS, PER_BAND = 24, 4
SEEDS = (0, 1, 2)
STEPS = 150
"""Steps that each size made alone."""
BATCH, IMAGES, RATE = 50, 2000, 1e-2
RECALIBRATION = 10


def net(seed: int) -> Elastic:
    """Builds the elastic network, untrained.

    Args:
        seed: Of its weights.

    Returns:
        A network of 46,656 sizes: six widths of 1/8 to 1, three blocks that can be left out,
        kernels of 1 or 3 in them.
    """
    with kept(seed):
        model = build("digits-cnn", widths=(16, 32, 48), blocks=(1, 1, 1))
    axes = [
        Width((0.125, 0.25, 0.5, 1.0)),
        Depth(pattern="any"),
        Kernel((1, 3), where="stages.*.1.conv1*"),
    ]
    return elastic(model, torch.zeros(2, 1, 8, 8), axes=axes, verify=False)


@cache
def data() -> Splits:
    """Loads the images: 2,000 to train, 2,000 to choose by, 5,000 to report on."""
    found = digits(BATCH)
    return Splits(
        train=found.train.first(IMAGES),
        validation=found.validation,
        test=found.test,
        classes=10,
    )


def configs() -> list[Config]:
    """Gives the sizes of the table, cheapest first."""
    return [Config(row["config"]) for row in _read()["sizes"]]


def costs() -> list[int]:
    """Gives the multiply-accumulates of each size of the table, for one image."""
    return [row["macs"] for row in _read()["sizes"]]


def table() -> list[float]:
    """Gives each size's test accuracy when it was trained alone, the mean over the seeds."""
    return [_mean(row["accuracies"]) for row in _read()["sizes"]]


def score(trained: Elastic) -> list[float]:
    """Measures the sizes of the table as parts of one network.

    Args:
        trained: What `net` built, trained; its statistics are recalibrated for each size.

    Returns:
        Validation accuracies in the order of `configs()`.
    """
    found = []
    trained.eval()
    for config in configs():
        recalibrate(trained, config, data().train, batches=RECALIBRATION)
        with trained.at(config):
            found.append(accuracy(trained.module, data().validation))
    return found


def tau(scores: Sequence[float], truth: Sequence[float] | None = None) -> float:
    """Tells how well scores order the sizes: Kendall's rank correlation (tau-b).

    Args:
        scores: One per size, in the order of `configs()`.
        truth: What they should be; the table's accuracies by default.

    Returns:
        1 for the same order, 0 for none in common, -1 for the reverse.
    """
    return float(kendalltau(scores, table() if truth is None else truth).statistic)


def regret(scores: Sequence[float], macs: float | None = None) -> float:
    """Tells what is lost by taking the size with the best score.

    Args:
        scores: One per size, in the order of `configs()`.
        macs: Take the best among the sizes that cost at most this; None for all.

    Returns:
        The best accuracy of the table less that of the size taken; of several with the best
        score the cheapest is taken.
    """
    most = float("inf") if macs is None else macs
    allowed = [i for i, cost in enumerate(costs()) if cost <= most]
    taken = max(allowed, key=lambda i: scores[i])
    truth = table()
    return max(truth[i] for i in allowed) - truth[taken]


def ceiling() -> float:
    """Gives Kendall's tau between trainings with two seeds, the mean over pairs of seeds."""
    return float(_read()["seed_to_seed_tau"])


def _mean(accuracies: Sequence[float]) -> float:
    return round(statistics.fmean(accuracies), 6)  # equal means must tie, however they add up


@cache
def _read() -> dict[str, Any]:
    found: dict[str, Any] = read_json(RESULT)
    return found


def spread_sizes() -> list[Config]:
    """Draws the sizes of the table: the two ends, and as many in each band of log cost."""
    whole = net(0)
    rows = whole.space.every()
    logs = np.log(whole.costs(rows)["macs"])
    edges = np.linspace(logs.min(), logs.max(), BANDS + 1)
    band = np.clip(np.searchsorted(edges, logs, side="right") - 1, 0, BANDS - 1)
    random = np.random.default_rng(0)
    chosen = {int(logs.argmin()), int(logs.argmax())}
    for i in range(BANDS):
        inside = np.flatnonzero(band == i)
        drawn = random.choice(inside, min(PER_BAND, len(inside)), replace=False)
        chosen.update(drawn.tolist())
    return [whole.space.decode(rows[i]) for i in sorted(chosen, key=lambda i: (logs[i], i))]


def alone(case: tuple[Config, int]) -> float:
    """Trains one size from scratch, as a network of its own.

    Args:
        case: The size, and the seed of its weights and of the order of the data.

    Returns:
        The test accuracy.
    """
    config, seed = case
    whole = net(seed)
    recalibrate(whole, config, data().train, batches=1)  # its statistics are reset below
    size = whole.extract(config)
    with kept(seed):
        for part in size.modules():
            if hasattr(part, "reset_parameters"):
                part.reset_parameters()  # slices would start at the full network's scale
    train(
        size,
        data().train,
        loss,
        steps=STEPS,
        lr=RATE,
        schedule="cosine",
        seed=seed,
        log_every=STEPS,
        progress=False,
    )
    return accuracy(size, data().test)


def main() -> None:
    """Train all sizes with all seeds and write the table."""
    started = time.perf_counter()
    sizes = spread_sizes()
    found = across(alone, [(config, seed) for seed in SEEDS for config in sizes])
    by_seed = [found[i * len(sizes) : (i + 1) * len(sizes)] for i in range(len(SEEDS))]
    whole = net(0)
    macs = whole.costs(whole.space.encode_many(sizes))["macs"].tolist()
    means = [_mean(each) for each in zip(*by_seed, strict=True)]
    pairs = [tau(a, b) for a, b in itertools.combinations(by_seed, 2)]
    seconds = time.perf_counter() - started
    result = {
        "command": "python -m benchmarks.nb_mini",
        "seeds": list(SEEDS),
        "steps": STEPS,
        "seed_to_seed_tau": statistics.fmean(pairs),
        "seed_to_seed_taus": pairs,
        "cost_tau": tau(macs, means),
        "cost_ratio": max(macs) / min(macs),
        "sizes": [
            {"config": dict(config), "macs": cost, "accuracies": list(each)}
            for config, cost, *each in zip(sizes, macs, *by_seed, strict=True)
        ],
        "seconds": round(seconds, 1),
        "device": device_name(),
        "versions": f"Python {sys.version.split()[0]}, PyTorch {torch.__version__}",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    write_json(RESULT, result)
    print(
        f"{len(sizes)} sizes, {result['cost_ratio']:.0f} times in cost, accuracy "
        f"{min(means):.3f} to {max(means):.3f}; Kendall's tau between seeds "
        f"{result['seed_to_seed_tau']:.3f}, of the cost {result['cost_tau']:.3f}; "
        f"{seconds:.0f} s; written to {RESULT}"
    )


if __name__ == "__main__":
    main()
