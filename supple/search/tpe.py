"""TPE: the tree-structured Parzen estimator of Optuna."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, IntDistribution

from supple.errors import SettingError
from supple.search.base import SearchAlgorithm, Told
from supple.space import Space
from supple.study.store import quiet
from supple.technique import register

__all__ = ["TPE"]

IntArray = NDArray[np.int64]

_SPARE = 500
"""Random configs behind those drawn, for where all of these are known."""


@register(title="Tree-structured Parzen estimator", paper="arXiv:2304.11127")
@dataclass(frozen=True, kw_only=True)
class TPE(SearchAlgorithm):
    """Draws sizes of your network from where good ones lie densely and bad ones don't.

    What was told is parted into good and bad configs. A density is fitted to each, over the
    indices of the choices; of `candidates` drawn from the density of the good, the one with
    the largest ratio of the two densities is proposed.

    Args:
        population: Configs told before the densities are fitted anew, at least 1. The first
            ones are random.
        candidates: Drawn to take one of them, at least 1.

    Example:
        >>> from supple.space import Site, Space
        >>> space = Space([Site(f"s{i}", "width", tuple(range(4)), 3) for i in range(6)])
        >>> run = TPE(population=10).start(space, ["loss"], 0)
        >>> for _ in range(6):
        ...     rows = run.ask_rows(10)
        ...     run.tell(rows, rows.sum(axis=1, keepdims=True))
        >>> bool(run.told.values[-10:].mean() < run.told.values[:10].mean())
        True

    Source:
        Watanabe 2023, "Tree-Structured Parzen Estimator: Understanding Its Algorithm Components
        and Their Roles for Better Empirical Performance", arXiv:2304.11127, and Ozaki et al.
        2020 for several objectives; the sampler of Optuna, with dependent sites.
    Differs:
        The sampler is made anew from what was told for each generation, so that a search goes
        on exactly where it stopped. A site that does not exist counts as at its full choice.
        Configs that were tried are never proposed again.
    Checked:
        Draws follow the good part of a hand-made history, also where constraints make it so.
    """

    distinguishing: ClassVar[str] = "propose"

    population: int = 10
    candidates: int = 24

    def __post_init__(self) -> None:
        for name in ("population", "candidates"):
            if getattr(self, name) < 1:
                raise SettingError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def generation(self) -> int:
        return self.population

    def propose(self, space: Space, parents: Told, random: np.random.Generator) -> IntArray:
        good = parents.take(np.isfinite(parents.violations))
        if not len(good) or not space.sites:
            return space.random_many(self.population, random)
        ranges: dict[str, BaseDistribution] = {
            site.name: IntDistribution(0, len(site.choices) - 1) for site in space.sites
        }
        study = self._study(good, ranges, int(random.integers(2**31)))
        rows = []
        for _ in range(self.population):
            taken = study.ask(ranges).params
            rows.append([taken[name] for name in space.names])
        drawn = space.canonical_many(np.array(rows, dtype=np.int64))
        return np.concatenate([drawn, space.random_many(_SPARE, random)])

    def _study(
        self, told: Told, ranges: dict[str, BaseDistribution], seed: int
    ) -> optuna.Study:
        """Makes a study in memory that holds what was told."""
        sampler = optuna.samplers.TPESampler(
            n_startup_trials=0, n_ei_candidates=self.candidates, multivariate=True, seed=seed
        )
        directions = [optuna.study.StudyDirection.MINIMIZE] * told.values.shape[1]
        with quiet():
            study = optuna.create_study(sampler=sampler, directions=directions)
        names = list(ranges)
        study.add_trials(
            [
                optuna.trial.create_trial(
                    params=dict(zip(names, row, strict=True)),
                    distributions=ranges,
                    values=values,
                    constraints={"violation": violation},
                )
                for row, values, violation in zip(
                    told.rows.tolist(),
                    told.values.tolist(),
                    told.violations.tolist(),
                    strict=True,
                )
            ]
        )
        return study
