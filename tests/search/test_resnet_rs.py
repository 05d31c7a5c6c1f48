"""Truths about the scaling strategies of ResNet-RS."""

from __future__ import annotations

import math

import pytest

from supple.errors import SettingError
from supple.search._scaling import ScalingRule
from supple.search.resnet_rs import ResNetRS

FAMILY = [
    (50, 160), (101, 160), (101, 192), (152, 192), (152, 224), (152, 256),
    (200, 256), (270, 256), (350, 256), (350, 320), (420, 320),
]  # fmt: skip
"""Layers and pixels of the released configurations."""


def test_long_training_grows_depth_and_short_training_width() -> None:
    assert ResNetRS().factors(32.0) == pytest.approx((32**0.6, 1.0, 32**0.2, 1.0))
    short = ResNetRS(overfits=False).factors(32.0)
    assert short == pytest.approx((1.0, 32**0.3, 32**0.2, 32**0.3))


def test_the_rule_goes_from_the_familys_first_network_to_its_last() -> None:
    (layers, pixels), (most, largest) = FAMILY[0], FAMILY[-1]
    factors = ResNetRS().factors(most * largest**2 / (layers * pixels**2))
    assert layers * factors.depth == pytest.approx(most, rel=0.03)
    assert pixels * factors.resolution == pytest.approx(largest, rel=0.03)


def test_resolution_grows_more_slowly_than_under_compound_scaling() -> None:
    assert 1.0 < ResNetRS().factors(10.0).resolution < ScalingRule().factors(10.0).resolution
    share = 2 * math.log(1.15) / math.log(1.2 * 1.1**2 * 1.15**2)
    assert ResNetRS().resolution_share < share


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_the_share_is_checked(share: float) -> None:
    with pytest.raises(SettingError, match="resolution_share"):
        ResNetRS(resolution_share=share)
