"""Few-shot NAS with gradient matching: a supernet splits where gradients disagree."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from supple.axes.base import added, below
from supple.axes.copies import Copies, copied
from supple.errors import SettingError
from supple.network import Elastic
from supple.space import Config, Site, Space, numpy_generator
from supple.supernet.base import SupernetRule
from supple.technique import register
from supple.training import processes
from supple.training.step import Network, Pass, Sampler, SizesRun

__all__ = ["FewShotNASGM", "SplittingSampler", "distances", "two_groups"]

Leaf = dict[str, tuple[int, ...]]
_MOST = 8  # choices of a site that are compared: there are 127 ways to part 8 in two
_TRIES = 64


@register(title="Few-shot NAS with gradient matching", paper="arXiv:2203.15207")
@dataclass(frozen=True, kw_only=True)
class FewShotNASGM(SupernetRule):
    r"""Splits the supernet in two where the gradients of a site's choices agree least.

    Training begins with one set of weights for all sizes. At even intervals, up to the share
    `until` of the run, each sub-supernet becomes two, until there are `leaves`; they start from
    its weights (and the optimizer's moments) and
    share the choices of one site between them. The site and the two groups follow from the
    gradients: in each of the `repeats` steps before, a random size is run with each choice $i$
    at the site in turn, giving the gradient $g_i$ of all weights outside the site, and
    $D_{ij}$ is the mean of $1 - \cos(g_i, g_j)$. The two groups are those with the least sum
    of $D$ within, and the site is the one with the largest mean of $D$ between its groups,
    among those that the sub-supernet has not been split at.

    The sub-supernet of the full network keeps the module's own weights; the others' are
    parameters that the network gains (`supple.axes.copies.Copies`). The passes of a step go to
    the sub-supernets in turn, so that all are trained alike; with as many passes as there are
    sub-supernets, each step trains all of them.

    Args:
        leaves: Sub-supernets in the end, a power of two; 1 is plain one-shot training.
        until: When the last split is, as a share of the run, in (0, 1).
        repeats: Steps before a split in which gradients are compared, at least 1. Each costs
            one backward per sub-supernet, site and choice.
        random: Random sizes per step, at least 1, each on the whole batch.
        by: `gradients` chooses site and groups as above; `random` draws an unsplit site and
            halves its choices at random, as a control.

    Example:
        ```python
        net = supple.elastic(model, (x,))
        supple.train(net, loader, loss, method=FewShotNASGM(repeats=20), epochs=30)
        net.sharing.parts   # which choices the four sub-supernets have
        ```

    Source:
        Hu et al. 2022, "Generalizing Few-Shot NAS with Gradient Matching", arXiv:2203.15207;
        skhu101/GM-NAS.
    Differs:
        Training goes on while gradients are compared (the authors stop for 100 batches), and
        all sub-supernets together make as many updates as one would. A site's score is the
        mean distance between its groups, not the sum, as sites here differ in their numbers
        of choices; of more than eight choices, eight are compared and the others go with the
        nearest. Groups have at least two choices where there are four, as in the authors'
        code. Weights are never started anew, and sub-supernets are not pruned by successive
        halving. A size without the site at which others were split (its block is skipped)
        belongs to the first sub-supernet. Parameters that axes add stay shared.
    Checked:
        Distances and partitions by hand; one step, the split and the weights that each size
        trains afterwards against the definition.
    """

    distinguishing: ClassVar[str] = "sampler"

    leaves: int = 4
    until: float = 0.5
    repeats: int = 100
    random: int = 4
    by: Literal["gradients", "random"] = "gradients"

    def __post_init__(self) -> None:
        if self.leaves < 1 or self.leaves & (self.leaves - 1):
            raise SettingError(f"leaves must be a power of two, got {self.leaves}")
        if not 0 < self.until < 1:
            raise SettingError(f"until must lie in (0, 1), got {self.until}")
        for name in ("repeats", "random"):
            if getattr(self, name) < 1:
                raise SettingError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.by not in ("gradients", "random"):
            raise SettingError(f"by must be 'gradients' or 'random', got {self.by!r}")

    @classmethod
    def examples(cls) -> list[FewShotNASGM]:
        return [cls(), cls(leaves=2, repeats=1, random=2), cls(by="random")]

    def sampler(self, space: Space, generator: torch.Generator) -> Sampler:
        repeats = self.repeats if self.by == "gradients" else 0
        levels = self.leaves.bit_length() - 1
        splits = [self.until * (level + 1) / levels for level in range(levels)]
        return SplittingSampler(space, generator, splits, repeats, self.random)

    def adapt(self, net: Network) -> None:
        """Adds the weights of all sub-supernets, unused until they come to be.

        Args:
            net: The network that is going to be trained.
        """
        assert isinstance(net, Elastic)
        if not isinstance(net.sharing, Copies) or net.sharing.count != self.leaves:
            net.share(Copies(({},), count=self.leaves))


class SplittingSampler(Sampler):
    """Trains random sizes of sub-supernets in turn, and splits these as the run goes on.

    A network that is split already goes on as it is.

    Args:
        space: The sizes there are.
        generator: Source of randomness.
        splits: When each sub-supernet becomes two, as shares of the run.
        repeats: Steps before each split in which gradients are compared; 0 for random splits.
        count: Passes per step.
    """

    def __init__(
        self,
        space: Space,
        generator: torch.Generator,
        splits: Sequence[float],
        repeats: int,
        count: int,
    ) -> None:
        self.space, self.generator = space, generator
        self.splits, self.repeats, self.count = tuple(splits), repeats, count
        self.leaves: list[Leaf] = []  # a leaf's place is the number of its copy
        self._levels = 0  # how many times all leaves were split
        self._distances: list[dict[str, Tensor]] = []  # sums, by leaf and site

    def begin(self, run: SizesRun) -> None:
        """Splits where it is time, and compares gradients where that is near."""
        net = run.net
        assert isinstance(net, Elastic)
        if not self.leaves:
            self._go_on(net)
        while self._levels < len(self.splits) and run.steps >= self._time(run, self._levels):
            self._split_all(run)
        self._share(net)
        if self._levels < len(self.splits):
            left = self._time(run, self._levels) - run.steps
            if left <= self.repeats:
                self._compare(run, net)

    def sample(self, step: int, steps: int | None) -> Sequence[Pass]:
        """Gives the passes of a step; the role `leaf-0` is the full network's sub-supernet."""
        leaves = [(step * self.count + i) % len(self.leaves) for i in range(self.count)]
        return [
            Pass(self._part(self.leaves[leaf]).random(self.generator), f"leaf-{leaf}")
            for leaf in leaves
        ]

    def state_dict(self) -> dict[str, Any]:
        """Gives the choices of each sub-supernet, and the distances so far."""
        return {
            "leaves": [{site: list(c) for site, c in leaf.items()} for leaf in self.leaves],
            "levels": self._levels,
            "distances": [dict(each) for each in self._distances],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what `state_dict` gave."""
        self.leaves = [{site: tuple(c) for site, c in leaf.items()} for leaf in state["leaves"]]
        self._levels = state["levels"]
        self._distances = [
            {site: d.clone() for site, d in each.items()} for each in state["distances"]
        ]

    def resumed(self, run: SizesRun) -> None:
        """Lets the sub-supernets have their weights again."""
        if self.leaves:
            assert isinstance(run.net, Elastic)
            self._share(run.net)

    # ------------------------------------------------------------------ the tree

    def _go_on(self, net: Elastic) -> None:
        """Takes over the sub-supernets that the network has."""
        assert isinstance(net.sharing, Copies)
        self.leaves = [dict(part) for part in net.sharing.parts]
        self._levels = (len(self.leaves) - 1).bit_length()
        self._distances = [{} for _ in self.leaves]

    def _share(self, net: Elastic) -> None:
        sharing = Copies(tuple(self.leaves), count=2 ** len(self.splits))
        if net.sharing != sharing:
            net.share(sharing)

    def _time(self, run: SizesRun, level: int) -> int:
        if run.options.steps is None:
            raise SettingError("splits need to know the number of steps; pass steps=")
        return max(1, round(self.splits[level] * run.options.steps))

    def _split_all(self, run: SizesRun) -> None:
        for number in range(len(self.leaves)):
            found = self._best(number) if self.repeats else self._drawn(number)
            if found is None:
                continue
            site, groups = found
            own, other = sorted(groups, key=lambda group: site.full not in group)
            leaf = self.leaves[number]
            self.leaves[number] = {**leaf, site.name: own}
            self.leaves.append({**leaf, site.name: other})
            _inherit(run, number, len(self.leaves) - 1)
        self._distances = [{} for _ in self.leaves]
        self._levels += 1

    def _best(self, number: int) -> tuple[Site, list[tuple[int, ...]]] | None:
        """The site whose choices disagree most, and its groups; none without a comparison."""
        measured = self._distances[number]
        if not measured:
            return None
        scored = {name: two_groups(distance) for name, distance in measured.items()}
        name = max(scored, key=lambda name: scored[name][1])
        return self.space.site(name), _grouped(self.space.site(name), scored[name][0])

    def _drawn(self, number: int) -> tuple[Site, list[tuple[int, ...]]] | None:
        sites = self._open(self.leaves[number])
        if not sites:
            return None
        random = numpy_generator(self.generator)
        site = sites[random.integers(len(sites))]
        order = random.permutation(np.array(site.choices)).tolist()
        half = len(order) // 2
        return site, [tuple(sorted(order[:half])), tuple(sorted(order[half:]))]

    def _open(self, leaf: Leaf) -> list[Site]:
        """The sites at which a leaf was not split."""
        return [s for s in self.space.sites if s.name not in leaf and len(s.choices) > 1]

    def _part(self, leaf: Leaf) -> Space:
        return self.space.subspace(leaf)

    # ------------------------------------------------------------------ comparing

    def _compare(self, run: SizesRun, net: Elastic) -> None:
        """Adds one batch's distances, for each leaf and each site that it may be split at."""
        random = numpy_generator(self.generator)
        found: list[tuple[int, str, Tensor]] = []
        for number, leaf in enumerate(self.leaves):
            part = self._part(leaf)
            for site in self._open(leaf):
                configs = _forced(part, site, random)
                if configs:
                    inside = net.paths_of(site.name)
                    gradients = [_outside(run, net, config, inside) for config in configs]
                    found.append((number, site.name, distances(gradients)))
        processes.average([distance for *_, distance in found])
        for number, name, distance in found:
            sums = self._distances[number]
            sums[name] = sums[name] + distance if name in sums else distance


def distances(gradients: Sequence[Mapping[str, Tensor]]) -> Tensor:
    r"""Compares gradients: $1 - \cos(g_i, g_j)$ over all parameters at once.

    Args:
        gradients: By parameter; one that lacks a parameter is zero there.

    Returns:
        Shape (gradients, gradients), on the CPU; 0 where one of the two is zero throughout.

    Example:
        >>> a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])
        >>> distances([{"w": a}, {"w": b}, {"w": -a}])[0].tolist()
        [0.0, 1.0, 2.0]
    """
    products = torch.zeros(len(gradients), len(gradients), dtype=torch.float64)
    for name in dict.fromkeys(name for each in gradients for name in each):
        like = next(each[name] for each in gradients if name in each)
        rows = torch.stack(
            [each.get(name, torch.zeros_like(like)).flatten() for each in gradients]
        )
        products += (rows @ rows.T).cpu()
    norms = products.diagonal().sqrt()
    lengths = norms.outer(norms)
    return torch.where(lengths > 0, 1 - products / lengths.clamp(min=1e-300), 0.0)


def two_groups(distance: Tensor) -> tuple[tuple[int, ...], float]:
    """Parts items in two so that those within a group are near one another.

    Args:
        distance: Between items, symmetric, shape (items, items); all ways are tried.

    Returns:
        The group of the first item, and the mean distance between the groups. Groups of four
        items and more have at least two each.

    Example:
        >>> near = torch.tensor([[0, 9, 1, 9], [9, 0, 9, 2], [1, 9, 0, 9], [9, 2, 9, 0]])
        >>> two_groups(near)
        ((0, 2), 9.0)
    """
    table = distance.to(torch.float64).numpy()
    items = range(len(table))
    least = min(2, len(items) // 2)

    def within(group: Sequence[int]) -> float:
        return float(table[np.ix_(group, group)].sum())

    best: tuple[float, tuple[int, ...]] = (float("inf"), ())
    for more in range(least - 1, len(items) - least):
        for chosen in itertools.combinations(items[1:], more):
            group = (0, *chosen)
            rest = [i for i in items if i not in group]
            best = min(best, (within(group) + within(rest), group))
    group = best[1]
    rest = [i for i in items if i not in group]
    return group, float(table[np.ix_(group, rest)].mean())


def _compared(site: Site) -> list[int]:
    """The positions of a site's choices that are compared."""
    count = len(site.choices)
    spread = np.linspace(0, count - 1, min(count, _MOST))
    return [round(position) for position in spread.tolist()]


def _grouped(site: Site, first: Sequence[int]) -> list[tuple[int, ...]]:
    """All choices in two groups, given which of the compared ones are in the first."""
    compared = _compared(site)
    groups: tuple[list[int], list[int]] = ([], [])
    for position, choice in enumerate(site.choices):
        nearest = min(range(len(compared)), key=lambda i: abs(compared[i] - position))
        groups[nearest not in first].append(choice)
    return [tuple(group) for group in groups]


def _forced(part: Space, site: Site, random: np.random.Generator) -> list[Config]:
    """A random size with each compared choice in turn; none where the site never exists."""
    rows = part.random_many(_TRIES, random)
    here = np.flatnonzero(part.present(rows)[:, part.column(site.name)])
    if not len(here):
        return []
    config = dict(part.decode(rows[here[0]]))
    choices = [site.choices[position] for position in _compared(site)]
    return [part.config({**config, site.name: choice}) for choice in choices]


def _outside(
    run: SizesRun, net: Elastic, config: Config, inside: Sequence[str]
) -> dict[str, Tensor]:
    """A size's gradient outside some modules, by the module's own names in every copy."""
    assert isinstance(net.sharing, Copies)
    number = net.sharing.chosen(config)
    names = {copied(name, number): name for name in _owned(net)}
    found = run.gradients(Pass(config, "compared", regularise=False), run.batch)
    return {
        names.get(name, name): gradient
        for name, gradient in found.items()
        if not any(below(name.rpartition(".")[0], path) for path in inside)
    }


def _owned(net: Elastic) -> list[str]:
    return [name for name, _ in net.module.named_parameters() if not added(name)]


@torch.no_grad()
def _inherit(run: SizesRun, source: int, target: int) -> None:
    """Gives one copy the weights, moments and averages of another."""
    net = run.net
    assert isinstance(net, Elastic)
    parameters, state = dict(net.module.named_parameters()), run.optimizer.state
    averages = {} if run.average is None else run.average.state_dict()["average"]
    for name in _owned(net):
        old, new = copied(name, source), copied(name, target)
        parameters[new].copy_(parameters[old])
        if old in averages:
            averages[new].copy_(averages[old])
        state.pop(parameters[new], None)
        if parameters[old] in state:
            state[parameters[new]] = {
                kind: value.clone() if isinstance(value, Tensor) else value
                for kind, value in state[parameters[old]].items()
            }
