"""Placement: something moves along the network, and happens as often in every size."""

from __future__ import annotations

import pytest
import torch

import supple
from supple.axes.placement import Placement, arrangements
from supple.axes.width import Width
from supple.cost.count import count
from supple.errors import SettingError
from supple.models.base import build
from tests.graph.checks import shake

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
AXIS = Placement(tuple(f"places.{i}" for i in range(4)), 2)
SITE = "places.0"


def cnn(pools=(0, 2)):
    return shake(build("pooling-cnn", widths=(5, 5, 7, 7), pools=pools)).eval()


def test_a_size_is_the_network_built_with_its_poolings():
    net = supple.elastic(cnn(), X, axes=[AXIS])
    assert dict(net.space.largest()) == {SITE: 1}
    for choice, pools in enumerate(arrangements(4, 2)):
        other = build("pooling-cnn", widths=(5, 5, 7, 7), pools=pools).eval()
        other.load_state_dict(net.module.state_dict())
        with net.at({SITE: choice}):
            torch.testing.assert_close(net(X), other(X))


@pytest.mark.filterwarnings("ignore:the running statistics")
def test_sizes_are_extracted_priced_and_saved(tmp_path):
    net = supple.elastic(cnn(), X, axes=[AXIS, Width((0.6, 1.0))])
    config = net.space.config({**net.space.smallest(), SITE: 4})
    alone = net.extract(config)
    assert not any("Choice" in type(part).__name__ for part in alone.modules())
    assert net.costs(config)["macs"][0] == count(alone, (X,))["macs"]
    supple.save(alone, tmp_path / "alone")
    again = supple.load(tmp_path / "alone")
    with net.at(config):
        torch.testing.assert_close(again(X), net(X))


def test_the_model_is_left_as_it_was():
    model = cnn(pools=(1, 3))
    supple.elastic(model, X, axes=[AXIS])
    assert [place.active for place in model.places] == [0, 1, 0, 1]


@pytest.mark.parametrize(
    ("places", "number", "message"),
    [
        (("places.0", "blocks.0"), 1, "'blocks.0' is a Block"),
        (("places.0", "places.9"), 1, "'places.9' is not there"),
        (("places.0", "places.1", "places.2"), 1, "but 2 places are in use"),
        (("places.0", "places.1"), 2, "number must be"),
        (tuple(f"places.{i}" for i in range(20)), 10, "184,756 ways"),
    ],
)
def test_what_cannot_move_is_refused(places, number, message):
    with pytest.raises(SettingError, match=message):
        supple.elastic(cnn(), X, axes=[Placement(places, number)])
