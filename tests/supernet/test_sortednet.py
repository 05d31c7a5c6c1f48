"""SortedNet: random nested sizes with accumulated gradients."""

from __future__ import annotations

import pytest
import torch

from supple.errors import SettingError
from supple.supernet.base import nested_chain
from supple.supernet.sortednet import SortedNet
from tests.training import stub


@pytest.mark.parametrize("sizes", ["chain", "random"])
def test_one_step_averages_the_label_gradients_of_its_micro_steps(sizes):
    net, batch = stub.mlp(), stub.vectors(size=8)[0]
    before = stub.weights(net.module)
    optimizer = torch.optim.SGD(net.module.parameters(), lr=0.1)
    method = SortedNet(micro_steps=4, sizes=sizes)
    run = method.start(
        net, optimizer, loss=stub.loss, generator=torch.Generator().manual_seed(1)
    )
    run.step(batch)
    drawn = list(net.active)
    assert len(drawn) == 4
    assert len(set(drawn)) > 1
    other = stub.mlp()
    for i, config in enumerate(drawn):
        part = tuple(tensor[2 * i : 2 * i + 2] for tensor in batch)
        with other.at(config):
            (stub.loss(other.module(part[0]), part) / 4).backward()
    for name, p in other.module.named_parameters():
        grad = torch.zeros_like(p) if p.grad is None else p.grad
        expected = before[name] - 0.1 * grad
        torch.testing.assert_close(net.module.get_parameter(name).detach(), expected)


def test_only_sizes_of_the_chain_are_trained_and_all_of_them():
    net = stub.mlp()
    optimizer = torch.optim.SGD(net.module.parameters(), lr=0.1)
    run = SortedNet(levels=3).start(net, optimizer, loss=stub.loss)
    roles = {role for _ in range(6) for batch in stub.vectors() for role in run.step(batch)}
    assert set(net.active) == set(nested_chain(net.space, 3))
    assert roles == {"nested-0", "nested-1", "nested-2"}


@pytest.mark.parametrize(
    ("name", "value"), [("micro_steps", 0), ("levels", 1), ("sizes", "nested")]
)
def test_settings_are_checked(name, value):
    with pytest.raises(SettingError, match=name):
        SortedNet(**{name: value})
