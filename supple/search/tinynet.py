"""TinyNet: shrink by a formula that is learned from small networks that did well."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from pymoo.util.nds.non_dominated_sorting import NonDominatedSorting
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF

from supple.errors import SettingError
from supple.search._scaling import Factors, ScalingRule, Spec, kept_shares
from supple.search.base import Told
from supple.space import Space
from supple.technique import register

__all__ = ["Spec", "TinyNet"]

IntArray = NDArray[np.int64]
Points = tuple[tuple[float, float, float], ...]

_PUBLISHED: Points = (
    (24 / 387, 0.475, 0.6),
    (52 / 387, 0.68, 0.695),
    (100 / 387, 0.825, 0.85),
    (202 / 387, 0.84, 1.1),
    (339 / 387, 0.86, 1.2),
)
"""TinyNet-E to -A: cost, resolution and depth relative to EfficientNet-B0."""


@register(title="Tiny formula", paper="arXiv:2010.14819")
@dataclass(frozen=True, kw_only=True)
class TinyNet(ScalingRule):
    r"""Shrinks a convolutional network by a formula learned from small networks that did well.

    For a share $c$ of the cost, two Gaussian processes over $\log_2 c$ give what to keep of
    the resolution, $r(c)$, and of the depth, $d(c)$; the width follows from the cost,
    $w = \sqrt{c / (d r^2)}$. They are fitted to networks on the front of cost and error:
    `fitted` takes the measurements, and by default they are the five TinyNets of the paper.
    Below and above the costs of the points, $r$ and $d$ stay and the width does the rest.

    On an elastic network it is a search: it draws `population` sizes at random, fits the
    formula to the best of what it was told, and goes on along the formula.

    Args:
        points: Cost, resolution and depth of good networks, relative to the base.
        length_scale: How far a point is felt, in halvings of the cost.
        noise: How far points are off the formula: standard deviation relative to theirs.
        share: Of the networks measured, how many count as good, in (0, 1].
        population: Sizes measured before the formula is fitted anew.
        divisor: Widths are multiples of it.
        resolution_divisor: Resolutions are multiples of it.

    Example:
        >>> from supple.search.tinynet import Spec
        >>> base = Spec(depth=(2, 4, 3), width=(32, 64, 128), resolution=64)
        >>> TinyNet().scale(base, 0.25)
        Spec(depth=(2, 3, 3), width=(24, 40, 88), resolution=52, group=())

    Source:
        Han, Wang, Zhang et al. 2020, "Model Rubik's Cube: Twisting Resolution, Depth and Width
        for TinyNets", arXiv:2010.14819; huawei-noah/Efficient-AI-Backbones, `tinynet_pytorch`.
        Multipliers of the five networks as in timm and MindSpore, costs from the README.
    Differs:
        The processes are over the logarithm of the cost, with a set length scale. The good
        networks are whole fronts, taken until there are `share` of all; the paper cuts the
        last front with NSGA-III's reference points. Widths and resolutions go to the nearest
        multiple; the authors round widths down by at most a tenth, and resolutions to whole
        pixels. Stem and head scale as the builder has it; the authors keep them.
    Checked:
        The process against its closed form; the front by hand; the published networks.
    """

    distinguishing: ClassVar[str] = "factors"

    points: Points = _PUBLISHED
    length_scale: float = 1.0
    noise: float = 0.1
    share: float = 0.2
    population: int = 40

    def __post_init__(self) -> None:
        super().__post_init__()
        points = tuple(tuple(float(value) for value in point) for point in self.points)
        object.__setattr__(self, "points", points)
        if not points or any(len(p) != 3 or min(p) <= 0 for p in points):
            raise SettingError(
                "points must be triples of cost, resolution and depth above 0, at least one, "
                f"got {self.points}"
            )
        for name in ("length_scale", "noise"):
            if not getattr(self, name) > 0:
                raise SettingError(f"{name} must be above 0, got {getattr(self, name)}")
        if not 0.0 < self.share <= 1.0:
            raise SettingError(f"share must be in (0, 1], got {self.share}")
        if self.population < 2:
            raise SettingError(f"population must be at least 2, got {self.population}")

    @classmethod
    def fitted(
        cls,
        costs: Sequence[float],
        resolutions: Sequence[float],
        depths: Sequence[float],
        errors: Sequence[float],
        **settings: Any,
    ) -> Self:
        """Learns the formula from networks that were trained.

        Args:
            costs: Their costs relative to the base's.
            resolutions: Their resolutions, relative.
            depths: Their depths, relative.
            errors: What is to be small, one per network.
            **settings: Of the rule.

        Returns:
            A rule whose points are the good ones among them.

        Raises:
            SettingError: The numbers of values differ, or there are none.
        """
        try:
            rows = np.array([costs, resolutions, depths], dtype=np.float64).T
            known = np.column_stack([rows[:, 0], np.asarray(errors, dtype=np.float64)])
        except (ValueError, IndexError) as error:
            raise SettingError(
                "costs, resolutions, depths and errors need one number per network each, got "
                f"{len(costs)}, {len(resolutions)}, {len(depths)} and {len(errors)}"
            ) from error
        rule = cls(**settings)
        return dataclasses.replace(rule, points=_good(rows, known, rule.share))

    def factors(self, s: float) -> Factors:
        inside = min(max(s, min(p[0] for p in self.points)), max(p[0] for p in self.points))
        resolution, depth = _formula(self.points, self.length_scale, self.noise)(inside)
        width = math.sqrt(s / (depth * resolution**2))
        return Factors(depth, width, resolution, width)

    @property
    def generation(self) -> int:
        return self.population

    def propose(self, space: Space, parents: Told, random: np.random.Generator) -> IntArray:
        finite = parents.violations == 0
        if not finite.any():
            return space.random_many(self.population, random)
        depth, width, resolution = kept_shares(space, parents.rows[finite])
        costs = depth * width**2 * resolution**2
        points = np.column_stack([costs, resolution, depth])
        known = np.column_stack([costs, parents.values[finite]])
        rule = dataclasses.replace(self, points=_good(points, known, self.share))
        return rule.along(space)


def _good(rows: NDArray[Any], known: NDArray[Any], share: float) -> Points:
    """Keeps the rows of the best fronts of `known`, until there are enough."""
    enough = max(1, round(share * len(rows)))
    fronts = NonDominatedSorting().do(known, n_stop_if_ranked=enough)
    kept = [rows[i].tolist() for front in fronts for i in sorted(front)]
    return tuple((cost, resolution, depth) for cost, resolution, depth in kept)


@cache
def _formula(points: Points, length_scale: float, noise: float) -> Any:
    """Gives the function from a cost to resolution and depth."""
    costs, *sizes = np.array(points).T
    process = GaussianProcessRegressor(
        RBF(length_scale), alpha=noise**2, optimizer=None, normalize_y=True
    ).fit(np.log2(costs)[:, None], np.column_stack(sizes))
    floor = np.min(sizes, axis=1) / 2  # far from its points a process may fall below 0

    def formula(cost: float) -> tuple[float, float]:
        found = process.predict(np.array([[math.log2(cost)]]))[0]
        resolution, depth = np.maximum(found, floor)
        return float(resolution), float(depth)

    return formula
