"""Balanced mixture of supernets: sizes that pool elsewhere need weights of their own.

Claim of the paper: a single supernet for all places at which a network may pool orders them
badly, since they disturb one another; a mixture of supernets, between which the configurations
are divided as training goes, orders them better, and has to be balanced for that.

Arms: the network of `reproductions.supernet._pooling15`, which pools at four of six places (15
sizes; a table of all of them trained alone with six seeds), 10,000 grey CIFAR-10 images of
16 x 16, 600 steps of AdamW at batch size 64 with two random sizes per step. The first arm has
four copies, far fewer than sizes, the second the same without balance, the third a single
supernet; all make as many passes and updates in total. Fashion-MNIST, which the catalogue
names, is not at hand. Each arm is to have the best of three learning rates by the mean
validation accuracy of all sizes, on a seed of its own, which `tune()` finds.
Supernets are scored on validation images after recalibration, each size with the weights of
its copy, and Kendall's tau is to the table.

Thresholds: any gain, as the catalogue of techniques has it: the mean over the seeds must
exceed that of the baseline by more than the effects spread.

History: a first table, of two poolings as the catalogue has it, could not be used: its own
seeds agreed to 0.19 in Kendall's tau only (`reproductions.supernet._pooling15` tells what else
was tried). The second one is little better; no supernet was trained before it. `tune()` then
gave validation accuracies of 0.277 for four balanced copies, 0.288 for four without balance
(its rates' largest) and 0.339 for one.

Result: undecided, both claims. Kendall's tau is 0.43, 0.22 and 0.20 for four balanced copies,
0.39, 0.18 and 0.44 without balance and 0.24, 0.42 and 0.15 for one supernet: seeds of an arm
differ more than arms do, against a table that can hardly judge. What can be told is the price:
each copy gets a quarter of the steps, and the sizes' mean accuracy is 0.289 (balanced) and
0.292 (unbalanced) against 0.340 of one supernet. Balance does what it is for: copies have 2 to
6 of the 15 sizes, where without it they have none to 7.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from functools import cache

from reproductions.supernet import _pooling15
from reproductions.supernet._pooling15 import DATA
from supple.supernet.balanced_supernets import BalancedSupernets
from supple.testing.reproduce import Claim, across
from supple.training.loop import train

__all__ = ["DATA", "OFF", "ON", "claims"]

STEPS = 600
RATES = (3e-3, 1e-2, 3e-2)
TUNING_SEED = 1000

ON = BalancedSupernets(copies=4, random=2)
OFF = BalancedSupernets(copies=4, random=2, balanced=False)
SINGLE = BalancedSupernets(copies=1, random=2)
NAMES = {"balanced": ON, "unbalanced": OFF, "single": SINGLE}
CHOSEN: dict[BalancedSupernets, float] = {ON: 1e-2, OFF: 3e-2, SINGLE: 1e-2}
Result = tuple[float, list[float], list[int]]


def claims(method: BalancedSupernets, seeds: Sequence[int]) -> Iterator[Claim]:
    """Compares Kendall's tau of the arms."""
    found = arms(tuple(seeds))
    taus = {arm: [each[0] for each in rows] for arm, rows in found.items()}
    yield Claim(
        "four balanced supernets order sizes better than one",
        taus[method],
        taus[SINGLE],
        unit="Kendall's tau",
        details={
            "mean accuracy": {
                name: [statistics.fmean(each[1]) for each in found[arm]]
                for name, arm in NAMES.items()
            },
            "copies": {name: [each[2] for each in found[arm]] for name, arm in NAMES.items()},
            "ceiling": _pooling15.ceiling(),
        },
    )
    yield Claim(
        "four supernets order sizes better if they are balanced",
        taus[method],
        taus[OFF],
        unit="Kendall's tau",
    )


@cache
def arms(seeds: tuple[int, ...]) -> dict[BalancedSupernets, list[Result]]:
    """Gives Kendall's tau, the accuracies and the copies of the sizes, by arm and seed."""
    rows = across(supernet, [(arm, CHOSEN[arm], s) for arm in NAMES.values() for s in seeds])
    count = len(seeds)
    return {arm: rows[i * count : (i + 1) * count] for i, arm in enumerate(NAMES.values())}


def tune() -> dict[str, float]:
    """Finds the learning rates of all arms, `CHOSEN`."""
    cases = [(arm, rate, TUNING_SEED) for arm in NAMES.values() for rate in RATES]
    means = [statistics.fmean(each[1]) for each in across(supernet, cases)]
    best = {}
    for i, name in enumerate(NAMES):
        row = means[i * len(RATES) : (i + 1) * len(RATES)]
        best[name] = RATES[row.index(max(row))]
    return best


def supernet(case: tuple[BalancedSupernets, float, int]) -> Result:
    """Trains a supernet and scores all sizes."""
    method, rate, seed = case
    net = _pooling15.net(seed)
    train(
        net,
        _pooling15.data().train,
        _pooling15.loss,
        method=method,
        steps=STEPS,
        lr=rate,
        schedule="cosine",
        seed=seed,
        log_every=STEPS,
        progress=False,
    )
    scores = _pooling15.score(net)
    copies = [net.sharing.chosen(config) for config in _pooling15.configs(net)]
    return _pooling15.tau(scores), scores, copies
