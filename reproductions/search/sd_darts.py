"""SD-DARTS: a mixture that learns from what it was before has a smoother loss.

Claim of the paper: with self-distillation from voting teachers the supernet's loss is less
sharp around its architecture parameters than with DARTS, so that less is lost when all but the
best options are cut, and the derived networks are better.

Arms: the cell of `_cells81` (four edges, each a skip, a mean or a separable convolution; all 81
cells were trained alone) as a supernet on two halves of 1,000 MNIST images of 8 x 8, for 30
epochs of SGD from 0.025 with a cosine at batch size 50; the rate of the parameters is 1e-2, so
that they can go as far in 600 steps as with the paper's 3e-4 in 20,000. The first arm is taught
by its last three snapshots, one per epoch, with a weight of 1 that grows over the first fifth;
the second is DARTS of the first order. All else is the same, the order of the data included.
The steps are the same, too; the first arm runs its teachers beside them. Five seeds.

Figures: (1) by how much the loss on the test images rises, on average over ten random moves of
all parameters by a vector of norm 1; (2) the mixture's accuracy on these images minus that of
the largest options alone, nothing trained in between; (3) the accuracy of the derived cell when
trained alone; (4) the loss of the mixture: a smooth loss that comes from training less would
show here. Normalization uses the statistics of batches wherever a mixture is measured.

Thresholds: (1) and (2) lower by any amount beyond the spread over seeds, as the catalogue of
techniques has it; (3) no worse than by 0.01; (4) no higher than by 0.05, about a twentieth of
what such small mixtures are left with.

Result: the loss is flatter and the cut costs less; but the mixture is not certainly trained as
well (0.07 worse, spread 0.06), so that part of it may be less training.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from reproductions.search import _cells81
from reproductions.search._cells81 import DATA
from supple.search._relaxed import RelaxedRun, RelaxedSearch
from supple.search.sd_darts import SDDARTS
from supple.testing.reproduce import Claim, across
from supple.training.seeds import generator

__all__ = ["DATA", "OFF", "ON", "SEEDS", "claims"]

SEEDS = (0, 1, 2, 3, 4)
EPOCHS = 30
LR = _cells81.alpha_rate(EPOCHS)
MOVES, REACH = 10, 1.0

ON = SDDARTS(lr=LR, interval=1 / EPOCHS)
OFF = RelaxedSearch(lr=LR)


class Figures(NamedTuple):
    """What is compared of a trained mixture."""

    rise: float
    drop: float
    accuracy: float
    loss: float
    cell: str


def claims(method: RelaxedSearch, seeds: Sequence[int]) -> Iterator[Claim]:
    """Compares sharpness, what is lost by cutting, the derived cells and the losses."""
    found = arms(tuple(seeds))
    ours = [figures._asdict() for figures in found[method]]
    baseline = [figures._asdict() for figures in found[OFF]]

    def compared(name: str, figure: str, **settings: object) -> Claim:
        claim = Claim(name, [one[figure] for one in ours], [one[figure] for one in baseline])
        return dataclasses.replace(claim, **settings)  # type: ignore[arg-type]

    yield compared(
        "the loss rises less when the parameters move",
        "rise",
        better="lower",
        unit="loss",
        details={
            name: {
                "cells": [figures.cell for figures in found[arm]],
                "mean loss": statistics.fmean(figures.loss for figures in found[arm]),
            }
            for name, arm in (("self-distillation", ON), ("DARTS", OFF))
        },
    )
    yield compared(
        "less accuracy is lost when all but the largest options are cut",
        "drop",
        better="lower",
        unit="accuracy",
    )
    yield compared(
        "the derived cell is truly no worse", "accuracy", threshold=-0.01, unit="accuracy"
    )
    yield compared(
        "the mixture is trained as well", "loss", threshold=-0.05, better="lower", unit="loss"
    )


@cache
def arms(seeds: tuple[int, ...]) -> dict[RelaxedSearch, list[Figures]]:
    """Gives the figures of both arms, by seed."""
    found = across(measured, [(arm, seed) for arm in (ON, OFF) for seed in seeds])
    return {ON: found[: len(seeds)], OFF: found[len(seeds) :]}


def measured(case: tuple[RelaxedSearch, int]) -> Figures:
    """Trains a mixture and measures it."""
    method, seed = case
    run = _cells81.searched(method, seed, EPOCHS)
    images = list(_cells81.tested())
    whole = run.measure(images)
    config = run.derive()
    moved = [run.measure(images, weights).loss for weights in nearby(run, seed)]
    for name, choice in config.items():
        run.fix(name, choice)
    cut = run.measure(images)
    assert whole.accuracy is not None
    assert cut.accuracy is not None
    return Figures(
        rise=statistics.fmean(moved) - whole.loss,
        drop=whole.accuracy - cut.accuracy,
        accuracy=_cells81.true_accuracy(config),
        loss=whole.loss,
        cell=_cells81.word(config),
    )


@torch.no_grad()
def nearby(run: RelaxedRun, seed: int) -> Iterator[dict[str, Tensor]]:
    """Gives mixtures whose parameters lie at a distance from those of a run."""
    source = generator(seed, "moves")
    for _ in range(MOVES):
        moves = {name: torch.randn(a.shape, generator=source) for name, a in run.alphas.items()}
        norm = torch.stack([move.norm() for move in moves.values()]).norm()
        yield {
            name: torch.softmax(alpha + REACH * moves[name] / norm, 0)
            for name, alpha in run.alphas.items()
        }
