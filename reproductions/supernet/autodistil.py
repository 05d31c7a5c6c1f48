"""AutoDistil: narrow sizes learn better if they share no weights with wide ones.

Claims of the paper: splitting the space into compact sub-spaces, each with weights of its own,
keeps sizes of different kinds from disturbing one another; and the distillation loss on
held-out text ranks the students of a sub-space without any task.

Arms: the teacher is MiniLM (6 layers of 12 heads and 1,536 hidden units, 384 wide), whose
pretrained weights all students begin with. The wide sub-space has 4 or 5 layers, the narrow
one 2 or 3; the shares of heads and hidden units differ, too (`WIDE`, `NARROW`); width stays at
384, the embeddings stay as they are, and dropout is off, to save time. The first arm trains the
two sub-spaces in turn, each with its own weights. OFF trains one joint space of all these
choices. The third arm trains the very students of the first arm, in the same order, with one
set of weights: what it lacks is the separation alone. All arms make `STEPS` steps of three
students each (largest, smallest and a random one) on the same batches, so that the sub-spaces'
own weights get half of the updates. Each arm has the best of three learning rates by the mean
validation loss of the narrow students on a seed of its own: `tune()` found the `CHOSEN` ones
beforehand. All arms are judged by the same 8 narrow students.

Thresholds: any gain in the mean held-out loss beyond the spread over seeds, as the catalogue of
techniques has it; and Spearman's correlation above 0.6 between (negative) held-out losses of
these students and the accuracies of linear probes, which tell from the mean last hidden state
(in bfloat16, to save time) which of 20 articles a passage is from. It is asked for within the
sub-space, where a search ranks.

History: the beginnings of film reviews were to be the probes' task, but MiniLM itself tells
good from bad ones at 51 to 57 % only, so that there was nothing to rank by. The articles
replaced them before any student was trained. In one trial at 3e-4, to learn how long it takes,
the narrow sub-space had 4 layers as well; the joint space was ahead in it (0.461 against 0.518
apart and 0.533 for the same students). `tune()` gave all arms the largest of its rates, where
the validation losses were 0.340 (apart), 0.354 (joint space) and 0.348 (same students), against
0.501, 0.470 and 0.537 with 3e-4; larger rates were not tried. To save time, losses are taken of
50 passages since then, every fourth of those held out, in place of 100.

Result: not reproduced; the separation holds and the ranking does not. The narrow students'
mean loss is 0.347 nats with weights of their own, 0.361 in the joint space and 0.355 where the
same students share weights with the wide ones; both gains have the same sign with each seed,
though the narrow weights get half of the updates. So the separation itself gains, and not just
that there are fewer students: against the third arm all eight gain (0.005 to 0.016, mean over
the seeds). Against the joint space those of 3 layers gain (0.02 to 0.07) and those of 2 lose
(0.005 to 0.03), as it trains its smallest size, of 2 layers, in every step, and sizes of 3
only now and then: there the gain is one of what is drawn, too.

Held-out losses rank the students like the probes with a correlation of 0.08 (0.27, 0.04 and
-0.07), and of 0.37 in the joint space. The experiment can hardly tell: mean accuracies of the
eight students lie between 48 and 52 %, where 200 passages have a standard error of 3.5 points.
Larger sets to read would take longer than the rest of the run. Losses differ more (0.28 to
0.38).
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from reproductions._minilm import encoder
from reproductions.supernet._articles import DATA, held_out, probe, training
from supple.axes.depth import Depth
from supple.axes.heads import Heads
from supple.axes.width import Width
from supple.network import Elastic, elastic
from supple.supernet.autodistil import AutoDistil, RelationDistillation, parts_of, students
from supple.testing.reproduce import Claim, across
from supple.training.loop import train
from supple.training.relations import WithAttended, attended
from supple.training.step import Network

__all__ = ["DATA", "OFF", "ON", "claims"]

STEPS, BATCH, READ = 40, 4, 50
RATES = (1e-4, 3e-4, 1e-3)
TUNING_SEED = 1000
WIDE = {"*.depth": (4, 5), "*.intermediate.*": (1152, 1536), "*.heads": (9, 12)}
NARROW = {"*.depth": (2, 3), "*.intermediate.*": (384, 768), "*.heads": (6, 9)}
JOINT = {"*.depth": (2, 3, 4, 5)}


@dataclass(frozen=True, kw_only=True)
class Together(AutoDistil):
    """Trains the same students in the same order, all of them with the same weights."""

    def adapt(self, net: Network) -> None:
        """Gives the sub-spaces no weights of their own."""


ON = AutoDistil(subspaces=(WIDE, NARROW), random=1)
OFF = AutoDistil(subspaces=(JOINT,), random=1)
TOGETHER = Together(subspaces=(WIDE, NARROW), random=1)
NAMES = {"apart": ON, "joint space": OFF, "same students": TOGETHER}
CHOSEN = {"apart": 1e-3, "joint space": 1e-3, "same students": 1e-3}
Scores = tuple[list[float], list[float]]


def claims(method: AutoDistil, seeds: Sequence[int]) -> Iterator[Claim]:
    """Compares the narrow students' losses, and looks how losses rank students."""
    found = arms(tuple(seeds))
    (ours,) = (found[name] for name, arm in NAMES.items() if arm is method)
    losses = {name: [statistics.fmean(each[0]) for each in row] for name, row in found.items()}
    mine = [statistics.fmean(each[0]) for each in ours]
    yield Claim(
        "narrow students are nearer to the teacher than in one joint space",
        mine,
        losses["joint space"],
        better="lower",
        unit="nats",
        details={"losses": {n: [each[0] for each in row] for n, row in found.items()}},
    )
    yield Claim(
        "they are nearer than the same students trained with one set of weights",
        mine,
        losses["same students"],
        better="lower",
        unit="nats",
    )
    yield Claim(
        "the held-out loss ranks narrow students like linear probes",
        [-float(spearmanr(*each).statistic) for each in ours],
        [0.0] * len(seeds),
        threshold=0.6,
        unit="Spearman's correlation",
        details={"accuracies": [each[1] for each in ours]},
    )


@cache
def arms(seeds: tuple[int, ...]) -> dict[str, list[Scores]]:
    """Gives the narrow students' test losses and probe accuracies, by arm and seed."""
    cases = [(name, CHOSEN[name], seed) for name in NAMES for seed in seeds]
    rows = across(_tested, cases)
    count = len(seeds)
    return {name: rows[i * count : (i + 1) * count] for i, name in enumerate(NAMES)}


def tune() -> dict[str, float]:
    """Finds the learning rates of all arms, `CHOSEN`."""
    cases = [(name, rate, TUNING_SEED) for name in NAMES for rate in RATES]
    means = across(_validated, cases)
    best = {}
    for i, name in enumerate(NAMES):
        row = means[i * len(RATES) : (i + 1) * len(RATES)]
        best[name] = RATES[row.index(min(row))]
    return best


def _validated(case: tuple[str, float, int]) -> float:
    return statistics.fmean(_losses(trained(case), "validation"))


def _tested(case: tuple[str, float, int]) -> Scores:
    net = trained(case)
    # the third arm's probes are not asked for
    read = NAMES[case[0]] is not TOGETHER
    return _losses(net, "test"), _accuracies(net) if read else []


def trained(case: tuple[str, float, int]) -> Elastic:
    """Distils the teacher into the students of an arm, by its name, rate and seed."""
    name, rate, seed = case
    model = encoder()
    model.embeddings.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    data = training(BATCH, seed)
    axes = [
        Width((0.25, 0.5, 0.75, 1.0), where="*.intermediate.*"),
        Heads((0.5, 0.75, 1.0)),
        Depth((2, 3, 4, 5, 6)),
    ]
    net = elastic(model, kwargs=data.example(), axes=axes, verify=False)
    train(
        net,
        data,
        loss,
        method=NAMES[name],
        optimizer="adamw",
        lr=rate,
        schedule="cosine",
        clip=1.0,
        steps=STEPS,
        seed=seed,
        log_every=STEPS,
        progress=False,
    )
    return net.eval()


def loss(output: object, batch: object) -> Tensor:
    """There are no labels; the weight of this loss is 0."""
    raise NotImplementedError


@torch.no_grad()
def _losses(net: Elastic, part: str) -> list[float]:
    """Held-out losses of the narrow students."""
    run = WithAttended(attended(net.module))
    score = RelationDistillation(loss).relations
    teacher = encoder()
    batches = [{"input_ids": ids} for ids in held_out(part)[0][::4].split(READ)]
    taught = [run(teacher, batch) for batch in batches]
    found = []
    for config in _narrow(net):
        with net.at(config):
            each = [
                float(score(run(net.module, batch), target, batch))
                for batch, target in zip(batches, taught, strict=True)
            ]
        found.append(statistics.fmean(each))
    return found


def _accuracies(net: Elastic) -> list[float]:
    """Probe accuracies of the narrow students."""
    found = []
    for config in _narrow(net):
        with net.at(config):
            found.append(probe(net.module))
    return found


def _narrow(net: Elastic) -> list:
    return students(net.space, parts_of(net.space, [NARROW])[0])
