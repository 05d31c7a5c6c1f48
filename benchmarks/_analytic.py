"""An OFA-like space with a known accuracy: nothing is fitted, nothing is measured.

The sizes and multiply-accumulates are those of `benchmarks._ofa_mbv3` (45 sites of three
choices). The accuracy, in %, is a formula whose constants are drawn once from `SEED`:

- each block has a capacity: an expansion's share that grows with its logarithm, a kernel's
  share whose best kernel differs from block to block, and a product of the two;
- a stage's capacity is the sum over its blocks, later blocks counting less;
- the network's quality saturates in each stage (a power below one), and falls with the square
  of the difference between neighbouring stages, which are then out of balance;
- the accuracy saturates in the quality, exponentially;
- a fixed ruggedness is added: each site and two others, drawn once, have a table of random
  numbers by their three choices (Kauffman's NK landscape), with a standard deviation of
  `RUGGED` points over random sizes.

The formula and its seed were committed before any search ran on it, and stay as they are:
`digest` is tested.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks._ofa_mbv3 import BLOCKS, DEPTHS, EXPANSIONS, STAGES, columns, space

__all__ = ["SEED", "accuracy", "digest"]

SEED = 20261121
VARIANT = 7
"""Another draw of the constants, to tune a search on: no figure of it is reported."""
BEST, SPREAD, STEEPNESS = 78.5, 12.0, 2.2
FADING, POWER, IMBALANCE = 0.85, 0.7, 0.1
RUGGED, PARTNERS = 0.12, 2

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class _Constants:
    """What is drawn once: see the module."""

    weights: Floats
    of_expansion: Floats
    of_both: Floats
    kernels: Floats
    stages: Floats
    partners: NDArray[np.int64]
    tables: Floats


@cache
def _constants(seed: int) -> _Constants:
    random = np.random.default_rng(seed)
    blocks = (STAGES, BLOCKS)
    kernels = random.uniform(0.3, 1.0, size=(*blocks, 3))
    kernels[..., 0] = 0.0
    sites = len(space().sites)
    others = [
        random.choice(np.delete(np.arange(sites), site), PARTNERS, replace=False)
        for site in range(sites)
    ]
    return _Constants(
        weights=random.gamma(2.0, 0.5, size=blocks),
        of_expansion=random.uniform(0.4, 0.7, size=blocks),
        of_both=random.uniform(0.0, 0.2, size=blocks),
        kernels=kernels,
        stages=random.dirichlet(np.full(STAGES, 5.0)),
        partners=np.concatenate([np.arange(sites)[:, None], np.array(others)], axis=1),
        tables=random.normal(size=(sites, *(3,) * (PARTNERS + 1))),
    )


def accuracy(rows: NDArray[Any], seed: int = SEED) -> Floats:
    """Gives the accuracy of encoded canonical configs.

    Args:
        rows: Shape (configs, 45), of `benchmarks._ofa_mbv3.space`.
        seed: Of the constants.

    Returns:
        In %, shape (configs,).
    """
    drawn = _constants(seed)
    relative = _stages(rows, drawn) / _stages(_full(), drawn)
    quality = (drawn.stages * relative**POWER).sum(axis=1)
    quality -= IMBALANCE * (np.diff(relative, axis=1) ** 2).sum(axis=1)
    smooth: Floats = BEST - SPREAD * np.exp(-STEEPNESS * quality)
    return smooth + RUGGED / np.sqrt(len(drawn.tables)) * _rugged(rows, drawn)


def _stages(rows: NDArray[Any], drawn: _Constants) -> Floats:
    """Gives each stage's capacity, shape (configs, stages)."""
    depths, kernels, widths = columns()
    grown = np.log(np.array(EXPANSIONS) / 2) / np.log(EXPANSIONS[-1] / 2)
    wide = grown[rows[:, widths]]
    stage, block = np.indices((STAGES, BLOCKS))
    kernel = drawn.kernels[stage, block, rows[:, kernels]]
    alone = drawn.of_expansion * wide + (1 - drawn.of_expansion) * kernel
    capacity = drawn.weights * (alone + drawn.of_both * wide * kernel)
    exists = rows[:, depths][..., None] + DEPTHS[0] > np.arange(BLOCKS)
    total: Floats = (capacity * exists * FADING ** np.arange(BLOCKS)).sum(axis=2)
    return total


def _rugged(rows: NDArray[Any], drawn: _Constants) -> Floats:
    """Gives the sum of the sites' tables; a site that does not exist adds nothing."""
    site = np.arange(len(drawn.tables))
    chosen = [rows[:, drawn.partners[:, i]] for i in range(PARTNERS + 1)]
    entries = drawn.tables[(site, *chosen)]
    total: Floats = (entries * space().present(rows)).sum(axis=1)
    return total


def _full() -> NDArray[np.int64]:
    return space().encode_many([space().largest()])


def digest(seed: int = SEED) -> str:
    """Gives 12 digits that change with the function: of 1,000 accuracies to 1e-6 points."""
    rows = (np.arange(1000)[:, None] * 7919 + np.arange(45) ** 3) // 11 % 3
    values = np.rint(accuracy(space().canonical_many(rows), seed) * 1e6).astype(np.int64)
    return hashlib.sha256(values.tobytes()).hexdigest()[:12]
