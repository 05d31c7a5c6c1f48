"""Truths about FlatQuant."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn

from supple.errors import SettingError, UnsupportedModelError
from supple.formats import QuantSpec, fake_quantize
from supple.layers.attention import SoftmaxAttention
from supple.layers.packed import PackedLinear
from supple.layers.quantized_attention import QuantizedAttention
from supple.layers.rotated_input import RotatedInput
from supple.quantize._flat import LearnedMap, rounded
from supple.quantize.base import baseline
from supple.quantize.flatquant import FlatQuant
from supple.testing.outliers import outlier_twin
from supple.testing.toys import generator
from supple.transforms import Given


class Block(nn.Module):
    """Attention and two layers behind norms, as in a language model."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.other = nn.LayerNorm(12), nn.LayerNorm(12)
        self.query, self.key, self.value = (nn.Linear(12, 12) for _ in range(3))
        self.attention = SoftmaxAttention(2, causal=True)
        self.out, self.up, self.down = nn.Linear(12, 12), nn.Linear(12, 20), nn.Linear(20, 12)

    def forward(self, x):
        y = self.norm(x)
        x = x + self.out(self.attention(self.query(y), self.key(y), self.value(y)))
        return x + self.down(self.up(self.other(x)).relu())


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Model().eval()


X = torch.randn(4, 9, 12, generator=generator())
DATA = [X[:2], X[2:]]


def test_maps_are_kronecker_products_behind_factors() -> None:
    learned = LearnedMap(12, torch.arange(12), generator())
    with torch.no_grad():
        for one in learned.parameters():
            one.add_(0.3 * torch.rand(one.shape, generator=generator()))
        left, right = learned.left.matrices()[0], learned.right.matrices()[0]
        whole = learned.channels()[:, None] * torch.kron(left, right)
        x = torch.randn(5, 12, generator=generator())
        torch.testing.assert_close(learned(x), x @ whole)
        inverse = torch.linalg.inv(whole.double()).float()
        torch.testing.assert_close(learned.inverse_t(x), x @ inverse.T, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(learned.inverse(x), x @ inverse, rtol=1e-3, atol=1e-4)
        plain = learned.plain()(x * learned.channels())
        torch.testing.assert_close(learned(x), plain)
    unit = LearnedMap(12, None, generator())
    turned = unit(torch.eye(12))
    torch.testing.assert_close(turned @ turned.T, torch.eye(12))


def test_factors_begin_as_smoothquant_has_them() -> None:
    learned = LearnedMap(3, torch.tensor([0, 0, 1]), generator())
    learned.begin(torch.tensor([0.5, 0.5, 2.0]), torch.tensor([4.0, 4.0, 1.0]), 0.3)
    wanted = [0.5**0.7 / 4**0.3] * 2 + [2**0.7]
    torch.testing.assert_close(learned.channels(), torch.tensor(wanted))


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec("int4"),
        QuantSpec("int3-narrow", "token"),
        QuantSpec("uint4", "token", symmetric=False),
        QuantSpec("int4", "group", 4),
        QuantSpec("uint2", "group", 5, symmetric=False),
    ],
)
def test_rounding_with_gradients_is_rounding(spec: QuantSpec) -> None:
    x = torch.randn(3, 11, generator=generator())
    x[1] = 0
    torch.testing.assert_close(rounded(x, spec, torch.ones(1)), fake_quantize(x, spec))


def test_shares_clip_and_learn() -> None:
    x = torch.tensor([[8.0, 1.0, 0.4, -0.6]])
    share = torch.tensor([0.5], requires_grad=True)
    found = rounded(x, QuantSpec("int3-narrow"), share)
    step = 4 / 3
    assert found.tolist()[0] == pytest.approx([4.0, step, 0.0, 0.0])
    # The clipped one moves by 8 when the share goes to 1; what is rounded by its rounding.
    (by_share,) = torch.autograd.grad(found[0, 0], share, retain_graph=True)
    assert float(by_share) == pytest.approx(8.0)
    (by_share,) = torch.autograd.grad(found[0, 1], share)
    assert float(by_share) == pytest.approx((1 - 1 / step) * 8 / 3)


def test_maps_alone_leave_the_function() -> None:
    model, given = network(), Given(tuple(DATA), None, generator())
    model = outlier_twin(model, (X,), factor=20.0)
    before, gain = model(X), model.blocks[0].norm.weight.detach().clone()
    method = FlatQuant(steps=2, lr=0.02)
    with torch.no_grad():
        parts = []
        for part in method._parts(model, given, {}):
            method.learn(part, given)
            parts.append(part)
        assert torch.equal(model(X), before)
        quiet = dataclasses.replace(method, bits=16, activations=None)
        changed = quiet._installed(model, parts, given)
        torch.testing.assert_close(changed(X), before, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(changed.blocks[0].norm.weight, gain)
    block = changed.blocks[0]
    assert block.query.rotation is block.key.rotation is block.value.rotation
    assert block.down.rotation.settings() == {"left": 4, "right": 5}
    assert isinstance(changed.head, RotatedInput)


def test_learned_maps_lose_less_than_none_and_than_random_ones() -> None:
    layers = network().blocks[0]
    model = nn.Sequential(layers.norm, layers.up)
    model = outlier_twin(model, (X,), channels=2, factor=20.0)
    lost = {}
    for name, method in (
        ("rtn", baseline("rtn", activations=4)),
        ("random", FlatQuant(steps=0)),
        ("learned", FlatQuant(steps=60, lr=0.02)),
    ):
        small = method.apply(model, calibration=DATA, generator=generator())
        with torch.no_grad():
            lost[name] = (small(X) - model(X)).norm().item()
    # Factors undo large channels of norms, maps have to do with what is left.
    assert lost["learned"] < 0.2 * lost["rtn"]
    assert lost["learned"] < 0.95 * lost["random"]


def test_keys_and_values_are_mapped_and_rounded() -> None:
    model = network()
    small = FlatQuant(bits=16, activations=None, kv_bits=3, steps=2).apply(
        model, calibration=DATA
    )
    attention = small.blocks[0].attention
    assert isinstance(attention, QuantizedAttention)
    assert attention.spec == QuantSpec("uint3", "token", None, False, "fp16")
    assert attention.key_map.settings() == {"left": 1, "right": 6}
    fine = FlatQuant(bits=16, activations=None, kv_bits=14, steps=0).apply(
        model, calibration=DATA
    )
    with torch.no_grad():
        torch.testing.assert_close(fine(X), model(X), rtol=1e-2, atol=1e-2)
        assert not torch.allclose(small(X), model(X), rtol=1e-2, atol=1e-2)
    with pytest.raises(UnsupportedModelError, match="leave kv_bits=None"):
        FlatQuant(kv_bits=4).apply(nn.Linear(3, 2), calibration=[torch.ones(2, 3)])


def test_other_layers_are_rounded_as_they_are() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Tanh(), nn.Flatten(), nn.Linear(16, 2))
    before = copy.deepcopy(model)
    x = torch.randn(2, 3, 2, 2, generator=generator())
    small = FlatQuant(steps=1).apply(model, calibration=[x])
    spec = FlatQuant().spec()
    matrix = fake_quantize(before[0].weight.detach().flatten(1), spec)
    torch.testing.assert_close(small[0].weight.flatten(1), matrix)
    assert isinstance(small[3].layer, PackedLinear)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"format": "e2m1"}, "learns ranges of whole numbers"),
        ({"kv_bits": 1}, "kv_bits must be from 2 to 16, got 1"),
        ({"alpha": 2.0}, r"alpha must be in \[0, 1\], got 2.0"),
        ({"steps": -1}, "steps must be 0 or more, got -1"),
        ({"lr": 0.0}, "lr must be above 0 and finite, got 0.0"),
    ],
)
def test_settings_that_can_not_be_used_say_so(settings, match: str) -> None:
    with pytest.raises(SettingError, match=match):
        FlatQuant(**settings)
