"""SVDQuant: moving outliers to the weights, and a product of low rank, make 4 bits suffice.

Claims of the paper: with inputs and weights of 4 bits, moving outliers from the inputs to the
weights helps, a product of low rank of the weights on inputs that are not rounded helps beyond
that, and the product needs the weights to hold the outliers: on weights as they were it is
worse.

Set-up: the outlier twin of the pretrained small Llama (each norm gives four channels that are
30 times as large, other ones for each seed, which the layers behind undo). Inputs and weights
have 4 bits in groups of 64. 16 windows of the network's training text, drawn by each seed,
calibrate; pairs of exponents are those of 6 steps, outputs are compared on 512 tokens, and the
product is found at most 10 times. The figure is the perplexity on the first 24 windows of text
that the network has not seen.

- SVDQuant with a product of rank 8, of 256; its bits and multiplications are in the details.
- The same without a product; the same without factors, on weights as they were.
- Neither, which is the idea switched off.

Thresholds, from the catalogue: the perplexity is below that without a product, that in turn is
below that of neither, and ours is below that with a product of weights as they were.

History: thresholds were set before any run. A pilot with one seed and 8 windows had 41.10
without rounding, 141.3 with neither, 43.9 with factors alone and 74.3 with the product of
weights as they were (found at most 20 times); it was cut off before ours, and nothing was tried
in full.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import cache, partial

from torch import nn

from reproductions.prune._llama import DATA, llama, perplexity, unseen, windows
from supple.layers.low_rank_branch import LowRankBranch
from supple.quantize.svdquant import SVDQuant
from supple.testing.outliers import outlier_twin
from supple.testing.reproduce import Claim, across
from supple.training.seeds import generator

__all__ = ["DATA", "OFF", "ON", "SEEDS", "claims"]

SEEDS = (0, 1, 2)
CALIBRATION, TESTED = 16, 24

ON = SVDQuant(rank=8, candidates=6, rows=512, iterations=10)
OFF = dataclasses.replace(ON, rank=0, candidates=1)


def claims(method: SVDQuant, seeds: Sequence[int]) -> Iterator[Claim]:
    """Compares perplexities."""
    places = tuple(seeds)
    ours = figures(method, places)
    moved = figures(dataclasses.replace(method, rank=0), places)
    neither = figures(OFF, places)
    alone = figures(dataclasses.replace(method, candidates=1), places)
    lower = {"better": "lower", "unit": "perplexity"}
    yield Claim(
        "a product of low rank helps beyond factors",
        [one for one, _ in ours],
        [one for one, _ in moved],
        details={
            "without rounding": [one for one, _ in figures(None, places)],
            "the product's multiplications, by the layers'": ours[0][1],
            "the product's bits, by weight": 16 * ours[0][1],
        },
        **lower,
    )
    yield Claim(
        "factors alone help",
        [one for one, _ in moved],
        [one for one, _ in neither],
        **lower,
    )
    yield Claim(
        "the product needs weights that hold the outliers",
        [one for one, _ in ours],
        [one for one, _ in alone],
        **lower,
    )


@cache
def figures(method: SVDQuant | None, seeds: tuple[int, ...]) -> list[tuple[float, float]]:
    """Gives the perplexity, and what share of multiplications products add, for each seed."""
    return across(partial(_figures, method), seeds)


def _figures(method: SVDQuant | None, seed: int) -> tuple[float, float]:
    calibration = windows(seed, CALIBRATION)
    model: nn.Module = llama()
    inputs = {"input_ids": calibration[0]["input_ids"]}
    model = outlier_twin(model, kwargs=inputs, generator=generator(seed, "outliers"))
    if method is not None:
        model = method.apply(model, calibration=calibration, inplace=True)
    return perplexity(model, unseen(TESTED)), _added(model)


def _added(model: nn.Module) -> float:
    """Gives the multiplications of products of low rank, by those of the layers beside them."""
    branches = [one for one in model.modules() if isinstance(one, LowRankBranch)]
    thin = sum(one.up.numel() + one.down.numel() for one in branches)
    return thin / max(1, sum(one.in_features * one.out_features for one in branches))
