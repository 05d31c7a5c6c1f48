"""Truths about keys and values of few bits."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import supple
from supple.errors import SettingError, UnsupportedModelError
from supple.formats import fake_quantize
from supple.layers.attention import SoftmaxAttention
from supple.layers.quantized_attention import HeadScale, QuantizedAttention
from supple.layers.rotations import BlockHadamard, KroneckerAffine
from supple.quantize._keys_values import attention_paths, cache_spec, rounding_keys
from supple.testing.toys import generator
from tests.zoo import ZOO


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))
        self.attention = SoftmaxAttention(2, causal=True)

    def forward(self, x):
        return self.attention(self.query(x), self.key(x), self.value(x))


def network() -> Attending:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Attending().eval()


X = torch.randn(2, 5, 8, generator=generator())
SPEC = cache_spec(3)


def heads(x: torch.Tensor) -> torch.Tensor:
    return x.unflatten(-1, (2, 4)).transpose(1, 2)


def test_keys_and_values_are_rounded_by_token_and_head() -> None:
    model = network()
    assert attention_paths(model, (X,)) == ["attention"]
    query, key, value = (heads(one(X)) for one in (model.query, model.key, model.value))
    wanted = F.scaled_dot_product_attention(
        query, fake_quantize(key, SPEC), fake_quantize(value, SPEC), is_causal=True
    )
    small = rounding_keys(model, ["attention"], SPEC)
    torch.testing.assert_close(small(X), wanted.transpose(1, 2).flatten(2))
    assert isinstance(small.attention, QuantizedAttention)


@pytest.mark.parametrize("kind", ["hadamard", "affine", "scale"])
def test_maps_alone_change_nothing(kind: str) -> None:
    model = network()
    before = model(X)
    if kind == "hadamard":
        maps = [BlockHadamard(4), BlockHadamard(2)]
    elif kind == "affine":
        maps = [
            KroneckerAffine.of(torch.eye(1), torch.randn(4, 4, generator=generator(seed)))
            for seed in (0, 1)
        ]
    else:
        maps = [HeadScale(2, 4), HeadScale(2, 4)]
        for one in maps:
            one.scale.uniform_(0.1, 3.0, generator=generator())
    paths = ["attention"]
    changed = rounding_keys(model, paths, None, {paths[0]: maps[0]}, {paths[0]: maps[1]})
    torch.testing.assert_close(changed(X), before, rtol=1e-4, atol=1e-5)


def test_queries_of_several_heads_share_the_scale_of_a_key() -> None:
    scale = HeadScale(2, 3)
    scale.scale.uniform_(0.5, 2.0, generator=generator())
    query, key = (torch.randn(1, n, 5, 3, generator=generator(n)) for n in (4, 2))
    repeated = key.repeat_interleave(2, 1)
    mapped = scale(key).repeat_interleave(2, 1)
    torch.testing.assert_close(scale.inverse_t(query) @ mapped.mT, query @ repeated.mT)


def test_scales_save_the_channels_beside_a_large_one() -> None:
    query, key = (torch.randn(1, 2, 5, 4, generator=generator(n)) for n in (4, 2))
    key[:, 0, :, 3] *= 50
    query[:, 0, :, 3] /= 50
    scale = HeadScale(2, 4)
    scale.scale[0, 3] = 1 / 50
    wanted = query @ key.mT
    plain = query @ fake_quantize(key, SPEC).mT
    scaled = scale.inverse_t(query) @ fake_quantize(scale(key), SPEC).mT
    lost = [(found - wanted)[:, 0].norm() for found in (plain, scaled)]
    assert lost[1] < 0.5 * lost[0]


def test_rounding_lets_gradients_through() -> None:
    small = rounding_keys(network(), ["attention"], SPEC)
    small(X).sum().backward()
    assert bool(small.value.weight.grad.abs().sum() > 0)


@pytest.mark.slow
def test_a_model_of_transformers_is_rounded_and_saved(tmp_path) -> None:
    model, args, kwargs = ZOO["llama_tied"]()
    model.eval()
    with torch.no_grad():
        before = model(*args, **kwargs).logits
        paths = attention_paths(model, args, kwargs)
        assert all(path.endswith("self_attn") for path in paths)
        fine = rounding_keys(copy.deepcopy(model), paths, cache_spec(12))
        torch.testing.assert_close(fine(*args, **kwargs).logits, before, rtol=1e-2, atol=1e-2)
        rough = rounding_keys(model, paths, cache_spec(2))
        after = rough(*args, **kwargs).logits
        assert not torch.allclose(after, before, rtol=1e-2, atol=1e-2)
        supple.save(rough, tmp_path / "net")
        assert torch.equal(supple.load(tmp_path / "net")(*args, **kwargs).logits, after)


def test_models_without_fused_attention_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="leave kv_bits=None"):
        attention_paths(nn.Linear(2, 2), (torch.ones(1, 2),))
    with pytest.raises(SettingError, match="sizes must be at least 1, got 0 and 4"):
        HeadScale(0, 4)


def test_a_rounded_module_is_exported() -> None:
    small = rounding_keys(network(), ["attention"], SPEC, {"attention": BlockHadamard(4)})
    program = torch.export.export(small, (X,)).module()
    torch.testing.assert_close(program(X), small(X))
