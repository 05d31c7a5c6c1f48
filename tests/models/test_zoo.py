"""The families that the elastic core is tested on can be built and run."""

from __future__ import annotations

import time

import pytest
import torch
from torch.utils._pytree import tree_leaves

from tests.zoo import ZOO

FAMILIES = list(ZOO)


def tensors(outputs):
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]


def test_there_are_at_least_25_families():
    assert len(FAMILIES) >= 25


@pytest.mark.parametrize("name", FAMILIES)
def test_a_forward_takes_less_than_a_second(name):
    module, args, kwargs = ZOO[name]()
    assert not any(part.training for part in module.modules())
    begin = time.process_time()
    with torch.no_grad():
        outputs = tensors(module(*args, **kwargs))
    assert time.process_time() - begin < 1
    assert outputs
    for output in outputs:
        assert output.isfinite().all()


@pytest.mark.parametrize("name", FAMILIES)
def test_building_twice_gives_the_same_network_and_inputs(name):
    state = torch.get_rng_state()
    (first, *inputs), (second, *others) = ZOO[name](), ZOO[name]()
    assert torch.equal(torch.get_rng_state(), state)
    for key, value in first.state_dict().items():
        torch.testing.assert_close(second.state_dict()[key], value, rtol=0, atol=0)
    for left, right in zip(tensors(inputs), tensors(others), strict=True):
        assert torch.equal(left, right)
