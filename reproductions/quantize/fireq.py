"""FireQ: keys of 4 bits keep their quality when scales pass rotary positions.

Claims of the paper: keys have outliers in a few channels, which rotary positions mix by pairs;
a factor for each pair, which the weights take in, and one for each channel after the turn keep
what keys of 4 bits lose small. A factor for the whole matrix keeps scales in e4m3 from
vanishing.

Set-up: the pretrained small Llama in which queries and keys of every layer have been changed:
in each head of keys one channel before the turn is 30 times as large, with its partner, and
those of the queries are as much smaller, so that the network computes the same. Keys and values
have 4 bits with a scale for each token of each head, all else is as it was. The figure is the
perplexity on the first 32 windows of 128 tokens that the network has not seen. Each seed draws
the channels and the 16 windows that factors are found from.

- FireQ: factors of pairs, then of channels.
- Factors of pairs alone.
- No factors.
- Weights a thousand times smaller: the error of scales in e4m3 with and without the factor.

The idea switched off is no factors.

Thresholds, from the catalogue: pairs are better than none; pairs and channels are not worse
than pairs by more than 1 %; weights with the factor lose less than without. That factors of
pairs change nothing, and others do, is a test of the technique.

History: thresholds were set before any run. A smoke run with one seed had 73.4 without factors,
46.63 with those of pairs, 46.51 with both and 46.50 unrounded; small weights lost 11 % with the
factor and all without. Not tried in full.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from reproductions.prune._llama import DATA, llama, perplexity, unseen, windows
from supple.formats import Float, QuantSpec, quantize
from supple.layers.lookup_linear import LookedUp
from supple.quantize.fireq import FireQ
from supple.testing.reproduce import Claim, across
from supple.training.seeds import generator

__all__ = ["DATA", "OFF", "ON", "SEEDS", "claims"]

SEEDS = (0, 1, 2)
TESTED, SHOWN, FACTOR, SMALL = 32, 16, 30.0, 1e-3

ON = FireQ(bits=16, activations=None)
PAIRS = dataclasses.replace(ON, channels=False)
OFF = dataclasses.replace(ON, pairs=False, channels=False)


def claims(method: FireQ, seeds: Sequence[int]) -> Iterator[Claim]:
    """Compares perplexities, and what is lost of small weights."""
    ours, pairs, none = (_all(one, tuple(seeds)) for one in (method, PAIRS, OFF))
    settings = {"better": "lower", "unit": "perplexity"}
    yield Claim("factors of keys save what 4 bits lose", ours, none, **settings)
    yield Claim("factors of pairs alone save most of it", pairs, none, **settings)
    yield Claim(
        "factors after the turn lose at most 1 % to pairs alone",
        ours,
        [1.01 * one for one in pairs],
        **settings,
    )
    lifted, bare = _small_weights()
    yield Claim(
        "small weights keep their scales by a factor for the matrix",
        [lifted],
        [bare],
        better="lower",
        unit="relative error",
        exact=True,
    )


@cache
def _all(method: FireQ, seeds: tuple[int, ...]) -> list[float]:
    """Gives the perplexity for each seed."""
    return across(partial(_figure, method), seeds)


def _figure(method: FireQ, seed: int) -> float:
    small = method.apply(spiked(seed), calibration=windows(seed, SHOWN))
    return perplexity(small, unseen(TESTED))


@torch.no_grad()
def spiked(seed: int) -> nn.Module:
    """Gives the network with large pairs of channels of keys, undone in the queries."""
    model = llama()
    source = generator(seed, "spikes")
    size = 32
    for block in model.model.layers:  # type: ignore[union-attr]
        attention: Any = block.self_attn
        for head in range(4):
            channel = int(torch.randint(size // 2, (1,), generator=source))
            for place in (channel, channel + size // 2):
                attention.k_proj.weight[head * size + place] *= FACTOR
                for reader in (2 * head, 2 * head + 1):
                    attention.q_proj.weight[reader * size + place] /= FACTOR
    return model


@torch.no_grad()
def _small_weights() -> tuple[float, float]:
    """Gives the relative errors of small weights with the factor and without it."""
    weight: Tensor = llama().model.layers[0].mlp.down_proj.weight.float() * SMALL  # type: ignore[union-attr,index]
    spec = QuantSpec("int4", "group", 64, scale_format="e4m3")
    lifted = LookedUp.of(quantize(weight, spec)).dequantize()
    plain = QuantSpec("int4", "group", 64)
    scale, _ = plain.scales(weight)
    eight = Float(4, 3)
    scale = eight.round(scale).clamp_min(2.0**-9)  # the smallest number above 0
    codes = quantize(weight, plain, scale)
    values = plain.format.decode(codes.codes)
    bare = eight.round(values * plain.spread(scale, weight.shape))
    whole = weight.norm()
    return float((lifted - weight).norm() / whole), float((bare - weight).norm() / whole)
