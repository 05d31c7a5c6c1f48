"""Copies: parts of a space with weights of their own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import supple
from supple.axes.copies import Copies
from supple.axes.depth import Depth
from supple.axes.width import Width
from supple.errors import SettingError
from supple.training.touched import Touched

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
LARGE, SMALL = {"0": 8}, {"0": 4}


@pytest.fixture
def net():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    made = supple.elastic(model, X, axes=[Width((0.5, 1.0))], verify=False)
    made.share(Copies(({"0": (8,)}, {"0": (4,)})))
    return made


def shift(net, number):
    """Changes the weights of one copy."""
    with torch.no_grad():
        for name, parameter in net.added_parameters().items():
            if f"supple_copy_{number}_" in name:
                parameter.add_(0.3)


def test_copies_begin_as_the_module_and_each_has_its_part(net):
    plain = copy.deepcopy(net.module).eval()
    with net.eval().at(LARGE):
        assert torch.equal(net(X), plain(X))
    with net.at(SMALL):
        before = net(X)
    shift(net, 1)
    with net.at(LARGE):
        assert torch.equal(net(X), plain(X))
    with net.at(SMALL):
        assert not torch.allclose(net(X), before)


@pytest.mark.filterwarnings("ignore:the running statistics")
def test_extracted_sizes_have_the_weights_of_their_copy(net):
    shift(net, 1)
    net.eval()
    for config in (LARGE, SMALL):
        alone = net.extract(config)
        assert not any("supple_" in name for name in alone.state_dict())
        with net.at(config):
            torch.testing.assert_close(alone(X), net(X))


def test_gradients_reach_the_copy_only(net):
    with net.at(SMALL):
        net(X).square().sum().backward()
    gradients = {name: p.grad for name, p in net.module.named_parameters()}
    assert all((g is None) != ("supple_" in name) for name, g in gradients.items())


@pytest.mark.filterwarnings("ignore:the running statistics")
def test_copies_are_saved_and_loaded(net, tmp_path):
    shift(net, 1)
    net.save(tmp_path / "net")
    again = supple.load(tmp_path / "net", model=copy.deepcopy(net.module))
    assert again.sharing == net.sharing
    for config in (LARGE, SMALL):
        torch.testing.assert_close(
            again.eval().extract(config)(X), net.eval().extract(config)(X)
        )


def test_a_split_may_come_later(net):
    net.share(Copies(({},), count=2))
    with net.eval().at(SMALL):
        own = net(X)
    shift(net, 1)
    with net.at(SMALL):
        assert torch.equal(net(X), own)
    net.share(Copies(({"0": (8,)}, {"0": (4,)})))
    with net.at(SMALL):
        assert not torch.allclose(net(X), own)


def test_units_are_sorted_before(net):
    with pytest.raises(SettingError, match="sort first"):
        net.sort()


@pytest.mark.parametrize("copies", [(0,), (0, 5)])
def test_numbers_of_copies_are_checked(copies):
    with pytest.raises(SettingError, match="copy must name"):
        Copies(({"0": (8,)}, {"0": (4,)}), copies, 2)


def test_elements_are_counted_in_the_copy_that_a_pass_used(net):
    touched = Touched(list(net.module.parameters()))
    with net.at(SMALL), touched.counting(net.module):
        net(X).sum().backward()
    with net.at(LARGE), touched.counting(net.module):
        net(X).sum().backward()
    own, copied = net.module[0].weight, net.module[0].supple_copy_1_weight
    assert touched.unused(own) is None
    unused = touched.unused(copied)
    assert unused[4:].all()
    assert not unused[:4].any()


def test_copies_are_frozen_where_the_module_is():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    model[0].requires_grad_(False)
    net = supple.elastic(model, X, axes=[Width((0.5, 1.0))], verify=False)
    net.share(Copies(({"0": (8,)}, {"0": (4,)})))
    learns = {name: p.requires_grad for name, p in net.added_parameters().items()}
    assert learns == {
        "0.supple_copy_1_weight": False,
        "0.supple_copy_1_bias": False,
        "2.supple_copy_1_weight": True,
        "2.supple_copy_1_bias": True,
    }


def test_sharing_may_change_while_a_size_without_some_blocks_is_active():
    class Residual(nn.Linear):
        def forward(self, x):
            return x + super().forward(x)

    tower = nn.Sequential(*(Residual(4, 4) for _ in range(3)))
    net = supple.elastic(tower, X, axes=[Depth()], verify=False)
    small, large = net.space.smallest(), net.space.largest()
    with net.at(small):
        active = net(X)
        net.share(Copies(tuple({k: (v,) for k, v in c.items()} for c in (large, small))))
        assert torch.equal(net(X), active)
    assert len(net.added_parameters()) == 6
