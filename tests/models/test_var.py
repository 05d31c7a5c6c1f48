"""The visual autoregressive transformer: tokens, masks, generation with and without a cache."""

from __future__ import annotations

import itertools

import pytest
import torch

import supple
from supple.errors import SettingError
from supple.models.base import build

EDGES = (0, 1, 5, 21, 85)


def model(num_layers: int = 3, **settings):
    torch.manual_seed(0)
    net = build("var", dim=12, num_layers=num_layers, num_heads=2, hidden=13, **settings).eval()
    with torch.no_grad():
        for p in net.parameters():  # far from uniform predictions
            p.mul_(3)
    return net


def images(count: int = 7) -> torch.Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def test_each_map_encodes_what_the_coarser_maps_leave_over():
    codes = model(image_size=2, scales=(1, 2), codes=3).codes
    codes.values.copy_(torch.tensor([[-1.0, 0.0, 1.0], [-0.5, 0.0, 0.5]]))
    x = torch.tensor([[[[1.5, 0.9], [0.6, 0.5]]]])  # mean 0.875: left over .5 -.1 -.4 -.5
    tokens = codes.encode(x)
    assert tokens.tolist() == [[2, 2, 1, 0, 0]]
    torch.testing.assert_close(codes.decode(tokens), torch.tensor([[[[1.5, 1.0], [0.5, 0.5]]]]))


def test_fitted_codes_are_means_of_what_they_stand_for():
    codes = model(image_size=2, scales=(1, 2), codes=3).codes
    x = images().view(-1, 1, 2, 2)
    codes.fit(x, rounds=50)
    first = x.mean((2, 3)).flatten()
    nearest = (first[:, None] - codes.values[0]).abs().argmin(1)
    assert set(nearest.tolist()) == {0, 1, 2}
    for i, value in enumerate(codes.values[0]):
        torch.testing.assert_close(value, first[nearest == i].mean())
    errors = (codes.decode(codes.encode(x)) - x).square().mean()
    assert errors < 0.3 * x.var()


def test_logits_of_a_map_depend_on_coarser_maps_only():
    net = model()
    tokens, classes = net.codes.encode(images()), torch.arange(7)
    logits = net(tokens, classes)
    for first, end in itertools.pairwise(EDGES[1:]):
        other = tokens.clone()
        other[:, first:end] = (other[:, first:end] + 5) % 16
        changed = (net(other, classes) - logits).abs().amax((0, 2)) > 1e-5
        assert not changed[:end].any()  # not even the map itself
        assert end == EDGES[-1] or changed[end:].all()


def test_fewer_maps_give_the_first_logits():
    net = model()
    tokens, classes = net.codes.encode(images()), torch.arange(7)
    logits = net(tokens, classes)
    for given, seen in ((0, 1), (1, 5), (5, 21), (21, 85), (85, 85)):
        torch.testing.assert_close(net(tokens[:, :given], classes), logits[:, :seen])


def test_positions_that_a_block_does_not_take_pass_by_and_are_not_seen():
    net = model(num_layers=1)
    tokens, classes = net.codes.encode(images()), torch.arange(7)
    whole = net(tokens, classes)
    net.blocks[0].tokens = 5
    entering = net.embed(tokens, classes)
    logits = net(tokens, classes)
    torch.testing.assert_close(logits[:, :5], whole[:, :5])
    torch.testing.assert_close(logits[:, 5:], net.read(entering[:, 5:]))


@pytest.mark.parametrize("depth", [2, 3, 5])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_cached_generation_equals_uncached(depth, temperature):
    net = model(num_layers=5)
    classes = torch.arange(7)
    tokens = net.codes.encode(images())
    axis = supple.ScaleDepth(early=5, choices=(2, 3))
    elastic = supple.elastic(net, (tokens, classes), axes=[axis], verify=False)
    with elastic.at({"blocks.scale_depth": depth}):
        found = [
            net.generate(
                classes,
                temperature=temperature,
                generator=torch.Generator().manual_seed(3),
                cache=cache,
            )
            for cache in (True, False)
        ]
    assert found[0].tokens.shape == (7, 85)
    assert torch.equal(found[0].tokens, found[1].tokens)
    assert len(found[0].tokens.unique()) > 5
    torch.testing.assert_close(found[0].images, net.codes.decode(found[0].tokens))
    assert found[1].cache_bytes == (0, 0, 0, 0)


def test_generation_at_a_depth_differs_from_the_full_network():
    net, classes = model(num_layers=5), torch.arange(7)
    whole = net.generate(classes, temperature=0).tokens
    for block in (1, 2, 3):
        net.blocks[block].tokens = 5
    part = net.generate(classes, temperature=0).tokens
    assert torch.equal(whole[:, :5], part[:, :5])
    assert not torch.equal(whole, part)


def test_the_cache_holds_keys_and_values_of_the_positions_that_a_block_takes():
    net, classes = model(num_layers=5), torch.arange(7)
    of_a_position = 7 * 12 * 2 * 4  # images, width, key and value, bytes
    expected = [5 * positions * of_a_position for positions in (1, 5, 21, 85)]
    assert list(net.generate(classes).cache_bytes) == expected
    for block in (1, 3):
        net.blocks[block].tokens = 5
    # their caches go with the first late map
    expected = [5 * of_a_position, 25 * of_a_position]
    expected += [3 * positions * of_a_position for positions in (21, 85)]
    assert list(net.generate(classes).cache_bytes) == expected


def test_drawn_tokens_follow_the_temperature():
    net, classes = model(), torch.zeros(400, dtype=torch.int64)
    source = torch.Generator().manual_seed(0)
    first = net.generate(classes, temperature=2.0, generator=source).tokens[:, 0]
    shares = (net(classes.new_zeros(1, 0), classes[:1])[0, 0] / 2).softmax(0)
    assert torch.allclose(first.bincount(minlength=16) / 400, shares, atol=0.08)


def test_what_cannot_be_used_is_refused():
    with pytest.raises(SettingError, match="scales"):
        build("var", scales=(1, 3, 8))
    with pytest.raises(SettingError, match="scales"):
        build("var", scales=(1, 2, 4))
    with pytest.raises(SettingError, match="num_heads"):
        build("var", dim=10, num_heads=4)
    net = model()
    with pytest.raises(SettingError, match="temperature"):
        net.generate(torch.arange(3), temperature=-1)
    net.blocks[1].tokens = 7
    with pytest.raises(SettingError, match="whole maps"):
        net.generate(torch.arange(3))
