"""The convolution whose sizes are decided by thresholds."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from supple.errors import SettingError
from supple.layers.super_kernel import Decision, SuperKernelConv2d, deciding, indicator


def layer(**settings):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return SuperKernelConv2d(6, 6, groups=6, **settings)


def images():
    return torch.randn(2, 6, 7, 7, generator=torch.Generator().manual_seed(1))


def test_the_indicator_is_hard_and_has_the_gradient_of_a_sigmoid():
    x = torch.tensor([-2.0, -1e-6, 0.0, 3.0], requires_grad=True)
    value = indicator(x)
    value.sum().backward()
    assert value.tolist() == [0.0, 0.0, 1.0, 1.0]
    soft = torch.sigmoid(x.detach())
    torch.testing.assert_close(x.grad, soft * (1 - soft))


def test_thresholds_are_held_against_norms_of_rings_and_channels():
    conv = layer(kernel_sizes=(1, 3, 5), widths=(0.5, 1.0))
    with torch.no_grad():
        conv.weight.fill_(1.0)
        # rings of 8 and 16 points in each of 6 channels
        conv.supple_kernel_thresholds.copy_(torch.tensor([48**0.5 - 0.01, 96**0.5 + 0.01]))
        # without the outer ring 9 points in each of 3 channels
        conv.supple_width_thresholds.copy_(torch.tensor([27**0.5 - 0.01, 27**0.5 + 0.01]))
    decision = conv.decide()
    assert decision.kernels.tolist() == [1.0, 0.0]
    assert decision.widths.tolist() == [1.0, 0.0]
    assert decision.counts() == (1, 1)


def test_what_follows_a_refusal_does_not_count():
    decision = Decision(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0]))
    assert decision.counts() == (0, 0)
    conv = layer(kernel_sizes=(1, 3, 5))
    with deciding([conv], [Decision(decision.kernels, torch.ones(2))]):
        inner = conv(images())
    torch.testing.assert_close(inner, images() * conv.weight[:, 0, 2, 2, None, None])
    with deciding([conv], [Decision(torch.ones(2), decision.widths)]):
        assert not conv(images()).any()


@pytest.mark.parametrize(("kernels", "size"), [(0.0, 3), (1.0, 5)])
@pytest.mark.parametrize(("widths", "channels"), [((1.0, 0.0), 2), ((1.0, 1.0), 6)])
def test_it_computes_with_the_sizes_decided_on(kernels, size, widths, channels):
    conv = layer(widths=(1 / 3, 1.0), bias=True, stride=2)
    decision = Decision(torch.tensor([kernels]), torch.tensor(widths))
    with deciding([conv], [decision]):
        given = conv(images())
    edge = (5 - size) // 2
    weight = conv.weight[:channels, :, edge : 5 - edge, edge : 5 - edge]
    expected = F.conv2d(
        images()[:, :channels], weight, conv.bias[:channels], 2, size // 2, groups=channels
    )
    torch.testing.assert_close(given[:, :channels], expected)
    assert not given[:, channels:].any()


def test_it_is_an_ordinary_convolution_outside_the_block():
    conv = layer()
    plain = nn.Conv2d(6, 6, 5, padding=2, groups=6, bias=False)
    plain.weight = conv.weight
    nothing = Decision(torch.zeros(1), torch.zeros(2))
    with pytest.raises(ZeroDivisionError), deciding([conv], [nothing]):
        raise ZeroDivisionError
    torch.testing.assert_close(conv(images()), plain(images()))


def test_gradients_reach_weights_and_thresholds():
    conv = layer()
    before = conv.weight.detach().clone()
    with deciding([conv], [conv.decide()]):
        conv(images()).sum().backward()
    kernels, widths = conv.supple_kernel_thresholds.grad, conv.supple_width_thresholds.grad
    # all indicators are 1: raising the first width's threshold takes the whole output away
    with torch.no_grad():
        norms = [float(part.norm()) for part in before.split(3)]
        outputs = [float(each.sum()) for each in conv(images()).split(3, dim=1)]
    slopes = [float(indicator_slope(norm)) for norm in norms]
    expected = torch.tensor([-slopes[0] * sum(outputs), -slopes[1] * outputs[1]])
    torch.testing.assert_close(widths, expected, rtol=1e-3, atol=1e-4)
    assert kernels.abs().item() > 0
    assert conv.weight.grad.abs().min().item() > 0


def indicator_slope(x):
    soft = torch.sigmoid(torch.tensor(x))
    return soft * (1 - soft)


def test_dropped_indicators_are_zero_and_kept_ones_are_scaled():
    conv = layer()
    source = torch.Generator().manual_seed(3)
    seen = torch.stack([torch.cat(conv.decide(0.6, source)) for _ in range(100)])
    torch.testing.assert_close(seen.unique(), torch.tensor([0.0, 1 / 0.6]))
    assert seen.mean().item() == pytest.approx(1.0, abs=0.15)
    always = layer(skip=False).decide(0.6, source)
    assert always.widths[0] == 1


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"kernel_sizes": (2, 5)}, "odd"),
        ({"kernel_sizes": (5, 3)}, "ascend"),
        ({"kernel_sizes": ()}, "kernel_sizes"),
        ({"widths": (0.5, 0.8)}, "widths"),
        ({"widths": (0.01, 1.0)}, "widths"),
        ({"widths": ()}, "widths"),
    ],
)
def test_settings_are_checked(settings, named):
    with pytest.raises(SettingError, match=named):
        layer(**settings)
