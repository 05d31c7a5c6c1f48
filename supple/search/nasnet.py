"""NASNet: a controller that learns by PPO, and the space of cells that it searched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from supple.errors import SettingError, nearest
from supple.models.nasnet import COMBINE, OPERATIONS
from supple.search._conservative import rewards
from supple.search._controller import Baseline, Decisions, SequenceController, entropy
from supple.search._policy import LearnedSearch, Learner, drawn_again
from supple.search.base import Problem, Told
from supple.space import Site, Space
from supple.technique import register
from supple.training.losses import Labels
from supple.training.seeds import generator as named_generator
from supple.training.step import SizesRun, WholeOnly

__all__ = ["CellSpace", "NASNet", "Taken", "clipped_loss"]

IntArray = NDArray[np.int64]

_DRAWS = 32
"""Configs that are drawn at once."""


@register(title="NASNet's controller (PPO)", paper="arXiv:1707.07012")
@dataclass(frozen=True, kw_only=True)
class NASNet(LearnedSearch):
    r"""Draws configs of your network from an LSTM that learns, by PPO, to draw good ones.

    The LSTM decides one site after the other, each decision fed back in. After every
    `population` configs, of rewards $R$ (minus the value that is told), it maximises

    $$\frac{1}{n} \sum_i \sum_t \min(r_{it} A_i, \text{clip}(r_{it}, 1 - c, 1 + c) A_i)
      + \beta H, \qquad A_i = R_i - b,$$

    where $r_{it}$ is by how much decision $t$ of config $i$ became likelier since the update
    began, $c$ is `clip`, $b$ a running average of the rewards before, and $\beta$ is the weight
    of the entropy $H$ of the decisions. `CellSpace` is the space that the authors searched.

    With several objectives $R$ is minus the rank of a config among all that were told (its
    front, counted from the best), since the paper has one reward and no weights between
    several. What breaks a constraint or failed is worth as little as the worst of the others.

    Args:
        population: Configs told between updates, at least 1.
        hidden: Width of the LSTM and of its embeddings.
        lr: Learning rate of Adam.
        epochs: Steps on the same configs in an update, at least 1.
        clip: How far a decision's probability may move, relatively, before it gains no more.
        entropy: Weight of the entropy of the decisions, at least 0.
        decay: Of the running average of rewards, in [0, 1).

    Example:
        >>> from supple.space import Site, Space
        >>> space = Space([Site(f"s{i}", "width", tuple(range(4)), 3) for i in range(6)])
        >>> run = NASNet(population=10, hidden=8, lr=0.05).start(space, ["loss"], 0)
        >>> for _ in range(7):
        ...     rows = run.ask_rows(10)
        ...     run.tell(rows, rows.sum(axis=1, keepdims=True))
        >>> bool(run.told.values[-10:].mean() < run.told.values[:10].mean() - 2)
        True

    Source:
        Zoph, Vasudevan, Shlens and Le 2018, "Learning Transferable Architectures for Scalable
        Image Recognition", CVPR, arXiv:1707.07012, with the controller's settings of its
        appendix A; cells as in tensorflow/models, research/slim/nets/nasnet. The code of the
        search was not published; PPO as in Schulman et al. 2017, arXiv:1707.06347.
    Differs:
        The paper names PPO without its settings: `clip` is PPO's own default, `epochs` is ours.
        The default learning rate is made for the authors' 20,000 networks; a search with
        hundreds needs a larger one. No config is evaluated twice: an update counts those that
        are known and drawn again with their known rewards, and where the LSTM draws nothing
        new, its probabilities are made flatter until it does. A site that doesn't exist counts
        for nothing, but the LSTM reads it at its full choice.
    Checked:
        The clipped loss by hand; learning against random draws; the same proposals after it is
        rebuilt; parameters of NASNet-A as in the paper.
    """

    distinguishing: ClassVar[str] = "learner"

    population: int = 20
    hidden: int = 100
    lr: float = 3.5e-4
    epochs: int = 4
    clip: float = 0.2
    entropy: float = 1e-5
    decay: float = 0.95

    def __post_init__(self) -> None:
        for name in ("population", "hidden", "epochs"):
            if getattr(self, name) < 1:
                raise SettingError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("lr", "clip"):
            if not getattr(self, name) > 0:
                raise SettingError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.entropy < 0:
            raise SettingError(f"entropy must be at least 0, got {self.entropy}")
        if not 0 <= self.decay < 1:
            raise SettingError(f"decay must be in [0, 1), got {self.decay}")

    @classmethod
    def examples(cls) -> list[NASNet]:
        return [cls(), cls(population=3, hidden=8, epochs=1)]

    @property
    def generation(self) -> int:
        return self.population

    def learner(self, problem: Problem, seed: int) -> Learner:
        if not problem.space.sites:
            return Learner(problem.space)
        return _Proximal(self, problem.space, seed)


class Taken(NamedTuple):
    """Decisions that an update learns from.

    Args:
        log_probs: Of the decisions before the update, shape (sequences, sites).
        here: Which of them count, shape (sequences, sites).
        advantages: Of each sequence, shape (sequences,).
    """

    log_probs: Tensor
    here: Tensor
    advantages: Tensor


def clipped_loss(log_probs: Tensor, taken: Taken, clip: float) -> Tensor:
    """Gives what PPO minimises, without the entropy.

    Args:
        log_probs: Of the decisions now, shape (sequences, sites).
        taken: The same before, and what they were good for.
        clip: How far a probability may move, relatively, before it gains no more.
    """
    ratio = (log_probs - taken.log_probs).exp()
    gain = taken.advantages[:, None]
    least = torch.minimum(ratio * gain, ratio.clamp(1 - clip, 1 + clip) * gain)
    return -(least * taken.here).sum(1).mean()


class _Proximal(Learner):
    """The controller, and how it learns."""

    def __init__(self, method: NASNet, space: Space, seed: int) -> None:
        super().__init__(space)
        self.method = method
        self.seed = seed
        self.generations = 0
        self.baseline = Baseline(method.decay)
        self.controller = SequenceController(
            space.counts.tolist(), hidden=method.hidden, temperature=1.0, limit=None, seed=seed
        )

        def loss(output: Decisions, batch: tuple[Tensor, Taken]) -> Tensor:
            rows, taken = batch
            bonus = method.entropy * entropy(output).mean()
            return clipped_loss(_of(output, rows), taken, method.clip) - bonus

        optimizer = torch.optim.Adam(self.controller.parameters(), lr=method.lr)
        self.run = SizesRun(self.controller, optimizer, WholeOnly(), Labels(loss))

    def learn(self, before: Told, new: Told) -> None:
        draws = named_generator(self.seed, "again", self.generations)
        self.generations += 1
        again = drawn_again(self._drawn(self.method.population, draws), before)
        told = before.joined(new)
        which = np.concatenate([again, np.arange(len(before), len(told))])
        worth = torch.from_numpy(rewards(told)[which]).float()
        rows = torch.from_numpy(told.rows[which])
        here = torch.from_numpy(self.space.present(told.rows[which])).float()
        with torch.no_grad():
            log_probs = _of(self.controller(rows), rows)
        advantages = self.baseline.advantages(worth)
        for _ in range(self.method.epochs):
            self.run.step((rows, Taken(log_probs, here, advantages)))

    def propose(self, random: np.random.Generator, heat: float) -> IntArray:
        draws = named_generator(int(random.integers(2**62)), "controller")
        return self._drawn(_DRAWS, draws, heat)

    def _drawn(self, count: int, draws: torch.Generator, heat: float = 1.0) -> IntArray:
        rows = self.controller.sample(count, draws, heat=heat)
        return self.space.canonical_many(rows.numpy())


def _of(decisions: Decisions, rows: Tensor) -> Tensor:
    """The logarithm of the probability of each decision that was taken."""
    return decisions.log_probs.gather(2, rows[..., None])[..., 0]


@dataclass(frozen=True)
class CellSpace:
    """The space of pairs of cells, normal and reduction, for `build("nasnet", ...)`.

    A cell is a list of blocks; each takes two of the states before it (0 and 1 are the outputs
    of the two cells before), does an operation to each and combines the results.

    Args:
        blocks: Blocks in each cell.
        operations: Names of `supple.models.nasnet.OPERATIONS`.
        combine: How results may be combined: `"add"`, `"concat"` or both.

    Example:
        >>> cells = CellSpace(blocks=2, operations=("identity", "max-3", "conv-3"))
        >>> cells.space().size() == (2**2 * 3**2 * 2 * 3**2 * 3**2 * 2) ** 2
        True
        >>> config = cells.space().smallest()
        >>> cells.cells(config)["normal"]["blocks"][1]
        {'inputs': (0, 0), 'ops': ('identity', 'identity'), 'combine': 'add'}
    """

    blocks: int = 5
    operations: tuple[str, ...] = tuple(OPERATIONS)
    combine: tuple[str, ...] = COMBINE

    def __post_init__(self) -> None:
        if self.blocks < 1:
            raise SettingError(f"blocks must be at least 1, got {self.blocks}")
        for name, known in (("operations", list(OPERATIONS)), ("combine", list(COMBINE))):
            given = tuple(getattr(self, name))
            object.__setattr__(self, name, given)
            if not given or len(set(given)) < len(given):
                raise SettingError(f"{name} must be distinct and some, got {given}")
            for one in given:
                if one not in known:
                    raise SettingError(
                        f"{name} are of {', '.join(known)}, got {one!r}{nearest(one, known)}"
                    )

    def space(self) -> Space:
        """Gives the space; choices of operations and combinations are their positions."""
        sites = []
        for cell in ("normal", "reduction"):
            for b in range(self.blocks):
                for side in (0, 1):
                    states = tuple(range(2 + b))
                    sites.append(Site(f"{cell}.{b}.input{side}", "input", states, side))
                for side in (0, 1):
                    ops = tuple(range(len(self.operations)))
                    sites.append(Site(f"{cell}.{b}.op{side}", "operator", ops, ops[-1]))
                joins = tuple(range(len(self.combine)))
                sites.append(Site(f"{cell}.{b}.combine", "combine", joins, 0))
        return Space(sites)

    def cells(self, config: Mapping[str, int]) -> dict[str, dict[str, Any]]:
        """Gives both cells of a config, as settings of `build("nasnet", ...)`.

        Args:
            config: Of `space()`, or of a subspace of it.
        """
        return {
            cell: {"blocks": [self._block(config, f"{cell}.{b}") for b in range(self.blocks)]}
            for cell in ("normal", "reduction")
        }

    def _block(self, config: Mapping[str, int], name: str) -> dict[str, Any]:
        return {
            "inputs": (config[f"{name}.input0"], config[f"{name}.input1"]),
            "ops": tuple(self.operations[config[f"{name}.op{side}"]] for side in (0, 1)),
            "combine": self.combine[config[f"{name}.combine"]],
        }
