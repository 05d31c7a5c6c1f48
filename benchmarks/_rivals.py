"""Searches as others run them, for `benchmarks.search` only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pymoo.algorithms.moo.nsga2 import NSGA2
from pymoo.core.problem import Problem
from pymoo.operators.crossover.sbx import SBX
from pymoo.operators.mutation.pm import PM
from pymoo.operators.repair.rounding import RoundingRepair
from pymoo.operators.sampling.rnd import IntegerRandomSampling

from supple.search.base import Told
from supple.space import Space

__all__ = ["DynasNSGA2"]


@dataclass(frozen=True, kw_only=True)
class DynasNSGA2:
    """NSGA-II by pymoo with the settings of DyNAS-T.

    Integer genes by rounding, simulated binary crossover (probability 0.9, eta 15), polynomial
    mutation (probability 0.02 per gene, eta 20). DyNAS-T evaluates each child; here those that
    are the same sub-network as an earlier one take its values and count for nothing.

    Args:
        population: Configs per generation.
    """

    population: int = 50

    def start(
        self,
        space: Space,
        objectives: Sequence[str],
        seed: int,
        exact: Mapping[str, Any] | None = None,
    ) -> _Run:
        """Begins a search; it predicts nothing, so exact costs are of no use to it."""
        return _Run(self, space, len(objectives), seed)


class _Run:
    """Asks and tells whole generations."""

    def __init__(self, settings: DynasNSGA2, space: Space, objectives: int, seed: int) -> None:
        self._space = space
        self._algorithm = NSGA2(
            pop_size=settings.population,
            sampling=IntegerRandomSampling(),
            crossover=SBX(prob=0.9, eta=15.0, repair=RoundingRepair(), vtype=float),
            mutation=PM(prob=1.0, prob_var=0.02, eta=20.0, repair=RoundingRepair()),
            eliminate_duplicates=True,
        )
        problem = Problem(
            n_var=len(space.sites), n_obj=objectives, xl=0, xu=space.counts - 1, vtype=int
        )
        self._algorithm.setup(problem, seed=seed, verbose=False)
        self._known: dict[bytes, NDArray[Any]] = {}
        self._waiting: Any = None
        nothing = np.zeros((0, len(space.sites)), dtype=np.int64)
        self.told = Told(nothing, np.zeros((0, objectives)), np.zeros(0))

    def ask_rows(self, n: int) -> NDArray[np.int64]:
        """Gives what is new of the next generation, at most `n` configs, at least one."""
        while True:
            self._waiting = self._algorithm.ask()
            rows = self._rows()
            _, first = np.unique(rows, axis=0, return_index=True)
            new = [i for i in np.sort(first) if rows[i].tobytes() not in self._known]
            if new:
                return rows[new[:n]]
            self._finish(rows)

    def tell(self, rows: NDArray[np.int64], values: NDArray[Any]) -> None:
        """Takes the values of what was asked for."""
        for row, value in zip(np.ascontiguousarray(rows), values, strict=True):
            self._known[row.tobytes()] = value
        self.told = self.told.joined(Told(rows, values, np.zeros(len(rows))))
        asked = self._rows()
        if all(row.tobytes() in self._known for row in asked):
            self._finish(asked)

    def _rows(self) -> NDArray[np.int64]:
        genes = np.rint(self._waiting.get("X").astype(float)).astype(np.int64)
        return np.ascontiguousarray(self._space.canonical_many(genes))

    def _finish(self, rows: NDArray[np.int64]) -> None:
        self._waiting.set("F", np.array([self._known[row.tobytes()] for row in rows]))
        self._algorithm.tell(infills=self._waiting)
