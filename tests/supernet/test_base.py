"""What supernet methods are made of."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from supple.errors import SettingError
from supple.space import Site, Space
from supple.supernet.base import (
    NestedSampler,
    Phase,
    PhasedSampler,
    RandomSampler,
    SandwichSampler,
    SupernetRule,
    nested_chain,
)
from supple.training.losses import Distillation
from supple.training.schedule import Constant
from supple.training.step import Pass, Sampler, StepOptions
from tests.training import stub


def space() -> Space:
    return Space(
        [
            Site("a", "width", (2, 4, 8), 8),
            Site("b", "width", (1, 2, 3, 4, 5), 4),
            Site("d", "depth", (0, 1), 1),
            Site("c", "width", (3, 6), 6, (("d", frozenset({1})),)),
        ]
    )


def source(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("levels", [None, 2, 3, 7])
def test_each_size_of_a_chain_contains_the_one_before(levels):
    chain = nested_chain(space(), levels)
    assert chain[0] == space().config(a=2, b=1, d=0)
    assert chain[-1] == space().largest()
    assert len(set(chain)) == len(chain)
    for small, large in itertools.pairwise(chain):
        assert all(small[site] <= large[site] for site in small)
    assert len(chain) == {None: 4, 2: 2, 3: 3, 7: 5}[levels]


def test_a_chain_has_at_least_two_levels():
    with pytest.raises(SettingError, match="levels must be at least 2, got 1"):
        nested_chain(space(), 1)


def test_nested_sizes_are_drawn_uniformly_each_on_its_own_part():
    chain = nested_chain(space())
    sampler = NestedSampler(chain, source(), 3)
    drawn = [entry for step in range(400) for entry in sampler.sample(step, None)]
    counts = Counter(entry.role for entry in drawn)
    assert counts.keys() == {f"nested-{i}" for i in range(4)}
    assert all(count == pytest.approx(300, abs=60) for count in counts.values())
    assert all(entry.config == chain[int(entry.role[-1])] for entry in drawn)
    assert [(entry.part, entry.parts) for entry in drawn[:3]] == [(0, 3), (1, 3), (2, 3)]


def test_the_sandwich_has_the_largest_first_and_regularised_alone():
    entries = SandwichSampler(space(), source(), 3, weight=0.5).sample(0, None)
    assert [entry.role for entry in entries] == ["largest", "smallest", *["random"] * 3]
    assert entries[0] == Pass(space().largest(), "largest")
    assert entries[1].config == space().smallest()
    assert not any(entry.regularise for entry in entries[1:])
    assert {entry.weight for entry in entries[1:]} == {0.5}
    assert {entry.parts for entry in entries} == {1}


@pytest.mark.parametrize("shared", [True, False])
def test_random_sizes_differ_and_repeat_with_their_generator(shared):
    def drawn() -> list[Pass]:
        sampler = RandomSampler(space(), source(3), 4, shared)
        return [entry for step in range(5) for entry in sampler.sample(step, None)]

    assert drawn() == drawn()
    assert len({entry.config for entry in drawn()}) > 5
    assert {entry.parts for entry in drawn()} == {4 if shared else 1}


@dataclass(frozen=True)
class Named(Sampler):
    """Gives one pass with a role of its own, and learns what it observes."""

    name: str
    memory: list[float] = dataclasses.field(default_factory=list)

    def sample(self, step, steps):
        return [Pass(None, self.name)]

    def observe(self, entry, loss, net):
        self.memory.append(loss)

    def state_dict(self):
        return {"memory": list(self.memory)}

    def load_state_dict(self, state):
        self.memory[:] = state["memory"]


def test_phases_follow_one_another_by_their_shares():
    sampler = PhasedSampler([Phase(1, Named("a")), Phase(2, Named("b")), Phase(1, Named("c"))])
    roles = [sampler.sample(step, 8)[0].role for step in range(9)]
    assert "".join(roles) == "aabbbbccc"


def test_phases_tell_and_keep_each_samplers_memory():
    a, b = Named("a"), Named("b")
    sampler = PhasedSampler([Phase(1, a), Phase(1, b)])
    for step, loss in enumerate([1.0, 2.0, 3.0, 4.0]):
        sampler.observe(sampler.sample(step, 4)[0], loss, None)
    assert (a.memory, b.memory) == ([1.0, 2.0], [3.0, 4.0])
    other = PhasedSampler([Phase(1, Named("a")), Phase(1, Named("b"))])
    other.load_state_dict(sampler.state_dict())
    assert other.state_dict() == sampler.state_dict()


@pytest.mark.parametrize("phases", [[], [Phase(0, Named("a"))]])
def test_phases_need_shares(phases):
    with pytest.raises(SettingError, match="phases must be at least one"):
        PhasedSampler(phases)


def test_phases_need_a_number_of_steps():
    with pytest.raises(SettingError, match="pass steps="):
        PhasedSampler([Phase(1, Named("a"))]).sample(0, None)


@dataclass(frozen=True, kw_only=True)
class Plain(SupernetRule):
    """The base's defaults."""


@dataclass(frozen=True, kw_only=True)
class Taught(SupernetRule):
    """Every part swapped."""

    aggregate: str = "mean"

    def sampler(self, space, generator):
        whole = SandwichSampler(space, generator, 0)
        return PhasedSampler([Phase(1, whole), Phase(1, RandomSampler(space, generator, 2))])

    def criterion(self, loss):
        return Distillation(loss, "teacher", labels=1.0, taught=frozenset({"random"}))

    def teachers(self, net):
        return {"teacher": stub.mlp(seed=5).module}

    def schedule(self):
        return Constant()


def test_by_default_one_random_size_learns_from_labels():
    net = stub.mlp()
    optimizer = torch.optim.SGD(net.module.parameters(), lr=0.1)
    run = Plain().start(net, optimizer, loss=stub.loss, generator=source(2))
    expected = [net.space.random(generator) for generator in [source(2)] for _ in range(4)]
    batches = stub.vectors()
    with torch.no_grad(), net.at(expected[0]):
        loss = stub.loss(net.module(batches[0][0]), batches[0]).item()
    net.active.clear()
    losses = [run.step(batch) for batch in batches]
    assert net.active == expected
    assert losses[0] == {"random": pytest.approx(loss, rel=1e-6)}
    assert Plain().schedule() is None


def test_a_method_is_a_combination_of_its_parts():
    net = stub.mlp()
    optimizer = torch.optim.SGD(net.module.parameters(), lr=0.1)
    run = Taught().start(net, optimizer, loss=stub.loss, options=StepOptions(steps=4))
    roles = [set(run.step(batch)) for batch in stub.vectors()]
    assert roles == [{"largest", "smallest"}] * 2 + [{"random"}] * 2


def test_a_plain_module_is_refused():
    module = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    with pytest.raises(SettingError, match="Plain trains an elastic network"):
        Plain().start(module, optimizer, loss=stub.loss)
