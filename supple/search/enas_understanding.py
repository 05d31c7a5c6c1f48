"""An audit of the controller of ENAS: does its state tell networks apart, does it learn?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from supple.errors import SettingError
from supple.search._controller import Baseline, SequenceController, entropy, learning
from supple.space import Config, Randomness, Space, numpy_generator
from supple.technique import Study, register
from supple.training.seeds import generator as named_generator

__all__ = ["Audit", "ENASUnderstanding", "states_against_decisions"]

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Audit:
    """What was found of one controller.

    Args:
        scores: Of the configs that it sampled while it learned, in order.
        random: Of as many configs drawn uniformly.
        correlation: Spearman's, between the distance of two hidden states and the number of
            decisions in which the sequences before differ.
        entropy: Of its decisions along a sequence, in nats, after training.
    """

    scores: tuple[float, ...]
    random: tuple[float, ...]
    correlation: float
    entropy: float

    @property
    def best(self) -> float:
        """The best score that it sampled."""
        return max(self.scores)

    @property
    def best_of_random(self) -> float:
        """The best score of as many configs drawn uniformly."""
        return max(self.random)


@register(title="Audit of an LSTM controller", paper="arXiv:1904.00438")
@dataclass(frozen=True, kw_only=True)
class ENASUnderstanding(Study):
    r"""Tells whether a search by an LSTM controller beats random draws, and what it remembers.

    The controller writes configs decision by decision and learns by REINFORCE (advantage over
    a running average, entropy bonus). Afterwards it samples configs, and for all pairs of
    sequences whose last decision agrees, the distance of the hidden states is held against the
    number of earlier decisions in which they differ: a state that has forgotten them shows no
    correlation. With `memory` above 0 the remedy is on: sequences that were sampled are
    remembered, and `alpha` times their mean negative log-likelihood is added to the loss, so
    that the controller, fed with a stored sequence, reproduces it.

    Args:
        memory: Sequences remembered; 0 for REINFORCE alone.
        alpha: Weight of reproducing what is remembered beside REINFORCE, at least 0.
        hidden: Width of the LSTM.
        lr: Learning rate of Adam.
        batch: Sequences sampled between updates.
        entropy: Weight of the mean entropy of the decisions.
        decay: Of the running average of scores.
        temperature: What the controller's logits are divided by.

    Example:
        >>> from supple.space import Site, Space
        >>> space = Space([Site(f"s{i}", "width", (1, 2, 4), 4) for i in range(5)])
        >>> audit = ENASUnderstanding(hidden=8).run(
        ...     space, lambda config: -config["s0"], evaluations=20
        ... )
        >>> audit.best, audit.best_of_random, len(audit.scores)
        (-1.0, -1.0, 20)

    Source:
        Adam and Lorraine 2019, "Understanding Neural Architecture Search Techniques",
        arXiv:1904.00438; the controller as in Pham et al. 2018, "Efficient Neural Architecture
        Search via Parameter Sharing", arXiv:1802.03268.
    Differs:
        Decisions are sites of a `Space`, not a graph of operations, so the distance of two
        networks is the number of differing decisions. Only pairs with the same last decision
        count: a state always knows that one. Size of the memory and weight are ours; the paper
        could not be checked on them.
    Checked:
        The correlation on states made by hand; learning on a score of one site.
    """

    distinguishing: ClassVar[str] = "run"

    memory: int = 0
    alpha: float = 1.0
    hidden: int = 100
    lr: float = 1e-3
    batch: int = 5
    entropy: float = 1e-4
    decay: float = 0.95
    temperature: float = 5.0

    def __post_init__(self) -> None:
        for name, least in (("memory", 0), ("alpha", 0), ("hidden", 1), ("batch", 1)):
            if getattr(self, name) < least:
                raise SettingError(
                    f"{name} must be at least {least}, got {getattr(self, name)}"
                )
        if not 0 <= self.decay < 1:
            raise SettingError(f"decay must be in [0, 1), got {self.decay}")
        if not (self.lr > 0 and self.temperature > 0):
            raise SettingError(
                f"lr and temperature must be above 0, got {self.lr} and {self.temperature}"
            )

    @classmethod
    def examples(cls) -> list[ENASUnderstanding]:
        return [cls(), cls(memory=100)]

    def run(
        self,
        space: Space,
        score: Callable[[Config], float],
        *,
        evaluations: int = 50,
        samples: int = 64,
        generator: Randomness = 0,
    ) -> Audit:
        """Trains a controller, and looks at what it learned.

        Args:
            space: Whose sites are decided, at least 3.
            score: Of a config; more is better.
            evaluations: Configs that the controller samples and learns from.
            samples: Sequences whose states are compared afterwards.
            generator: Source of all randomness.

        Returns:
            Scores along the way, those of random draws, and what the states tell.

        Raises:
            SettingError: The space has fewer than 3 sites, or a number is too small.
        """
        if len(space.sites) < 3 or evaluations < 1 or samples < 3:
            raise SettingError(
                "an audit needs 3 sites, 1 evaluation and 3 samples at least, got "
                f"{len(space.sites)}, {evaluations} and {samples}"
            )
        random = numpy_generator(generator)
        seed = int(random.integers(2**62))
        draws = named_generator(seed, "controller")
        controller = SequenceController(
            space.counts.tolist(), hidden=self.hidden, temperature=self.temperature, seed=seed
        )
        scores = self._learn(controller, space, score, evaluations, draws)
        with torch.no_grad():
            rows = controller.sample(samples, draws)
            decisions = controller(rows)
        uniform = space.decode_many(space.random_many(evaluations, random))
        return Audit(
            tuple(scores),
            tuple(float(score(config)) for config in uniform),
            states_against_decisions(decisions.states.numpy(), rows.numpy()),
            float(entropy(decisions).mean()),
        )

    def _learn(
        self,
        controller: SequenceController,
        space: Space,
        score: Callable[[Config], float],
        evaluations: int,
        draws: torch.Generator,
    ) -> list[float]:
        run = learning(controller, lr=self.lr, bonus=self.entropy)
        baseline = Baseline(self.decay)
        remembered = torch.zeros((0, len(space.sites)), dtype=torch.long)
        scores: list[float] = []
        while len(scores) < evaluations:
            rows = controller.sample(min(self.batch, evaluations - len(scores)), draws)
            configs = space.decode_many(space.canonical_many(rows.numpy()))
            rewards = torch.tensor([float(score(config)) for config in configs])
            scores += rewards.tolist()
            weights = baseline.advantages(rewards) / len(rows)
            run.step(self._with_memory(rows, weights, remembered))
            remembered = torch.cat([remembered, rows])[
                max(0, len(remembered) + len(rows) - self.memory) :
            ]
        return scores

    def _with_memory(
        self, rows: Tensor, weights: Tensor, remembered: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Joins what was just sampled, by advantage, and what is remembered, by `alpha`."""
        if not len(remembered):
            return rows, weights
        replayed = torch.full((len(remembered),), self.alpha / len(remembered))
        return torch.cat([rows, remembered]), torch.cat([weights, replayed])


def states_against_decisions(states: FloatArray, rows: NDArray[np.int64]) -> float:
    """Correlates distances of hidden states with differences of earlier decisions.

    Args:
        states: Shape (sequences, sites, hidden); state `t` has seen the decisions before `t`.
        rows: The decisions, shape (sequences, sites).

    Returns:
        Spearman's correlation, the mean over the later half of the sites of what can be told
        there: pairs with the same last decision, and not all equally far apart. NaN for none.
    """
    sites = rows.shape[1]
    first, second = np.triu_indices(len(rows), 1)
    found = []
    for t in range(max(2, sites // 2), sites):
        same = rows[first, t - 1] == rows[second, t - 1]
        a, b = first[same], second[same]
        differing = (rows[a, : t - 1] != rows[b, : t - 1]).sum(axis=1)
        apart = np.linalg.norm(states[a, t] - states[b, t], axis=1)
        if len(np.unique(differing)) > 1 and len(np.unique(apart)) > 1:
            found.append(float(np.corrcoef(_ranks(apart), _ranks(differing))[0, 1]))
    return float(np.mean(found)) if found else float("nan")


def _ranks(values: NDArray[Any]) -> FloatArray:
    """Gives ranks, the mean of them where values are equal."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    middle: FloatArray = np.cumsum(counts) - (counts - 1) / 2
    return middle[place]
