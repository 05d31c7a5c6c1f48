"""Two tables of small networks trained with recipes, for FBNetV3.

A recipe is one of 24: learning rate, weight decay, label smoothing, averaged weights. Networks
are trained alone from scratch, 60 steps of 50 images, on the 2,000 images of
`benchmarks/nb_mini.py`; a table holds the accuracy on the 2,000 images to choose by and on the
5,000 to report on, one training each.

`recipes.json` is complete: 72 networks (`digits-cnn`: widths of three stages, a residual block
or none in the first two) times 24 recipes, in the order of `SPACE.every()`. `nb_mini.json` has
220 random sizes of nb-mini's network, each with a random recipe: `WIDE.random_many(220, 0)`.

`python -m reproductions.search._recipes` makes both, 25 minutes and 7 on one busy core, a part
at a time; a part that is there is not made again.

The steps were set after 30 trainings of three networks: with 60 of them, networks differ more
than with 100, and small ones want a larger learning rate than large ones.
"""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.nb_mini import data, net
from reproductions.supernet._mnist8 import accuracy
from supple.cost.count import macs, params
from supple.files import read_json, write_json
from supple.models.base import build
from supple.space import Config, Site, Space
from supple.testing.reproduce import across
from supple.training.loop import train
from supple.training.recalibrate import recalibrate
from supple.training.seeds import kept

TABLES = {"recipes": 8, "nb_mini": 2}
"""Their names, and in how many parts they are made."""
STEPS, SIZES = 60, 220
RECIPE = (
    # Thousandths, hundredths and tenths: choices are whole numbers.
    Site("lr", "recipe", (3, 10, 30), 10),
    Site("weight_decay", "recipe", (1, 100), 1),
    Site("smoothing", "recipe", (0, 2), 0),
    Site("ema", "recipe", (0, 9), 0),
)
SPACE = Space(
    [
        Site("width0", "width", (4, 8, 16), 16),
        Site("width1", "width", (8, 16, 32), 32),
        Site("width2", "width", (16, 48), 48),
        Site("blocks0", "depth", (0, 1), 1),
        Site("blocks1", "depth", (0, 1), 1),
        *RECIPE,
    ]
)
WIDE = Space([*net(0).space.sites, *RECIPE])


def trained(case: tuple[str, Config]) -> tuple[float, float]:
    """Trains one network with one recipe; gives its accuracies to choose by and to report."""
    table, config = case
    model = network(config) if table == "recipes" else size(config)

    def loss(output: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(output, batch[1], label_smoothing=config["smoothing"] / 10)

    train(
        model,
        data().train,
        loss,
        steps=STEPS,
        lr=config["lr"] / 1000,
        weight_decay=config["weight_decay"] / 100,
        ema=config["ema"] / 10 or None,
        schedule="cosine",
        log_every=STEPS,
        progress=False,
    )
    return accuracy(model, data().validation), accuracy(model, data().test)


def size(config: Config) -> nn.Module:
    """Makes a size of nb-mini's network, untrained."""
    whole = net(0)
    kept_sites = {name: value for name, value in config.items() if name in whole.space.names}
    only = Config(kept_sites)
    recalibrate(whole, only, data().train, batches=1)  # its statistics are reset below
    model = whole.extract(only)
    with kept(0):
        for part in model.modules():
            if hasattr(part, "reset_parameters"):
                part.reset_parameters()  # slices would start at the full network's scale
    return model


def network(config: Config) -> nn.Module:
    """Builds the network of a config, untrained."""
    with kept(0):
        return build(
            "digits-cnn",
            widths=[config[f"width{i}"] for i in range(3)],
            blocks=[config["blocks0"], config["blocks1"], 0],
        )


@cache
def costs() -> np.ndarray:
    """Gives the cost of each row: thousands of multiply-accumulates, and parameters."""
    every = SPACE.decode_many(SPACE.every())
    names = [site.name for site in SPACE.sites if site not in RECIPE]
    found = {}
    for config in every:
        key = tuple(config[name] for name in names)
        if key not in found:
            model = network(config)
            found[key] = macs(model, (torch.zeros(1, 1, 8, 8),)) / 1000, params(model)
    return np.array([found[tuple(config[name] for name in names)] for config in every])


def wide_costs(rows: np.ndarray) -> np.ndarray:
    """Gives the same of encoded configs of `WIDE`, by nb-mini's closed forms."""
    whole = net(0)
    found = whole.costs(rows[:, : len(whole.space.sites)])
    return np.stack([found["macs"] / 1000, found["params"]], axis=1)


@cache
def accuracies(table: str = "recipes") -> np.ndarray:
    """Gives the accuracies of each row, to choose by and to report, shape (rows, 2)."""
    return np.array(read_json(_path(table))["accuracies"])


def rows_of(table: str) -> np.ndarray:
    """Gives the encoded configs of a table."""
    rows = SPACE.every() if table == "recipes" else WIDE.random_many(SIZES, 0)
    return np.ascontiguousarray(rows)


@cache
def places() -> dict[bytes, int]:
    """Gives the place in the complete table of each encoded config."""
    return {row.tobytes(): place for place, row in enumerate(rows_of("recipes"))}


def find(rows: np.ndarray) -> np.ndarray:
    """Gives the places in the complete table of encoded configs, shape (configs,)."""
    known = places()
    return np.array([known[row.tobytes()] for row in np.ascontiguousarray(rows)], dtype=int)


def _path(name: str) -> Path:
    return Path(__file__).with_name(f"{name}.json")


def main(table: str | None = None, part: str | None = None) -> None:
    """Make one part of a table; without one, what is not there of both, and join the parts."""
    for name in [table] if table else TABLES:
        space = SPACE if name == "recipes" else WIDE
        cases = [(name, config) for config in space.decode_many(rows_of(name))]
        parts = TABLES[name]
        made = [_path(f"{name}-{i}") for i in range(parts)]
        for i in range(parts) if part is None else [int(part)]:
            if not made[i].exists():
                write_json(made[i], {"accuracies": across(trained, cases[i::parts])})
        if part is None:
            found = np.zeros((len(cases), 2))
            for i, path in enumerate(made):
                found[i::parts] = read_json(path)["accuracies"]
            write_json(_path(name), {"accuracies": found.round(4).tolist()})
            for path in made:
                path.unlink()


if __name__ == "__main__":
    main(*sys.argv[1:])
