"""Once-for-all: sizes are enabled one axis after another, from the full network down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor

from supple.errors import SettingError
from supple.network import Elastic
from supple.space import Site, Space
from supple.supernet.base import Phase, PhasedSampler, RandomSampler, SupernetRule
from supple.technique import register
from supple.training.batches import Loss
from supple.training.losses import Criterion, Distillation, Labels
from supple.training.schedule import Cosine, Scaled
from supple.training.step import Sampler, SizesRun, WholeOnly

__all__ = ["PAPER", "OnceForAll", "Shrink"]

_TEACHER = "teacher"
_EVERYTHING = "all"
Enabled = dict[str, tuple[int, ...]]
"""The choices that are on at each site, ascending."""


def _axis_and_count(entry: str) -> tuple[str, int | None]:
    axis, colon, count = entry.partition(":")
    if not colon:
        return axis, None
    if not count.isdecimal() or int(count) < 1:
        raise SettingError(
            f"a phase enables an axis ('kernel') or so many of its largest choices "
            f"('depth:2'), got {entry!r}"
        )
    return axis, int(count)


@dataclass(frozen=True)
class Shrink:
    """A phase of progressive shrinking.

    Args:
        share: How long it is, relative to the other phases, above 0.
        enable: What is on from here on: an axis with all its choices (`"kernel"`), with so many
            of the largest (`"depth:2"`), or every axis (`"all"`).
        rate: Its peak learning rate relative to the run's, above 0.
        sizes: Sizes per step, at least 1.
    """

    share: float
    enable: tuple[str, ...] = ()
    rate: float = 1.0
    sizes: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "enable", tuple(self.enable))
        if not self.share > 0 or not self.rate > 0 or self.sizes < 1:
            raise SettingError(
                "a phase needs a share and a rate above 0 and at least one size per step, got "
                f"{self}"
            )
        for entry in self.enable:
            _axis_and_count(entry)


#: Epochs, learning rates (by that of the full network) and sizes of the authors' training.
PAPER = (
    Shrink(180),
    Shrink(120, ("kernel",), 0.37),
    Shrink(25, ("depth:2",), 0.031, 2),
    Shrink(120, ("depth",), 0.092, 2),
    Shrink(25, ("width:2", "heads:2"), 0.031, 4),
    Shrink(120, ("all",), 0.092, 4),
)


@register(title="Once-for-All", paper="arXiv:1908.09791")
@dataclass(frozen=True, kw_only=True)
class OnceForAll(SupernetRule):
    r"""Trains the full network first, then ever smaller sizes beside it: progressive shrinking.

    Large sizes are trained before small ones start to share their weights. Each phase enables
    more choices: first none (the full network learns from labels), then kernels, depths and
    widths, the next smaller ones first. From then on a step draws random sizes among the
    enabled ones and sums their gradients; they minimise the user's loss plus `soft` times the
    soft cross-entropy to a frozen copy of the full network, taken when the first sizes are
    enabled. Before widths are enabled, channels are sorted by the absolute weights that the
    following layers read them with, within the widths that are on already, so that the most
    important ones stay longest. Each phase has its own cosine of the learning rate, and starts
    with new optimizer moments.

    Phases that enable nothing in the network at hand are left out. Without a first phase that
    enables nothing, the network is taken as it is: pretrained.

    Args:
        phases: The phases, in order; together they enable every axis of the network.
        soft: Weight of distillation beside the user's loss, at least 0.
        temperature: Softens both distributions, above 0.

    Example:
        ```python
        axes = [Kernel((3, 5, 7), transform=True), Depth((2, 3, 4)), Width((0.5, 0.67, 1.0))]
        net = supple.elastic(model, (x,), axes=axes)
        supple.train(net, loader, loss, method=OnceForAll(), optimizer="sgd", lr=0.1, epochs=60)
        ```

    Source:
        Cai et al. 2020, "Once-for-All: Train One Network and Specialize it for Efficient
        Deployment", arXiv:1908.09791; defaults as in the authors' mit-han-lab/once-for-all.
    Differs:
        The teacher runs with its running statistics, and at the full resolution (the authors'
        takes the batch's statistics). Each size of a step draws its own resolution. All
        following layers count for the order of channels, gates of squeeze-and-excitation
        included (the authors' only the projection). With an average of the weights, that
        starts anew with each phase, too.
    Checked:
        The enabled choices, rates and number of sizes of each phase; one step against
        gradients summed by hand; sorting within the enabled widths; resuming in each phase.
    """

    distinguishing: ClassVar[str] = "sampler"

    phases: tuple[Shrink, ...] = PAPER
    soft: float = 1.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "phases", tuple(self.phases))
        if not self.phases:
            raise SettingError("phases must be at least one, got none")
        if not self.soft >= 0 or not self.temperature > 0:
            raise SettingError(
                "soft must be at least 0 and temperature above 0, got "
                f"{self.soft} and {self.temperature}"
            )

    @classmethod
    def examples(cls) -> list[OnceForAll]:
        short = (Shrink(1), Shrink(1, ("width:2",), 0.5), Shrink(1, ("all",), 0.5, 2))
        return [cls(), cls(phases=short, soft=0.5, temperature=2.0), cls(phases=short[1:])]

    def sampler(self, space: Space, generator: torch.Generator) -> Sampler:
        phases: list[Phase] = []
        before: Enabled = {site.name: (site.full,) for site in space.sites}
        for phase, enabled in self._different(space):
            phases.append(self._phase(phase, enabled, before, space, generator))
            before = enabled
        return PhasedSampler(phases)

    def criterion(self, loss: Loss) -> Criterion:
        if not self.soft:
            return Labels(loss)
        return Distillation(
            loss,
            teacher=_TEACHER,
            temperature=self.temperature,
            labels=1.0,
            soft=self.soft,
            taught=frozenset({"random"}),
        )

    def _different(self, space: Space) -> list[tuple[Shrink, Enabled]]:
        """The phases that enable something, and what is on then."""
        counts: dict[str, int | None] = {}
        found: list[tuple[Shrink, Enabled]] = []
        for phase in self.phases:
            counts |= dict(map(_axis_and_count, phase.enable))
            enabled = {site.name: _enabled(site, counts) for site in space.sites}
            if not found or enabled != found[-1][1]:
                found.append((phase, enabled))
        left = {s.axis for s in space.sites if found[-1][1][s.name] != s.choices}
        if left:
            raise SettingError(
                f"phases must enable every choice in the end, but not those of "
                f"{', '.join(sorted(left))}; end with a phase that enables 'all', or make the "
                "network elastic with fewer choices"
            )
        return found

    def _phase(
        self,
        phase: Shrink,
        enabled: Enabled,
        before: Enabled,
        space: Space,
        generator: torch.Generator,
    ) -> Phase:
        whole = all(len(choices) == 1 for choices in enabled.values())
        sampler: Sampler = WholeOnly(space.largest())
        if not whole:
            sampler = RandomSampler(space.subspace(enabled), generator, phase.sizes)
        enter = None if whole else _Entrance(enabled, before, bool(self.soft))
        return Phase(phase.share, sampler, Scaled(Cosine(), phase.rate), enter)


@dataclass(frozen=True)
class _Entrance:
    """What happens before a phase that trains more sizes than the full one."""

    enabled: Mapping[str, tuple[int, ...]]
    before: Mapping[str, tuple[int, ...]]
    taught: bool

    def __call__(self, run: SizesRun) -> None:
        first = all(len(choices) == 1 for choices in self.before.values())
        if first and self.taught:
            run.keep_teacher(_TEACHER)
        net = cast(Elastic, run.net)
        scores = net.importance("read_l1").items()
        # Only where something is enabled: nothing else may move.
        changed = {n: within(s, self.before[n]) for n, s in scores if self._changes(n)}
        net.sort(changed)
        run.restart()

    def _changes(self, site: str) -> bool:
        return self.enabled[site] != self.before[site]


def within(scores: Tensor, sizes: Sequence[int]) -> Tensor:
    """Scores that order units without moving any across the sizes that are on already.

    Args:
        scores: One per unit, at least 0, shape (units,).
        sizes: Ascending numbers of units, the last one all of them.

    Returns:
        Scores of the same shape: those of a smaller size are above all others.

    Example:
        >>> within(torch.tensor([1.0, 3.0, 9.0, 2.0]), (2, 4)).argsort(descending=True).tolist()
        [1, 0, 2, 3]
    """
    units = torch.arange(len(scores), device=scores.device)
    outside = sum((units >= size).to(scores.dtype) for size in sizes)
    return scores / scores.max().clamp(min=torch.finfo(scores.dtype).tiny) - 2 * outside


def _enabled(site: Site, counts: Mapping[str, int | None]) -> tuple[int, ...]:
    if site.axis not in counts and _EVERYTHING not in counts:
        return (site.full,)
    count = counts.get(site.axis, None)
    if count is None or _EVERYTHING in counts:
        return site.choices
    return site.choices[: site.choices.index(site.full) + 1][-count:]
