"""A layer that sees its input with a few bits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from supple.errors import SettingError
from supple.formats import QuantSpec
from supple.layers.quantized_input import QuantizedInput


def test_a_static_scale_holds_for_all_inputs() -> None:
    spec = QuantSpec("uint4", "tensor", symmetric=False)
    layer = QuantizedInput(nn.Identity(), spec.settings(), static=True)
    layer.set_scale(torch.tensor(0.5), torch.tensor(4.0))
    x = torch.tensor([[-9.0, -1.1, 0.0], [0.3, 0.2, 99.0]])
    expected = torch.tensor([[-2.0, -1.0, 0.0], [0.5, 0.0, 5.5]])
    assert torch.equal(layer(x), expected)
    again = QuantizedInput(**layer.settings())
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x), expected)


def test_gradients_pass_unchanged() -> None:
    layer = QuantizedInput(nn.Linear(3, 1, bias=False), QuantSpec("int4", "token"))
    x = torch.tensor([[7.5, 2.2, 0.1]], requires_grad=True)
    (slope,) = torch.autograd.grad(layer(x).sum(), x)
    torch.testing.assert_close(slope, layer.weight)
    (steep,) = torch.autograd.grad(layer(x).sum(), layer.layer.weight)
    torch.testing.assert_close(steep, torch.tensor([[7.0, 2.0, 0.0]]))


def test_what_can_not_be_used_says_so() -> None:
    with pytest.raises(SettingError, match="granularity='tensor', got 'token'"):
        QuantizedInput(nn.Identity(), QuantSpec("int4", "token"), static=True)
    layer = QuantizedInput(nn.Identity(), QuantSpec("int4", "token"))
    with pytest.raises(SettingError, match="takes no static scale and no zero point"):
        layer.set_scale(torch.tensor(1.0))
