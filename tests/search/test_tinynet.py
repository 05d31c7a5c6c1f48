"""Truths about the tiny formula."""

from __future__ import annotations

import math

import numpy as np
import pytest

from supple.errors import SettingError
from supple.search._scaling import kept_shares
from supple.search.tinynet import TinyNet
from supple.space import Site, Space


def test_width_follows_from_the_cost() -> None:
    rule = TinyNet(points=((0.25, 0.8, 0.5),))
    # One point: resolution and depth are its, whatever the cost.
    factors = rule.factors(0.16)
    assert factors == pytest.approx((0.5, math.sqrt(0.16 / 0.32), 0.8, math.sqrt(0.5)))


def test_the_formula_is_the_closed_form_of_a_gaussian_process() -> None:
    rule = TinyNet(points=((0.125, 0.4, 0.5), (0.5, 0.8, 1.1)), noise=0.5, length_scale=2.0)
    # By hand: log costs -3 and -1, kernel exp(-4 / 8) between them, normalised targets -1, 1.
    apart, half = math.exp(-0.5), math.exp(-1 / 8)
    inverse = np.linalg.inv(np.array([[1.25, apart], [apart, 1.25]]))
    middle = float(np.array([half, half]) @ inverse @ np.array([-1.0, 1.0]))
    low = float(np.array([1.0, apart]) @ inverse @ np.array([-1.0, 1.0]))
    assert rule.factors(0.25).resolution == pytest.approx(0.6 + 0.2 * middle)
    assert rule.factors(0.125).resolution == pytest.approx(0.6 + 0.2 * low)
    assert rule.factors(0.125).depth == pytest.approx(0.8 + 0.3 * low)
    # Below the points, resolution and depth stay.
    assert rule.factors(0.01).resolution == rule.factors(0.125).resolution


def test_the_published_networks_lie_on_the_default_formula() -> None:
    rule = TinyNet()
    for cost, resolution, depth in rule.points:
        factors = rule.factors(cost)
        assert factors.resolution == pytest.approx(resolution, abs=0.01)
        assert factors.depth == pytest.approx(depth, abs=0.02)
    found = [rule.factors(c).resolution for c in np.linspace(0.07, 0.85, 40)]
    assert found == sorted(found)


def test_only_the_front_counts() -> None:
    costs, errors = [0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.3, 0.4]  # the 2nd and 4th are beaten
    rule = TinyNet.fitted(costs, [0.5, 0.6, 0.7, 0.8], [0.9, 1.0, 1.1, 1.2], errors, share=0.5)
    assert rule.points == ((0.1, 0.5, 0.9), (0.3, 0.7, 1.1))
    more = TinyNet.fitted(costs, [0.5, 0.6, 0.7, 0.8], [0.9, 1.0, 1.1, 1.2], errors, share=0.75)
    assert len(more.points) == 4


def test_networks_without_their_numbers_are_refused() -> None:
    with pytest.raises(SettingError, match="one number per network"):
        TinyNet.fitted([0.1, 0.2], [0.5], [0.9, 1.0], [0.5, 0.4])


def test_the_search_learns_the_formula_from_what_it_is_told() -> None:
    space = Space(
        [Site(f"{i}.depth", "depth", (1, 2, 3, 4, 5), 5) for i in range(4)]
        + [Site(f"{i}.width", "width", (2, 4, 6, 8, 10), 10) for i in range(4)]
        + [Site("resolution", "resolution", (8, 12, 16, 20, 24, 28, 32), 32)]
    )
    run = TinyNet(population=60, noise=0.3).start(space, ["error"], 0)
    for _ in range(2):
        rows = run.ask_rows(60)
        # Here the shallow ones are good at any cost; the published networks are deep.
        depth, _, _ = kept_shares(space, rows)
        run.tell(rows, depth[:, None])
    learned, _, _ = kept_shares(space, run.told.rows[60:70])
    published, _, _ = kept_shares(space, TinyNet().along(space)[:10])
    assert learned.mean() < 0.45 < 0.6 < published.mean()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"points": ()}, "points must be triples"),
        ({"points": ((0.1, 0.2, 0.0),)}, "points must be triples"),
        ({"noise": 0.0}, "noise must be above 0"),
        ({"length_scale": -1.0}, "length_scale must be above 0"),
        ({"share": 0.0}, r"share must be in \(0, 1\]"),
        ({"population": 1}, "population must be at least 2"),
    ],
)
def test_settings_are_checked(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        TinyNet(**wrong)  # type: ignore[arg-type]
