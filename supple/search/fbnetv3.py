"""FBNetV3: networks and how to train them, searched together by a pretrained predictor."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy.stats import qmc, spearmanr

from supple.errors import SettingError
from supple.predictors import Predictor, PretrainedMLP
from supple.search._predicted import LEAST, Price, evolved, prices
from supple.search._ranking import best, ranked
from supple.search.base import Problem, SearchAlgorithm, Told
from supple.search.nsga2 import NSGA2
from supple.space import Space
from supple.technique import register

__all__ = ["FBNetV3", "epochs_that_tell"]

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]

_MOST = 1000
"""Of the best predicted configs, so many at most are put in order."""


@register(title="Joint architecture-recipe search", paper="arXiv:2006.02049")
@dataclass(frozen=True, kw_only=True)
class FBNetV3(SearchAlgorithm):
    r"""Finds sizes of your network, and recipes to train them, with few trainings.

    A config is a network and its recipe: sites of the axis `"recipe"` (learning rate,
    augmentation, ...) stand beside those of the network. A neural predictor makes an embedding
    of the network, and predicts from embedding and recipe. Before anything is evaluated, the
    first half of it learns the costs of `statistics` random configs, where they can be
    computed; with the few evaluations that follow only the rest begins anew.

    The first generation is quasi-random (a Sobol sequence), configs that meet the constraints
    first. For `rounds` generations in all, the predictor is then fitted to everything that was
    told, and the best predicted of `candidates` quasi-random configs are the next to evaluate.
    After that it evolves configs on the predictor, beginning with the best that are known and
    as many random ones.

    To save epochs, take all of them in the first generation only: `epochs_that_tell` says how
    many are enough to tell which config is better.

    Args:
        population: Configs to evaluate per generation, at least 4.
        rounds: Generations taken from quasi-random configs, at least 1; then it evolves.
        candidates: Configs to predict per generation, at least `population`. Of quasi-random
            ones the next power of two.
        statistics: Configs whose computed costs the predictor learns first; 0 for none.

    Example:
        >>> from supple.space import Site, Space
        >>> sites = [Site(f"s{i}", "width", tuple(range(4)), 3) for i in range(5)]
        >>> space = Space([*sites, Site("lr", "recipe", (1, 10, 100), 10)])
        >>> size = lambda rows: rows[:, :5].sum(axis=1)
        >>> search = FBNetV3(population=12, candidates=100, statistics=50)
        >>> run = search.start(space, ["size", "loss"], 0, exact={"size": size})
        >>> for _ in range(2):
        ...     rows = run.ask_rows(12)
        ...     run.tell(rows, np.stack([size(rows), 20 - size(rows) + rows[:, 5]], axis=1))
        >>> bool((run.told.rows[-12:, 5] == 0).mean() > 0.8)  # the best recipe prevails
        True

    Source:
        Dai et al. 2021, "FBNetV3: Joint Architecture-Recipe Search using Predictor
        Pretraining", CVPR, arXiv:2006.02049. facebookresearch/mobile-vision has the networks
        that were found; the search was not released.
    Differs:
        Numbers that the paper leaves open are ours, and the predictor is
        `supple.predictors.PretrainedMLP`. Each generation draws its quasi-random configs anew.
        With several objectives the best are the first fronts. The evolution is NSGA-II, where
        the authors adapt a genetic algorithm. Statistics are the objectives that can be
        computed and the violation of computed constraints; without any, nothing is pretrained.
    Checked:
        Coverage of the first generation; the best of the whole pool by a hand-made order; what
        the predictor is taught; epochs by hand. No code of the authors to compare with.
    """

    distinguishing: ClassVar[str] = "propose_for"

    population: int = 40
    rounds: int = 4
    candidates: int = 10_000
    statistics: int = 500

    def __post_init__(self) -> None:
        least = {"population": LEAST, "rounds": 1, "candidates": self.population}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise SettingError(
                    f"{name} must be at least {bound}, got {getattr(self, name)}"
                )
        if self.statistics < 0 or self.statistics == 1:
            raise SettingError(
                f"statistics must be at least 2, or 0 for none, got {self.statistics}"
            )

    @classmethod
    def examples(cls) -> list[FBNetV3]:
        return [cls(), cls(population=10, rounds=2, candidates=1000, statistics=0)]

    @property
    def generation(self) -> int:
        return self.population

    def propose_for(
        self, problem: Problem, parents: Told, random: np.random.Generator
    ) -> IntArray:
        pool = quasi_random(problem.space, self.candidates, random)
        if np.isfinite(parents.violations).sum() < LEAST:
            return _allowed_first(problem, pool)
        price = prices(problem, parents, self._predictor(problem, random))
        if len(parents) < self.rounds * self.population:
            return self._of_pool(price, parents, pool)
        return self._evolved(problem.space, price, parents, pool, random)

    def _predictor(self, problem: Problem, random: np.random.Generator) -> Predictor:
        """Gives the predictor, its encoder taught what can be computed."""
        method = PretrainedMLP()
        if not self.statistics:
            return method
        rows = problem.space.random_many(self.statistics, random)
        known = free_statistics(problem, rows)
        return method.pretrain(problem.space, rows, known) if known.shape[1] else method

    def _of_pool(self, price: Price, parents: Told, pool: IntArray) -> IntArray:
        """Puts those first that are predicted best and are not known."""
        known = {row.tobytes() for row in np.ascontiguousarray(parents.rows)}
        new = pool[[row.tobytes() not in known for row in np.ascontiguousarray(pool)]]
        if not len(new):
            return pool
        priced = price(new)
        ahead = priced.take(best(priced, self.population)[:_MOST])
        return np.concatenate([ahead.rows[_in_order(ahead)], pool])

    def _evolved(
        self,
        space: Space,
        price: Price,
        parents: Told,
        pool: IntArray,
        random: np.random.Generator,
    ) -> IntArray:
        first = parents.rows[_in_order(parents)[: self.population]]
        start = np.concatenate([first, space.random_many(self.population, random)])
        method = NSGA2(population=self.population)
        found = evolved(space, price, method, self.candidates, random, parents.rows, start)
        return np.concatenate([found.rows, pool])


def quasi_random(space: Space, candidates: int, random: np.random.Generator) -> IntArray:
    """Draws configs that cover a space more evenly than random ones: a Sobol sequence.

    Args:
        space: What to cover.
        candidates: How many at least; the next power of two is drawn.
        random: Scrambles the sequence.

    Returns:
        Encoded canonical configs, shape (configs, sites).
    """
    sequence = qmc.Sobol(max(len(space.sites), 1), seed=random)
    points = sequence.random_base2(math.ceil(math.log2(candidates)))[:, : len(space.sites)]
    return space.canonical_many(np.floor(points * space.counts).astype(np.int64))


def free_statistics(problem: Problem, rows: IntArray) -> FloatArray:
    """Gives what is known of configs without an evaluation.

    Args:
        problem: What is searched; its exact objectives and violations are what is known.
        rows: Encoded configs, shape (configs, sites).

    Returns:
        A column for each that differs between configs, logarithms where all are above 0.
    """
    functions = [*problem.exact.values(), *([problem.violation] if problem.violation else [])]
    known = [np.asarray(function(rows), dtype=np.float64) for function in functions]
    columns = [np.log(each) if each.min() > 0 else each for each in known if np.ptp(each) > 0]
    return np.stack(columns, axis=1) if columns else np.zeros((len(rows), 0))


def epochs_that_tell(accuracies: NDArray[np.float64], correlation: float = 0.92) -> int:
    """Tells after how many epochs configs are in the order in which they will end.

    Args:
        accuracies: Of each config after each epoch, shape (configs, epochs), at least 3 by 1.
        correlation: What Spearman's rank correlation with the last epoch has to reach.

    Returns:
        The first such epoch, counted from 1.

    Raises:
        SettingError: The shape does not fit, or `correlation` is not in (0, 1].

    Example:
        >>> epochs_that_tell(np.array([[0.5, 0.1, 0.2], [0.4, 0.3, 0.4], [0.3, 0.5, 0.6]]))
        2
    """
    known = np.asarray(accuracies, dtype=np.float64)
    if known.ndim != 2 or len(known) < 3 or not known.shape[1]:
        raise SettingError(
            f"accuracies must have shape (configs, epochs), at least 3 by 1, got {known.shape}"
        )
    if not 0 < correlation <= 1:
        raise SettingError(f"correlation must be in (0, 1], got {correlation}")
    for epoch, column in enumerate(known.T, start=1):
        # Equal accuracies say nothing about the order.
        if np.ptp(column) and spearmanr(column, known[:, -1]).statistic >= correlation:
            return epoch
    return known.shape[1]


def _in_order(told: Told) -> IntArray:
    """Gives the indices of configs, the best first; of one front the least crowded."""
    rank, crowding = ranked(told)
    return np.lexsort((-crowding, rank))


def _allowed_first(problem: Problem, rows: IntArray) -> IntArray:
    """Puts configs in order of how far they are beyond constraints that can be computed."""
    if problem.violation is None:
        return rows
    beyond = np.asarray(problem.violation(rows), dtype=np.float64)
    return rows[np.argsort(beyond, kind="stable")]
