"""The Once-for-All MobileNetV3 (width 1.0, 224 pixels) as a space with exact costs.

45 sites of three choices: in each of five stages the depth (2, 3, 4 blocks), and in each of 20
blocks the kernel (3, 5, 7) and the expansion (3, 4, 6). What belongs to a block that is left
out does not exist. `macs` is a closed form; it equals the recorded column of all 1,458 rows of
`ofa-mbv3-imagenet` to the last unit.

The recorded accuracies (three searches by DyNAS-T on ImageNet) are continued to all sizes by
two surrogates of different families, fitted to the same rows in the same way each time:

- `kernel`: support vectors with a Gaussian kernel (what LINAS itself may choose as its
  predictor), on the rows of all three searches;
- `trees`: a ridge regression whose errors boosted trees correct, without the rows of LINAS.
"""

from __future__ import annotations

import ast
import csv
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import kendalltau, spearmanr
from sklearn.base import clone
from sklearn.ensemble import GradientBoostingRegressor
from sklearn.linear_model import Ridge
from sklearn.model_selection import KFold, cross_val_predict
from sklearn.svm import SVR

from supple.data.base import find
from supple.models.mobilenet_v3 import divisible
from supple.space import Site, Space

__all__ = [
    "BLOCKS",
    "CORNER",
    "FAMILIES",
    "STAGES",
    "columns",
    "digest",
    "macs",
    "quality",
    "recorded",
    "space",
    "surrogate",
    "together",
]

STAGES, BLOCKS = 5, 4
KERNELS, EXPANSIONS, DEPTHS = (3, 5, 7), (3, 4, 6), (2, 3, 4)
WIDTHS = (24, 40, 80, 112, 160)
STRIDES = (2, 2, 2, 1, 2)
SQUEEZED = (False, True, False, True, True)
STEM, PIXELS, LAST, HIDDEN, CLASSES = 16, 224, 960, 1280, 1000

FAMILIES = {"kernel": ("ga", "nsga2", "linas"), "trees": ("ga", "nsga2")}
"""The surrogates, and the searches whose rows each is fitted to."""
FILES = {
    "ga": "mbnv3w10_evoga_acc.csv",
    "nsga2": "mbnv3w10_evonsga2_acc_macs.csv",
    "linas": "mbnv3w10_linasnsga2_acc_macs.csv",
}
FOLDS = 10
CORNER = (70.0, 600e6)
"""Accuracy in % and multiply-accumulates that everything worth counting beats."""

Rows = NDArray[np.int64]
Floats = NDArray[np.float64]


@cache
def space() -> Space:
    """Gives the space: per stage its depth, then kernel and expansion of its blocks."""
    sites = []
    for stage in range(STAGES):
        depth = f"{stage}.depth"
        sites.append(Site(depth, "depth", DEPTHS, DEPTHS[-1]))
        for block in range(BLOCKS):
            deep = frozenset(d for d in DEPTHS if d > block)
            inside = ((depth, deep),) if len(deep) < len(DEPTHS) else ()
            name = f"{stage}.{block}"
            sites.append(Site(f"{name}.kernel", "kernel", KERNELS, KERNELS[-1], inside))
            sites.append(Site(f"{name}.expansion", "width", EXPANSIONS, EXPANSIONS[-1], inside))
    return Space(sites)


@cache
def columns() -> tuple[Rows, Rows, Rows]:
    """Gives the columns of depths (stages,), and of kernels and expansions (stages, blocks)."""
    here = space()
    depths = [here.column(f"{s}.depth") for s in range(STAGES)]
    blocks = [[f"{s}.{b}" for b in range(BLOCKS)] for s in range(STAGES)]
    kernels = [[here.column(f"{name}.kernel") for name in row] for row in blocks]
    widths = [[here.column(f"{name}.expansion") for name in row] for row in blocks]
    return np.array(depths), np.array(kernels), np.array(widths)


def macs(rows: NDArray[Any]) -> Floats:
    """Gives the multiply-accumulates of encoded configs for one image, shape (configs,)."""
    depths, kernels, widths = columns()
    constant, table = _terms()
    total = np.full(len(rows), constant)
    for stage in range(STAGES):
        for block in range(BLOCKS):
            cost = table[stage, block][
                rows[:, kernels[stage, block]], rows[:, widths[stage, block]]
            ]
            total += np.where(rows[:, depths[stage]] + DEPTHS[0] > block, cost, 0.0)
    return total


@cache
def _terms() -> tuple[float, Floats]:
    """Gives the cost of what does not vary, and of each block by kernel and expansion."""
    side = PIXELS // 2
    constant = side**2 * (3 * STEM * 9 + STEM * 9 + STEM * STEM)
    table = np.zeros((STAGES, BLOCKS, len(KERNELS), len(EXPANSIONS)))
    inputs = STEM
    for stage in range(STAGES):
        for block in range(BLOCKS):
            after = side // STRIDES[stage] if block == 0 else side
            for i, kernel in enumerate(KERNELS):
                for j, expansion in enumerate(EXPANSIONS):
                    inner = divisible(inputs * expansion)
                    cost = inputs * inner * side**2
                    cost += inner * (kernel**2 + WIDTHS[stage]) * after**2
                    if SQUEEZED[stage]:
                        cost += 2 * inner * divisible(inner // 4)
                    table[stage, block, i, j] = cost
            side, inputs = after, WIDTHS[stage]
    constant += inputs * LAST * side**2 + LAST * HIDDEN + HIDDEN * CLASSES
    return float(constant), table


# --- what was recorded ------------------------------------------------------------------------


@dataclass(frozen=True)
class Recorded:
    """Evaluations of one or several searches, in the order in which they were made.

    Args:
        rows: Encoded canonical configs, shape (evaluations, sites).
        accuracy: Top-1 on ImageNet in %, shape (evaluations,).
        macs: The recorded column, shape (evaluations,).
    """

    rows: Rows
    accuracy: Floats
    macs: Floats


@cache
def recorded(search: str) -> Recorded:
    """Reads the evaluations of one search: `ga`, `nsga2` or `linas`."""
    depths, kernels, widths = columns()
    path = find("ofa-mbv3-imagenet") / FILES[search]
    with path.open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    rows = np.zeros((len(lines), len(space().sites)), dtype=np.int64)
    for row, line in zip(rows, lines, strict=True):
        lists = ast.literal_eval(line["Sub-network"])
        row[depths] = np.searchsorted(DEPTHS, lists["d"])
        row[kernels.ravel()] = np.searchsorted(KERNELS, lists["ks"])
        row[widths.ravel()] = np.searchsorted(EXPANSIONS, lists["e"])
    return Recorded(
        space().canonical_many(rows),
        np.array([float(line["Top-1 Acc (%)"]) for line in lines]),
        np.array([float(line["MACs"]) for line in lines]),
    )


def together(*searches: str) -> Recorded:
    """Gives each config once, with the mean of its accuracies, in the order of the codes."""
    parts = [recorded(search) for search in searches]
    rows = np.concatenate([part.rows for part in parts])
    accuracy = np.concatenate([part.accuracy for part in parts])
    unique, which, times = np.unique(rows, axis=0, return_inverse=True, return_counts=True)
    return Recorded(unique, np.bincount(which.ravel(), accuracy) / times, macs(unique))


# --- surrogates -------------------------------------------------------------------------------


def surrogate(family: str) -> Callable[[NDArray[Any]], Floats]:
    """Fits a surrogate.

    Args:
        family: `kernel` or `trees`.

    Returns:
        What gives the accuracy of encoded canonical configs in %.
    """
    known = together(*FAMILIES[family])
    model = _regressor(family).fit(space().one_hot(known.rows), known.accuracy)
    if family == "trees":
        return lambda rows: np.asarray(model.predict(space().one_hot(rows)))
    return _machine(model)


def quality(family: str) -> dict[str, float]:
    """Says how well a surrogate foretells rows that it is not fitted to, by folds."""
    known = together(*FAMILIES[family])
    folds = KFold(FOLDS, shuffle=True, random_state=0)
    features = space().one_hot(known.rows)
    told = cross_val_predict(clone(_regressor(family)), features, known.accuracy, cv=folds)
    wrong = told - known.accuracy
    return {
        "rows": len(known.rows),
        "mean_absolute_error": float(np.abs(wrong).mean()),
        "root_mean_square_error": float(np.sqrt((wrong**2).mean())),
        "kendall": float(kendalltau(told, known.accuracy).statistic),
        "spearman": float(spearmanr(told, known.accuracy).statistic),
    }


def digest(family: str) -> str:
    """Gives 12 digits that change with a surrogate: of 1,000 accuracies to 1e-3 points."""
    values = surrogate(family)(space().random_many(1000, 0))
    return hashlib.sha256(np.rint(values * 1e3).astype(np.int64).tobytes()).hexdigest()[:12]


def _regressor(family: str) -> Any:
    if family == "kernel":
        return SVR(C=30.0, gamma=0.01, epsilon=0.02)
    return GradientBoostingRegressor(
        init=Ridge(1.0),
        n_estimators=400,
        learning_rate=0.05,
        subsample=0.5,
        random_state=0,
    )


def _machine(model: Any) -> Callable[[NDArray[Any]], Floats]:
    """Gives what support vectors say of many rows at once, by one product of matrices."""
    vectors, weights = model.support_vectors_, model.dual_coef_[0]
    squares = (vectors**2).sum(axis=1)

    def predict(rows: NDArray[Any]) -> Floats:
        parts = []
        for start in range(0, len(rows), 4096):
            features = space().one_hot(rows[start : start + 4096])
            apart = (features**2).sum(axis=1)[:, None] + squares - 2 * features @ vectors.T
            parts.append(np.exp(-model.gamma * apart) @ weights + model.intercept_[0])
        return np.concatenate(parts) if parts else np.zeros(0)

    return predict
