"""DepS: small sizes should join when the full network is half trained, and gently.

Claims of the paper: shrinking that starts from a partially trained full network (about half of
the run) gives better sub-networks for the same cost than shrinking from the start or near the
end, and growing step sizes of the small ones spare the full network a shock.

Arms: a residual network for 8 x 8 images with widths of 1/4 to 1 and blocks that can be
skipped (33,600 sizes, a factor of 93 in MACs), 8,000 grey CIFAR-10 images of 8 x 8 in place of
Fashion-MNIST's, batches of 64, Nesterov SGD with a cosine. The switch lies at 0, 50 or 90 % of
the steps; with a delay, the others' step size grows over the last 5 % of the steps before it
(an epoch of twenty), and a fourth arm switches at 50 % at once. A step has one pass before the
ramp and four from then on. All arms make 2,400 forward-backward passes, and so have 600 to
1,655 steps (passes of the full network cost most, so that of equal passes those of a late
switch take more time). Each arm has the best of four learning rates by validation accuracy on
a seed of its own: `tune()` found the `CHOSEN` ones beforehand. Switched off, the idea is the
sandwich from the start.

Ten sub-networks are compared, the smallest, the full one and eight that were drawn once at
random; the statistics of each are recalibrated on the same 10 batches. At the switch, the loss
of the full network on its training batches is averaged over the twentieth of the run that
follows; the batches come in the same order in all arms of a seed.

Thresholds, set before the first full run: 0 for all three: the catalogue asks for the best of
three starts, and for a worse switch without a ramp.

Before the final run, single seeds with 4,000 images and a wider network, then with these, were
used to choose a size that fits the time; the grid of rates got 1.0 as a fourth, since three
arms had chosen the largest of three.

Result: the start at half is better by 3.6 points than one at the beginning (every seed) and by
12 points than one at 90 %. The latter chose the largest rate, which went badly in one of three
seeds (17.6 % against 24 to 26 %): its sub-networks learn in a tenth of the run. Whether the
ramp spares the full network a shock is undecided: its loss after the switch is lower for two
seeds and higher for one. The ten sub-networks are better with a ramp in every seed, by 0.3 to
1.1 points. A likely reason is the length: a twentieth of the run is 45 steps here (the paper's
ramp alone has thousands), so that its mean loss is noisy (it differs by 0.08 between seeds).

The run took 306 s while other work kept both cores busy (a load of 4 to 5); its twelve
trainings took some 15 s each on one core before, which makes about 100 s on an idle machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache, partial

import torch

from reproductions.supernet._mnist8 import accuracy, loss
from supple.axes.depth import Depth
from supple.axes.width import Width
from supple.data.base import Splits, load
from supple.models.base import build
from supple.network import elastic
from supple.supernet.deps import DepS
from supple.testing.reproduce import Claim, across
from supple.training.loop import train
from supple.training.recalibrate import recalibrate
from supple.training.seeds import kept

__all__ = ["DATA", "OFF", "ON", "claims"]

DATA = ("cifar10/train.parquet", "cifar10/test.parquet")
PASSES, RAMP = 2400, 0.05
RATES = (0.03, 0.1, 0.3, 1.0)
CHOSEN = {"start": 0.1, "half": 0.3, "late": 1.0, "at once": 0.3}
TUNING_SEED = 1000

ON = DepS(delay=0.5, ramp=RAMP)
OFF = DepS(delay=0.0, ramp=0.0)
LATE = DepS(delay=0.9, ramp=RAMP)
AT_ONCE = DepS(delay=0.5, ramp=0.0)
NAMES = {OFF: "start", ON: "half", LATE: "late", AT_ONCE: "at once"}

Result = tuple[list[float], float]
"""Accuracies of the ten sub-networks, and the full network's loss after the switch."""


def claims(method: DepS, seeds: Sequence[int]) -> Iterator[Claim]:
    """Compares a switch at half of the run with others, and with one without a ramp."""
    found = arms(tuple(seeds))
    means = {arm: [sum(row) / len(row) for row, _ in found[arm]] for arm in NAMES}
    details = {name: [row for row, _ in found[arm]] for arm, name in NAMES.items()}
    for arm, when in ((OFF, "at the start"), (LATE, "at 90 % of the run")):
        yield Claim(
            f"the mean of ten sub-networks is better than with a switch {when}",
            means[method],
            means[arm],
            threshold=0.0,
            unit="accuracy",
            details=details if arm is OFF else {},
        )
    yield Claim(
        "after the switch, the full network's loss is lower than without a ramp",
        [after for _, after in found[method]],
        [after for _, after in found[AT_ONCE]],
        threshold=0.0,
        better="lower",
        unit="cross-entropy",
        details={"at half, sub-networks with a ramp and without": [means[ON], means[AT_ONCE]]},
    )


@cache
def arms(seeds: tuple[int, ...]) -> dict[DepS, list[Result]]:
    """Gives the results of each arm by seed."""
    cases = [(method, CHOSEN[name], seed) for method, name in NAMES.items() for seed in seeds]
    found = across(partial(run, "test"), cases)  # one pool: processes are slow to start
    count = len(seeds)
    return {arm: found[i * count : (i + 1) * count] for i, arm in enumerate(NAMES)}


@cache
def images() -> Splits:
    """Loads grey images of 8 x 8: 8,000 to train, 2,000 to choose by, 3,000 to report on."""
    found = load(
        "images",
        path="cifar10",
        size=8,
        channels=1,
        mean=(0.47,) * 3,
        std=(0.22,) * 3,
        augment=False,
        batch_size=64,
    )
    return Splits(
        train=found.train.first(8000),
        validation=found.validation.first(2000),
        test=found.test.first(3000),
        classes=10,
    )


def steps_of(method: DepS) -> int:
    """Gives the steps in which a method makes `PASSES` passes."""
    alone = method.delay - method.ramp
    return round(PASSES / (alone + (2 + method.random) * (1 - alone)))


def run(part: str, case: tuple[DepS, float, int]) -> Result:
    """Trains all sizes together, and scores ten of them on a part of the data."""
    method, rate, seed = case
    data, steps = images(), steps_of(method)
    with kept(seed):
        model = build("digits-cnn", widths=(8, 16, 24))
    example = data.train.example()[0]
    net = elastic(model, example, axes=[Width((0.25, 0.5, 0.75, 1.0)), Depth()], verify=False)
    history = train(
        net,
        data.train,
        loss,
        method=method,
        steps=steps,
        optimizer="sgd",
        lr=rate,
        weight_decay=3e-5,
        seed=seed,
        progress=False,
    )
    switch = round(method.delay * steps)
    at, losses = history.losses("largest")
    after = [x for step, x in zip(at, losses, strict=True) if 0 <= step - switch < steps / 20]
    drawn = torch.Generator().manual_seed(0)
    sizes = [net.space.largest(), net.space.smallest()]
    sizes += [net.space.random(drawn) for _ in range(8)]
    found = []
    for size in sizes:
        recalibrate(net, size, data.train, batches=10)
        net.eval()
        with net.at(size):
            found.append(accuracy(net.module, getattr(data, part)))
    return found, sum(after) / len(after)


def tune() -> dict[str, float]:
    """Finds the learning rates of all arms, `CHOSEN`; takes some four minutes."""
    best = {}
    for method, name in NAMES.items():
        cases = [(method, rate, TUNING_SEED) for rate in RATES]
        scores = [sum(row) for row, _ in across(partial(run, "validation"), cases)]
        print(name, [round(score / 10, 4) for score in scores])
        best[name] = RATES[scores.index(max(scores))]
    return best
