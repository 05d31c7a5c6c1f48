"""The complete NATS-Bench topology space: 15,625 cells with their accuracies on CIFAR-10.

Six edges, each with one of five operations. They are ordered by how much they compute, so that
searches that take steps between neighbours have neighbours to step to.
"""

from __future__ import annotations

import csv
import re
from functools import cache

import numpy as np
from numpy.typing import NDArray

from supple.data.base import find
from supple.space import Site, Space

__all__ = ["accuracies", "regrets", "space"]

OPERATIONS = ("none", "skip_connect", "avg_pool_3x3", "nor_conv_1x1", "nor_conv_3x3")
EDGES = 6


@cache
def space() -> Space:
    """Gives the space: six sites of five choices."""
    choices = tuple(range(len(OPERATIONS)))
    return Space([Site(f"edge{i}", "operator", choices, choices[-1]) for i in range(EDGES)])


@cache
def accuracies() -> NDArray[np.float64]:
    """Gives the test accuracy in % of every cell, shape (5,) * 6 by the operations' indices."""
    table = np.full((len(OPERATIONS),) * EDGES, np.nan)
    path = find("nats-bench") / "topology.csv"
    with path.open(newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            named = re.findall(r"([a-z_0-9]+)~\d", line["architecture"])
            table[tuple(OPERATIONS.index(name) for name in named)] = float(line["cifar10"])
    return table


def regrets(rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """Gives how many points encoded cells are below the best one, shape (cells,)."""
    found: NDArray[np.float64] = accuracies().max() - accuracies()[tuple(rows.T)]
    return found
