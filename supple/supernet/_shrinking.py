"""Progressive shrinking: one axis after another is enabled, from the full network down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from supple.errors import SettingError
from supple.network import Elastic
from supple.space import Site, Space
from supple.supernet.base import Phase, PhasedSampler, RandomSampler, SupernetRule
from supple.training.schedule import Scaled, Schedule
from supple.training.step import Sampler, SizesRun, WholeOnly

__all__ = ["Shrink", "Shrinking", "within"]

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


@dataclass(frozen=True, kw_only=True)
class Shrinking(SupernetRule):
    """What methods share that enable sizes in phases.

    Phases that enable nothing in the network at hand are left out. Without a first phase that
    enables nothing, the network is taken as it is: pretrained.

    Args:
        phases: The phases, in order; together they enable every axis of the network.
    """

    phases: tuple[Shrink, ...] = (Shrink(1), Shrink(1, (_EVERYTHING,)))

    def __post_init__(self) -> None:
        object.__setattr__(self, "phases", tuple(self.phases))
        if not self.phases:
            raise SettingError("phases must be at least one, got none")

    def shrinking(
        self,
        space: Space,
        generator: torch.Generator,
        schedule: Schedule,
        *,
        teacher: str = "",
        sort: bool = False,
    ) -> PhasedSampler:
        """Gives the sampler of the phases; each begins with new optimizer moments.

        Args:
            space: The sizes there are.
            generator: Source of randomness.
            schedule: The learning rate in each phase, relative to the phase's peak.
            teacher: In which role a frozen copy of the full network teaches from the first
                phase on that enables sizes; empty for none.
            sort: Whether units are sorted, before their widths are enabled, by the absolute
                weights that the following layers read them with, within the widths that are
                on already.

        Raises:
            SettingError: Some choices are never enabled.
        """
        phases: list[Phase] = []
        before: Enabled = {site.name: (site.full,) for site in space.sites}
        for phase, enabled in self._different(space):
            sampler: Sampler = WholeOnly(space.largest())
            enter = None
            if any(len(choices) > 1 for choices in enabled.values()):
                sampler = RandomSampler(space.subspace(enabled), generator, phase.sizes)
                enter = _Entrance(enabled, before, teacher, sort)
            phases.append(Phase(phase.share, sampler, Scaled(schedule, phase.rate), enter))
            before = enabled
        return PhasedSampler(phases)

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


@dataclass(frozen=True)
class _Entrance:
    """What happens before a phase that trains more sizes than the full one."""

    enabled: Mapping[str, tuple[int, ...]]
    before: Mapping[str, tuple[int, ...]]
    teacher: str
    sort: bool

    def __call__(self, run: SizesRun) -> None:
        first = all(len(choices) == 1 for choices in self.before.values())
        if first and self.teacher:
            run.keep_teacher(self.teacher)
        if self.sort:
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
