"""Exhaustive ranking: every config of a small space is predicted, the best are tried."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from supple.errors import SettingError
from supple.predictors import predictor
from supple.search._predicted import LEAST, prices
from supple.search._ranking import best, ranked
from supple.search.base import AskTell, Exact, Problem, SearchAlgorithm, Told
from supple.space import Randomness, Space
from supple.technique import register

__all__ = ["Exhaustive"]

IntArray = NDArray[np.int64]

_SPARE = 100
"""Random configs behind the best, for workers that ask for more at once."""


@register(title="Exhaustive ranking", paper="arXiv:1912.00848")
@dataclass(frozen=True, kw_only=True)
class Exhaustive(SearchAlgorithm):
    """Ranks every size of a small space by a predictor, and tries the best ones in order.

    After `first` random configs a regressor is fitted to each objective that only an
    evaluation tells; costs that can be computed are. It predicts the whole space, so no inner
    search can miss what it thinks best: the first fronts of the predictions are tried, those
    in sparse regions first. After each `population` evaluations it is fitted anew.

    Args:
        population: Configs told before the predictor is fitted anew, at least 1.
        first: Random configs told before anything is predicted, at least 4.
        candidates: Largest number of configs that a space may have, at least 1.
        predictor: What predicts: `"gradient-boosting"`, `"mlp"`, `"ridge"`, `"svr"`,
            `"ridge-svr"` or `"gaussian-process"`.

    Example:
        >>> from supple.space import Site, Space
        >>> space = Space([Site(f"s{i}", "width", tuple(range(3)), 2) for i in range(6)])
        >>> run = Exhaustive(first=20, predictor="ridge").start(space, ["loss"], 0)
        >>> for _ in range(3):
        ...     rows = run.ask_rows(10)
        ...     run.tell(rows, rows.sum(axis=1, keepdims=True))
        >>> run.told.values[20:22, 0].tolist()  # all zeros, and one that is next to it
        [0.0, 1.0]

    Source:
        Wen et al. 2020, "Neural Predictor for Neural Architecture Search", ECCV,
        arXiv:1912.00848.
    Differs:
        The predictor is one of `supple.predictors`, not a graph convolution, and it is fitted
        again as evaluations come in, where the paper fits it once. With several objectives the
        best are the first fronts.
    Checked:
        The order of what is tried by hand; no config of a better predicted front is left out;
        a space that is too large is refused.
    """

    distinguishing: ClassVar[str] = "propose_for"

    population: int = 10
    first: int = 20
    candidates: int = 100_000
    predictor: str = "ridge"

    def __post_init__(self) -> None:
        for name, least in (("population", 1), ("first", LEAST), ("candidates", 1)):
            if getattr(self, name) < least:
                raise SettingError(
                    f"{name} must be at least {least}, got {getattr(self, name)}"
                )
        predictor(self.predictor)

    def start(
        self,
        space: Space,
        objectives: Sequence[str],
        generator: Randomness,
        *,
        exact: Mapping[str, Exact] | None = None,
        violation: Exact | None = None,
    ) -> AskTell:
        if space.size() > self.candidates:
            raise SettingError(
                f"every config of the space is to be ranked, and it has {space.size():,} of "
                f"them, more than the {self.candidates:,} of `candidates`; take a larger "
                "number, a subspace, or search/weaknas"
            )
        return super().start(space, objectives, generator, exact=exact, violation=violation)

    @property
    def generation(self) -> int:
        return self.population

    def propose_for(
        self, problem: Problem, parents: Told, random: np.random.Generator
    ) -> IntArray:
        space = problem.space
        learned = int(np.isfinite(parents.violations).sum())
        if len(parents) < self.first or learned < LEAST:
            return space.random_many(self.first, random)
        known = {row.tobytes() for row in parents.rows}
        rows = np.ascontiguousarray(space.every())
        rows = rows[[row.tobytes() not in known for row in rows]]
        if not len(rows):
            return space.random_many(1, random)
        priced = prices(problem, parents, predictor(self.predictor))(rows)
        leading = priced.take(best(priced, self.population))
        rank, crowding = ranked(leading)
        order = np.lexsort((-crowding, rank))
        return np.concatenate([leading.rows[order], space.random_many(_SPARE, random)])
