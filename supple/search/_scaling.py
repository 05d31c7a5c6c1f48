"""What scaling rules share: how a base grows or shrinks by one number.

A rule says how much of a change of the multiply-accumulates by `s` goes into depth, width and
resolution. `factors(s)` is the closed form; `scale` turns it into whole numbers for a network
that is built anew; on an elastic network the rule is a search that walks along `s` alone.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from supple.errors import SettingError
from supple.search.base import SearchAlgorithm, Told
from supple.space import Site, Space

__all__ = ["Factors", "ScalingRule", "Spec", "by_shares", "kept_shares"]

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
Macs = Callable[["Spec"], float]

_AXES = {"width": "width", "heads": "width", "depth": "depth", "resolution": "resolution"}
"""Kinds of sites that a rule decides on, and by which of its factors."""
_HALVINGS = 6
_LEAST = 1e-3
_WIDTHS = np.geomspace(1 / 3, 3, 801)
"""Widths that are tried to meet a cost, relative to what the rule says."""


class Factors(NamedTuple):
    """What depth, width, resolution and group width are multiplied by."""

    depth: float
    width: float
    resolution: float
    group: float = 1.0


@dataclass(frozen=True)
class Spec:
    """A convolutional network, as scaling rules see it.

    Args:
        depth: Blocks of each stage, at least 1 each.
        width: Channels of each stage, as many numbers as `depth`.
        resolution: Height and width of the images in pixels.
        group: Channels per group of each stage's grouped convolutions; empty without any.

    Raises:
        SettingError: The numbers of stages differ, or a number is below 1.

    Example:
        >>> Spec(depth=[1, 2], width=[16, 32], resolution=32).width
        (16, 32)
    """

    depth: tuple[int, ...]
    width: tuple[int, ...]
    resolution: int
    group: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("depth", "width", "group"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        stages = {len(self.depth), len(self.width), len(self.group) or len(self.width)}
        if len(stages) > 1 or not self.depth:
            raise SettingError(
                "depth, width and group need one number per stage each, got "
                f"{self.depth}, {self.width} and {self.group}"
            )
        if min(*self.depth, *self.width, *self.group, self.resolution) < 1:
            raise SettingError(f"all numbers of a spec must be at least 1, got {self}")


def by_shares(s: float, *, depth: float, width: float, resolution: float) -> Factors:
    """Gives factors from the share of the growth that each of the three takes.

    Multiply-accumulates are proportional to depth, and to the squares of width and resolution.

    Args:
        s: What the multiply-accumulates are multiplied by.
        depth: Share of the growth that goes into depth; the shares sum to 1.
        width: Share that goes into width; the width of groups grows alike.
        resolution: Share that goes into resolution.

    Example:
        >>> by_shares(16.0, depth=0.5, width=0.5, resolution=0.0)
        Factors(depth=4.0, width=2.0, resolution=1.0, group=2.0)
    """
    wider = s ** (width / 2)
    return Factors(s**depth, wider, s ** (resolution / 2), wider)


@dataclass(frozen=True, kw_only=True)
class ScalingRule(SearchAlgorithm):
    """Base of scaling rules: compound scaling, as EfficientNet has it.

    Args:
        divisor: Widths are multiples of it.
        resolution_divisor: Resolutions are multiples of it.

    Source of the default factors:
        Tan and Le 2019, arXiv:1905.11946: 1.2 for depth, 1.1 for width and 1.15 for resolution
        at each step.
    """

    divisor: int = 8
    resolution_divisor: int = 4

    def __post_init__(self) -> None:
        for name in ("divisor", "resolution_divisor"):
            if getattr(self, name) < 1:
                raise SettingError(f"{name} must be at least 1, got {getattr(self, name)}")

    def factors(self, s: float) -> Factors:
        """Gives what depth, width and resolution are multiplied by.

        Args:
            s: What the multiply-accumulates shall be multiplied by, above 0.

        Returns:
            Factors with depth times width squared times resolution squared equal to `s`.
        """
        steps = math.log(s) / math.log(1.2 * 1.1**2 * 1.15**2)
        return Factors(1.2**steps, 1.1**steps, 1.15**steps, 1.1**steps)

    def scale(
        self, base: Spec, s: float, *, macs: Macs | None = None, tolerance: float = 0.05
    ) -> Spec:
        """Scales a network to `s` times its multiply-accumulates.

        Rounding, and what does not scale (stem, classifier), move the cost off what was asked
        for. Where `macs` is given, all widths are therefore moved by one common factor until
        the cost is met.

        Args:
            base: What is scaled.
            s: What the multiply-accumulates are multiplied by, above 0.
            macs: Gives the cost of a spec, such as the count of the network built from it.
            tolerance: Largest relative miss of the cost, above 0.

        Returns:
            The scaled network: whole blocks, at least one in each stage, widths and resolution
            multiples of the divisors, widths multiples of their groups.

        Raises:
            SettingError: `s` or `tolerance` is not above 0, or no width meets the cost.
        """
        if not (s > 0 and tolerance > 0 and math.isfinite(s)):
            raise SettingError(f"s and tolerance must be above 0, got {s} and {tolerance}")
        factors = self.factors(s)
        if macs is None:
            return self._rounded(base, factors)
        return self._meeting(base, factors, s, macs, tolerance)

    def _rounded(self, base: Spec, factors: Factors) -> Spec:
        widths = [_multiple(w * factors.width, self.divisor) for w in base.width]
        groups = [_group(g * factors.group) for g in base.group]
        if groups:
            groups = [min(g, w) for g, w in zip(groups, widths, strict=True)]
            widths = [_multiple(w, g) for g, w in zip(groups, widths, strict=True)]
        return Spec(
            depth=tuple(max(1, round(d * factors.depth)) for d in base.depth),
            width=tuple(widths),
            resolution=self._pixels(base.resolution * factors.resolution),
            group=tuple(groups),
        )

    def _pixels(self, resolution: float) -> int:
        return _multiple(resolution, self.resolution_divisor)

    def _meeting(
        self, base: Spec, factors: Factors, s: float, macs: Macs, tolerance: float
    ) -> Spec:
        """Moves the widths: depth and resolution are too coarse to meet a cost."""
        wanted = s * macs(base)
        near = (factors._replace(width=factors.width * float(by)) for by in _WIDTHS)
        specs = list(dict.fromkeys(self._rounded(base, each) for each in near))
        cost = cache(macs)
        above = bisect.bisect_left(specs, wanted, key=cost)
        around = specs[max(above - 1, 0) : above + 1]
        best = min(around, key=lambda spec: abs(cost(spec) / wanted - 1))
        miss = cost(best) / wanted - 1
        if abs(miss) > tolerance:
            raise SettingError(
                f"no widths meet {s:g} times the cost of {base} within {tolerance:.1%}: the "
                f"nearest is {best} at {miss:+.1%}; a divisor below {self.divisor} or a larger "
                "tolerance would do"
            )
        return best

    # ------------------------------------------------------------ on an elastic network

    def propose(self, space: Space, parents: Told, random: np.random.Generator) -> IntArray:
        return self.along(space)

    def along(self, space: Space) -> IntArray:
        """Gives the configs along the rule, from both ends inwards, shape (configs, sites)."""
        rows = [self._row(space, s) for s in _numbers(_least(space))]
        return space.canonical_many(np.array(rows, dtype=np.int64))

    def _row(self, space: Space, s: float) -> list[int]:
        """Encodes the config that keeps of each site what the rule says."""
        factors = self.factors(s)._asdict()
        owed = 0.0
        row = []
        for site in space.sites:
            wanted = site.full * factors.get(_AXES.get(site.axis, ""), 1.0)
            if site.axis == "depth":
                # One block can't be kept by half: what rounding takes, the next stack gets.
                wanted += owed
            index = _nearest(site, wanted)
            if site.axis == "depth":
                owed = wanted - site.choices[index]
            row.append(index)
        return row


def kept_shares(space: Space, rows: IntArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Tells what share of depth, width and resolution configs keep; 1 where none can vary.

    Args:
        space: Their space.
        rows: Encoded configs, shape (configs, sites).

    Returns:
        Three arrays of shape (configs,): choices summed over the sites, relative to the full.
        Sites of blocks that are left out count as full.
    """
    choices = space.choices_of(rows)
    depth, width, resolution = (
        _share(space, choices, name) for name in ("depth", "width", "resolution")
    )
    return depth, width, resolution


def _share(space: Space, choices: IntArray, name: str) -> FloatArray:
    columns = [i for i, site in enumerate(space.sites) if _AXES.get(site.axis) == name]
    full = sum(space.sites[i].full for i in columns)
    kept: FloatArray = choices[:, columns].sum(axis=1) / full if full else np.ones(len(choices))
    # Where all blocks can be left out, nothing would be the smallest size.
    return np.maximum(kept, _LEAST)


def _least(space: Space) -> float:
    """Gives the share of the cost that is left with the first choice at every site."""
    first = np.zeros((1, len(space.sites)), dtype=np.int64)
    depth, width, resolution = kept_shares(space, first)
    return float((depth * width**2 * resolution**2)[0])


def _numbers(least: float) -> list[float]:
    """Lists numbers from 1 to `least`, evenly in the logarithm, each halving the last gaps."""
    places = [0.0, 1.0]
    for depth in range(1, _HALVINGS + 1):
        places += [odd / 2**depth for odd in range(1, 2**depth, 2)]
    return [least**place for place in places]


def _nearest(site: Site, wanted: float) -> int:
    """Gives the index of the choice nearest to a size; of two the larger."""
    misses = [abs(choice - wanted) for choice in site.choices]
    return max(i for i, miss in enumerate(misses) if miss == min(misses))


def _multiple(value: float, divisor: int) -> int:
    return max(1, round(value / divisor)) * divisor


def _group(width: float) -> int:
    """Rounds a width of groups as the authors of fast scaling do: to 1, 2, 4, 8, 16, 24, ..."""
    whole = max(1, round(width))
    if whole <= 2:
        return whole
    return 4 if whole <= 5 else _multiple(whole, 8)
