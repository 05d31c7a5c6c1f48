"""Beside: parameters of an objective, which are saved and extracted from like all others."""

from __future__ import annotations

import pytest
import torch

import supple
from supple.axes.beside import Beside
from supple.axes.width import Width
from supple.errors import SettingError
from supple.network import elastic
from supple.testing.toys import mlp

X = torch.ones(2, 5)


def network():
    net = elastic(mlp(), (X,), axes=[Width((0.5, 1.0))], verify=False)
    net.share(Beside((("supple_head", (40, 30)), ("supple_mask", (3,)))))
    return net


def test_sizes_stay_what_they_were():
    plain, net = elastic(mlp(), (X,), axes=[Width((0.5, 1.0))], verify=False), network()
    for config in (net.space.smallest(), net.space.largest()):
        with plain.at(config), net.at(config):
            assert torch.equal(net(X), plain(X))
    assert not dict(net.extract(net.space.smallest()).named_parameters()).keys() & {
        "supple_head",
        "supple_mask",
    }


def test_matrices_are_scaled_by_their_columns_and_vectors_are_zero():
    module = network().module
    assert module.supple_head.std().item() == pytest.approx(30**-0.5, rel=0.1)
    assert torch.equal(module.supple_head, network().module.supple_head)
    assert module.supple_head.requires_grad
    assert not module.supple_mask.any()


def test_they_are_saved_with_the_network(tmp_path):
    net = network()
    with torch.no_grad():
        net.module.supple_mask.fill_(2.0)
    supple.save(net, tmp_path / "net")
    again = supple.load(tmp_path / "net", mlp())
    assert again.sharing == net.sharing
    assert torch.equal(again.module.supple_mask, net.module.supple_mask)


def test_names_are_checked():
    with pytest.raises(SettingError, match="'supple_', got 'head'"):
        Beside((("head", (1, 2)),))
