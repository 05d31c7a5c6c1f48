"""VARiant: the ratio of sub-networks to the full network, stage by stage."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from supple.errors import SettingError
from supple.supernet.base import nested_chain
from supple.supernet.variant import Mix, MixSampler, Variant
from supple.training.step import StepOptions
from tests.training import stub


def sampler(method: Variant, seed: int = 0) -> MixSampler:
    return method.sampler(stub.mlp().space, torch.Generator().manual_seed(seed))


def test_three_stages_lead_from_two_in_ten_to_sub_networks_alone():
    found = [sampler(Variant()).probability(step, 30) for step in range(30)]
    assert found[:10] == pytest.approx([0.2] * 10)
    assert found[10:20] == pytest.approx([0.2 + 0.8 * (i + 0.5) / 10 for i in range(10)])
    assert found[20:] == pytest.approx([1.0] * 10)


def test_stages_have_the_lengths_of_their_shares():
    method = Variant(phases=(Mix(3, 0.0), Mix(1, 1.0, 0.0)))
    found = [sampler(method).probability(step, 8) for step in range(8)]
    assert found == pytest.approx([0, 0, 0, 0, 0, 0, 0.75, 0.25])


def test_sizes_are_drawn_as_often_as_the_ratio_says():
    method, steps = Variant(), 3000
    chosen = sampler(method)
    passes = [chosen.sample(step, steps) for step in range(steps)]
    assert {len(each) for each in passes} == {1}
    drawn = [each[0] for each in passes]
    *smaller, largest = nested_chain(stub.mlp().space)
    for first, expected in ((0, 0.2), (1000, 0.6), (2000, 1.0)):
        part = drawn[first : first + 1000]
        assert sum(p.role == "smaller" for p in part) / 1000 == pytest.approx(
            expected, abs=0.04
        )
    assert {p.config for p in drawn if p.role == "largest"} == {largest}
    counts = Counter(p.config for p in drawn if p.role == "smaller")
    assert set(counts) == set(smaller)
    assert min(counts.values()) > 0.85 * sum(counts.values()) / len(smaller)


def test_one_step_follows_the_label_gradient_of_the_drawn_size():
    roles = set()
    for seed in range(6):
        net, batch = stub.mlp(), stub.vectors()[0]
        before = stub.weights(net.module)
        optimizer = torch.optim.SGD(net.module.parameters(), lr=0.1)
        run = Variant(phases=(Mix(1, 0.5),), levels=2).start(
            net,
            optimizer,
            loss=stub.loss,
            generator=torch.Generator().manual_seed(seed),
            options=StepOptions(steps=4),
        )
        roles.update(run.step(batch))
        (config,) = net.active
        other = stub.mlp()
        with other.at(config):
            stub.loss(other.module(batch[0]), batch).backward()
        for name, p in other.module.named_parameters():
            grad = torch.zeros_like(p) if p.grad is None else p.grad
            expected = before[name] - 0.1 * grad
            torch.testing.assert_close(net.module.get_parameter(name).detach(), expected)
    assert roles == {"largest", "smaller"}


def test_the_number_of_steps_must_be_known():
    with pytest.raises(SettingError, match="steps="):
        sampler(Variant()).sample(0, None)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("phases", lambda: Variant(phases=())),
        ("levels", lambda: Variant(levels=1)),
        ("share", lambda: Mix(0, 0.5)),
        ("probabilities", lambda: Mix(1, 1.5)),
        ("probabilities", lambda: Mix(1, 0.5, -0.1)),
    ],
)
def test_settings_are_checked(name, make):
    with pytest.raises(SettingError, match=name):
        make()
