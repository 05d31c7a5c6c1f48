"""LINAS, the search of the hardware-aware system: evolution on predictors, again and again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from supple.errors import SettingError
from supple.predictors import predictor
from supple.search._predicted import LEAST, evolved, prices
from supple.search.base import Problem, SearchAlgorithm, Told
from supple.search.nsga2 import NSGA2
from supple.technique import register

__all__ = ["HardwareAwareSearch"]

IntArray = NDArray[np.int64]

_SPARE = 500
"""Random configs behind the evolved ones where these are fewer than a generation needs."""


@register(title="LINAS, hardware-aware search", paper="arXiv:2202.12954")
@dataclass(frozen=True, kw_only=True)
class HardwareAwareSearch(SearchAlgorithm):
    r"""Finds good sizes of your network with few evaluations, by predicting most of them.

    The first generation of `population` configs is random. After each generation, a regressor
    is fitted to everything that was told, one for each objective that only an evaluation
    tells; costs that can be computed (multiply-accumulates, parameters, a latency model) are.
    NSGA-II then searches on these predictions alone, over `candidates` configs. The best
    `population` of them by its ranking, less what was evaluated already, is the next
    generation to evaluate.

    `supple.pareto` gives it the closed-form costs and bounds of your network; in a search of
    your own, `start(..., exact={"macs": lambda rows: net.costs(rows)["macs"]})` does.

    Args:
        population: Configs to evaluate per generation, at least 4. The budget should hold a
            handful of generations.
        candidates: Configs to predict per generation, at least `population`.
        predictor: What predicts: `"ridge-svr"` (ridge or support vectors, whichever has the
            smaller error in cross-validation), `"ridge"`, `"svr"`, `"gradient-boosting"` or
            `"mlp"`.

    Example:
        >>> from supple.space import Site, Space
        >>> space = Space([Site(f"s{i}", "width", tuple(range(4)), 3) for i in range(10)])
        >>> search = HardwareAwareSearch(population=10, candidates=200, predictor="svr")
        >>> size = lambda rows: rows.sum(axis=1)
        >>> run = search.start(space, ["size", "loss"], 0, exact={"size": size})
        >>> for _ in range(3):
        ...     rows = run.ask_rows(10)
        ...     run.tell(rows, np.stack([size(rows), 30 - size(rows) + rows[:, 0]], axis=1))
        >>> bool((run.told.rows[-10:, 0] == 0).mean() > 0.8)  # what only harms dies out
        True

    Source:
        Sarah et al. 2022, "A Hardware-Aware System for Accelerating Deep Neural Network
        Optimization", arXiv:2202.12954, and the authors' code, IntelLabs/DyNAS-T,
        `dynast/search/search_tactic.py`.
    Differs:
        In the authors' code all objectives are predicted, costs too. There, configs of the
        inner search's final population that were evaluated before are evaluated again; here
        the best others take their places. The regressors try fewer strengths
        (`supple.predictors.RidgeSVR`). NSGA-II for any number of objectives; theirs takes
        U-NSGA-III for three, and a plain genetic algorithm for one. Where constraints can't
        be computed they are predicted.
    Checked:
        On an additive problem the second generation is the true front; the order of proposals
        against a slow reference; computed costs are never predicted; more hypervolume than
        NSGA-II and random search on a known front.
    """

    distinguishing: ClassVar[str] = "propose_for"

    population: int = 50
    candidates: int = 10_000
    predictor: str = "ridge-svr"

    def __post_init__(self) -> None:
        if self.population < LEAST:
            raise SettingError(f"population must be at least {LEAST}, got {self.population}")
        if self.candidates < self.population:
            raise SettingError(
                f"candidates must be at least the population, {self.population}, got "
                f"{self.candidates}"
            )
        predictor(self.predictor)

    @classmethod
    def examples(cls) -> list[HardwareAwareSearch]:
        return [cls(), cls(population=4, candidates=40, predictor="ridge")]

    @property
    def generation(self) -> int:
        return self.population

    def propose_for(
        self, problem: Problem, parents: Told, random: np.random.Generator
    ) -> IntArray:
        space = problem.space
        if np.isfinite(parents.violations).sum() < LEAST:
            return space.random_many(self.population, random)
        price = prices(problem, parents, predictor(self.predictor))
        method = NSGA2(population=self.population)
        best = evolved(space, price, method, self.candidates, random, parents.rows)
        if len(best) == self.population:
            return best.rows
        return np.concatenate([best.rows, space.random_many(_SPARE, random)])
