"""Truths about rotations that are put into networks."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from supple.errors import SettingError, UnsupportedModelError
from supple.formats import fake_quantize
from supple.layers.packed import PackedLinear
from supple.layers.rotated_input import RotatedInput
from supple.layers.rotations import BlockHadamard, KroneckerAffine
from supple.quantize._rotations import (
    block_hadamards,
    fuse,
    inner,
    random_hadamards,
    rotated,
    rotations,
)
from supple.quantize.base import baseline
from supple.testing.toys import generator
from supple.weights import matrices


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv1d(3, 4, 1), nn.Flatten(), nn.Linear(20, 6), Conv1D(7, 6), nn.Linear(7, 2)
        ).eval()


X = torch.randn(3, 3, 5, generator=generator())


@pytest.mark.parametrize("kind", ["blocks", "random", "kronecker"])
def test_a_rotated_network_computes_the_same(kind: str) -> None:
    model = network()
    before = model(X)
    if kind == "kronecker":
        found = rotations(model, lambda n: KroneckerAffine(*KroneckerAffine.sizes(n)))
        for rotation in found.values():
            rotation.left_matrix += torch.rand(rotation.left_matrix.shape)
    elif kind == "random":
        found = random_hadamards(model, generator())
    else:
        found = block_hadamards(model, size=4)
    old = {name: layer.weight.clone() for name, layer in matrices(model).items()}
    model = rotated(model, found)
    torch.testing.assert_close(model(X), before, rtol=1e-4, atol=1e-5)
    names = [inner(name) if name in found else name for name in old]
    assert list(matrices(model)) == names
    for name in found:
        assert not torch.allclose(matrices(model)[inner(name)].weight, old[name])


def test_blocks_are_the_largest_that_fit() -> None:
    found = block_hadamards(network(), size=8)
    sizes = {name: one.settings()["size"] for name, one in found.items()}
    assert sizes == {"2.weight": 4, "3.weight": 2}


def test_a_map_put_into_a_producer_is_not_needed_at_run_time() -> None:
    model = network()
    before, rotation = model(X), BlockHadamard(2)
    fuse(rotation, model[2])
    with torch.no_grad():
        model[3].weight.copy_(rotation.inverse_t(model[3].weight.T).T)
    torch.testing.assert_close(model(X), before)
    with pytest.raises(UnsupportedModelError, match="not into a Conv1d"):
        fuse(rotation, model[0])


def test_weights_that_can_not_be_rotated_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Conv2d(4, 4, 1))
    model[1].weight = model[0].weight
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UnsupportedModelError, match="is the weight of 2 layers"):
        rotated(model, block_hadamards(model))
    with pytest.raises(UnsupportedModelError, match=r"'2\.weight' is of a Conv2d"):
        rotated(model, {"2.weight": BlockHadamard(4)})
    with pytest.raises(UnsupportedModelError, match=r"'x\.weight' is no weight of the network"):
        rotated(model, {"x.weight": BlockHadamard(4)})
    assert all(torch.equal(before[name], one) for name, one in model.state_dict().items())


def test_a_model_that_is_one_layer_is_wrapped() -> None:
    model = nn.Linear(8, 2)
    x = torch.randn(3, 8, generator=generator())
    before = model(x)
    wrapped = rotated(model, block_hadamards(model))
    assert isinstance(wrapped, RotatedInput)
    torch.testing.assert_close(wrapped(x), before)


def test_the_baseline_rounds_rotated_weights_and_inputs() -> None:
    model = nn.Sequential(nn.Linear(12, 6), nn.ReLU(), nn.Conv1d(6, 2, 1))
    small = baseline("quarot", layers="0").apply(model, generator=generator(5))
    turned = random_hadamards(model, generator(5), "0")["0.weight"]
    layer = small[0]
    assert isinstance(layer, RotatedInput)
    assert isinstance(layer.layer, PackedLinear)
    spec = baseline("quarot").spec()
    expected = fake_quantize(turned(model[0].weight.detach()), spec)
    torch.testing.assert_close(layer.layer.dense_weight(), expected)
    x = torch.randn(3, 12, generator=generator())
    wanted = fake_quantize(turned(x), layer.layer.input) @ expected.T + model[0].bias
    torch.testing.assert_close(layer(x), wanted)
    assert torch.equal(small[2].weight, model[2].weight)


def test_rotations_make_up_for_spikes() -> None:
    model = nn.Sequential(nn.Linear(64, 32, bias=False))
    x = torch.randn(50, 64, generator=generator())
    with torch.no_grad():
        model[0].weight.normal_(generator=generator(1))
        model[0].weight[:, 3] *= 20
        x[:, 7] *= 20
        lost = {
            rotation: (baseline("quarot", rotation=rotation).apply(model)(x) - model(x)).norm()
            for rotation in ("none", "blocks", "random")
        }
    assert lost["blocks"] < 0.5 * lost["none"]
    assert lost["random"] < 0.5 * lost["none"]


def test_sixteen_bits_are_not_rotated() -> None:
    model = nn.Sequential(nn.Linear(8, 2))
    method = baseline("quarot", bits=16, activations=16)
    assert type(method.apply(model)[0]) is nn.Linear
    with pytest.raises(SettingError, match="rotation must be one of none, blocks, random"):
        baseline("quarot", rotation="round")
