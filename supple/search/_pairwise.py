"""A predictor that only learns which of two configs is better."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit
from scipy.stats import kendalltau
from sklearn.tree import DecisionTreeRegressor

from supple.errors import SettingError
from supple.predictors import Fitted, Predictor, Rows
from supple.space import Space

__all__ = ["PairwiseRanking"]

FloatArray = NDArray[np.float64]

_DEPTH = 3
"""How many sites a tree can see at once."""
_LEAST = 1e-6
"""Curvature below which all pairs of a config are decided."""


@dataclass(frozen=True, kw_only=True)
class PairwiseRanking(Predictor):
    r"""Scores configs so that of each pair the better one has the lower score.

    Boosted trees lower the logistic loss over all pairs of known configs,
    $\sum_{y_i < y_j} \log(1 + e^{s_i - s_j})$, by Newton steps. Only the order of the values
    counts; predictions are scores without a unit.

    Args:
        trees: How many, at least 1.
        rate: What each adds, in (0, 1].
        sites: How many sites are looked at: those whose choices go most with the values, by
            Kendall's tau. None for all.

    Raises:
        SettingError: A setting is out of range.

    Example:
        >>> from supple.space import Site
        >>> space = Space([Site(name, "width", (1, 2, 3), 3) for name in "abc"])
        >>> rows = space.every()
        >>> known = PairwiseRanking(trees=20).fit(space, rows, 1e6 ** (rows @ [9, 3, 1] / 9))
        >>> scores = known.predict(space.every()[[0, 13, 26]])
        >>> bool(scores[0] < scores[1] < scores[2])
        True

    Source:
        Hu et al. 2021, "RankNAS: Efficient Neural Architecture Search by Pairwise Ranking",
        EMNLP, arXiv:2109.07383.
    """

    trees: int = 100
    rate: float = 0.1
    sites: int | None = None

    def __post_init__(self) -> None:
        if self.trees < 1:
            raise SettingError(f"trees must be at least 1, got {self.trees}")
        if not 0.0 < self.rate <= 1.0:
            raise SettingError(f"rate must be in (0, 1], got {self.rate}")
        if self.sites is not None and self.sites < 1:
            raise SettingError(f"sites must be at least 1, got {self.sites}")

    def _fitted(self, space: Space, features: FloatArray, values: FloatArray) -> Fitted:
        columns = self._columns(space, features, values)
        better = (values[:, None] < values).astype(np.float64)
        scores = np.zeros(len(values))
        seen = np.ascontiguousarray(features[:, columns], dtype=np.float32)
        grown: list[Any] = []
        for _ in range(self.trees):
            slope, curvature = _derivatives(scores, better)
            tree = DecisionTreeRegressor(max_depth=_DEPTH, random_state=0)
            # a leaf's mean, weighted by curvature, is its Newton step
            tree.fit(seen, -slope / curvature, sample_weight=curvature, check_input=False)
            scores = scores + self.rate * tree.predict(seen, check_input=False)
            grown.append(tree)
        return _Scores(space, columns, grown, self.rate)

    def _columns(
        self, space: Space, features: FloatArray, values: FloatArray
    ) -> NDArray[np.int64]:
        """Gives the columns of the sites that are looked at."""
        owner = np.repeat(np.arange(len(space.counts)), space.counts)
        if self.sites is None or self.sites >= len(space.counts):
            return np.arange(len(owner))
        places = np.arange(len(owner)) - np.repeat(
            np.cumsum(space.counts) - space.counts, space.counts
        )
        strength = []
        for site in range(len(space.counts)):
            mine = owner == site
            chosen = np.where(
                features[:, mine].any(axis=1), features[:, mine] @ places[mine], -1
            )
            strength.append(abs(float(np.nan_to_num(kendalltau(chosen, values).statistic))))
        kept = np.argsort(-np.array(strength), kind="stable")[: self.sites]
        return np.flatnonzero(np.isin(owner, kept))


def _derivatives(scores: FloatArray, better: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Gives the first and second derivatives of the loss in each score."""
    wrong = expit(scores[:, None] - scores) * better  # how far from the right order, by pair
    curved = wrong * (1.0 - wrong) * better
    slope: FloatArray = wrong.sum(axis=1) - wrong.sum(axis=0)
    return slope, np.maximum(curved.sum(axis=1) + curved.sum(axis=0), _LEAST)


class _Scores(Fitted):
    """Sums what trees say."""

    def __init__(
        self, space: Space, columns: NDArray[np.int64], trees: Sequence[Any], rate: float
    ) -> None:
        super().__init__(space)
        self._columns, self._trees, self._rate = columns, trees, rate

    def predict(self, rows: Rows) -> FloatArray:
        encoded = rows if isinstance(rows, np.ndarray) else self.space.encode_many(rows)
        features = self.space.one_hot(encoded)[:, self._columns]
        seen = np.ascontiguousarray(features, dtype=np.float32)
        total = np.zeros(len(encoded))
        for tree in self._trees:
            total += self._rate * tree.predict(seen, check_input=False)
        return total
