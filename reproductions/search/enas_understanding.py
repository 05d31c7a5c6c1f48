"""Audit of ENAS' controller: it forgets its decisions, and a memory makes it keep them.

Claims of the paper: a controller trained by REINFORCE finds nothing better than random draws
do; distances between its hidden states say nothing about how networks differ; with a memory of
sampled sequences, which it must reproduce, they do.

Rewards are looked up: the CIFAR-10 test accuracy of the 15,625 cells of NAS-Bench-201 (six
edges with one of five operations; the table is complete, so that nothing is interpolated, which
is why it stands in for nb-mini, a table of 92 sizes out of 46,656).

Search: a controller samples 50 cells and learns from them as it goes; its best is held against
the best of 50 uniform draws. The figure is the t of the paired differences over twenty seeds.

States: the controller samples and learns from 1,000 cells; then, over 64 sampled sequences,
distances of hidden states are held against the number of earlier decisions that differ, among
pairs whose last decision is the same (Spearman's correlation; states of the later half of the
sequence), with ten seeds. Arms: with a memory of 1,000 sequences and weight 1, and without; all
else is equal, and at its defaults. The entropy of the decisions is kept beside it: where it has
collapsed, a correlation says nothing.

Thresholds, as the catalogue of techniques has them: t below 2.09 (two-sided 5 % at 19 degrees
of freedom); a correlation below 0.2 without the memory, above 0.5 with it, each by more than
its spread over the seeds.

History: a pilot with one seed (1000, not reported) came after the thresholds: a correlation of
0.61 without the memory and of 0.49 with it, against both claims. After 50 cells, all but
untrained, both controllers had 0.65: random weights remember, nobody has to teach them. The
thresholds stayed; the states have ten seeds instead of twenty, to save time.

Result: as in the pilot. REINFORCE is no better than random draws of as many cells; states
remember decisions without a memory already, since an LSTM with random weights does.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from functools import cache

from benchmarks import _nats
from supple.search.enas_understanding import Audit, ENASUnderstanding
from supple.space import Config
from supple.testing.reproduce import Claim, across

__all__ = ["DATA", "OFF", "ON", "SEEDS", "claims"]

DATA = ("nats-bench/topology.csv",)
SEEDS = tuple(range(20))
ON = ENASUnderstanding(memory=1000)
OFF = ENASUnderstanding(memory=0)
FEW, MANY = 50, 1000
STATES = 10
"""Seeds of what is asked of states."""
SIGNIFICANT = 2.09
FORGOTTEN, KEPT = 0.2, 0.5


def claims(method: ENASUnderstanding, seeds: Sequence[int]) -> Iterator[Claim]:
    """Holds the search against random draws, and states against decisions."""
    few = audits(OFF, FEW, tuple(seeds))
    differences = [audit.best - audit.best_of_random for audit in few]
    yield Claim(
        "REINFORCE's best of 50 is not significantly better than that of 50 random draws",
        [_t(differences)],
        [SIGNIFICANT],
        better="lower",
        exact=True,
        unit="t of the paired differences",
        details={
            "best": [audit.best for audit in few],
            "best of random": [audit.best_of_random for audit in few],
        },
    )
    yield _correlated("without a memory, states forget decisions", OFF, FORGOTTEN, seeds)
    yield _correlated("with the memory, states tell decisions apart", method, KEPT, seeds)


def _correlated(
    name: str, method: ENASUnderstanding, limit: float, seeds: Sequence[int]
) -> Claim:
    """Holds the correlation of states and decisions against a limit, from the side meant."""
    many = audits(method, MANY, tuple(seeds[:STATES]))
    return Claim(
        name,
        [audit.correlation for audit in many],
        [limit for _ in many],
        better="lower" if limit == FORGOTTEN else "higher",
        unit="Spearman's correlation",
        details={
            "entropy": [audit.entropy for audit in many],
            "largest entropy": _nats.EDGES * math.log(len(_nats.OPERATIONS)),
            "mean score": [statistics.fmean(audit.scores) for audit in many],
            "mean score of random": [statistics.fmean(audit.random) for audit in many],
        },
    )


@cache
def audits(method: ENASUnderstanding, evaluations: int, seeds: tuple[int, ...]) -> list[Audit]:
    """Audits one controller per seed."""
    return across(_audited, [(method, evaluations, seed) for seed in seeds])


def _audited(case: tuple[ENASUnderstanding, int, int]) -> Audit:
    method, evaluations, seed = case
    return method.run(_nats.space(), _score, evaluations=evaluations, generator=seed)


def _score(config: Config) -> float:
    """Gives the accuracy of a cell, from 0 to 1."""
    return float(_nats.accuracies()[tuple(config.values())]) / 100


def _t(differences: Sequence[float]) -> float:
    """Gives Student's t of paired differences."""
    spread = statistics.stdev(differences) / math.sqrt(len(differences))
    return statistics.fmean(differences) / spread
