"""Factors of channels: the network computes the same with them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from supple.errors import SettingError
from supple.graph.feeds import feeds
from supple.layers.scaled_input import ScaledInput
from supple.quantize._equivalent import by_column, paths_of, scaled
from supple.storage import load, save
from supple.testing.toys import generator
from supple.weights import matrices
from tests.test_feeds import Block, conv_net


def factors(size: int) -> torch.Tensor:
    return torch.rand(size, generator=generator(3)) * 3 + 0.2


def test_all_feeds_of_a_block_take_factors_without_new_layers() -> None:
    model, x = Block().eval(), torch.randn(2, 5, 12, generator=generator())
    other, names = copy.deepcopy(model), list(matrices(model))
    for feed in feeds(model, (x,)):
        other = scaled(other, feed, feed.tied(factors(feed.size)))
    assert list(matrices(other)) == names
    assert not torch.equal(other.q.weight, model.q.weight)
    torch.testing.assert_close(other(x), model(x))


def test_layers_scale_where_nothing_else_can(tmp_path: object) -> None:
    model, x = conv_net().eval(), torch.randn(2, 3, 8, 8, generator=generator())
    other = copy.deepcopy(model)
    for feed in feeds(model, (x,)):
        other = scaled(other, feed, factors(feed.size))
    wrapped = [path for path, one in other.named_modules() if isinstance(one, ScaledInput)]
    assert wrapped == ["0", "10"]
    assert (other[0].stride, other[10].in_features) == ((1, 1), 5)  # others may ask for these
    torch.testing.assert_close(other(x), model(x))
    layers = [other[0].layer, other[8]]
    assert paths_of(other, layers) == "0.layer, 8"
    assert list(matrices(other, paths_of(other, layers))) == ["0.layer.weight", "8.weight"]
    save(other, f"{tmp_path}/scaled")
    assert torch.equal(load(f"{tmp_path}/scaled", model=conv_net()).eval()(x), other(x))


def test_columns_of_groups_and_of_transposed_weights_are_told_apart() -> None:
    grouped = nn.Conv1d(4, 2, 2, groups=2)
    assert by_column(grouped, torch.arange(1.0, 5)).tolist() == [[1, 1, 2, 2], [3, 3, 4, 4]]
    x = torch.randn(2, 4, 5, generator=generator())
    for layer, given in ((grouped, x), (Conv1D(3, 5), x), (nn.ConvTranspose1d(4, 2, 2), x)):
        model = nn.Sequential(copy.deepcopy(layer))
        (feed,) = feeds(model, (given,))
        assert feed.producer is None
        other = scaled(copy.deepcopy(model), feed, factors(feed.size))
        torch.testing.assert_close(other(given), model(given))


def test_factors_that_can_not_be_used_leave_the_network_as_it_was() -> None:
    model, x = Block(), torch.randn(2, 5, 12, generator=generator())
    found = feeds(model, (x,))
    before = copy.deepcopy(model.state_dict())
    for feed, scale, match in (
        (found[1], factors(12), r"'v.weight' makes from one row.*feed.tied"),
        (found[0], torch.ones(5), r"12 finite numbers above 0, got shape \(5,\)"),
        (found[0], torch.zeros(12), "least 0.0"),
    ):
        with pytest.raises(SettingError, match=match):
            scaled(model, feed, scale)
    assert all(torch.equal(model.state_dict()[name], old) for name, old in before.items())
