"""Balanced mixture of supernets: which of several sets of weights a size has is learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from supple.axes.base import selected
from supple.axes.copies import Copies
from supple.errors import SettingError
from supple.network import Elastic
from supple.space import Space
from supple.supernet.base import SupernetRule
from supple.technique import register
from supple.training import processes
from supple.training.step import Network, Pass, Sampler, Seen, SizesRun

__all__ = ["AssigningSampler", "BalancedSupernets", "balance", "configurations"]

Part = dict[str, tuple[int, ...]]
_MOST = 1024
_CLOSE = 0.01
_ROUNDS = 100


@register(title="Balanced mixture of supernets", paper="arXiv:2306.11982")
@dataclass(frozen=True, kw_only=True)
class BalancedSupernets(SupernetRule):
    r"""Trains several supernets, and learns which sizes each of them is for.

    Sizes that need different weights, such as networks that halve their image at different
    places, disturb one another in a single supernet. Here there are $M$ copies of all weights.
    Each pass draws a size uniformly, and a copy $m$ for the size's configuration $c$ with
    probability $p(m|c)$; the copy is trained, and the running average $L_{cm}$ of its losses
    is updated. $p(m|c)$ is the softmax of $-L_{cm} / T$ over $m$, where $1 / T$ grows linearly
    from 1 over the run. It is balanced before use: columns are divided by their sums and rows
    by theirs, in turn, until all copies have the same share of the configurations; otherwise
    the copy that happens to be ahead would take them all. Averages begin at 0, better than any
    loss, so that copies that were not tried with a configuration come first.

    After each step every size has the weights of the copy with the highest $p(m|c)$
    (`supple.axes.copies.Copies`). The full network always has copy 0, the module itself.

    Args:
        copies: $M$, at least 1; 1 is a single supernet.
        where: Only sites whose names match this shell-style pattern tell configurations apart;
            None for all sites. At most 1,024 configurations can be told apart.
        decay: Of the running average of losses, in [0, 1).
        temperature: $T$ at the end of the run, in (0, 1], in the loss's unit.
        balanced: Whether copies get equal shares; without it one of them may take all.
        random: Random sizes per step, at least 1, each on the whole batch.

    Example:
        ```python
        places = tuple(f"places.{i}" for i in range(6))
        net = supple.elastic(build("pooling-cnn"), x, axes=[Placement(places, 2)])
        supple.train(net, loader, loss, method=BalancedSupernets(copies=4), epochs=30)
        ```

    Source:
        Javan et al. 2023, "Balanced Mixture of SuperNets for Learning the CNN Pooling
        Architecture", arXiv:2306.11982; mehravehj/Balanced-Mixture-of-SuperNets.
    Differs:
        Copies are judged by the training loss of a batch before they learn from it, where the
        authors use the accuracy on validation data after it (half of the training set), so the
        final temperature is 0.03 where theirs is 0.01. All copies start from the same weights
        (also pretrained ones) and differ by what they are trained with. Probabilities
        follow the step, not the epoch. The full network's configuration is always copy 0's,
        which only names the copies. Copies share one optimizer.
    Checked:
        Balancing and probabilities by hand; one step's gradients and averages; the weights
        that each size has in and after a step.
    """

    distinguishing: ClassVar[str] = "sampler"

    copies: int = 4
    where: str | None = None
    decay: float = 0.9
    temperature: float = 0.03
    balanced: bool = True
    random: int = 1

    def __post_init__(self) -> None:
        for name in ("copies", "random"):
            if getattr(self, name) < 1:
                raise SettingError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.decay < 1:
            raise SettingError(f"decay must lie in [0, 1), got {self.decay}")
        if not 0 < self.temperature <= 1:
            raise SettingError(f"temperature must lie in (0, 1], got {self.temperature}")

    @classmethod
    def examples(cls) -> list[BalancedSupernets]:
        return [cls(), cls(copies=2, random=3), cls(copies=2, balanced=False, decay=0.5)]

    def sampler(self, space: Space, generator: torch.Generator) -> Sampler:
        return AssigningSampler(space, generator, self)

    def adapt(self, net: Network) -> None:
        """Adds the copies.

        Args:
            net: The network that is going to be trained.
        """
        assert isinstance(net, Elastic)
        if not isinstance(net.sharing, Copies) or net.sharing.count != self.copies:
            net.share(Copies(({},), count=self.copies))


class AssigningSampler(Sampler):
    """Draws sizes and copies for them, and learns from the losses which fit.

    Args:
        space: The sizes there are.
        generator: Source of randomness.
        method: The settings.
    """

    def __init__(
        self, space: Space, generator: torch.Generator, method: BalancedSupernets
    ) -> None:
        self.space, self.generator, self.method = space, generator, method
        self.parts = configurations(space, method.where)
        self._rows = Copies(tuple(self.parts))  # gives a size's configuration by its number
        self._full = self._rows.chosen(space.largest())
        self.losses = torch.zeros(len(self.parts), method.copies, dtype=torch.float64)
        self._waiting: list[tuple[int, int]] = []  # configuration and copy of passes to come
        self._likely = torch.zeros(0)
        self._net: Elastic | None = None

    def begin(self, run: SizesRun) -> None:
        """Remembers the network."""
        assert isinstance(run.net, Elastic)
        self._net = run.net

    def probabilities(self, step: int, steps: int | None) -> Tensor:
        """Gives $p(m|c)$, shape (configurations, copies).

        Args:
            step: Counted from 0.
            steps: How many there will be.

        Raises:
            SettingError: The number of steps is not known.
        """
        if steps is None:
            raise SettingError(
                "the temperature follows the number of steps, which is not known; pass steps="
            )
        inverse = 1 + (1 / self.method.temperature - 1) * min(1.0, step / max(1, steps - 1))
        found = (-self.losses * inverse).softmax(1)
        found[self._full] = 0.0
        found[self._full, 0] = 1.0
        return balance(found) if self.method.balanced else found

    def sample(self, step: int, steps: int | None) -> Sequence[Pass]:
        """Gives the passes of a step; the role `copy-0` is the module itself."""
        self._likely = self.probabilities(step, steps)
        configs = [self.space.random(self.generator) for _ in range(self.method.random)]
        drawn: dict[int, int] = {}
        self._waiting = []
        for config in configs:
            row = self._rows.chosen(config)
            if row not in drawn:  # a configuration has one copy in a step
                copy = torch.multinomial(self._likely[row], 1, generator=self.generator)
                drawn[row] = int(copy)
            self._waiting.append((row, drawn[row]))
        self._share(drawn)
        return [
            Pass(config, f"copy-{copy}")
            for config, (_, copy) in zip(configs, self._waiting, strict=True)
        ]

    def observe(self, seen: Seen) -> None:
        """Averages the loss; after a step's last pass, sizes have their likeliest copies."""
        loss = seen.loss.to("cpu", torch.float64, copy=True)
        processes.average([loss])
        decay, place = self.method.decay, self._waiting.pop(0)
        self.losses[place] = decay * self.losses[place] + (1 - decay) * loss
        if not self._waiting:
            self._share({})

    def state_dict(self) -> dict[str, Any]:
        """Gives the averages of the losses, and the probabilities last used."""
        return {"losses": self.losses.clone(), "likely": self._likely.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what `state_dict` gave."""
        self.losses, self._likely = state["losses"].clone(), state["likely"].clone()

    def resumed(self, run: SizesRun) -> None:
        """Lets sizes have the weights of their copies again."""
        self.begin(run)
        if len(self._likely):
            self._share({})

    def _share(self, drawn: dict[int, int]) -> None:
        """Gives each configuration its likeliest copy, but for those that are named."""
        assert self._net is not None, "a run begins each step before it samples"
        copy: list[int] = self._likely.argmax(1).tolist()
        for row, number in drawn.items():
            copy[row] = number
        sharing = Copies(tuple(self.parts), tuple(copy), self.method.copies)
        if sharing != self._net.sharing:
            self._net.share(sharing)


def configurations(space: Space, where: str | None = None) -> list[Part]:
    """Lists what sizes can be at some sites, as parts for `Copies`.

    Args:
        space: The sizes there are.
        where: Only sites whose names match this shell-style pattern; None for all.

    Returns:
        For each configuration, the one choice at each of these sites that exists in it.

    Raises:
        SettingError: No site matches, or there are more than 1,024 configurations.

    Example:
        >>> from supple.space import Site
        >>> space = Space([Site("pool", "operator", (0, 1), 1), Site("a", "width", (4, 8), 8)])
        >>> configurations(space, "pool*")
        [{'pool': (0,)}, {'pool': (1,)}]
    """
    names = [site.name for site in space.sites if selected(site.name, where)]
    if not names:
        raise SettingError(f"where='{where}' matches none of the sites {list(space.names)}")
    rest = {site.name: site.full for site in space.sites if site.name not in names}
    part = space.subspace(rest)
    if part.size() > _MOST:
        raise SettingError(
            f"{part.size():,} configurations can't be told apart, only {_MOST:,}; name fewer "
            "sites with where="
        )
    found = part.decode_many(part.every())
    return [{name: (config[name],) for name in names if name in config} for config in found]


def balance(probabilities: Tensor) -> Tensor:
    """Scales columns and rows in turn until all columns have the same share (Sinkhorn).

    Args:
        probabilities: Rows that sum to 1, shape (rows, columns).

    Returns:
        Rows that sum to 1, and columns whose means are within 1 % of 1 / columns, or what
        100 rounds gave where zeros do not admit that.

    Example:
        >>> balance(torch.tensor([[0.9, 0.1], [0.9, 0.1]])).tolist()
        [[0.5, 0.5], [0.5, 0.5]]
    """
    table = probabilities.numpy()
    for _ in range(_ROUNDS):
        shares = table.mean(0) * table.shape[1]  # 1 where all are alike
        if np.abs(shares - 1).max() <= _CLOSE:
            break
        table = table / np.maximum(shares, 1e-300)
        table = table / table.sum(1, keepdims=True)
    return torch.from_numpy(table)
