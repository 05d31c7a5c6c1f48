"""VPTQ: at 2 bits, vectors from codebooks lose less than scalars, and less yet with feedback.

Claims of the paper: at 2 bits a weight, vectors of weights from a codebook lose less than whole
numbers with scales, and rounding columns in turn, with those to come making up for the error,
loses less than taking each vector's nearest entry. The codebook is best found by a k-means in
which inputs count as much as they matter.

Set-up: the pretrained small Llama, the linear layers of its first three blocks, at 2 bits.
Vectors are of 4 weights, codebooks of 256 entries, 2.16 bits a weight with the codebooks; GPTQ
has groups of 64 with a scale and a zero point, 2.28 bits. Both see 32 windows of 128 tokens of
text that the network was trained on, other ones with each seed. The figure is the perplexity on
the first 64 windows of text that it has not seen.

- VPTQ.
- Nearest entries: the same codebooks, no feedback, and no fitting afterwards.
- The same with a k-means in which all vectors count alike.
- GPTQ, at more bits.

Thresholds, from the catalogue: VPTQ is better than nearest entries, these are better than GPTQ,
VPTQ takes no more bits than GPTQ, and vectors that count alike are at most 1 % better.
The idea switched off is GPTQ itself, which has no codebooks.

History: thresholds were set before any run. A pilot with one seed and half of the windows had
49.1 with VPTQ, 51.4 and 52.0 with nearest entries and 52.7 with GPTQ. Not tried in full.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from reproductions.prune._llama import DATA, llama, perplexity, unseen, windows
from supple.quantize.base import Quantizer, baseline, bits_per_weight
from supple.quantize.vptq import VPTQ
from supple.testing.reproduce import Claim, across
from supple.transforms import Given

__all__ = ["DATA", "OFF", "ON", "SEEDS", "claims"]

SEEDS = (0, 1, 2)
TESTED, SHOWN = 64, 32
LAYERS = "model.layers.[0-2].*"


@dataclass(frozen=True, kw_only=True)
class Nearest(VPTQ):
    """The codebooks of VPTQ without feedback.

    Args:
        weighted: Whether vectors count as much as their inputs matter.
    """

    refit: bool = False
    weighted: bool = True

    def solve(self, matrix: Tensor, spec: Any, seen: Any) -> Any:
        """Rounds as if no two inputs had anything to do with each other."""
        diagonal = seen.gram.diagonal()
        alike = torch.ones_like(diagonal)
        gram = torch.diag(diagonal if self.weighted else alike)
        return super().solve(matrix, spec, SimpleNamespace(gram=gram))  # type: ignore[arg-type]


ON = VPTQ(layers=LAYERS)
OFF = baseline("gptq", bits=2, group_size=64, layers=LAYERS)
NEAREST = Nearest(layers=LAYERS)
ALIKE = Nearest(layers=LAYERS, weighted=False)


def claims(method: Quantizer, seeds: Sequence[int]) -> Iterator[Claim]:
    """Compares perplexities and bits."""
    arms = {"ours": method, "nearest": NEAREST, "alike": ALIKE, "gptq": OFF}
    found = {name: _all(one, tuple(seeds)) for name, one in arms.items()}
    perplexities = {name: [one[0] for one in figures] for name, figures in found.items()}
    settings = {"better": "lower", "unit": "perplexity"}
    yield Claim(
        "feedback and fitted codebooks lose less than nearest entries",
        perplexities["ours"],
        perplexities["nearest"],
        **settings,
    )
    yield Claim(
        "nearest entries lose less than GPTQ",
        perplexities["nearest"],
        perplexities["gptq"],
        **settings,
    )
    yield Claim(
        "vectors take no more bits than GPTQ",
        [one[1] for one in found["ours"]],
        [one[1] for one in found["gptq"]],
        better="lower",
        unit="bits per weight",
    )
    yield Claim(
        "entries found by a k-means that counts inputs are no worse",
        perplexities["nearest"],
        perplexities["alike"],
        threshold=-0.01 * sum(perplexities["alike"]) / len(seeds),
        **settings,
    )


@cache
def _all(method: Quantizer, seeds: tuple[int, ...]) -> list[tuple[float, float]]:
    """Gives perplexity and bits per weight for each seed of the calibration windows."""
    return across(partial(_figures, method), seeds)


def _figures(method: Quantizer, seed: int) -> tuple[float, float]:
    model = llama()
    source = torch.Generator().manual_seed(seed)
    found = method.quantized(model, Given(tuple(windows(seed, SHOWN)), None, source))
    return perplexity(model, unseen(TESTED)), bits_per_weight(found)
