"""Choices follow the device: rounded to the channel counts that its profile found to pay."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import supple
from supple.cost.profile import DeviceProfile, Divisor
from supple.errors import SettingError
from supple.rebuild import axes_from, axes_record


def profile(**divisors: int) -> DeviceProfile:
    found = {kind: Divisor(kind, divisor) for kind, divisor in divisors.items()}
    return DeviceProfile("a device", "1.0", 1, "", True, {}, found)


def model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 256, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 3),
    )  # fmt: skip


def choices(axis=None, profile=None):
    axes = [axis or supple.Width((0.3,))]
    net = supple.elastic(model(), torch.zeros(1, 3, 2, 2), axes=axes, profile=profile)
    return {site.name: site.choices[0] for site in net.space.sites}


def test_without_a_profile_fractions_are_rounded_to_eight() -> None:
    assert choices() == {"0": 80, "3": 152}


def test_a_profile_rounds_convolutions_and_linear_layers_each_to_their_own() -> None:
    assert choices(profile=profile(conv=32, linear=64)) == {"0": 64, "3": 128}
    assert choices(profile=profile(conv=16, linear=1)) == {"0": 80, "3": 154}


def test_where_no_multiple_pays_nothing_is_rounded() -> None:
    assert choices(profile=profile(conv=1, linear=1)) == {"0": 77, "3": 154}


def test_a_divisor_that_was_given_stays() -> None:
    axis = supple.Width((0.3,), divisor=4)
    assert choices(axis, profile(conv=32, linear=64)) == {"0": 76, "3": 152}


def test_absolute_choices_are_left_alone() -> None:
    axis = supple.Width((77,))
    assert choices(axis, profile(conv=32, linear=64)) == {"0": 77, "3": 77}


def test_a_divisor_by_kind_is_written_and_read_back() -> None:
    axis = supple.Width((0.3,), divisor={"linear": 64, "conv": 32})
    assert hash(axis) == hash(supple.Width((0.3,), divisor={"conv": 32, "linear": 64}))
    assert axes_from(axes_record([axis]), None) == (axis,)
    assert choices(axis) == {"0": 64, "3": 128}


@pytest.mark.parametrize(
    ("divisor", "message"),
    [
        (0, "at least 1, got 0"),
        (2.5, r"at least 1, got 2\.5"),
        (True, "at least 1, got True"),
        ({"conv": 0}, "at least 1, got 0"),
        ({"convs": 8}, "did you mean 'conv'"),
    ],
)
def test_wrong_divisors_are_refused(divisor, message) -> None:
    with pytest.raises(SettingError, match=message):
        supple.Width((0.5,), divisor=divisor)
