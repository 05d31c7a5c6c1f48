"""N2N: one policy removes blocks of a network, then another shrinks what is left."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from supple.errors import SettingError
from supple.search._policy import LearnedSearch, Learner, drawn_again
from supple.search.base import AskTell, Exact, Problem, Told
from supple.space import Randomness, Space
from supple.technique import register
from supple.training.losses import Labels
from supple.training.seeds import derive, kept
from supple.training.seeds import generator as named_generator
from supple.training.step import SizesRun, WholeOnly

__all__ = ["FACTORS", "N2N", "Removal", "Shrinkage", "compression_rewards"]

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]

FACTORS = tuple(i / 10 for i in range(1, 11))
"""By which a layer may be shrunk."""
_LAYERS = 2
_FEATURES = 5
_DRAWS = 32
_TOLERANT = 15
"""Updates after which what is over budget gets no more than -1."""
_NEVER = -1e9


@register(title="Network-to-network compression (N2N)", paper="arXiv:1709.06030")
@dataclass(frozen=True, kw_only=True)
class N2N(LearnedSearch):
    r"""Makes your network smaller in two stages: blocks are removed, then what is left shrinks.

    The full network is the teacher and is evaluated first. In the first stage a bidirectional
    LSTM reads what each removable block is like and keeps or removes it; all else stays full.
    From the best student of that stage, another LSTM then goes from site to site (widths,
    kernels, ...), its last decision fed back in, and picks one of ten factors, 0.1 to 1.0; the
    choice nearest to that part of the full one is taken. A student's reward is

    $$R = C (2 - C) \cdot A, \qquad C = 1 - \frac{\text{cost}}{\text{teacher's cost}},$$

    where $A$ is its accuracy over the teacher's. A student that failed, or is not smaller than
    the network it is made of, gets -1; one that is over budget $(e - 1) + e R$, where $e$ falls
    from 1 to 0 over 15 updates. After every `population` students the policy learns by
    REINFORCE: the gradient of all their decisions' log-likelihood times the mean of their
    rewards less the average of earlier means.

    It needs two objectives: first what is to be kept, as an accuracy that is maximised or as
    a loss, then what is to be compressed, such as `params`.

    Args:
        population: Students told between updates, at least 1.
        removals: Students told before blocks stop being removed, at least 1; earlier where
            all removals were tried.
        hidden: Width of both LSTMs, which have two layers.
        removal_lr: Learning rate of the policy that removes.
        lr: Learning rate of the policy that shrinks.

    Example:
        >>> from supple.space import Site, Space
        >>> space = Space(
        ...     [Site(f"{i}.depth", "depth", (0, 1), 1) for i in range(4)]
        ...     + [Site(f"{i}.width", "width", (2, 4, 8), 8) for i in range(4)]
        ... )
        >>> run = N2N(removals=10).start(space, ["accuracy", "params"], 0)
        >>> run.ask(1) == [space.largest()]  # the teacher
        True

    Source:
        Ashok, Rhinehart, Beainy and Kitani 2018, "N2N Learning: Network to Network Compression
        via Policy Gradient Reinforcement Learning", ICLR, arXiv:1709.06030, and the authors'
        code, anubhavashok/N2N.
    Differs:
        Layers are the sites of the axis depth, and all others can be shrunk, so it works for
        any network and never makes one that does not fit together. How students are trained
        (the authors: anew, by distillation) is up to the evaluation. Where a site is a number
        of blocks, the first ones stay. The authors shrink with 3 students an update, ours are
        `population` in both stages. Their running average is divided by one too many. No
        student is evaluated twice: known ones that are drawn again count in an update with
        their rewards. Of a loss, $A$ is $1 + (l_t - l) / l_t$, at least 0.
    Checked:
        Rewards by hand; both policies' probabilities against all their decisions; stages.
    """

    distinguishing: ClassVar[str] = "learner"
    skips: ClassVar[Mapping[str, str]] = {
        "check_search_finds_the_optimum": "it needs two objectives, a quality and a cost",
    }

    population: int = 5
    removals: int = 250
    hidden: int = 30
    removal_lr: float = 3e-3
    lr: float = 1e-2

    def __post_init__(self) -> None:
        for name in ("population", "removals", "hidden"):
            if getattr(self, name) < 1:
                raise SettingError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("removal_lr", "lr"):
            if not getattr(self, name) > 0:
                raise SettingError(f"{name} must be above 0, got {getattr(self, name)}")

    @classmethod
    def examples(cls) -> list[N2N]:
        return [cls(), cls(population=2, removals=2, hidden=8)]

    @property
    def generation(self) -> int:
        return self.population

    def start(
        self,
        space: Space,
        objectives: Sequence[str],
        generator: Randomness,
        *,
        exact: Mapping[str, Exact] | None = None,
        violation: Exact | None = None,
    ) -> AskTell:
        """Begins a search; see `SearchAlgorithm.start`.

        Raises:
            SettingError: There are not two objectives.
        """
        if len(tuple(objectives)) != 2:
            raise SettingError(
                "N2N needs two objectives, what is to be kept and then what is to be "
                f"compressed, such as ('accuracy', 'params'), got {tuple(objectives)}"
            )
        return super().start(space, objectives, generator, exact=exact, violation=violation)

    def learner(self, problem: Problem, seed: int) -> Learner:
        return (
            _Stages(self, problem.space, seed)
            if problem.space.sites
            else Learner(problem.space)
        )


def compression_rewards(
    told: Told, teacher: FloatArray, parent: float, updates: int = 0
) -> FloatArray:
    """Gives what students are worth, shape (students,).

    Args:
        told: Quality and cost of students, less being better.
        teacher: The teacher's quality and cost, shape (2,).
        parent: Cost of the network that the students are made of.
        updates: Updates of the policy so far, which make it strict with budgets.

    Raises:
        SettingError: The teacher's quality or cost is 0.

    Example:
        >>> told = Told(np.zeros((1, 1), int), np.array([[-0.9, 25.0]]), np.zeros(1))
        >>> round(float(compression_rewards(told, np.array([-1.0, 100.0]), 100.0)[0]), 5)
        0.84375
    """
    if not teacher.all():
        raise SettingError(
            f"students are judged relative to the teacher, whose quality and cost are "
            f"{teacher.tolist()}; neither may be 0"
        )
    kept_share = np.maximum(0, 1 + (teacher[0] - told.values[:, 0]) / abs(teacher[0]))
    removed = 1 - told.values[:, 1] / teacher[1]
    worth = kept_share * removed * (2 - removed)
    patience = min(1.0, max(0.0, 1 - updates / _TOLERANT)) ** 4
    worth = np.where(told.violations > 0, (patience - 1) + patience * worth, worth)
    invalid = ~np.isfinite(told.violations) | (told.values[:, 1] >= parent)
    found: FloatArray = np.where(invalid, -1.0, worth)
    return found


class Removal(nn.Module):
    """Keeps or removes each block, knowing all of them.

    Args:
        space: Whose sites of the axis depth are decided.
        columns: Those sites.
        hidden: Width of the LSTM.
        seed: Of its weights.
    """

    states: Tensor

    def __init__(self, space: Space, columns: IntArray, hidden: int, seed: int) -> None:
        super().__init__()
        self.units = [int(space.counts[c]) - 1 for c in columns]
        self.register_buffer("states", _blocks(space, columns), persistent=False)
        with kept(seed):
            self.lstm = nn.LSTM(_FEATURES, hidden, _LAYERS, bidirectional=True)
            self.head = nn.Linear(2 * hidden, 2)

    def forward(self, rows: Tensor) -> Tensor:
        """Gives the log-probability of each site's choice, shape (sequences, depth sites)."""
        table = self._table()
        return table[torch.arange(len(self.units)), rows]

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator, heat: float) -> Tensor:
        """Draws choices, shape (n, depth sites)."""
        probs = (self._table() / heat).softmax(-1)
        drawn = [torch.multinomial(p, n, replacement=True, generator=generator) for p in probs]
        return torch.stack(drawn, dim=1)

    def _table(self) -> Tensor:
        """Log-probabilities of all choices, shape (depth sites, most choices)."""
        decided = self.head(self.lstm(self.states)[0]).log_softmax(-1)
        rows = []
        for part in decided.split(self.units):
            removed, kept_on = part[:, 0], part[:, 1].cumsum(0)
            # The first block that is removed ends the stack: choice j keeps j and drops the
            # next, the last choice keeps all.
            before = F.pad(kept_on, (1, 0))
            row = before + F.pad(removed, (0, 1))
            rows.append(F.pad(row, (0, max(self.units) + 1 - len(row)), value=_NEVER))
        return torch.stack(rows)


class Shrinkage(nn.Module):
    """Shrinks one site after the other by a factor, knowing the decisions before.

    Args:
        space: Whose sites are shrunk.
        columns: The sites that are decided, in this order.
        hidden: Width of the LSTM.
        seed: Of its weights.
    """

    states: Tensor
    taken: Tensor

    def __init__(self, space: Space, columns: IntArray, hidden: int, seed: int) -> None:
        super().__init__()
        sites = [space.sites[c] for c in columns]
        nearest = [
            [
                min(range(len(s.choices)), key=lambda i: abs(s.choices[i] - f * s.full))
                for f in FACTORS
            ]
            for s in sites
        ]
        self.register_buffer("states", _sites(space, columns), persistent=False)
        self.register_buffer("taken", torch.tensor(nearest), persistent=False)
        with kept(seed):
            self.lstm = nn.LSTM(_FEATURES + 1, hidden, _LAYERS, batch_first=True)
            self.head = nn.Linear(hidden, len(FACTORS))

    def reachable(self, rows: IntArray) -> NDArray[np.bool_]:
        """Says which rows of choices some factors lead to, shape (rows,)."""
        led = self.taken.numpy()[None] == rows[:, :, None]
        found: NDArray[np.bool_] = led.any(2).all(1)
        return found

    def forward(self, rows: Tensor) -> Tensor:
        """Gives the log-probability of each site's choice, shape (sequences, sites)."""
        before = F.pad(self._shares(rows)[:, :-1], (1, 0), value=1.0)
        states = self.states.expand(len(rows), -1, -1)
        out, _ = self.lstm(torch.cat([states, before[..., None]], dim=2))
        decided = self.head(out).log_softmax(-1)
        # Several factors may lead to one choice.
        leads = self.taken[None] == rows[..., None]
        return decided.masked_fill(~leads, _NEVER).logsumexp(-1)

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator, heat: float) -> Tensor:
        """Draws choices, shape (n, sites)."""
        before = torch.ones(n, 1, 1)
        memory = None
        drawn = []
        for i in range(len(self.taken)):
            state = self.states[i].expand(n, 1, -1)
            out, memory = self.lstm(torch.cat([state, before], dim=2), memory)
            probs = (self.head(out[:, 0]).log_softmax(-1) / heat).softmax(-1)
            factor = torch.multinomial(probs, 1, generator=generator)[:, 0]
            drawn.append(self.taken[i][factor])
            before = self._share(i, drawn[-1])[:, None, None]
        return torch.stack(drawn, dim=1)

    def _shares(self, rows: Tensor) -> Tensor:
        return torch.stack([self._share(i, rows[:, i]) for i in range(rows.shape[1])], dim=1)

    def _share(self, i: int, choice: Tensor) -> Tensor:
        """What is fed back of a decision: the position of the choice, 1 for the last."""
        last = max(int(self.taken[i].max()), 1)
        return choice / last


def _blocks(space: Space, columns: IntArray) -> Tensor:
    """Describes each block that can be removed, shape (blocks, features)."""
    rows = []
    for c in columns:
        site = space.sites[c]
        inner = [s.full for s in space.sites if site.name in dict(s.inside)]
        width = math.log2(1 + sum(inner) / len(inner)) / 10 if inner else 0.0
        units = len(site.choices) - 1
        rows += [
            [(c + 1) / len(space.sites), (u + 1) / units, 1 / units, len(inner) / 10, width]
            for u in range(units)
        ]
    return torch.tensor(rows, dtype=torch.float32)


def _sites(space: Space, columns: IntArray) -> Tensor:
    """Describes each site that can shrink, shape (sites, features)."""
    rows = []
    for c in columns:
        site = space.sites[c]
        size = math.log2(1 + abs(site.full)) / 10
        least = site.choices[0] / site.full if site.full else 0.0
        place = (c + 1) / len(space.sites)
        rows.append([place, size, least, len(site.choices) / 10, float(bool(site.inside))])
    return torch.tensor(rows, dtype=torch.float32)


class _Reinforced:
    """A policy of some columns, and how it learns."""

    def __init__(self, policy: Removal | Shrinkage, columns: IntArray, lr: float) -> None:
        self.policy = policy
        self.columns = columns
        self.means: list[float] = []

        def loss(output: Tensor, batch: tuple[Tensor, float]) -> Tensor:
            return -batch[1] * output.sum()

        optimizer = torch.optim.Adam(policy.parameters(), lr=lr)
        self.run = SizesRun(policy, optimizer, WholeOnly(), Labels(loss))

    def learn(self, rows: IntArray, worth: FloatArray) -> None:
        """Takes one step for each student, all with the advantage of their mean."""
        mean = float(worth.mean())
        advantage = mean - (sum(self.means) / len(self.means) if self.means else 0.0)
        self.means.append(mean)
        for row in torch.from_numpy(rows[:, self.columns]):
            self.run.step((row[None], advantage))

    def drawn(self, start: IntArray, n: int, draws: torch.Generator, heat: float) -> IntArray:
        """Draws students of a network, encoded, not yet canonical."""
        rows = np.repeat(start[None], n, axis=0)
        rows[:, self.columns] = self.policy.sample(n, draws, heat).numpy()
        return rows


class _Stages(Learner):
    """Which stage it is, what students are made of, and the stage's policy."""

    def __init__(self, method: N2N, space: Space, seed: int) -> None:
        super().__init__(space)
        self.method = method
        self.seed = seed
        self.generations = 0
        self.full = space.encode(space.largest())
        self.start = self.full
        several = space.counts > 1
        deep = np.array([site.axis == "depth" for site in space.sites])
        self.depth = np.flatnonzero(deep & several)
        others = {s.name: s.full for s, d in zip(space.sites, deep, strict=True) if not d}
        self.left = space.subspace(others).size()
        self.removing = len(self.depth) > 0
        self.teacher: FloatArray | None = None
        self.parent = math.inf
        self.policy = self._removal() if self.removing else self._shrinkage()

    def learn(self, before: Told, new: Told) -> None:
        told = before.joined(new)
        self.generations += 1
        self._meet(told)
        if self.teacher is None:
            return
        mine = np.flatnonzero(self._mine(told.rows))
        if self.policy is not None:
            self._update(before, told, mine)
        if self.removing:
            removed = told.take(mine)
            enough = len(told) >= self.method.removals or len(removed) >= self.left
            if enough and len(removed):
                self._begin_shrinking(removed)

    def propose(self, random: np.random.Generator, heat: float) -> IntArray:
        draws = named_generator(int(random.integers(2**62)), "students")
        found = [self.full[None]] if self.teacher is None else []
        if self.policy is not None:
            found.append(self.policy.drawn(self.start, _DRAWS, draws, heat))
        if heat > 1 and self.removing:
            # All removals may be known: what is left of the generation shrinks.
            found.append(self._anything(random))
        if not found:
            return super().propose(random, heat)
        return self.space.canonical_many(np.concatenate(found))

    def _meet(self, told: Told) -> None:
        """Looks for the teacher among what was told."""
        if self.teacher is None:
            same = (told.rows == self.full).all(axis=1) & np.isfinite(told.violations)
            if same.any():
                self.teacher = told.values[np.flatnonzero(same)[0]]
                self.parent = float(self.teacher[1])

    def _mine(self, rows: IntArray) -> NDArray[np.bool_]:
        """Says which configs are students that the policy can draw."""
        if self.policy is None:
            return np.zeros(len(rows), dtype=bool)
        made = np.repeat(self.start[None], len(rows), axis=0)
        made[:, self.policy.columns] = rows[:, self.policy.columns]
        same = (self.space.canonical_many(made) == rows).all(axis=1)
        if isinstance(self.policy.policy, Shrinkage):
            same &= self.policy.policy.reachable(rows[:, self.policy.columns])
        return np.asarray(same)

    def _update(self, before: Told, told: Told, mine: IntArray) -> None:
        assert self.policy is not None
        assert self.teacher is not None
        draws = named_generator(self.seed, "again", self.generations)
        drawn = self.policy.drawn(self.start, self.method.population, draws, 1.0)
        again = drawn_again(self.space.canonical_many(drawn), before)
        which = np.concatenate([again, mine[mine >= len(before)]])
        if len(which):
            students = told.take(which)
            updates = len(self.policy.means)
            worth = compression_rewards(students, self.teacher, self.parent, updates)
            self.policy.learn(students.rows, worth)

    def _begin_shrinking(self, removed: Told) -> None:
        """Goes on from the best student so far."""
        assert self.teacher is not None
        worth = compression_rewards(removed, self.teacher, self.parent, _TOLERANT)
        best = int(worth.argmax())
        if np.isfinite(removed.violations[best]):
            self.start = removed.rows[best]
            self.parent = float(removed.values[best, 1])
        self.removing = False
        self.policy = self._shrinkage()

    def _removal(self) -> _Reinforced:
        policy = Removal(
            self.space, self.depth, self.method.hidden, derive(self.seed, "remove")
        )
        return _Reinforced(policy, self.depth, self.method.removal_lr)

    def _shrinkage(self) -> _Reinforced | None:
        here = self.space.present(self.start[None])[0] & (self.space.counts > 1)
        here[self.depth] = False
        columns = np.flatnonzero(here)
        if not len(columns):
            return None
        seed = derive(self.seed, "shrink")
        policy = Shrinkage(self.space, columns, self.method.hidden, seed)
        return _Reinforced(policy, columns, self.method.lr)

    def _anything(self, random: np.random.Generator) -> IntArray:
        """Shrinks students of the first stage anyhow."""
        return self.space.random_many(_DRAWS, random)
