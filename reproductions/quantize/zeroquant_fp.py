"""ZeroQuant-FP: floating-point inputs stand outliers that whole numbers do not.

Claims of the paper: with layers' inputs in 8-bit floating point perplexity is lower than with
8-bit whole numbers; weights in 4-bit floating point are as good as 4-bit whole numbers; scales
that differ by powers of two cost little, those of an output over powers of two (M2) less than
powers of two (M1); a product of low rank makes up for part of what rounding lost.

Set-up: the pretrained small Llama has no outliers of its own, so in a copy that computes the
same three channels of each norm's output are 60 times as large (`outlier_twin`, with numbers of
the catalogue), others for each seed, and the plain network stands beside it in the details.
Weights are rounded by GPTQ in groups of 256 on 16 windows of 128 tokens; inputs token by token.
The figure is the perplexity on the first 24 windows of text that the network has not seen.

Arms: the technique (weights E2M1, inputs E4M3, rank 8, scales M2); the same with inputs as
whole numbers of 8 bits; with weights as whole numbers of 4 bits; with rank 0. All but the
inputs are the same where the idea is switched off, which is whole-number inputs throughout.

Thresholds, from the catalogue: lower perplexity than with whole-number inputs, in the copy with
outliers; weights in floating point within 2 % of whole numbers; lower perplexity with the
product than without; and a mean squared error of all weights, rounded to the nearest, that is
lower with M2 than with M1.

History: thresholds were set before any run. A pilot with one seed, 8 windows and four channels
30 times as large had 41.55 with floating-point inputs and 41.62 with whole numbers (the network
itself 41.10), and errors of weights of 0.0126 with M2, 0.0171 with M1, 0.0124 with any scale.
The outliers became those of the catalogue's own probe, three and 60. Not tried in full.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import nn

from reproductions.prune._llama import DATA, llama, perplexity, unseen, windows
from supple.formats import ScaleFormat, fake_quantize
from supple.quantize.zeroquant_fp import ZeroQuantFP
from supple.testing.outliers import outlier_twin
from supple.testing.reproduce import Claim, across
from supple.training.seeds import generator
from supple.transforms import Given
from supple.weights import matrices

__all__ = ["DATA", "OFF", "ON", "SEEDS", "claims"]

SEEDS = (0, 1, 2)
SEEN, TESTED = 16, 24
CHANNELS, FACTOR = 3, 60.0
FORMATS = ("e4m3", "int8")

ON = ZeroQuantFP(packed=False)
OFF = dataclasses.replace(ON, activation_format="int8")


def claims(method: ZeroQuantFP, seeds: Sequence[int]) -> Iterator[Claim]:
    """Compares perplexities, and errors of weights."""
    seeds = tuple(seeds)
    own = FORMATS.index(method.activation_format)
    ours = [one[own] for one in _all(method, seeds)]
    whole = dataclasses.replace(method, format=None)
    none = dataclasses.replace(method, rank=0)
    settings: Any = {"better": "lower", "unit": "perplexity"}
    yield Claim(
        "less is lost than with inputs of whole numbers",
        ours,
        [one[1] for one in _all(method, seeds)],
        details={
            "the network itself": [one[2] for one in _all(method, seeds)],
            "without outliers, first seed, by inputs": dict(
                zip(FORMATS, _figures(method, seeds[0], outliers=False), strict=False)
            ),
        },
        **settings,
    )
    yield Claim(
        "weights in floating point are within 2 % of whole numbers",
        ours,
        [1.02 * one[own] for one in _all(whole, seeds)],
        **settings,
    )
    yield Claim(
        "less is lost with the product of low rank",
        ours,
        [one[own] for one in _all(none, seeds)],
        **settings,
    )
    yield Claim(
        "scales over powers of two are nearer than powers of two",
        [_weight_error("shift4")],
        [_weight_error("e8m0-up")],
        better="lower",
        unit="mean squared error over mean square",
        exact=True,
        details={"any scale, in float16": _weight_error("fp16")},
    )


def _all(method: ZeroQuantFP, seeds: tuple[int, ...]) -> list[tuple[float, ...]]:
    """Gives perplexities by the inputs' format, and the network's own, for each seed."""
    return _measured(dataclasses.replace(method, activation_format=FORMATS[0]), seeds)


@cache
def _measured(method: ZeroQuantFP, seeds: tuple[int, ...]) -> list[tuple[float, ...]]:
    return across(partial(_figures, method), seeds)


def _figures(method: ZeroQuantFP, seed: int, outliers: bool = True) -> tuple[float, ...]:
    seen = windows(seed, SEEN)
    model = llama()
    if outliers:
        random, example = generator(seed, "outliers"), seen[0]
        model = outlier_twin(
            model, kwargs=example, channels=CHANNELS, factor=FACTOR, generator=random
        )
    found = [perplexity(model, unseen(TESTED))]
    solved = method.quantized(model, Given(batches=tuple(seen)))
    for form in reversed(FORMATS):
        rounding = dataclasses.replace(method, activation_format=form)
        small = rounding.install(copy.deepcopy(model), solved, Given())
        found.insert(0, perplexity(small, unseen(TESTED)))
    return tuple(found)


@cache
@torch.no_grad()
def _weight_error(held: ScaleFormat) -> float:
    spec = dataclasses.replace(ON, scale_format=held).spec()
    lost = whole = 0.0
    for layer in matrices(llama()).values():
        assert isinstance(layer, nn.Linear)
        lost += float((fake_quantize(layer.weight, spec) - layer.weight).square().sum())
        whole += float(layer.weight.square().sum())
    return lost / whole
