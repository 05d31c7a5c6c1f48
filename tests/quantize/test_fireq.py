"""Truths about FireQ."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import supple
from supple.errors import SettingError, SuppleWarning
from supple.formats import Float, QuantSpec, fake_quantize, quantize
from supple.layers.lookup_linear import LookedUp, LookupLinear
from supple.layers.quantized_attention import ProductsBy, QuantizedAttention
from supple.quantize._rotary import rotary_keys, scale_pairs
from supple.quantize.fireq import FireQ
from supple.testing.toys import generator

HEADS, KEYS, CHANNELS = 4, 2, 6


class Rotary(nn.Module):
    """Attention with rotary positions; queries of two heads share a head of keys."""

    def __init__(self, *, halves: bool, normed: bool = False) -> None:
        super().__init__()
        self.halves = halves
        self.norm = nn.LayerNorm(CHANNELS) if normed else nn.Identity()
        self.query = nn.Linear(12, HEADS * CHANNELS)
        self.key, self.value = (nn.Linear(12, KEYS * CHANNELS) for _ in range(2))
        self.out = nn.Linear(HEADS * CHANNELS, 12)

    def turned(self, x):
        angles = torch.arange(x.shape[-2])[:, None] * torch.tensor([1.0, 0.3, 0.01])
        cos, sin = angles.cos(), angles.sin()
        if self.halves:
            one, two = x.chunk(2, -1)
            return torch.cat((one * cos - two * sin, two * cos + one * sin), -1)
        one, two = x[..., ::2], x[..., 1::2]
        return torch.stack((one * cos - two * sin, two * cos + one * sin), -1).flatten(-2)

    def forward(self, x):
        query = self.query(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        key = self.key(x).unflatten(-1, (KEYS, -1)).transpose(1, 2)
        value = self.value(x).unflatten(-1, (KEYS, -1)).transpose(1, 2)
        query, key = self.turned(query), self.turned(self.norm(key))
        key, value = (one.repeat_interleave(2, 1) for one in (key, value))
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


def network(*, halves: bool = True, normed: bool = False) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        attention = Rotary(halves=halves, normed=normed)
        return nn.Sequential(nn.LayerNorm(12), attention).eval()


X = torch.randn(2, 9, 12, generator=generator())


@pytest.mark.parametrize("halves", [True, False])
def test_pairs_are_found_and_others_change_the_outputs(halves: bool) -> None:
    model = network(halves=halves)
    state = copy.deepcopy(model.state_dict())
    before = model(X)
    found = rotary_keys(model, {"1": CHANNELS}, (X,))
    assert all(torch.equal(state[name], one) for name, one in model.state_dict().items())
    keys = found["1"]
    assert (keys.query, keys.key) == ("1.query", "1.key")
    assert keys.partner.tolist() == ([3, 4, 5, 0, 1, 2] if halves else [1, 0, 3, 2, 5, 4])
    factor = torch.rand(KEYS, CHANNELS, generator=generator()) + 0.5
    scale_pairs(model, keys, factor * factor[:, keys.partner])
    torch.testing.assert_close(model(X), before, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model[1].key.weight, state["1.key.weight"])
    scale_pairs(model, keys, factor)
    assert not torch.allclose(model(X), before, rtol=1e-2, atol=1e-3)


def test_keys_that_are_normalised_are_left_with_a_warning() -> None:
    model = network(normed=True)
    assert rotary_keys(model, {"1": CHANNELS}, (X,)) == {}
    with pytest.warns(SuppleWarning, match="pairs of channels of keys of '1' can't be scaled"):
        small = FireQ(group_size=4).apply(model, calibration=[X])
    assert isinstance(small[1], QuantizedAttention)
    FireQ(group_size=4, pairs=False).apply(model, calibration=[X])


def spiked() -> nn.Sequential:
    model = network()
    with torch.no_grad():
        model[1].key.bias[[1, 9]] += 12.0
    return model


def test_scales_of_keys_save_what_rounding_loses() -> None:
    model = spiked()
    lost = {}
    for pairs, channels in itertools.product((False, True), (False, True)):
        method = FireQ(bits=16, activations=None, kv_bits=4, pairs=pairs, channels=channels)
        small = method.apply(model, calibration=[X])
        lost[pairs, channels] = (products(small) - products(model)).norm().item()
    none = lost.pop((False, False))
    assert all(one < 0.6 * none for one in lost.values())


def products(model: nn.Module) -> torch.Tensor:
    """Gives what queries and keys are multiplied to."""
    seen: list[torch.Tensor] = []

    def noting(query, key, value, **kwargs):
        seen.append(query @ key.mT)
        return F.scaled_dot_product_attention(query, key, value, **kwargs)

    with torch.no_grad(), ProductsBy(noting):
        model(X)
    return seen[0]


def test_codes_are_looked_up_in_tables_of_e4m3() -> None:
    spec = QuantSpec("int4", "group", 5, scale_format="e4m3")
    weight = torch.randn(7, 13, generator=generator()) * 1e-4
    codes = quantize(weight, spec)
    found = LookedUp.of(codes).dequantize()
    level, factor = spec.scale_levels(codes.scale)
    assert float(level.max()) == 448.0
    whole = spec.format.decode(codes.codes)
    for row, column in ((0, 0), (3, 7), (6, 12)):
        sigma = level[row, column // 5] / 8
        entries = [float(Float(4, 3).round(c * sigma)) for c in range(-8, 8)]
        wanted = entries[int(whole[row, column]) + 8] * 8 * float(factor)
        assert float(found[row, column]) == pytest.approx(wanted)
    # A scale of its own, without the factor, would be below the format.
    assert float(Float(4, 3).round(codes.scale).max()) == 0.0
    assert (found - weight).norm() < 0.12 * weight.norm()


def test_layers_look_up_and_round_inputs(tmp_path) -> None:
    model = nn.Sequential(nn.Linear(13, 7), nn.ReLU(), nn.Linear(7, 3))
    x = torch.randn(11, 13, generator=generator())
    method = FireQ(group_size=5, kv_bits=None)
    small = method.apply(model, calibration=[x])
    layer = small[0]
    assert type(layer) is LookupLinear
    looked = LookedUp.of(quantize(model[0].weight.detach(), method.spec())).dequantize()
    spec = QuantSpec("e4m3", "token", scale_format="bf16")
    inner = method.apply(model[:1], calibration=[x])
    torch.testing.assert_close(inner[0].dense_weight(), looked)
    torch.testing.assert_close(
        inner(x), fake_quantize(x, spec) @ looked.T + model[0].bias, rtol=1e-5, atol=1e-6
    )
    plain = FireQ(group_size=5, kv_bits=None, packed=False).apply(model, calibration=[x])
    torch.testing.assert_close(plain(x), small(x))
    supple.save(small, tmp_path / "net")
    assert torch.equal(supple.load(tmp_path / "net", model=model)(x), small(x))


def test_attention_rounds_queries_keys_and_values() -> None:
    small = FireQ(group_size=4).apply(network(), calibration=[X])
    attention = small[1]
    assert isinstance(attention, QuantizedAttention)
    assert attention.spec == QuantSpec("int4-narrow", "token", scale_format="fp16")
    assert attention.queries == QuantSpec("e4m3", "token", scale_format="bf16")
    assert attention.key_map.scale.shape == (HEADS, CHANNELS)
    torch.testing.assert_close(attention.key_map.scale[0], attention.key_map.scale[1])
    assert isinstance(attention.layer.query, LookupLinear)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"bits": 8}, "tables hold whole numbers of up to 4 bits"),
        ({"symmetric": False}, "without zero points"),
        ({"scale_format": "fp16"}, "scale_format must be e4m3, got 'fp16'"),
        ({"activations": 4}, "activations must be 8, bits of e4m3, or None, got 4"),
        ({"kv_bits": 1}, "kv_bits must be from 2 to 16, got 1"),
        ({"alpha": -1.0}, r"alpha must be in \[0, 1\], got -1.0"),
    ],
)
def test_settings_that_can_not_be_used_say_so(settings, match: str) -> None:
    with pytest.raises(SettingError, match=match):
        FireQ(**settings)
