"""FBNetV3: free costs teach a predictor, and recipes are searched together with networks.

Claims of the paper: pretraining the predictor on costs, which are free, makes it reliable with
few trainings; and searching networks together with their recipes finds better ones than
searching networks under one recipe.

Tables are of `_recipes.py`: an evaluation looks up the accuracy on the images to choose by.
What is reported is the accuracy on the test images.

Arms of the first two claims: `PretrainedMLP` fitted to 20 of the 220 random sizes of nb-mini's
network that were trained with random recipes, its encoder taught the multiply-accumulates and
parameters of 500 random sizes, and without. The figure is Kendall's tau over the other 200; for
the second claim the mean over the five fullest bands of sizes whose cost differs by at most a
quarter, in which cost alone tells little. Settings of the predictor were chosen on nb-mini
itself (92 sizes, one recipe), both arms alike.

Arms of the third claim: FBNetV3 over the 72 networks and 24 recipes that were all trained, and
over networks alone under the default recipe, which is nb-mini's (learning rate 1e-2, weight
decay 0.01, labels not smoothed, weights not averaged). 60 trainings each. The figure is the
accuracy of the best network that costs at most 10 %, 25 %, 50 % and 100 % of the largest,
chosen by validation, the mean of the four. `details` hold the same under the recipe that is
best for the largest network, which nobody knows without having searched recipes.

Ten seeds: draws of rows, of statistics and of the search.

Thresholds: 0.05 of Kendall's tau, and better by any amount, as the catalogue of techniques has
it; in bands of equal cost no worse than by 0.02.

History: the first version drew the labels from the complete table too, and gave the search 30
trainings; one seed that is not reported showed no gain in either (0.648 against 0.649; 0.8986
against 0.8995). The catalogue asks for nb-mini and for 60 trainings, which is what it is now;
the same seed gave 0.577 against 0.442 then.

Result: pretraining gives 0.125 more tau, with a spread of 0.078 that reaches below 0.05:
undecided; the other two hold. With pretraining off the joint search is better than the sizes
alone, too: that claim is the recipe's.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache

import numpy as np
from scipy.stats import kendalltau

from reproductions.search._recipes import (
    RECIPE,
    SPACE,
    WIDE,
    accuracies,
    costs,
    find,
    rows_of,
    wide_costs,
)
from supple.predictors import Predictor, PretrainedMLP
from supple.search.fbnetv3 import FBNetV3
from supple.space import Space
from supple.testing.reproduce import Claim, across

__all__ = ["OFF", "ON", "SEEDS", "claims"]

ON = FBNetV3(population=15, rounds=3, candidates=2000, statistics=500)
OFF = replace(ON, statistics=0)
SEEDS = tuple(range(10))
LABELS, TRAININGS = 20, 60
SHARES = (0.1, 0.25, 0.5, 1.0)
BANDS, WIDTH = 5, 1.25
DEFAULT = {site.name: site.full for site in RECIPE}


def claims(method: FBNetV3, seeds: Sequence[int]) -> Iterator[Claim]:
    """Compares predictors with 20 labels, and searches with and without recipes."""
    ours, baseline = (across(ordered, [(m, s) for s in seeds]) for m in (method, OFF))
    yield Claim(
        "with 20 labels a pretrained predictor orders better",
        [whole for whole, _ in ours],
        [whole for whole, _ in baseline],
        threshold=0.05,
        unit="Kendall's tau",
    )
    yield Claim(
        "it orders no worse where the cost is equal",
        [band for _, band in ours],
        [band for _, band in baseline],
        threshold=-0.02,
        unit="Kendall's tau",
    )
    alone, best = (
        searched_all(ON, each, tuple(seeds)) for each in (under(), under(best_recipe()))
    )
    yield Claim(
        "networks and recipes together beat networks under the default recipe",
        searched_all(method, SPACE, tuple(seeds)),
        alone,
        unit="accuracy",
        details={
            "under the largest network's best recipe": statistics.fmean(best),
            "of the whole table": reported(np.arange(len(accuracies()))),
        },
    )


def ordered(case: tuple[FBNetV3, int]) -> tuple[float, float]:
    """Fits a predictor to few rows; gives Kendall's tau over the others, whole and in bands."""
    method, seed = case
    random = np.random.default_rng(seed)
    rows, known_of = rows_of("nb_mini"), accuracies("nb_mini")
    order = random.permutation(len(rows))
    known, others = order[:LABELS], order[LABELS:]
    fitted = _predictor(method, random).fit(WIDE, rows[known], known_of[known, 0])
    predicted, truth = fitted.predict(rows[others]), known_of[others, 1]
    place = banded(wide_costs(rows)[:, 0])[others]
    inside = [
        kendalltau(predicted[place == band], truth[place == band]).statistic
        for band in range(BANDS)
    ]
    return float(kendalltau(predicted, truth).statistic), float(np.mean(inside))


def _predictor(method: FBNetV3, random: np.random.Generator) -> Predictor:
    if not method.statistics:
        return PretrainedMLP()
    rows = WIDE.random_many(method.statistics, random)
    return PretrainedMLP().pretrain(WIDE, rows, np.log(wide_costs(rows)))


def banded(macs: np.ndarray) -> np.ndarray:
    """Gives the band of each row: the fullest ones, none overlapping; -1 outside them."""
    place = np.full(len(macs), -1)
    for band in range(BANDS):
        free = np.where(place < 0, macs, np.inf)
        inside = [(free >= low) & (free <= WIDTH * low) for low in np.unique(macs)]
        place[max(inside, key=np.count_nonzero)] = band
    return place


def under(recipe: dict[str, int] | None = None) -> Space:
    """Gives the space of networks under one recipe, the default one if None."""
    return SPACE.subspace(recipe or DEFAULT)


def best_recipe() -> dict[str, int]:
    """Gives the recipe that is best for the largest network."""
    largest = np.flatnonzero(costs()[:, 0] == costs()[:, 0].max())
    place = largest[accuracies()[largest, 0].argmax()]
    config = SPACE.decode(SPACE.every()[place])
    return {site.name: config[site.name] for site in RECIPE}


@cache
def searched_all(method: FBNetV3, space: Space, seeds: tuple[int, ...]) -> list[float]:
    """Runs a search with each seed and gives what it found."""
    return across(searched, [(method, space, seed) for seed in seeds])


def searched(case: tuple[FBNetV3, Space, int]) -> float:
    """Runs a search; gives the accuracy that is reported of what it found."""
    method, space, seed = case

    def at(rows: np.ndarray) -> np.ndarray:
        return find(SPACE.encode_many(space.decode_many(rows)))

    def macs(rows: np.ndarray) -> np.ndarray:
        found: np.ndarray = costs()[at(rows), 0]
        return found

    run = method.start(space, ["error", "macs"], seed, exact={"macs": macs})
    while len(run.told) < TRAININGS:
        rows = run.ask_rows(method.population)
        run.tell(rows, np.stack([1 - accuracies()[at(rows), 0], macs(rows)], axis=1))
    return reported(at(run.told.rows))


def reported(places: np.ndarray) -> float:
    """Gives the mean test accuracy of the networks chosen for the four budgets."""
    found = []
    for share in SHARES:
        allowed = places[costs()[places, 0] <= share * costs()[:, 0].max()]
        found.append(accuracies()[allowed[accuracies()[allowed, 0].argmax()], 1])
    return float(np.mean(found))
