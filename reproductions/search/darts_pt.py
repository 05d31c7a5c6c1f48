"""DARTS-PT: options are told apart by what their removal costs, not by their parameters.

Claim of the paper: after the same supernet training, options that are kept because their
removal hurts make better networks than those with the largest architecture parameters, which
favour skips.

Arms: the cell of `_cells81` (four edges, each a skip, a mean or a separable convolution; all 81
cells were trained alone) as a supernet on two halves of 1,000 MNIST images of 8 x 8. Both arms
decide the same supernets: DARTS of the first order, trained for 50 epochs as in the paper (SGD
from 0.025 with a cosine, batch size 50; the rate of the parameters is 6e-3, so that they can go
as far in 1,000 steps as with the paper's 3e-4 in 20,000). The first arm decides edge after edge
by accuracy on the validation half, with five epochs of tuning at a tenth of the rate in between
(the paper's number for NAS-Bench-201). The second arm is tuned for as many epochs at the same
rate and then takes the largest parameters, so that the tuning is no advantage. What counts is
the accuracy of the picked cells when they are trained alone. Five seeds.

Thresholds: more true accuracy, and fewer skips, by any amount beyond the spread over seeds, as
the catalogue of techniques has it.

Result: undecided. Largest parameters took no skips in 50 epochs, so the failure that the
method mends did not show; what it keeps is no better than they are.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Iterator, Sequence
from functools import cache

from reproductions.search import _cells81
from reproductions.search._cells81 import DATA, EDGES
from supple.search._relaxed import RelaxedRun, RelaxedSearch, paired
from supple.search.darts_pt import DARTSPT
from supple.space import Config
from supple.testing.reproduce import Claim, across
from supple.training.seeds import generator

__all__ = ["DATA", "OFF", "ON", "SEEDS", "claims"]

SEEDS = (0, 1, 2, 3, 4)
EPOCHS, TUNING, SLOWER = 50, 5, 0.1
LR = _cells81.alpha_rate(EPOCHS)

ON = DARTSPT(lr=LR, epochs=TUNING, rate=SLOWER)
OFF = RelaxedSearch(lr=LR)


def claims(method: RelaxedSearch, seeds: Sequence[int]) -> Iterator[Claim]:
    """Compares the true accuracy and the skips of what both arms pick."""
    found = picks(tuple(seeds))
    accuracies = {arm: [_cells81.true_accuracy(c) for c in found[arm]] for arm in found}
    counts = {arm: [float(_cells81.skips(c)) for c in found[arm]] for arm in found}
    yield Claim(
        "cells kept for what their removal costs are truly more accurate",
        accuracies[method],
        accuracies[OFF],
        unit="accuracy",
        details={
            name: {
                "mean accuracy": statistics.fmean(accuracies[arm]),
                "cells": [_cells81.word(cell) for cell in found[arm]],
            }
            for name, arm in (("perturbation", ON), ("largest parameters", OFF))
        },
    )
    yield Claim(
        "the largest parameters take more skips",
        counts[method],
        counts[OFF],
        better="lower",
        unit="skips",
    )


@cache
def picks(seeds: tuple[int, ...]) -> dict[RelaxedSearch, list[Config]]:
    """Gives the cell of each arm, by seed."""
    both = across(picked, seeds)
    return {ON: [pair[0] for pair in both], OFF: [pair[1] for pair in both]}


def picked(seed: int) -> tuple[Config, Config]:
    """Trains a supernet; gives what is kept by perturbation, and the largest parameters."""
    run = _cells81.searched(OFF, seed, EPOCHS)
    twin = twin_of(run, seed)
    return ON.derive(run, *_cells81.data()), tuned(twin, seed).derive()


def twin_of(run: RelaxedRun, seed: int) -> RelaxedRun:
    """Gives a run of its own that has learned the same."""
    net = copy.deepcopy(run.net)
    twin = OFF.start(
        net,
        _cells81.sgd(net),
        loss=_cells81.loss,
        generator=generator(seed, "tuning"),
        options=run.options,
    )
    twin.load_state_dict(run.state_dict())
    return twin


def tuned(run: RelaxedRun, seed: int) -> RelaxedRun:
    """Trains on, for as long and at the rate that perturbation has between its decisions."""
    tuning = run.renewed(rate=SLOWER)
    run.net.train()
    for epoch in range(TUNING * (len(EDGES) - 1)):
        for batch in paired(*_cells81.data(), epoch=epoch, seed=seed):
            tuning.step(batch)
    return tuning
