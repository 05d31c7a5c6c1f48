"""BitStack: one store of blocks serves every budget of bytes, without training.

Claims of the paper: a network as a sorted stack of blocks can be cut anywhere, and the more
fits into memory the better it is; signs apart from magnitudes of low rank keep far more than
products of low rank that take as many bytes; sorting by loss helps; to grow, only what is
missing is read.

Set-up: the linear layers of the pretrained small Llama's blocks, 4 levels of rank 4. 16 windows
of 128 tokens of the network's training text, drawn by each seed, calibrate; 4 of them sort the
blocks (the catalogue has 1,000 tokens, twice as many). Perplexity is that on the first 12
windows of text that the network has not seen.

- BitStack: saved once, read to the least of 10 budgets, evenly spaced up to all blocks, and
  grown to the others.
- Its blocks in random order within the levels, at 3 budgets half-way between levels.
- Products of low rank alone, whose blocks take as many bytes, where levels are complete, so
  that no order matters. With the idea switched off they stand for BitStack throughout, in
  random order.

Thresholds, from the catalogue: no budget is more than 2 % worse than the next smaller one;
at each complete level below products alone; at half-way budgets below random order on average
(of the logarithms); what all growths together read is less than what reading everything anew
for each budget would.

History: thresholds were set before any run. Not tried: what it takes is worked out from parts.
"""

from __future__ import annotations

import itertools
import math
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from functools import cache, partial
from typing import Any

import torch

from reproductions.prune._llama import DATA, llama, loss, perplexity, unseen, windows
from supple.layers.stacked_signs import StackedSigns
from supple.quantize.bitstack import BitStack, Stack
from supple.testing.reproduce import Claim, across
from supple.training.seeds import generator

__all__ = ["DATA", "OFF", "ON", "claims"]

LEVELS, BUDGETS, CALIBRATION, TESTED = 4, 10, 16, 12
ON = BitStack(rank=4, levels=LEVELS, rows=4, layers="model.layers.*")
OFF = BitStack(rank=4, levels=LEVELS, rows=4, layers="model.layers.*", signs=False, sort=False)


def claims(method: BitStack, seeds: Sequence[int]) -> Iterator[Claim]:
    """Compares perplexities, and what is read."""
    ours = figures(method, tuple(seeds))
    plain = figures(OFF, tuple(seeds))
    yield Claim(
        "no budget is more than 2 % worse than the next smaller one",
        [_rise(one["budgets"]) for one in ours],
        [0.02] * len(seeds),
        better="lower",
        unit="share of the perplexity",
        details={"ours": ours, "products alone": plain},
    )
    yield Claim(
        "signs and products are better than products alone at every level",
        [
            max(math.log(a / b) for a, b in zip(mine["levels"], other["levels"], strict=True))
            for mine, other in zip(ours, plain, strict=True)
        ],
        [0.0] * len(seeds),
        better="lower",
        unit="logarithm of the perplexities' ratio",
    )
    yield Claim(
        "sorted blocks are better than blocks in random order",
        [_logarithm(one["sorted"]) for one in ours],
        [_logarithm(one["random"]) for one in ours],
        better="lower",
        unit="logarithm of the perplexity",
    )
    yield Claim(
        "growing reads what is missing and no more",
        [one["read"] for one in ours],
        [one["read anew"] for one in ours],
        better="lower",
        unit="bytes",
    )


def _rise(perplexities: Sequence[float]) -> float:
    return max(after / before - 1 for before, after in itertools.pairwise(perplexities))


def _logarithm(perplexities: Sequence[float]) -> float:
    return statistics.fmean(map(math.log, perplexities))


@cache
def figures(method: BitStack, seeds: tuple[int, ...]) -> list[dict[str, Any]]:
    """Gives the figures of a method for each seed."""
    return across(partial(of_seed, method), seeds)


def of_seed(method: BitStack, seed: int) -> dict[str, Any]:
    """Takes the network apart, and measures it at all budgets."""
    model = method.apply(
        llama(),
        calibration=windows(seed, CALIBRATION),
        loss=loss,
        generator=generator(seed, "order"),
    )
    with tempfile.TemporaryDirectory() as folder:
        whole = Stack(model)
        least, most = whole.least, whole.nbytes
        whole.save(folder)
        stack = Stack.load(folder, least)
        budgets = [least + (most - least) * i // (BUDGETS - 1) for i in range(BUDGETS)]
        found: dict[str, Any] = {"bytes": budgets, "read": stack.moved, "read anew": 0}
        level = stack.moved  # of one block of each layer
        found["budgets"] = []
        for budget in budgets:
            found["read anew"] += stack.fit(budget) - least + level
            found["read"] += stack.moved
            found["budgets"].append(_perplexity(stack))
        found["levels"] = _at(stack, [least + level * i for i in range(LEVELS)])
        halves = [least + level * i + level // 2 for i in range(LEVELS - 1)]
        found["sorted"] = _at(stack, halves)
        _shuffle(stack, seed)
        found["random"] = _at(stack, halves)
    return found


def _at(stack: Stack, budgets: Sequence[int]) -> list[float]:
    found = []
    for budget in budgets:
        stack.fit(budget)
        found.append(_perplexity(stack))
    return found


def _perplexity(stack: Stack) -> float:
    layers = [one for one in stack.model.modules() if isinstance(one, StackedSigns)]
    for layer in layers:
        layer.keep(len(layer.blocks))
    found = perplexity(stack.model, unseen(TESTED))
    for layer in layers:
        layer.keep(None)
    return found


def _shuffle(stack: Stack, seed: int) -> None:
    """Puts the blocks of each level into random order."""
    layers = [one for one in stack.model.modules() if isinstance(one, StackedSigns)]
    source = generator(seed, "shuffled")
    orders = [torch.randperm(len(layers), generator=source) for _ in range(LEVELS)]
    for number, layer in enumerate(layers):
        layer.set_places(
            [level * len(layers) + int(order[number]) for level, order in enumerate(orders)]
        )
