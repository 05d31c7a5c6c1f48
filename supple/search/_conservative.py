"""A controller that keeps the best config and decides one class of its sites anew.

Each class of sites has a recurrent encoder of its own, which reads the best config without
that class and decides the class's sites one after the other. A config that was told teaches
the encoder of the one class in which it differs from the best config of its time, so whatever
the controller knows follows from its seed and from what was told.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from supple.errors import SettingError
from supple.search._controller import Baseline, Decisions, SequenceController
from supple.search._ranking import front, ranked
from supple.search.base import Told
from supple.space import Space
from supple.training.losses import Labels
from supple.training.seeds import derive, kept
from supple.training.seeds import generator as named_generator
from supple.training.step import SizesRun, WholeOnly

__all__ = ["ConservativeController", "Encoder", "classes_of", "rewards"]

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]

_CHILDREN = 64
_LEARNED_ROUNDS = 4
"""Rounds of children in which all may be known before classes are decided uniformly."""
_SPREAD = 0.1


class Learning(Protocol):
    """How the controller learns: the settings of `AutoGNN`."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Patterns of the sites that are decided together."""

    @property
    def first(self) -> int:
        """Random configs before the best is improved."""

    @property
    def batch(self) -> int:
        """Configs told between updates."""

    @property
    def hidden(self) -> int:
        """Width of the encoders."""

    @property
    def lr(self) -> float:
        """Learning rate of the encoders."""

    @property
    def decay(self) -> float:
        """Of the running average of rewards."""


class Example(NamedTuple):
    """What an encoder learns from; one row per sequence."""

    decisions: Tensor
    """Choice indices of the class's sites, shape (sequences, sites of the class)."""
    here: Tensor
    """Which of these sites exist, of the same shape."""
    masked: Tensor
    """The best config without the class, shape (sequences, features)."""
    advantages: Tensor
    """Shape (sequences,)."""


class Encoder(nn.Module):
    """Decides the sites of one class, having read the rest of a config.

    Args:
        counts: How many choices each site of the class has.
        features: Length of an encoded config.
        hidden: Width of the LSTM.
        seed: Of the weights.
    """

    def __init__(self, counts: Sequence[int], features: int, hidden: int, seed: int) -> None:
        super().__init__()
        self.controller = SequenceController(
            counts, hidden=hidden, temperature=1.0, limit=None, seed=seed
        )
        with kept(derive(seed, "rest")):
            self.rest = nn.Linear(features, hidden)
            for parameter in self.rest.parameters():
                nn.init.uniform_(parameter, -_SPREAD, _SPREAD)

    def forward(self, decisions: Tensor, masked: Tensor) -> Decisions:
        """Says what would have been decided along given decisions."""
        found: Decisions = self.controller(decisions, self.read(masked))
        return found

    def read(self, masked: Tensor) -> Tensor:
        """Gives the hidden state in which the decisions begin, shape (sequences, hidden)."""
        state: Tensor = self.rest(masked).tanh()
        return state


class ConservativeController:
    """Proposes configs that differ from the best one in one class of sites, and learns which.

    Args:
        settings: How it learns.
        space: What is searched.
        seed: Of the encoders.
    """

    def __init__(self, settings: Learning, space: Space, seed: int) -> None:
        self.space = space
        self.settings = settings
        self.classes = classes_of(space, settings.classes)
        self.best: IntArray | None = None
        self.learned = 0
        self._baseline = Baseline(settings.decay)
        features = int(space.counts.sum())
        owner = np.repeat(np.arange(len(space)), space.counts)
        self._rest = [~np.isin(owner, columns) for columns in self.classes.values()]
        self._encoders = [
            Encoder(space.counts[c].tolist(), features, settings.hidden, derive(seed, name))
            for name, c in self.classes.items()
        ]
        self._runs = [_learning(encoder, settings.lr) for encoder in self._encoders]

    def learn(self, told: Told) -> None:
        """Learns from what was told and is not known yet, `batch` configs at a time.

        Args:
            told: All that was told, what is known first.
        """
        size = self.settings.batch
        for start in range(self.learned, len(told), size):
            known = told.take(slice(0, start + size))
            new = len(known) - start
            reward = torch.as_tensor(rewards(known)[-new:], dtype=torch.float32)
            advantages = self._baseline.advantages(reward)
            if self.best is not None:
                self._teach(known.rows[-new:], advantages)
            self.learned = len(known)
            self.best = known.rows[front(known)[-1]]

    def propose(self, random: np.random.Generator, rounds: int) -> IntArray:
        """Proposes children of the best config.

        Args:
            random: Source of all randomness.
            rounds: How often this was called since the controller learned.

        Returns:
            Encoded canonical configs, shape (children, sites).
        """
        if self.best is None or self.learned < self.settings.first or not self.classes:
            return self.space.random_many(_CHILDREN, random)
        which = int(random.choice(len(self.classes), p=self.guide()))
        columns = list(self.classes.values())[which]
        children = np.repeat(self.best[None], _CHILDREN, axis=0)
        if rounds < _LEARNED_ROUNDS:
            children[:, columns] = self._decided(which, random)
        else:
            counts = self.space.counts[columns]
            children[:, columns] = random.integers(counts, size=(_CHILDREN, len(columns)))
        return self.space.canonical_many(children)

    @torch.no_grad()
    def guide(self) -> FloatArray:
        """Gives the probability of each class to be decided anew, shape (classes,).

        It is the class's share of the entropy of all decisions along the best config, of those
        sites that exist in it; all the same where nothing is open.
        """
        assert self.best is not None, "something was told"
        here = self.space.present(self.best[None])[0]
        entropies = np.zeros(len(self.classes))
        for which, columns in enumerate(self.classes.values()):
            own = torch.as_tensor(self.best[columns][None])
            log_probs = self._encoders[which](own, self._masked(which)).log_probs[0]
            open_ = -(log_probs.exp() * log_probs).sum(1).double().numpy()
            entropies[which] = (open_ * here[columns]).sum()
        total = entropies.sum()
        return entropies / total if total > 0 else np.full(len(entropies), 1 / len(entropies))

    # ------------------------------------------------------------------------- internals

    def _decided(self, which: int, random: np.random.Generator) -> IntArray:
        """Draws decisions of a class, shape (children, sites of the class)."""
        encoder = self._encoders[which]
        with torch.no_grad():
            state = encoder.read(self._masked(which)).repeat(_CHILDREN, 1)
        draws = named_generator(int(random.integers(2**62)), "children")
        decided: IntArray = encoder.controller.sample(_CHILDREN, draws, state).numpy()
        return decided

    def _masked(self, which: int) -> Tensor:
        """The best config without a class, shape (1, features)."""
        assert self.best is not None, "something was told"
        features = self.space.one_hot(self.best[None]) * self._rest[which]
        return torch.as_tensor(features, dtype=torch.float32)

    def _teach(self, rows: IntArray, advantages: Tensor) -> None:
        """Lets the encoder of the one class in which a config differs learn from it."""
        assert self.best is not None
        here = self.space.present(rows)
        differs = here & self.space.present(self.best[None]) & (rows != self.best)
        columns = list(self.classes.values())
        changed = np.stack([differs[:, mine].any(1) for mine in columns], 1)
        alone = changed.sum(1) == 1
        for which in range(len(columns)):
            children = np.flatnonzero(changed[:, which] & alone)
            if len(children):
                part = np.ix_(children, columns[which])
                self._runs[which].step(
                    Example(
                        torch.as_tensor(rows[part]),
                        torch.as_tensor(here[part]),
                        self._masked(which).repeat(len(children), 1),
                        advantages[children] / len(rows),
                    )
                )


def classes_of(space: Space, patterns: Sequence[str]) -> dict[str, IntArray]:
    """Groups the sites that have several choices.

    Args:
        space: Whose sites.
        patterns: Shell-style patterns of site names, each a class; a site belongs to the first
            that matches, and to the class of its axis where none does.

    Returns:
        Name of the class -> columns, ascending.

    Raises:
        SettingError: A pattern matches no site.

    Example:
        >>> from supple.space import Site
        >>> space = Space([Site(n, "width", (1, 2), 2) for n in ("1.dim", "1.head", "2.head")])
        >>> {name: found.tolist() for name, found in classes_of(space, ["*.head"]).items()}
        {'width': [0], '*.head': [1, 2]}
    """
    for pattern in patterns:
        if not fnmatch.filter(space.names, pattern):
            raise SettingError(
                f"classes must be patterns of sites, but {pattern!r} matches none of "
                f"{', '.join(space.names)}"
            )
    found: dict[str, list[int]] = {}
    for column, site in enumerate(space.sites):
        if len(site.choices) > 1:
            matching = [p for p in patterns if fnmatch.fnmatchcase(site.name, p)]
            found.setdefault(matching[0] if matching else site.axis, []).append(column)
    return {name: np.array(columns) for name, columns in found.items()}


def rewards(told: Told) -> FloatArray:
    """Gives what configs are worth, more being better, shape (configs,).

    That is minus the value, or with several objectives minus the rank among the configs given.
    What breaks a constraint or failed is worth as little as the worst of the others.
    """
    good = told.violations == 0
    single = told.values.shape[1] == 1
    values = -told.values[:, 0] if single else -ranked(told)[0].astype(np.float64)
    return np.where(good, values, values[good].min() if good.any() else 0.0)


def _learning(encoder: Encoder, lr: float) -> SizesRun:
    """REINFORCE; a step takes an `Example`."""

    def loss(output: Decisions, batch: Example) -> Tensor:
        picked = output.log_probs.gather(2, batch.decisions[..., None])[..., 0]
        return -(batch.advantages * (picked * batch.here).sum(1)).sum()

    return SizesRun(
        encoder,
        torch.optim.Adam(encoder.parameters(), lr=lr),
        WholeOnly(),
        Labels(loss),
        forward=lambda model, batch: model(batch.decisions, batch.masked),
    )
