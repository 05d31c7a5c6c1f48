"""Truths about what scaling rules share."""

from __future__ import annotations

import math

import numpy as np
import pytest

from supple.errors import SettingError
from supple.search._scaling import Factors, ScalingRule, Spec, by_shares, kept_shares
from supple.space import Site, Space

BASE = Spec(depth=(2, 3), width=(16, 40), resolution=32)
SITES = [
    Site("a.depth", "depth", (1, 2, 3, 4), 4),
    Site("b.depth", "depth", (1, 2, 3, 4), 4),
    Site("a.width", "width", (8, 16, 24, 32), 32),
    Site("b.heads", "heads", (1, 2, 4), 4),
    Site("kernel", "kernel", (3, 5), 5),
    Site("resolution", "resolution", (16, 24, 32), 32),
]


def macs(spec: Spec) -> float:
    """A stem that does not scale, and stages of convolutions."""
    stages = sum(d * w**2 for d, w in zip(spec.depth, spec.width, strict=True))
    return float(spec.resolution**2 * (48 + stages))


def test_compound_scaling_is_efficientnets() -> None:
    factors = ScalingRule().factors(1.2 * 1.1**2 * 1.15**2)
    assert factors == pytest.approx((1.2, 1.1, 1.15, 1.1))


@pytest.mark.parametrize("s", [0.1, 0.5, 1.0, 7.0])
def test_factors_multiply_to_the_cost(s: float) -> None:
    for factors in (
        ScalingRule().factors(s),
        by_shares(s, depth=0.2, width=0.5, resolution=0.3),
    ):
        assert factors.depth * factors.width**2 * factors.resolution**2 == pytest.approx(s)


class _Given(ScalingRule):
    """A rule whose factors are given, so that rounding can be seen."""

    def factors(self, s: float) -> Factors:
        return Factors(1.3, 1.3, 1.1, s)


def test_rounding_is_the_authors() -> None:
    # 2.6 and 3.9 blocks; 20.8 and 52 channels in eights (52 / 8 = 6.5 goes to the even 6);
    # 35.2 pixels in fours.
    expected = Spec(depth=(3, 4), width=(24, 48), resolution=36)
    assert _Given().scale(BASE, 1.0) == expected


@pytest.mark.parametrize(
    ("group", "s", "expected"),
    [
        (1, 1.4, (1, 24)),
        (2, 1.1, (2, 24)),
        (2, 1.6, (4, 24)),  # 3.2 is 3, and 3 to 5 become 4
        (4, 1.3, (4, 24)),  # 5.2 is 5
        (4, 1.6, (8, 24)),  # 6.4 is 6, nearer to 8 than to 0
        (8, 1.9, (16, 32)),  # 15.2; 24 channels are one and a half groups of 16: two
        (16, 2.0, (24, 24)),  # no group is wider than its stage
    ],
)
def test_groups_round_as_the_authors_and_fit_their_width(
    group: int, s: float, expected: tuple[int, int]
) -> None:
    spec = _Given().scale(Spec((2,), (16,), 32, (group,)), s)
    assert (spec.group[0], spec.width[0]) == expected


def test_nothing_goes_below_one_block_or_one_divisor() -> None:
    spec = ScalingRule().scale(BASE, 1e-6)
    assert spec == Spec(depth=(1, 1), width=(8, 8), resolution=4)


@pytest.mark.parametrize("s", [0.2, 0.5, 2.0, 9.0])
def test_widths_move_until_the_cost_is_met(s: float) -> None:
    rule = ScalingRule(divisor=1)
    plain, met = rule.scale(BASE, s), rule.scale(BASE, s, macs=macs, tolerance=0.03)
    assert abs(macs(met) / macs(BASE) / s - 1) <= 0.03
    assert (met.depth, met.resolution) == (plain.depth, plain.resolution)
    # No factor for both widths, however fine, comes much nearer.
    factors = rule.factors(s)
    tried = [
        Spec(
            met.depth, tuple(round(w * factors.width * by) for w in BASE.width), met.resolution
        )
        for by in np.linspace(0.4, 2.5, 3000)
    ]
    nearest = min(abs(macs(spec) / macs(BASE) / s - 1) for spec in tried)
    assert abs(macs(met) / macs(BASE) / s - 1) == pytest.approx(nearest, abs=1e-3)


def test_a_cost_that_no_width_meets_is_refused_with_the_nearest() -> None:
    with pytest.raises(SettingError, match=r"nearest is Spec.* at [-+]\d.*divisor below 64"):
        ScalingRule(divisor=64).scale(BASE, 2.0, macs=macs, tolerance=0.01)


@pytest.mark.parametrize(
    "wrong",
    [
        {"depth": (1,), "width": (8, 8), "resolution": 8},
        {"depth": (), "width": (), "resolution": 8},
        {"depth": (0,), "width": (8,), "resolution": 8},
        {"depth": (1,), "width": (8,), "resolution": 8, "group": (2, 2)},
    ],
)
def test_a_spec_that_is_no_network_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(SettingError):
        Spec(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("s", [0.0, -1.0, math.nan, math.inf])
def test_a_size_that_is_none_is_refused(s: float) -> None:
    with pytest.raises(SettingError, match="above 0"):
        ScalingRule().scale(BASE, s)


def test_divisors_are_checked() -> None:
    with pytest.raises(SettingError, match="resolution_divisor must be at least 1"):
        ScalingRule(resolution_divisor=0)


def test_on_a_space_each_kind_of_site_follows_its_factor() -> None:
    class Halved(ScalingRule):
        def factors(self, s: float) -> Factors:
            return Factors(0.6, 0.5, 0.75)

    # 0.6 x 4 = 2.4 is 2; the 0.4 lost go to the next stack: 2.8 is 3.
    row = Halved().along(Space(SITES))[0]
    chosen = [site.choices[i] for site, i in zip(SITES, row, strict=True)]
    assert chosen == [2, 3, 16, 2, 5, 24]


def test_between_two_choices_the_larger_is_kept() -> None:
    class Halved(ScalingRule):
        def factors(self, s: float) -> Factors:
            return Factors(1.0, 0.5, 1.0)

    assert Halved().along(Space([Site("w", "width", (1, 3, 4), 4)]))[0].tolist() == [1]


def test_blocks_that_are_sites_of_their_own_are_kept_in_proportion() -> None:
    class Third(ScalingRule):
        def factors(self, s: float) -> Factors:
            return Factors(1 / 3, 1.0, 1.0)

    space = Space([Site(f"{i}.depth", "depth", (0, 1), 1) for i in range(9)])
    assert Third().along(space)[0].tolist() == [0, 1, 0, 0, 1, 0, 0, 1, 0]


def test_the_search_goes_from_both_ends_inwards() -> None:
    space = Space(SITES)
    run = ScalingRule().start(space, ["error"], 0)
    first, second, *middle = run.ask(6)
    assert first == space.largest()
    # Resolution is at its first choice before depth is.
    assert second["resolution"] == 16
    costs = [np.prod(kept_shares(space, space.encode_many([c])), axis=0)[0] for c in middle]
    low, high = (np.prod(kept_shares(space, space.encode_many([c]))) for c in (second, first))
    assert all(low <= cost <= high for cost in costs)


def test_shares_are_of_what_can_vary() -> None:
    space = Space(SITES)
    rows = space.encode_many([{**space.smallest(), "b.depth": 4}])
    depth, width, resolution = kept_shares(space, rows)
    assert (depth[0], width[0], resolution[0]) == (5 / 8, 9 / 36, 1 / 2)
    assert kept_shares(Space(SITES[:2]), rows[:, :2])[1].tolist() == [1.0]
