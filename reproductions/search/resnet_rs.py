"""ResNet-RS: whether depth or width is the better way to grow depends on how long one trains.

Claims of the paper: depth is the better way to spend a larger cost where training is long
enough to overfit, width where it is short; and a smaller weight decay helps only beside other
regularisation.

Arms: a base of three stages (1 block each; 4, 8 and 16 channels; 12 x 12 pixels) is scaled to
three times its multiply-accumulates, in depth and in width (both with the rule's share in
resolution; costs met within 5 %), and trained on 1,500 CIFAR-10 images for 3 and for 12 epochs.
All arms have AdamW with cosine, a learning rate of 1e-2 and a weight decay of 0.01. The figure
is the accuracy of the deep network less that of the wide one. With the idea switched off both
regimes get the network of compound scaling.

Weight decay: the wide network, 6 epochs, with label smoothing (0.1) and augmentation (shifts
and mirrors) or with neither, at a weight decay of 1 and of 0.4, a ratio as in the paper (1e-4
and 4e-5 there, with SGD). The figure is what the smaller one gains.

Fair: pairs differ in one thing, and learning rates are equal, as the catalogue of techniques
asks. Thresholds: effects above 0, likewise.

History: no pilot; the code was tried with one epoch only.

Result: undecided. The wide network is ahead at both lengths, by 5.0 points after 3 epochs
(0.321 against 0.271) and by 4.0 after 12 (0.408 against 0.368). The gap shrinks in two of
three seeds, as the paper has it, by 1.0 +- 1.5 points in the mean. Twelve epochs of 1,500
images are no training that overfits at networks of 0.5 M multiply-accumulates, so that only
the direction could be seen. A smaller weight decay gains -0.4 points beside other
regularisation and +0.8 without, a difference of -1.2 +- 1.5: at 6 epochs nothing overfits that
a regulariser could help. The run took 71 s.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import cache

from reproductions.search._scaled import DATA, accuracy, cost
from supple.search._scaling import ScalingRule
from supple.search.resnet_rs import ResNetRS, Spec
from supple.testing.reproduce import Claim, across

__all__ = ["DATA", "OFF", "ON", "claims"]

ON = ResNetRS(divisor=1)
OFF = ScalingRule(divisor=1)
BASE = Spec(depth=(1, 1, 1), width=(4, 8, 16), resolution=12)
GROWTH = 3.0
EXAMPLES = 1500
SHORT, LONG, MIDDLE = 3, 12, 6
LARGER, SMALLER = 1.0, 0.4


def claims(method: ScalingRule, seeds: Sequence[int]) -> Iterator[Claim]:
    """Compares depth with width by the length of training, and two weight decays."""
    deep, wide = grown(method)
    gaps = {
        epochs: [
            a - b
            for a, b in zip(
                trained(deep, epochs, tuple(seeds)),
                trained(wide, epochs, tuple(seeds)),
                strict=True,
            )
        ]
        for epochs in (SHORT, LONG)
    }
    yield Claim(
        "depth gains on width as training gets longer",
        gaps[LONG],
        gaps[SHORT],
        unit="accuracy, deep less wide",
        details={
            "deep": [str(deep), cost(deep)],
            "wide": [str(wide), cost(wide)],
            "accuracies": {
                f"{name}, {epochs} epochs": trained(spec, epochs, tuple(seeds))
                for name, spec in (("deep", deep), ("wide", wide))
                for epochs in (SHORT, LONG)
            },
        },
    )
    gains = decay_gains(tuple(seeds))
    yield Claim(
        "a smaller weight decay helps more beside other regularisation than alone",
        gains[True],
        gains[False],
        unit="accuracy gained",
    )


def grown(method: ScalingRule) -> tuple[Spec, Spec]:
    """Gives what the rule scales to for long and for short training."""
    if not isinstance(method, ResNetRS):
        spec = method.scale(BASE, GROWTH, macs=cost)
        return spec, spec
    rules = (dataclasses.replace(method, overfits=overfits) for overfits in (True, False))
    deep, wide = (rule.scale(BASE, GROWTH, macs=cost) for rule in rules)
    return deep, wide


@cache
def trained(spec: Spec, epochs: int, seeds: tuple[int, ...]) -> list[float]:
    """Trains a network with each seed."""
    return across(_trained, [(spec, epochs, seed) for seed in seeds])


def _trained(case: tuple[Spec, int, int]) -> float:
    spec, epochs, seed = case
    return accuracy(spec, seed, examples=EXAMPLES, epochs=epochs)


@cache
def decay_gains(seeds: tuple[int, ...]) -> dict[bool, list[float]]:
    """Gives what the smaller weight decay gains, with other regularisation and without."""
    settings = [
        (regularised, decay) for regularised in (True, False) for decay in (SMALLER, LARGER)
    ]
    cases = [(*setting, seed) for setting in settings for seed in seeds]
    rows = across(_decayed, cases)
    parts = [rows[i * len(seeds) :][: len(seeds)] for i in range(len(settings))]
    return {
        regularised: [a - b for a, b in zip(smaller, larger, strict=True)]
        for regularised, smaller, larger in zip(
            (True, False), parts[::2], parts[1::2], strict=True
        )
    }


def _decayed(case: tuple[bool, float, int]) -> float:
    regularised, decay, seed = case
    return accuracy(
        grown(ON)[1],
        seed,
        examples=EXAMPLES,
        epochs=MIDDLE,
        smoothing=0.1 if regularised else 0.0,
        augment=regularised,
        weight_decay=decay,
    )
