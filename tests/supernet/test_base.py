"""What supernet methods are made of."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from supple.errors import SettingError
from supple.space import Site, Space
from supple.supernet.base import (
    BandSampler,
    NestedSampler,
    Phase,
    PhasedSampler,
    RandomSampler,
    SandwichSampler,
    SupernetRule,
    nested_chain,
    random_in_band,
)
from supple.testing import rules
from supple.training.losses import Distillation, Labels
from supple.training.schedule import Constant, Scaled
from supple.training.step import Pass, Sampler, Seen, SizesRun, StepOptions, WholeOnly
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

    def observe(self, seen):
        self.memory.append(seen.loss)

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
        sampler.observe(Seen(sampler.sample(step, 4)[0], loss, None, None, None))
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


@dataclass(frozen=True)
class Entering:
    """Writes down who entered, and where the run was."""

    name: str
    told: list[tuple[str, int]]

    def __call__(self, run) -> None:
        self.told.append((self.name, run.steps))


def phased(told: list[tuple[str, int]], shares=(2, 0.01, 1, 1)) -> PhasedSampler:
    return PhasedSampler(
        [
            Phase(share, WholeOnly(role=name), Scaled(Linear(), factor), Entering(name, told))
            for share, name, factor in zip(shares, "abcd", (1.0, 3.0, 0.5, 0.25), strict=True)
        ]
    )


@dataclass(frozen=True)
class Linear:
    """Falls linearly to 0."""

    def __call__(self, step, steps):
        return 1 - step / steps


def test_phases_are_entered_in_order_once_also_where_they_have_no_step():
    net, told = stub.mlp(), []
    options = StepOptions(steps=8)
    optimizer = torch.optim.SGD(net.module.parameters(), lr=0.1)
    run = SizesRun(net.module, optimizer, phased(told), Labels(stub.loss), options=options)
    rates = []
    for batch in stub.vectors(8):
        run.step(batch)
        rates.append(run.lr)
    assert told == [("a", 0), ("b", 4), ("c", 4), ("d", 6)]
    # each phase has its own course of the rate
    assert rates == pytest.approx([0.1, 0.075, 0.05, 0.025, 0.05, 0.025, 0.025, 0.0125])


@pytest.mark.parametrize("stop", [1, 4, 5, 6, 7])
def test_a_resumed_run_does_not_enter_a_phase_again(stop):
    net, told = stub.mlp(), []
    options = StepOptions(steps=8)
    optimizer = torch.optim.SGD(net.module.parameters(), lr=0.1)

    def begun() -> SizesRun:
        return SizesRun(net.module, optimizer, phased(told), Labels(stub.loss), options=options)

    first = begun()
    for batch in stub.vectors(8)[:stop]:
        first.step(batch)
    second = begun()
    second.load_state_dict(first.state_dict())
    for batch in stub.vectors(8)[stop:]:
        second.step(batch)
    assert told == [("a", 0), ("b", 4), ("c", 4), ("d", 6)]


def test_phases_without_schedules_leave_the_rate_alone():
    phases = PhasedSampler([Phase(1, WholeOnly()), Phase(1, WholeOnly())])
    assert phases.rate(0, 4) is None


def sums(rows):
    return space().choices_of(space().canonical_many(rows)).sum(1)


@pytest.mark.parametrize("cost", [11, 16, 19])
def test_a_config_of_a_cost_is_found_also_where_it_is_rare(cost):
    found = {random_in_band(space(), sums, cost, cost, seed) for seed in range(20)}
    assert {int(sums(space().encode(config)[None])[0]) for config in found} == {cost}
    assert len(found) > 1 or cost == 19


def test_a_thin_band_is_reached_by_moves():
    sites = [Site(f"s{i}", "width", (0, 1, 2, 3), 3) for i in range(24)]
    wide = Space(sites)
    config = random_in_band(wide, lambda rows: rows.sum(1), 0, 1, 0)
    assert sum(config.values()) <= 1  # a uniform draw is there with probability 25 / 4**24


def test_a_band_without_sizes_names_the_nearest_cost():
    with pytest.raises(SettingError, match=r"from 30 to 40 .* the nearest costs 20"):
        random_in_band(space(), sums, 30, 40, 0, tries=3)


class Priced(stub.Stub):
    """Costs the square of its width."""

    def costs(self, configs):
        widths = self.space.choices_of(configs)[:, self.space.column("width")]
        return {"macs": widths**2}


def test_bands_of_costs_are_drawn_uniformly_and_sizes_fit_them():
    net = Priced(stub.mlp().module)
    sampler = BandSampler(net.space, source(), bands=3, count=2)
    optimizer = torch.optim.SGD(net.module.parameters(), lr=0.1)
    run = SizesRun(net, optimizer, sampler, Labels(stub.loss), generator=source())
    run.step(stub.vectors()[0])
    drawn = [entry for step in range(300) for entry in sampler.sample(step, None)]
    counts = Counter((entry.role, entry.config["width"]) for entry in drawn)
    # costs 4, 16, 36, 64 in bands that end at 24, 44, 64
    roles = Counter(entry.role for entry in drawn)
    assert all(count == pytest.approx(200, abs=40) for count in roles.values())
    assert counts.keys() == {("band-0", 2), ("band-0", 4), ("band-1", 6), ("band-2", 8)}


def test_bands_can_be_preferred():
    class Small(BandSampler):
        def probabilities(self, step, steps):
            return np.array([1.0, 0.0, 0.0])

    net = Priced(stub.mlp().module)
    optimizer = torch.optim.SGD(net.module.parameters(), lr=0.1)
    run = SizesRun(net, optimizer, Small(net.space, source(), 3), Labels(stub.loss))
    assert run.step(stub.vectors()[0]).keys() == {"band-0"}
    with pytest.raises(SettingError, match="bands and count"):
        BandSampler(net.space, source(), bands=0)


def test_bands_of_a_subspace_have_its_own_costs():
    class Counted(Priced):
        def costs(self, configs):
            return super().costs(self.space.encode_many(configs))

    net = Counted(stub.mlp().module)
    half = net.space.subspace({"width": (4, 6)})
    optimizer = torch.optim.SGD(net.module.parameters(), lr=0.1)
    sampler = BandSampler(half, source(), bands=2)
    SizesRun(net, optimizer, sampler, Labels(stub.loss)).step(stub.vectors()[0])
    drawn = [entry for _ in range(40) for entry in sampler.sample(0, None)]
    widths = {(entry.role, entry.config["width"]) for entry in drawn}
    assert widths == {("band-0", 4), ("band-1", 6)}


def test_sorting_takes_moments_and_the_average_along() -> None:
    """A run whose units are reordered goes on as the same run with units in the old order."""
    plain, moved = (rules.network() for _ in range(2))
    runs = [
        SizesRun(
            net,
            torch.optim.Adam(net.module.parameters(), lr=0.01),
            WholeOnly(net.space.largest()),
            Labels(stub.loss),
            options=StepOptions(ema=0.5),
        )
        for net in (plain, moved)
    ]
    for batch in stub.vectors():
        for run in runs:
            run.step(batch)
    before = moved.module[0].weight.detach().clone()
    runs[1].sort("read_l1")
    assert not torch.equal(moved.module[0].weight.detach(), before)
    for batch in stub.vectors(seed=5):
        for run in runs:
            run.step(batch)
    x = stub.vectors()[0][0]
    torch.testing.assert_close(moved.module(x), plain.module(x))
    with runs[0].average.applied(), runs[1].average.applied():
        torch.testing.assert_close(moved.module(x), plain.module(x))


def test_only_elastic_networks_are_sorted() -> None:
    module = nn.Linear(2, 2)
    run = SizesRun(module, torch.optim.SGD(module.parameters()), WholeOnly(), Labels(stub.loss))
    with pytest.raises(SettingError, match="a Linear can't be sorted"):
        run.sort()
