"""Gaussian weight sampling: who trained with noise loses little by rounding.

Claims of the paper: noise of the size that rounding would have, in the place of rounding, lets
a language model be trained as well as without, down to floats of 6 bits; and each block's bits
can be learned along.

Set-up: a Llama of bytes (0.46 M parameters) on tiny Shakespeare, `STEPS` steps of 512 bytes;
the weights of all layers but embedding and head have noise of 6 bits at first and 4 in the end.
What is judged has its weights rounded to the floats that stand for the learned bits (6 bits for
4), on text that was not trained on. The other network is trained in the same way without
noise; its weights are rounded to the same floats.

Claims: the loss of the rounded network is within 2 % of that of the other one before rounding;
rounding raises the loss by less than half of what it costs the other one; the mean of the
blocks' bits goes from 6 below 5.5. With the idea switched off there is no noise, and what
rounding costs is compared with half of itself.

`weight_decay` of the bits is 10, such that they arrive within so short a run.

History: thresholds were set before any run. A trial of 30 steps and one seed gave 2.8126 nats
before and after rounding with noise, and 2.8164 and 2.8153 without; nothing was changed but the
number of steps, for time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache, partial

import torch
from torch import nn

from reproductions.quantize._bytes import BLOCKS, DATA, model, nats, trained
from supple.layers.sampled_weight import SampledWeight
from supple.quantize._qat import wrapped
from supple.quantize.gaussws import GaussWS
from supple.testing.reproduce import Claim, across

__all__ = ["DATA", "OFF", "ON", "SEEDS", "claims"]

SEEDS = (0, 1, 2)
STEPS = 200

ON = GaussWS(weight_decay=10.0, layers=BLOCKS)
OFF = GaussWS(bits=16, layers=BLOCKS)


def claims(method: GaussWS, seeds: Sequence[int]) -> Iterator[Claim]:
    """Compares losses before and after rounding."""
    ours, plain = runs(method, tuple(seeds)), runs(OFF, tuple(seeds))
    yield Claim(
        "rounded weights are as good as ones trained without noise",
        [after / other for (_, after, _), (other, _, _) in zip(ours, plain, strict=True)],
        [1.0] * len(ours),
        threshold=-0.02,
        better="lower",
        unit="of the loss without noise",
        details={"nats without noise": [before for before, _, _ in plain]},
    )
    yield Claim(
        "rounding costs less than half of what it costs without noise",
        [after - before for before, after, _ in ours],
        [(after - before) / 2 for before, after, _ in plain],
        better="lower",
        unit="nats",
    )
    yield Claim(
        "bits go down",
        [bits for _, _, bits in ours],
        [ON.initial_bits] * len(ours),
        threshold=0.5,
        better="lower",
        unit="bits",
    )


@cache
def runs(method: GaussWS, seeds: tuple[int, ...]) -> list[tuple[float, float, float]]:
    """Gives the loss before and after rounding, and the mean bits, for each seed."""
    return across(partial(_run, method), seeds)


def _run(method: GaussWS, seed: int) -> tuple[float, float, float]:
    net = trained(method, seed, STEPS).eval()
    noisy = [one.of_weight for one in wrapped(net).values()]
    widths = [one.widths().detach() for one in noisy if isinstance(one, SampledWeight)]
    bits = float(torch.cat(widths).mean()) if widths else float(ON.initial_bits)
    plain = model(seed)
    state = {
        name.replace(".layer.weight", ".weight"): t for name, t in net.state_dict().items()
    }
    plain.load_state_dict({name: state[name] for name in plain.state_dict()})
    return nats(plain), nats(net if widths else _at_the_end(net)), bits


def _at_the_end(net: nn.Module) -> nn.Module:
    """Rounds weights that were trained without noise to the floats that ours end with."""
    rounded = ON.wrap(net)
    for layer in wrapped(rounded).values():
        assert isinstance(layer.of_weight, SampledWeight)
        layer.of_weight.shares.data.zero_()
    return rounded
