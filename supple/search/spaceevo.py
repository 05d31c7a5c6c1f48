"""SpaceEvo: aging evolution one level up, whose individuals are search spaces."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from supple.errors import SettingError
from supple.search._ranking import winner
from supple.search.base import SearchAlgorithm, Told
from supple.space import Config, Space
from supple.technique import register

__all__ = ["BlockTables", "SpaceEvo", "noise_to_signal", "quality_tradeoff"]

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]

_PARENTS = 8
"""Drawn at once; more than one only for several workers, and where children are known."""
_LEAST_SHARE = 1e-5
_NO_QUALITY = 1e5


@register(title="Search of search spaces", paper="arXiv:2303.08308")
@dataclass(frozen=True, kw_only=True)
class SpaceEvo(SearchAlgorithm):
    r"""Finds a search space whose networks are good at the latencies you need.

    A config stands for a whole space of networks: for each stage one site of some axis (say
    `"block"`) says which kind of block it has, and one of another axis (say `"window"`) from
    which widths it takes. A space is judged before anything is trained in it, by
    `quality_tradeoff` of networks drawn from it; `BlockTables` draws them from tables of
    blocks that were distilled alone, stage by stage (`noise_to_signal`). Tell the negative
    score.

    The first spaces are homogeneous, with the same choice at all sites of an axis; then random
    ones fill the population. From there on the best of a sample is the parent of two children:
    in each, one site of one axis takes another choice. They join, and the two oldest leave.

    Args:
        population: Spaces that live at a time, at least 2.
        sample: Spaces that compete for being the parent, from 1 to `population`.

    Example:
        >>> from supple.space import Site, Space
        >>> blocks = [Site(f"block{i}", "block", (0, 1, 2), 2) for i in range(3)]
        >>> windows = [Site(f"window{i}", "window", (0, 1), 1) for i in range(3)]
        >>> hyperspace = Space([*blocks, *windows])
        >>> run = SpaceEvo(population=8, sample=4).start(hyperspace, ["score"], 0)
        >>> [list(space.values()) for space in run.ask(3)]  # the homogeneous ones first
        [[0, 0, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1], [1, 1, 1, 0, 0, 0]]

    Source:
        Wang et al. 2023, "SpaceEvo: Hardware-Friendly Search Space Design for Efficient INT8
        Inference", ICCV, arXiv:2303.08308; microsoft/Moonlit, `SpaceEvo/search_block_kd.py`
        and `SpaceEvo/modules/block_kd/search`.
    Differs:
        The order of a parent's two children is drawn, and in spaces of more than two axes
        their axes are. A space that was scored is never scored again; the authors score random
        ones again. A site that comes to exist takes its full choice. What the authors train
        and time is INT8; tables here hold what you put into them.
    Checked:
        Homogeneous spaces, the parent and the children by hand; the score against the authors'
        formula, by hand and by a slow reference; sums of tables against all networks.
    """

    distinguishing: ClassVar[str] = "propose"

    population: int = 500
    sample: int = 125

    def __post_init__(self) -> None:
        if self.population < 2:
            raise SettingError(f"population must be at least 2, got {self.population}")
        if not 1 <= self.sample <= self.population:
            raise SettingError(
                f"sample must be from 1 to the population of {self.population}, got "
                f"{self.sample}"
            )

    @classmethod
    def examples(cls) -> list[SpaceEvo]:
        return [cls(), cls(population=6, sample=3)]

    @property
    def generation(self) -> int:
        return 2  # the children of one parent

    def select(self, pool: Told) -> Told:
        return pool.take(slice(-self.population, None))

    def propose(self, space: Space, parents: Told, random: np.random.Generator) -> IntArray:
        if len(parents) < self.population or not (space.counts > 1).any():
            first = list(itertools.islice(_homogeneous(space), self.population))
            drawn = space.random_many(self.population, random)
            return np.concatenate([space.canonical_many(np.array(first)), drawn])
        best = [winner(parents, self.sample, random) for _ in range(_PARENTS)]
        children = [child for i in best for child in _children(space, parents.rows[i], random)]
        return space.canonical_many(np.array(children))


def _homogeneous(space: Space) -> Iterator[IntArray]:
    """Yields the configs with the same choice at all sites of an axis, encoded.

    Sites with fewer choices take their last one.
    """
    axes = list(dict.fromkeys(site.axis for site in space.sites))
    which = np.array([axes.index(site.axis) for site in space.sites], dtype=np.int64)
    most = [int(space.counts[which == i].max()) for i in range(len(axes))]
    for indices in itertools.product(*map(range, most)):
        yield np.minimum(np.array(indices, dtype=np.int64)[which], space.counts - 1)


def _children(space: Space, row: IntArray, random: np.random.Generator) -> list[IntArray]:
    """Gives a child for each axis, in a drawn order: one of its sites takes another choice."""
    free = space.present(row[None])[0] & (space.counts > 1)
    axes = np.array([site.axis for site in space.sites])
    children = []
    for axis in random.permutation(np.unique(axes[free])):
        column = random.choice(np.flatnonzero(free & (axes == axis)))
        child = row.copy()
        step = random.integers(1, space.counts[column])
        child[column] = (child[column] + step) % space.counts[column]
        children.append(child)
    return children


def quality_tradeoff(
    losses: FloatArray | Sequence[float],
    latencies: FloatArray | Sequence[float],
    limits: Sequence[float],
    *,
    top: int = 50,
    share: float = 0.1,
    exponent: float = 0.01,
) -> float:
    r"""Scores a space by the quality of its networks at some latencies (the Q-T score).

    Under a limit $T$, a share $p$ of the networks are fast enough, and the best `top` of these
    have the mean loss $L$. The score is $\sum_T 1 / (\max(1, (s / p)^a) L)$ with $s$ the
    `share` and $a$ the `exponent`: what matters is the loss, but a space where hardly a
    network is fast enough is marked down.

    Args:
        losses: Of networks drawn from the space, above 0, shape (networks,).
        latencies: Of the same networks, in any unit.
        limits: Latencies, in that unit, at least one.
        top: How many networks count under a limit, at least 1.
        share: Of the networks that are fast enough, below which the score is reduced.
        exponent: How much it is, at least 0.

    Returns:
        The score, the more the better. Under a limit that no network meets, $L$ is 1e5.

    Raises:
        SettingError: The numbers of losses and latencies differ, or there are none; a loss is
            not above 0; there is no limit, or a setting is out of range.

    Example:
        >>> round(quality_tradeoff([0.5, 0.25, 0.1], [1, 2, 3], [2], top=1), 3)
        4.0
    """
    known, times = (np.asarray(each, dtype=np.float64) for each in (losses, latencies))
    if known.ndim != 1 or known.shape != times.shape or not len(known):
        raise SettingError(
            "a score needs one loss and one latency of each network, at least one, got shapes "
            f"{known.shape} and {times.shape}"
        )
    if not (known > 0).all():
        raise SettingError(f"losses must be above 0, the least is {known.min()}")
    if not len(limits) or top < 1 or not 0 < share <= 1 or exponent < 0:
        raise SettingError(
            "a score needs a limit, a top of at least 1, a share in (0, 1] and an exponent of "
            f"at least 0, got {list(limits)}, {top}, {share} and {exponent}"
        )
    order = np.argsort(known, kind="stable")
    total = 0.0
    for limit in limits:
        fast = order[times[order] <= limit]
        loss = known[fast[:top]].mean() if len(fast) else _NO_QUALITY
        rare = share / (len(fast) / len(known) + _LEAST_SHARE)
        total += 1 / (max(1.0, rare**exponent) * loss)
    return float(total)


def noise_to_signal(output: Tensor, target: Tensor) -> Tensor:
    """Gives how far a block's output is off its teacher's, relative to how much that varies.

    Args:
        output: Of the block that is trained, shape (images, channels, height, width).
        target: Of the teacher's stage, the same shape; more than one pixel in all.

    Returns:
        The squared error of each channel over the variance of the teacher's, the mean of all.

    Differs:
        The authors' code divides by the variance within each image of the block's own output:
        a block can make that large, and channels behind a ReLU are constant in many images.
    """
    off = ((output - target) ** 2).mean((0, 2, 3))
    # A channel that is constant has no signal to be relative to.
    ratio: Tensor = off / target.var((0, 2, 3)).clamp_min(_LEAST_SHARE)
    return ratio.mean()


@dataclass(frozen=True)
class BlockTables:
    """What the sub-blocks of each stage lose and take, from which networks are put together.

    Loss and latency of a network are taken to be the sums over its stages.

    Args:
        sites: For each stage, the names of its sites in the hyperspace.
        stages: For each stage, by the choices at its sites, the loss (first column) and the
            latency (second) of every sub-block, shape (sub-blocks, 2).
        rest: Latency of what belongs to no stage.

    Raises:
        SettingError: There is no stage, or a table has another shape.

    Example:
        >>> table = {(0,): np.array([[0.5, 1.0], [0.3, 2.0]]), (1,): np.array([[0.2, 4.0]])}
        >>> tables = BlockTables((("block0",),), (table,), rest=1.0)
        >>> losses, latencies = tables.draw(Config({"block0": 1}), 2)
        >>> losses.tolist(), latencies.tolist()
        ([0.2, 0.2], [5.0, 5.0])
    """

    sites: tuple[tuple[str, ...], ...]
    stages: tuple[Mapping[tuple[int, ...], NDArray[Any]], ...]
    rest: float = 0.0

    def __post_init__(self) -> None:
        if not self.stages or len(self.stages) != len(self.sites):
            raise SettingError(
                "tables need the same number of stages and of groups of sites, at least one, "
                f"got {len(self.stages)} and {len(self.sites)}"
            )
        shapes = [np.shape(table) for stage in self.stages for table in stage.values()]
        wrong = [shape for shape in shapes if len(shape) != 2 or shape[1] != 2 or not shape[0]]
        if wrong:
            raise SettingError(f"a table must have shape (sub-blocks, 2), got {wrong[0]}")

    def draw(self, config: Config, n: int, *, seed: int = 0) -> tuple[FloatArray, FloatArray]:
        """Draws networks of a space: a sub-block of each stage, independently.

        Args:
            config: The space.
            n: How many networks, at least 1.
            seed: Of the draws, which depend on the space, too.

        Returns:
            Losses and latencies, shape (n,) each; always the same for a space and a seed.

        Raises:
            SettingError: A stage has no table for the choices of the space.
        """
        random = np.random.default_rng([seed, int(config.digest, 16)])
        total = np.zeros((n, 2))
        for number, names in enumerate(self.sites):
            table = self._table(number, tuple(config[name] for name in names))
            total += table[random.integers(len(table), size=n)]
        return total[:, 0], total[:, 1] + self.rest

    def score(
        self,
        config: Config,
        limits: Sequence[float],
        *,
        networks: int = 100_000,
        seed: int = 0,
        **settings: Any,
    ) -> float:
        """Gives the quality-tradeoff score of a space.

        Args:
            config: The space.
            limits: Latencies.
            networks: How many are drawn, at least 1.
            seed: Of the draws.
            **settings: Of `quality_tradeoff`.

        Raises:
            SettingError: A stage has no table for the choices of the space, or a setting is
                out of range.
        """
        return quality_tradeoff(*self.draw(config, networks, seed=seed), limits, **settings)

    def _table(self, stage: int, choices: tuple[int, ...]) -> NDArray[Any]:
        known = self.stages[stage]
        if choices not in known:
            raise SettingError(
                f"stage {stage} has no table for the choices {choices} of the sites "
                f"{self.sites[stage]} (there are: {sorted(known)})"
            )
        return np.asarray(known[choices], dtype=np.float64)
