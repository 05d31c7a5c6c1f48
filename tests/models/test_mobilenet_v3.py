"""The MobileNetV3-like network suits its images and follows its settings."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from supple.errors import SettingError
from supple.models.mobilenet_v3 import Stage, build, divisible


@pytest.mark.parametrize("variant", ["small", "large"])
@pytest.mark.parametrize(("image_size", "final"), [(8, 4), (32, 4), (48, 6), (224, 7)])
def test_strides_leave_a_map_of_at_least_four(variant, image_size, final):
    with torch.device("meta"):
        net = build(variant=variant, image_size=image_size, classes=7)
        x = net.stem(torch.empty(2, 3, image_size, image_size))
        for stage in net.stages:
            x = stage(x)
    halvings = 1 + sum(stage.stride == 2 for stage in _stages(variant))
    expected = max(final, image_size // 2**halvings)
    assert x.shape[2:] == (expected, expected)


def _stages(variant):
    from supple.models.mobilenet_v3 import STAGES

    return STAGES[variant]


def test_the_large_variant_has_the_stages_of_once_for_all():
    with torch.device("meta"):
        net = build(variant="large", image_size=224)
    assert [len(stage) for stage in net.stages] == [1, 4, 4, 4, 4, 4]
    assert [stage[-1].project[0].out_channels for stage in net.stages] == [
        16, 24, 40, 80, 112, 160,
    ]  # fmt: skip


def test_all_but_the_first_block_of_a_stage_are_residual():
    for stage in build(image_size=8).stages[1:]:
        assert [block.residual for block in stage] == [False] + [True] * (len(stage) - 1)


def test_stages_may_be_plain_mappings():
    net = build(stages=[{"channels": 11, "blocks": 2, "expansion": 2, "squeeze": True}])
    block = net.stages[0][1]
    assert block.project[0].out_channels == 11
    assert block.expand[0].out_channels == divisible(22) == 24
    assert type(block.squeeze).__name__ == "SqueezeExcite"


def test_squeeze_and_excitation_scales_each_channel_by_one_number():
    net = build(stages=[Stage(16, squeeze=True)])
    squeeze = net.stages[0][0].squeeze
    x = torch.rand(2, 64, 5, 7) + 0.5
    scale = squeeze(x) / x
    torch.testing.assert_close(scale, scale[:, :, :1, :1].expand_as(scale))
    assert scale.std() > 0


def test_width_multiplies_to_multiples_of_eight():
    wide = build(width=2.0, image_size=8)
    assert [stage[0].project[0].out_channels for stage in wide.stages] == [32, 48, 80, 128]
    assert wide.stem[0].out_channels == 32


@pytest.mark.parametrize(
    ("value", "expected"), [(3, 8), (11, 16), (16, 16), (19, 24), (43, 40)]
)
def test_rounding_never_loses_more_than_a_tenth(value, expected):
    assert divisible(value) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 7}, "image_size"),
        ({"variant": "smal"}, "did you mean 'small'"),
        ({"stages": [{"chanels": 8}]}, "did you mean 'channels'"),
        ({"stages": [{"blocks": 8}]}, "needs 'channels'"),
        ({"stages": [{"channels": 8, "kernel": 4}]}, "odd kernel"),
        ({"width": 0}, "width must be"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(SettingError, match=message):
        build(**settings)


def test_activations_follow_the_stage():
    hard, soft = (
        build(stages=[Stage(16, hard_swish=flag)]).stages[0][0].expand[2] for flag in (1, 0)
    )
    assert isinstance(hard, nn.Hardswish)
    assert isinstance(soft, nn.ReLU)
