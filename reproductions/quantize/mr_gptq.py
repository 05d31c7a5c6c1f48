"""MR-GPTQ: rotations make up for coarse scales, and GPTQ gains from both.

Claims of the paper: numbers with heavy tails lose less in MXFP4, whose scales are powers of two
for 32 numbers, once blocks of them are rotated; in NVFP4, with finer scales for 16, rotations
don't help rounding to the nearest; and with GPTQ on rotated weights, in the order of inputs'
sizes with scales fixed before, MXFP4 loses less than with GPTQ, and that less than rounding.

Set-up: matrices of 256 x 512 numbers of Student's t with 3 degrees of freedom, rounded to the
nearest with and without a rotation of blocks of 128, for each seed; and the pretrained small
Llama, calibrated on 16 windows of 128 tokens, other ones for each seed. Its figure is the
perplexity on the first 16 windows of text that the network has not seen, weights in MXFP4
(powers of two times 4/3 in all arms, for the largest magnitude: the search takes too long here)
and inputs as they are; with inputs in MXFP4, too, it stands in the details.

Arms: the technique; GPTQ; rounding to the nearest. Switched off it is GPTQ in the order of the
inputs' size, with scales fixed before, and nothing is rotated.

Thresholds, from the catalogue: in MXFP4 the mean squared error is at least 15 % lower with the
rotation; in NVFP4 it is not lower; perplexity is lower than with GPTQ, and GPTQ's lower than
that of rounding.

History: thresholds were set before any run. A pilot of the matrices alone had errors of 0.0230
and 0.0133 in MXFP4, without and with the rotation, and 0.0083 and 0.0093 in NVFP4 (the
catalogue's probe: 0.0206, 0.0133, 0.0084 and 0.0093). With one seed and 8 windows to calibrate
on and 8 to test the technique had 41.73 and GPTQ 41.51, where the network itself has 41.10: it
has no outliers to spread, so that claim may well fail. Searched scales took too long. Not tried
in full.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import cache, partial
from typing import Any

import torch

from reproductions.prune._llama import DATA, llama, perplexity, unseen, windows
from supple.formats import QuantSpec, fake_quantize
from supple.layers.rotations import BlockHadamard
from supple.quantize.base import Quantizer, baseline
from supple.quantize.mr_gptq import MRGPTQ
from supple.testing.reproduce import Claim, across
from supple.training.seeds import generator

__all__ = ["DATA", "OFF", "ON", "SEEDS", "claims"]

SEEDS = (0, 1, 2)
SEEN, TESTED = 16, 16

ON = MRGPTQ(observer="minmax", activations=None, packed=False)
OFF = dataclasses.replace(ON, diagonal=1)
_FORMAT: dict[str, Any] = {
    "format": "e2m1",
    "group_size": 32,
    "symmetric": True,
    "scale_format": "e8m0-wide",
    "packed": False,
}
GPTQ = baseline("gptq", **_FORMAT)
NEAREST = baseline("rtn", **_FORMAT)
MX = ON.spec()
NV = QuantSpec("e2m1", "group", 16, scale_format="e4m3")


def claims(method: MRGPTQ, seeds: Sequence[int]) -> Iterator[Claim]:
    """Compares errors of rounded matrices, and perplexities."""
    seeds = tuple(seeds)
    settings: Any = {"better": "lower", "unit": "mean squared error over mean square"}
    tails = [_errors(method.diagonal, seed) for seed in seeds]
    yield Claim(
        "heavy tails lose 15 % less in MXFP4 behind a rotation",
        [one["mx"] for one in tails],
        [0.85 * _errors(1, seed)["mx"] for seed in seeds],
        **settings,
    )
    yield Claim(
        "in NVFP4 a rotation does not lower the error of rounding to the nearest",
        [_errors(1, seed)["nv"] for seed in seeds],
        [_errors(ON.diagonal, seed)["nv"] for seed in seeds],
        **settings,
    )
    settings["unit"] = "perplexity"
    both = dataclasses.replace(method, activations=4)
    yield Claim(
        "less is lost than with GPTQ",
        _all(method, seeds),
        _all(GPTQ, seeds),
        details={
            "the network itself": perplexity(llama(), unseen(TESTED)),
            "with inputs in MXFP4, first seed": _figure(both, seeds[0]),
        },
        **settings,
    )
    yield Claim(
        "GPTQ loses less than rounding to the nearest",
        _all(GPTQ, seeds),
        _all(NEAREST, seeds),
        **settings,
    )


@cache
def _errors(size: int, seed: int) -> dict[str, float]:
    """Gives the errors of a matrix with heavy tails, rotated in blocks of some size."""
    normal = torch.randn(4, 256, 512, generator=generator(seed, "tails"))
    matrix = normal[0] / normal[1:].square().mean(0).sqrt()
    rotated = BlockHadamard(size)(matrix)
    return {
        name: float((fake_quantize(rotated, spec) - rotated).square().mean())
        / float(matrix.square().mean())
        for name, spec in (("mx", MX), ("nv", NV))
    }


@cache
def _all(method: Quantizer, seeds: tuple[int, ...]) -> list[float]:
    return across(partial(_figure, method), seeds)


def _figure(method: Quantizer, seed: int) -> float:
    """Gives the perplexity of the quantized network."""
    small = method.apply(llama(), calibration=windows(seed, SEEN))
    return perplexity(small, unseen(TESTED))
