"""Truths about fast scaling."""

from __future__ import annotations

import math

import pytest

from supple.errors import SettingError
from supple.search.fast_scaling import FastScaling, Spec


def test_factors_are_those_of_the_authors_preset() -> None:
    # Preset d1_w8_g8_r1: of ten parts of the growth, one for depth, one for resolution.
    factors = FastScaling().factors(16.0)
    assert factors == pytest.approx((16**0.1, 16**0.4, 16**0.05, 16**0.4))


@pytest.mark.parametrize(
    ("alpha", "exponent"), [(0.0, 1.0), (1 / 3, 5 / 6), (0.8, 0.6), (1.0, 0.5)]
)
def test_activations_grow_with_the_exponent_of_the_paper(alpha: float, exponent: float) -> None:
    factors = FastScaling(alpha=alpha).factors(7.0)
    assert factors.depth * factors.width**2 * factors.resolution**2 == pytest.approx(7.0)
    activations = factors.depth * factors.width * factors.resolution**2
    assert math.log(activations, 7.0) == pytest.approx(exponent)


def test_a_network_with_groups_scales_as_the_authors_code_does() -> None:
    # By 8: depth x 1.23, width and groups x 2.30, pixels x 1.11. Widths 112 and 256, then whole
    # groups of 40 (36.8 to a multiple of 8).
    base = Spec((2, 6), (48, 112), 224, (16, 16))
    assert FastScaling().scale(base, 8.0) == Spec((2, 7), (120, 240), 248, (40, 40))


@pytest.mark.parametrize("alpha", [-0.1, 1.1])
def test_alpha_is_checked(alpha: float) -> None:
    with pytest.raises(SettingError, match=r"alpha must be in \[0, 1\]"):
        FastScaling(alpha=alpha)
