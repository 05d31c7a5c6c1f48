"""Outputs of modules inside a network."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from supple.errors import SettingError
from supple.training.features import WithFeatures

MODEL = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
X = torch.ones(4, 2)


def test_features_are_what_the_modules_gave():
    seen = WithFeatures(["0", "1"])(MODEL, X)
    assert torch.equal(seen.features["0"], MODEL[0](X))
    assert torch.equal(seen.features["1"], MODEL[0](X).relu())
    assert torch.equal(seen.output, MODEL(X))


def test_nothing_stays_on_the_model():
    WithFeatures(["0"])(MODEL, X)
    with pytest.raises(RuntimeError):
        WithFeatures(["0"])(MODEL, torch.ones(4, 5))
    assert not any(module._forward_hooks for module in MODEL.modules())


def test_a_module_that_is_not_there_is_named():
    with pytest.raises(SettingError, match=r"no module '00'.*'0'"):
        WithFeatures(["00"])(MODEL, X)


def test_changed_outputs_take_the_place_of_what_modules_gave():
    seen = WithFeatures(["0"], change={"0": lambda output: output * 2})(MODEL, X)
    assert torch.equal(seen.features["0"], MODEL[0](X) * 2)
    assert torch.equal(seen.output, MODEL[1:](MODEL[0](X) * 2))
    with pytest.raises(SettingError, match="'9'"):
        WithFeatures([], change={"9": torch.relu})(MODEL, X)
