"""N2N: a policy that edits a teacher finds better students than random edits.

Claim of the paper: removing layers and shrinking what is left by learned policies compresses a
network many times at nearly its accuracy; the policies learn to propose better students.

The teacher is a network of three stages, each with a residual block that can be removed (84,154
parameters), trained on 960 of scikit-learn's digits for ten epochs. Of its three widths
and its blocks' three inner widths a quarter, a half or all can stay: 1,728 students. Each is
trained from scratch for three epochs on the labels and on the teacher's logits (AdamW,
learning rate 1e-2 with cosine, batches of 60), and judged by 544 other images. `main()` makes
the table of them, `n2n.json` beside this file, in about 16 minutes on one core:
`python -m reproductions.search.n2n`.

Arms: N2N with the authors' settings, and students drawn uniformly; each evaluates the teacher
and 149 others, no student twice; five seeds. Students of both arms are trained in the same way.

Thresholds, as the catalogue of techniques has them: the best reward above that of random
edits (there in three of five seeds), the mean reward of the last 50 students above that of the
first 50. Since the reward is flat where nearly all is removed, it could be reached by size
alone: hence the best student must keep 95 % of the teacher's accuracy.

History: no pilot; four students were trained, for the time it takes (0.6 s each), and
the claims were tried on a made-up table, to see that they run.

Result: undecided. The policy learns (its last students are better than its first, random
edits' are not) and keeps 95 % of the teacher's accuracy, but the best of random edits is as
good: on 1,728 students of one small network as many evaluations find good ones by chance.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from supple.axes.depth import Depth
from supple.axes.width import Width
from supple.data.base import Splits, load
from supple.files import read_json, write_json
from supple.models.base import build
from supple.network import Elastic, elastic
from supple.search.base import SearchAlgorithm, Told
from supple.search.n2n import N2N, compression_rewards
from supple.search.random_search import RandomSearch
from supple.space import Config
from supple.testing.reproduce import Claim, across
from supple.training.loop import train
from supple.training.recalibrate import recalibrate
from supple.training.seeds import kept

__all__ = ["OFF", "ON", "SEEDS", "claims"]

SEEDS = (0, 1, 2, 3, 4)
TABLE = Path(__file__).with_suffix(".json")
EVALUATIONS, PART = 150, 50
EXAMPLES, BATCH, RATE = 960, 60, 1e-2
EPOCHS, TEACHER_EPOCHS = 3, 10
KEPT = 0.95

ON = N2N()
OFF = RandomSearch()


def claims(method: SearchAlgorithm, seeds: Sequence[int]) -> Iterator[Claim]:
    """Compares the best students with those of random edits, and late ones with early ones."""
    found = runs(method, tuple(seeds))
    drawn = runs(OFF, tuple(seeds))
    best = [each["best"] for each in found]
    random = [each["best"] for each in drawn]
    yield Claim(
        "the best student has a higher reward than the best of random edits",
        best,
        random,
        unit="reward",
        details={
            "seeds in which it has": sum(a > b for a, b in zip(best, random, strict=True)),
            "best of all": float(every().max()),
            "compression": [each["compression"] for each in found],
            "compression, random": [each["compression"] for each in drawn],
        },
    )
    yield Claim(
        "the last students are better than the first",
        [each["last"] for each in found],
        [each["first"] for each in found],
        unit="mean reward",
        details={"last, random": statistics.fmean(each["last"] for each in drawn)},
    )
    yield Claim(
        "the best student keeps 95 % of the teacher's accuracy",
        [each["kept"] for each in found],
        [KEPT] * len(found),
        unit="accuracy over the teacher's",
    )


@cache
def runs(method: SearchAlgorithm, seeds: tuple[int, ...]) -> list[dict[str, float]]:
    """Runs a search with each seed."""
    return across(searched, [(method, seed) for seed in seeds])


def searched(case: tuple[SearchAlgorithm, int]) -> dict[str, float]:
    """Runs a search on the table."""
    method, seed = case
    space = net().space
    places = {row.tobytes(): i for i, row in enumerate(np.ascontiguousarray(space.every()))}
    run = method.start(space, ["accuracy", "params"], seed)
    teacher_row = space.encode_many([space.largest()])
    order = [places[teacher_row[0].tobytes()]]
    run.tell(teacher_row, values()[order])
    while len(order) < EVALUATIONS:
        rows = run.ask_rows(1)
        order.append(places[rows[0].tobytes()])
        run.tell(rows, values()[order[-1:]])
    rewards = every()[order]
    accuracy, cost = values()[order[int(rewards.argmax())]]
    return {
        "first": float(rewards[:PART].mean()),
        "last": float(rewards[-PART:].mean()),
        "best": float(rewards.max()),
        "kept": float(accuracy / teacher_values()[0]),
        "compression": float(teacher_values()[1] / cost),
    }


@cache
def values() -> np.ndarray:
    """Gives what an evaluation tells of each student: minus accuracy, and parameters."""
    read: dict[str, Any] = read_json(TABLE)
    return np.stack([-np.array(read["accuracies"]), np.array(read["params"])], axis=1)


def teacher_values() -> np.ndarray:
    """Gives the same of the teacher, the student with the most parameters."""
    found: np.ndarray = values()[values()[:, 1].argmax()]
    return found


@cache
def every() -> np.ndarray:
    """Gives the reward of each student."""
    told = Told(net().space.every(), values(), np.zeros(len(values())))
    return compression_rewards(told, teacher_values(), float(teacher_values()[1]))


@cache
def net() -> Elastic:
    """Builds the network whose sizes are the students, untrained."""
    with kept(0):
        model = build("digits-cnn", widths=(16, 32, 48), blocks=(1, 1, 1))
    axes = [Width((0.25, 0.5, 1.0)), Depth(pattern="any")]
    return elastic(model, torch.zeros(2, 1, 8, 8), axes=axes, verify=False)


@cache
def data() -> Splits:
    """Loads the images."""
    found = load("digits", batch_size=BATCH)
    return Splits(
        train=found.train.first(EXAMPLES),
        validation=found.validation,
        test=found.test,
        classes=10,
    )


@cache
def teacher() -> nn.Module:
    """Trains the teacher."""
    with kept(0):
        model = build("digits-cnn", widths=(16, 32, 48), blocks=(1, 1, 1))
    _train(model, lambda output, batch: F.cross_entropy(output, batch[1]), TEACHER_EPOCHS)
    return model.eval()


def _train(model: nn.Module, loss: Any, epochs: int) -> None:
    steps = epochs * EXAMPLES // BATCH
    options = {"schedule": "cosine", "seed": 0, "log_every": steps, "progress": False}
    train(model, data().train, loss, steps=steps, lr=RATE, **options)


def taught(output: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Gives the loss of a student: to the labels, and to the teacher's logits."""
    model = teacher()  # trained at the first call
    with torch.no_grad():
        logits = model(batch[0])
    return F.cross_entropy(output, batch[1]) + F.mse_loss(output, logits)


def trained(config: Config) -> float:
    """Trains a student from scratch and gives its accuracy; the teacher has its own."""
    if config == net().space.largest():
        return accuracy(teacher())
    recalibrate(net(), config, data().train, batches=1)  # its statistics are reset below
    student = net().extract(config)
    with kept(0):
        for part in student.modules():
            if hasattr(part, "reset_parameters"):
                part.reset_parameters()
    _train(student, taught, EPOCHS)
    return accuracy(student.eval())


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    """Gives the share of the test images that a network classifies correctly."""
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in data().test.batches())
    return right / data().test.examples


def main() -> None:
    """Train all students and write the table."""
    rows = net().space.every()
    accuracies = across(trained, net().space.decode_many(rows))
    costs = net().costs(rows)["params"].tolist()
    write_json(TABLE, {"accuracies": accuracies, "params": costs})


if __name__ == "__main__":
    main()
