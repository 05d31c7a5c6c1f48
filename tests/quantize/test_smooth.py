"""SmoothQuant: outliers of inputs are moved to the weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from supple.errors import SettingError
from supple.graph.feeds import feeds
from supple.quantize._smooth import SmoothQuant, largest_weights
from supple.quantize.base import baseline
from supple.testing.toys import generator
from supple.transforms import Given


def network() -> nn.Sequential:
    source = generator()
    model = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 3)).eval()
    with torch.no_grad():
        for place in (1, 3):
            model[place].weight.normal_(generator=source)
        model[0].weight[2] = 50.0
        model[1].weight[:, 2] /= 50
    return model


def test_factors_are_largest_inputs_over_largest_weights() -> None:
    model, x = network(), torch.randn(40, 6, generator=generator(2))
    with torch.no_grad():
        inputs = model[0](x).abs().amax(0)
    weights = model[1].weight.detach().abs().amax(0)
    given = Given(((x[:20],), (x[20:],)), None, generator())
    for alpha in (0.5, 0.8):
        method = SmoothQuant(alpha=alpha)
        ((feed, scale),) = method.factors(model, feeds(model, (x,)), given)
        assert feed.consumers == ("1.weight",)  # behind GELU nothing takes factors
        torch.testing.assert_close(scale, inputs**alpha / weights ** (1 - alpha))
    other, _ = SmoothQuant().prepared(copy.deepcopy(model), given)
    torch.testing.assert_close(other(x), model(x), rtol=1e-4, atol=1e-4)


def test_less_is_lost_with_few_bits() -> None:
    model, x = network(), torch.randn(40, 6, generator=generator(2))
    lost = [
        (method.apply(model, calibration=[(x,)])(x) - model(x)).square().mean()
        for method in (
            SmoothQuant(bits=4, activations=4),
            baseline("rtn", bits=4, activations=4),
        )
    ]
    assert lost[0] < 0.5 * lost[1]
    same = SmoothQuant(bits=16, activations=None).apply(model, calibration=[(x,)])
    assert torch.equal(same(x), model(x))


def test_weights_of_all_readers_count_by_channel() -> None:
    model = nn.Sequential(nn.Conv1d(4, 2, 2, groups=2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[[1.0, -5], [2, 3]], [[4, 1], [0, -7]]]))
    (feed,) = feeds(model, (torch.ones(1, 4, 3),))
    assert largest_weights(model, feed).tolist() == [5.0, 3.0, 4.0, 7.0]


def test_settings_that_can_not_be_used_say_so() -> None:
    with pytest.raises(SettingError, match=r"alpha must be in \[0, 1\], got 2"):
        SmoothQuant(alpha=2)
