"""FlatQuant: maps that are learned lose less at 4 bits than random rotations.

Claims of the paper: with 4-bit weights and inputs, small affine maps learned block by block
lose far less than Hadamard rotations, and these far less than rounding to the nearest.

Set-up: the pretrained small Llama, and its outlier twin, which computes the same but in which
four channels of what each norm gives are 30 times as large. All weights of its blocks have 4
bits with a scale for each output, all inputs of layers 4 bits with a scale for each token. The
figure is the perplexity on the first 32 windows of 128 tokens that the network has not seen.
Each seed draws the large channels, signs of rotations, and 32 windows of text that the network
was trained on, which FlatQuant sees two at a time.

- FlatQuant with 30 steps for each block (the authors take 480, of four times 2,048 tokens).
- Hadamard rotations with random signs before all layers, nothing learned: QuaRot-like.
- Rounding to the nearest.

The idea switched off is the rotation alone.

Thresholds, from the catalogue: on the twin FlatQuant is better than rotations, and these better
than rounding. The plain network's figures are reported beside them: factors of channels can
undo large channels of norms exactly, so there the comparison is about maps alone.

History: thresholds were set before any run. A pilot with one seed and 10 steps on the twin had
48.6 with FlatQuant, 62.2 with rotations and 3261 with rounding alone, 46.5 unrounded. The
catalogue's 100 steps became 30, for time. Not tried in full.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import nn

from reproductions.prune._llama import DATA, llama, perplexity, unseen, windows
from supple.layers.rotations import KroneckerAffine
from supple.quantize.base import Quantizer, baseline
from supple.quantize.flatquant import FlatQuant
from supple.testing.outliers import outlier_twin
from supple.testing.reproduce import Claim, across
from supple.training.seeds import generator

__all__ = ["DATA", "OFF", "ON", "SEEDS", "claims"]

SEEDS = (0, 1, 2)
TESTED, SHOWN, TOGETHER = 32, 32, 2

ON = FlatQuant(steps=30)
OFF = baseline("quarot")
NEAREST = baseline("rtn", activations=4)


def claims(method: Quantizer, seeds: Sequence[int]) -> Iterator[Claim]:
    """Compares perplexities of the twin."""
    ours, turned, nearest = (_all(one, tuple(seeds)) for one in (method, OFF, NEAREST))
    settings = {"better": "lower", "unit": "perplexity"}
    arms = {"learned": ours, "rotations": turned, "nearest": nearest}
    plain = {name: [one["plain"] for one in arm] for name, arm in arms.items()}
    yield Claim(
        "less is lost than with random rotations",
        [one["twin"] for one in ours],
        [one["twin"] for one in turned],
        details={
            "plain network": plain,
            "multiply-accumulates of maps for a token": ours[0]["macs"],
        },
        **settings,
    )
    yield Claim(
        "random rotations lose less than rounding alone",
        [one["twin"] for one in turned],
        [one["twin"] for one in nearest],
        **settings,
    )


@cache
def _all(method: Quantizer, seeds: tuple[int, ...]) -> list[dict[str, float]]:
    """Gives the perplexities of both networks for each seed."""
    return across(partial(_figures, method), seeds)


def _figures(method: Quantizer, seed: int) -> dict[str, float]:
    plain, shown = llama(), _shown(seed)
    inputs = {"input_ids": shown[0]["input_ids"][:1]}
    twin = outlier_twin(plain, (), inputs, generator=generator(seed, "outliers"))
    found: dict[str, float] = {}
    for name, model in (("plain", plain), ("twin", twin)):
        small = method.apply(model, calibration=shown, generator=generator(seed, "maps"))
        found[name] = perplexity(small, unseen(TESTED))
        found["macs"] = _macs(small)
    return found


def _shown(seed: int) -> list[dict[str, torch.Tensor]]:
    """Gives the windows that are learned from, two by two."""
    return [
        {name: tensor[start : start + TOGETHER] for name, tensor in batch.items()}
        for batch in windows(seed, SHOWN)
        for start in range(0, len(batch["input_ids"]), TOGETHER)
    ]


def _macs(model: nn.Module) -> float:
    """Counts what maps cost; those of layers that see the same are shared."""
    maps: list[Any] = [one for one in model.modules() if isinstance(one, KroneckerAffine)]
    return float(sum(one.left * one.right * (one.left + one.right) for one in maps))
