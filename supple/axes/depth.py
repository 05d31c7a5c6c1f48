"""Depth: how many residual blocks of a stack run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from supple.axes.base import Axis, Patch, check_choices, choices_of, selected
from supple.errors import SettingError
from supple.graph.blocks import Stack
from supple.graph.couple import Graph
from supple.graph.joins import Join, find_joins
from supple.graph.repeats import Repeat
from supple.space import Site

__all__ = ["Depth"]

PATTERNS = ("prefix", "even", "any")


@dataclass(frozen=True)
class DepthSite(Site):
    """A site that leaves blocks of one stack out.

    With a `block` the site is that block (0 leaves it out, 1 keeps it); without, its choice is
    the number of blocks that stay. With a `repeat` it is the number of calls of one module,
    with a `join` the number of blocks whose outputs are put side by side.
    """

    stack: Stack | None = field(default=None, compare=False, repr=False)
    block: int | None = field(default=None, compare=False, repr=False)
    repeat: Repeat | None = field(default=None, compare=False, repr=False)
    join: Join | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Depth(Axis):
    """Makes the number of residual blocks of every stack elastic.

    A module that is called several times in a row (ALBERT's shared layer, a recurrent block)
    gives a site `<path>.calls`: how many of its calls are made, always the first ones.

    Args:
        choices: Block counts on offer per stack, counting the blocks that can be left out:
            fractions (floats in (0, 1]) or counts (integers). None offers every count.
        pattern: Which blocks stay: the first ones (`prefix`), evenly spaced ones, the first
            and last among them (`even`), or any (`any`: each block is a site of its own).
        joined: Whether blocks whose outputs are put side by side, for later layers to read
            them all, can be left out, too: always the last ones, and what reads them loses the
            parts that they made. (A detector whose neck takes certain blocks should keep them.)
        where: Only stacks whose container's path matches this shell-style pattern.

    Raises:
        SettingError: The pattern is unknown, or a choice is not a fraction or a count.

    Example:
        >>> Depth(pattern="even").pattern
        'even'
    """

    choices: tuple[int | float, ...] | None = None
    pattern: str = "prefix"
    joined: bool = False
    where: str | None = None
    name: ClassVar[str] = "depth"

    def __post_init__(self) -> None:
        if self.choices is not None:
            object.__setattr__(self, "choices", tuple(self.choices))
        check_choices(self.name, self.choices)
        if self.pattern not in PATTERNS:
            raise SettingError(f"pattern must be one of {PATTERNS}, got {self.pattern!r}")

    def sites(self, graph: Graph) -> Sequence[Site]:
        sites: list[Site] = []
        seen: dict[str, int] = {}
        for stack in graph.stacks:
            if not selected(stack.container, self.where):
                continue
            count = seen[stack.container] = seen.get(stack.container, 0) + 1
            base = f"{stack.container}.depth" if stack.container else "depth"
            label = base if count == 1 else f"{base}#{count}"
            sites.extend(self._of_stack(stack, label))
        for repeat in graph.repeats:
            if selected(repeat.path, self.where):
                sites.extend(self._of_repeat(repeat))
        if self.joined:
            joins = [
                join for join in find_joins(graph) if selected(join.stack.container, self.where)
            ]
            sites.extend(site for join in joins for site in self._of_join(join))
        return sites

    def fixed(self, graph: Graph) -> Mapping[str, str]:
        if not self.joined:
            return {}
        joins = [
            join for join in find_joins(graph) if selected(join.stack.container, self.where)
        ]
        return {join.stack.path(b): "" for join in joins for b in join.stack.blocks}

    def _of_repeat(self, repeat: Repeat) -> list[Site]:
        """All calls are of the same weights: whatever the pattern, the first ones stay."""
        counts = choices_of(repeat.count, 1, self.choices, 1) if self.choices else ()
        offered = tuple(sorted({*(counts or range(1, repeat.count)), repeat.count}))
        name = f"{repeat.path}.calls"
        site = DepthSite(name, self.name, offered, repeat.count, repeat=repeat)
        return [site] if offered[1:] else []

    def _of_join(self, join: Join) -> list[Site]:
        full = len(join.stack.blocks)
        counts = choices_of(full, 1, self.choices, 1) if self.choices else range(1, full + 1)
        site = DepthSite(
            f"{join.stack.container}.depth", self.name, tuple(counts), full, join=join
        )
        return [site] if len(counts) > 1 else []

    def _of_stack(self, stack: Stack, label: str) -> list[Site]:
        full = len(stack.blocks)
        if self.pattern == "any":
            return [
                DepthSite(f"{stack.path(b)}.keep", self.name, (0, 1), 1, stack=stack, block=b)
                for b in stack.blocks
            ]
        counts = set(choices_of(full, 1, self.choices, 1)) if self.choices else {*range(full)}
        counts = {n for n in counts if n >= stack.least} | {full}
        if self.choices is None and stack.least == 0:
            counts.add(0)
        offered = tuple(sorted(counts))
        return [DepthSite(label, self.name, offered, full, stack=stack)] if offered[1:] else []

    def patch(self, site: Site, choice: int) -> Patch:
        assert isinstance(site, DepthSite)
        if site.repeat is not None:
            if choice == site.full:
                return Patch()
            # fewer operators run: costs record each number of calls
            return Patch(attributes={site.repeat.attribute: choice}, downstream=True)
        if site.join is not None:
            return _without(site.join, choice)
        assert site.stack is not None
        stack = site.stack
        if site.block is not None:
            kept = set(stack.blocks) - ({site.block} if choice == 0 else set())
        else:
            kept = self._kept(stack, choice)
        return Patch(dropped=frozenset(stack.path(b) for b in stack.blocks if b not in kept))

    def _kept(self, stack: Stack, count: int) -> set[int]:
        blocks = stack.blocks
        if self.pattern == "prefix" or count in (0, len(blocks)):
            return set(blocks[:count])
        if count == 1:
            return {blocks[0]}
        last = len(blocks) - 1
        return {blocks[round(i * last / (count - 1))] for i in range(count)}

    def paths(self, site: Site) -> tuple[str, ...]:
        assert isinstance(site, DepthSite)
        if site.repeat is not None:
            return (site.repeat.path,)
        if site.join is not None:
            return (site.join.stack.container,)
        assert site.stack is not None
        return (site.stack.container,)


def _without(join: Join, count: int) -> Patch:
    """The first blocks stay; what reads them all loses the parts of the others."""
    gone = frozenset(join.stack.path(block) for block in join.stack.blocks[count:])
    kept = tuple(number for number, block in enumerate(join.parts) if block not in gone)
    if not gone:
        return Patch()
    return Patch(
        dropped=gone,
        tensors={name: _Parts(dim, len(join.parts), kept) for name, dim in join.readers},
        downstream=True,  # what is joined is narrower: costs record each number of blocks
    )


@dataclass(frozen=True)
class _Parts:
    """Keeps some of the equal parts of a dimension."""

    dim: int
    count: int
    kept: tuple[int, ...]

    def __call__(self, tensor: Tensor) -> Tensor:
        parts = tensor.chunk(self.count, self.dim)
        return torch.cat([parts[number] for number in self.kept], self.dim)
