"""Where a small network pools four times: all 15 ways, each trained alone with six seeds.

`python -m reproductions.supernet._pooling15` writes the table `pooling15.json` beside the
results of `benchmarks`. The network has six blocks of eight channels, with a place for a
pooling before each; the data are CIFAR-10's first 10,000 training images, grey and shrunk to
16 x 16, so that after four poolings one pixel is left.

The catalogue has two poolings, which are 15 ways, too. They can't be told apart here: their
means over three seeds lay between 0.391 and 0.412, the seeds of one way differed by 0.009
(standard deviation), and Kendall's tau between seeds was 0.19. Other ways to train were tried,
all without looking at any supernet:

- MNIST instead (the first 2,000 images, 200 steps, learning rate 3e-2): seeds agreed to 0.62
  in a pilot of seven sizes and two seeds, and to 0.08 over all sizes and three seeds, whose
  means lie between 0.914 and 0.933. The pilot was chance.
- Three times as many steps, four sizes and two seeds only: 0.440 for places 0 and 1, 0.476 for
  1 and 3, 0.482 for 3 and 4, 0.475 for 4 and 5. The first two of the four are further apart
  than with 600 steps, but the seeds of one size still differ by 0.003 to 0.033.
- Three poolings, four sizes and two seeds: 0.398, 0.415, 0.411, 0.413.
- Four poolings, four sizes and two seeds: 0.382, 0.397, 0.387, 0.408; they were taken.

The table of these is hardly better: means over six seeds lie between 0.388 and 0.405, the seeds
of one way differ by 0.008 (standard deviation), Kendall's tau is 0.14 between two seeds and
0.28 between the means of three and of the other three. Where so small a network pools matters
little; what is compared with the table can differ only by chance, unless by much.
"""

from __future__ import annotations

import itertools
import statistics
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch
from scipy.stats import kendalltau

from reproductions.supernet._mnist8 import accuracy, loss
from supple.axes.placement import Placement, arrangements
from supple.data.base import Splits, load
from supple.files import read_json, write_json
from supple.models.base import build
from supple.network import Elastic, elastic
from supple.space import Config
from supple.testing.reproduce import across
from supple.training.loop import train
from supple.training.recalibrate import recalibrate
from supple.training.seeds import kept

__all__ = ["DATA", "configs", "data", "loss", "net", "score", "table", "tau"]

DATA = ("cifar10/train.parquet", "cifar10/test.parquet")
RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "pooling15.json"
PLACES, POOLS, WIDTH = 6, 4, 8
SEEDS = (0, 1, 2, 3, 4, 5)
STEPS, RATE = 600, 1e-2


@cache
def data() -> Splits:
    """Loads the images: 10,000 to train, 5,000 each to choose by and to report on."""
    found = load(
        "images",
        path="cifar10",
        size=16,
        channels=1,
        mean=(0.47,) * 3,
        std=(0.24,) * 3,
        augment=False,
        batch_size=64,
    )
    return Splits(
        train=found.train.first(10_000),
        validation=found.validation,
        test=found.test,
        classes=10,
    )


def model(seed: int, pools: tuple[int, ...]) -> torch.nn.Module:
    """Builds the network with its poolings at some places."""
    with kept(seed):
        return build("pooling-cnn", widths=(WIDTH,) * PLACES, pools=pools, channels=1)


def net(seed: int) -> Elastic:
    """Builds the elastic network: one site, where it pools."""
    places = tuple(f"places.{i}" for i in range(PLACES))
    axes = [Placement(places, POOLS)]
    return elastic(
        model(seed, (1, 2, 3, 4)), torch.zeros(2, 1, 16, 16), axes=axes, verify=False
    )


def configs(whole: Elastic) -> list[Config]:
    """Gives the 15 sizes, in the order of the table."""
    return whole.space.decode_many(whole.space.every())


def score(trained: Elastic, *, batches: int = 20) -> list[float]:
    """Measures the sizes as parts of one network: validation accuracies, recalibrated."""
    found = []
    trained.eval()
    for config in configs(trained):
        recalibrate(trained, config, data().train, batches=batches)
        with trained.at(config):
            found.append(accuracy(trained.module, data().validation))
    return found


def table() -> list[float]:
    """Gives each size's test accuracy when it was trained alone, the mean over the seeds."""
    return [statistics.fmean(row["accuracies"]) for row in _read()["sizes"]]


def ceiling() -> float:
    """Gives Kendall's tau between trainings with two seeds, the mean over pairs of seeds."""
    return float(_read()["seed_to_seed_tau"])


def tau(scores: list[float], truth: list[float] | None = None) -> float:
    """Tells how well scores order the sizes: Kendall's rank correlation with the table."""
    return float(kendalltau(scores, table() if truth is None else truth).statistic)


@cache
def _read() -> dict[str, Any]:
    found: dict[str, Any] = read_json(RESULT)
    return found


def alone(case: tuple[tuple[int, ...], int]) -> float:
    """Trains one size from scratch, as a network of its own, and gives its test accuracy."""
    pools, seed = case
    single = model(seed, pools)
    train(
        single,
        data().train,
        loss,
        steps=STEPS,
        lr=RATE,
        schedule="cosine",
        seed=seed,
        log_every=STEPS,
        progress=False,
    )
    return accuracy(single, data().test)


def main() -> None:
    """Train all sizes with all seeds and write the table."""
    started = time.perf_counter()
    sizes = arrangements(PLACES, POOLS)
    found = across(alone, [(pools, seed) for seed in SEEDS for pools in sizes])
    by_seed = [found[i * len(sizes) : (i + 1) * len(sizes)] for i in range(len(SEEDS))]
    pairs = [tau(a, b) for a, b in itertools.combinations(by_seed, 2)]
    result = {
        "command": "python -m reproductions.supernet._pooling15",
        "seeds": list(SEEDS),
        "steps": STEPS,
        "lr": RATE,
        "seed_to_seed_tau": statistics.fmean(pairs),
        "seed_to_seed_taus": pairs,
        "sizes": [
            {"pools": list(pools), "accuracies": list(each)}
            for pools, *each in zip(sizes, *by_seed, strict=True)
        ],
        "seconds": round(time.perf_counter() - started, 1),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    write_json(RESULT, result)
    print(f"Kendall's tau between seeds {result['seed_to_seed_tau']:.3f}; written to {RESULT}")


if __name__ == "__main__":
    main()
