"""Search problems with a known answer."""

from __future__ import annotations

import numpy as np

from supple.search.base import AskTell
from supple.space import Site, Space
from supple.study.indicators import hypervolume

BLOCKS = 6
SITES = [
    site
    for i in range(BLOCKS)
    for site in (
        Site(f"{i}.depth", "depth", (0, 1), 1),
        Site(f"{i}.width", "width", (1, 2, 3, 4), 4, ((f"{i}.depth", frozenset({1})),)),
        Site(f"{i}.ratio", "width", (1, 2, 3, 4), 4, ((f"{i}.depth", frozenset({1})),)),
    )
]
SPACE = Space(SITES)
"""Six blocks that may be skipped, 17^6 configs."""


def loss_and_cost(rows: np.ndarray) -> np.ndarray:
    """Loss falls with the size of each block, less and less; cost is a sum of products."""
    gains, costs = np.random.default_rng(7).gamma(1.0, 1.0, size=(2, BLOCKS))
    sizes = (SPACE.choices_of(rows) * SPACE.present(rows)).reshape(-1, BLOCKS, 3)
    gained = (np.log1p(sizes[:, :, 1:].sum(axis=2)) * gains).sum(axis=1)
    cost = (sizes[:, :, 1] * sizes[:, :, 2] * costs).sum(axis=1)
    return np.stack([1 - gained / (np.log(9) * gains.sum()), cost / (16 * costs.sum())], axis=1)


def searched(run: AskTell, evaluations: int, batch: int = 10) -> float:
    """Runs a search on the blocks and returns the hypervolume that it reached."""
    while len(run.told) < evaluations:
        rows = run.ask_rows(min(batch, evaluations - len(run.told)))
        run.tell(rows, loss_and_cost(rows))
    return hypervolume(run.told.values, [1.1, 1.1])
