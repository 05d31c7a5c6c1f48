"""ElasticViT: adjacent costs, remembered sizes, width before depth, small sizes by region."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn

from supple.errors import SettingError
from supple.space import Site, Space
from supple.supernet.elasticvit import (
    AdjacentCostSampler,
    Bank,
    ElasticViT,
    cost_banks,
    prefer_width,
)
from supple.testing.rules import network
from supple.training.divergence import adaptive_divergence
from supple.training.step import Pass, Seen, StepOptions
from tests.training import stub


def grid(sites=3):
    """Sizes whose cost is the product of their choices: from 1 to 4096."""
    space = Space([Site(f"w{i}", "width", (1, 2, 4, 8, 16), 16) for i in range(sites)])
    return space, lambda rows: space.choices_of(rows).prod(1)


class Priced(stub.Stub):
    """A stub that knows the cost of its sizes."""

    def costs(self, configs):
        chosen = self.space.choices_of(np.asarray(configs))
        return {"macs": chosen[:, 0] * (1 + chosen[:, 1])}


def start(method, net, seed=3, lr=0.1, steps=60):
    optimizer = torch.optim.SGD(net.module.parameters(), lr=lr)
    generator = torch.Generator().manual_seed(seed)
    options = StepOptions(steps=steps)
    return method.start(net, optimizer, loss=stub.loss, generator=generator, options=options)


def sampler(**settings):
    """One on three banks of the grid, without a network."""
    space, price = grid()
    made = AdjacentCostSampler(space, torch.Generator().manual_seed(0), ElasticViT(**settings))
    made._banks, made._price = cost_banks(space, price, banks=3), price
    return made


def test_banks_are_spaced_geometrically_and_share_small_sizes_by_thirds():
    space, price = grid()
    banks = cost_banks(space, price, banks=7, window=0.1)
    costs = [Counter(price(bank.rows).tolist()) for bank in banks]
    assert costs[0] == {1: 1, 2: 3, 4: 4}  # there is one at 1, and each has 125 / 14 or more
    assert costs[2:5] == [{16: 15}, {64: 19}, {256: 15}]  # all there are
    assert costs[6] == {4096: 1, 2048: 3, 1024: 4}
    smallest = [price(space.encode_many([bank.smallest]))[0] for bank in banks]
    assert smallest == [1, 1, 1, 8, 8, 512, 512]


def test_thin_banks_hold_the_nearest_sizes_and_end():
    space = Space([Site("w", "width", (1, 1000), 1000), Site("v", "width", (1, 2), 2)])
    asked = []

    def price(rows):
        asked.append(len(rows))
        return space.choices_of(rows).prod(1)

    banks = cost_banks(space, price, banks=5, window=0.01)
    costs = [price(bank.rows).tolist() for bank in banks]
    assert [1] in costs
    assert [2000] in costs
    assert all(len(one) == 1 for one in costs)
    assert len(banks) == 4  # there are no more sizes
    assert len(asked) < 5 * 45


def test_the_walk_moves_by_one_and_stays_at_the_ends_twice_as_often():
    made, places = sampler(banks=3), []
    for step in range(3000):
        made.sample(step, None)
        places.append(made._bank)
    moves = Counter(itertools.pairwise(places))
    assert set(moves) == {(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (2, 1), (2, 2)}
    at = Counter(places[:-1])
    assert moves[0, 0] / at[0] == pytest.approx(2 / 3, abs=0.06)
    assert moves[2, 2] / at[2] == pytest.approx(2 / 3, abs=0.06)
    for end in (0, 1, 2):
        assert moves[1, end] / at[1] == pytest.approx(1 / 3, abs=0.06)


def test_a_step_stays_within_a_bank_and_ends_with_its_small_size():
    made = sampler(banks=3, random=2)
    for step in range(30):
        *drawn, last = made.sample(step, 30)
        bank = made._banks[made._bank]
        inside = {made.space.decode(row) for row in bank.rows}
        assert [entry.role for entry in (*drawn, last)] == ["random", "random", "smallest"]
        assert {entry.config for entry in drawn} <= inside
        assert last.config == bank.smallest


def see(made, config, loss):
    """Tells a sampler that a step trained one size."""
    for entry in (Pass(config, "random"), Pass(made._banks[0].smallest, "smallest")):
        made.observe(Seen(entry, torch.tensor(loss), None, None, nn.Identity()))
    made._seen.clear()


def test_a_bank_remembers_the_sizes_with_the_lowest_losses_for_their_time():
    made = sampler(memory=2)
    a, b, c = (made.space.decode(row) for row in made.space.every()[:3])
    see(made, a, 4.0)
    assert made._memory[0] == {a: 0.0}
    see(made, b, 2.0)  # less than usual, 4
    see(made, c, 3.9)  # more than usual, 3.8
    assert made._memory[0] == {a: 0.0, b: -2.0}
    see(made, b, 3.0)  # measured anew
    assert made._memory[0][b] == pytest.approx(3.0 - (0.9 * 3.8 + 0.1 * 3.9))


def test_remembered_sizes_are_drawn_by_the_softmax_of_their_losses():
    made = sampler(memory=2, exploit=1.0, random=1, banks=1)
    made._banks = made._banks[:1]
    every = made._banks[0].rows
    good, bad = (made.space.decode(row) for row in every[:2])
    made._memory[0] = {good: -math.log(3.0), bad: 0.0}
    drawn = Counter(made.sample(step, None)[0].config for step in range(2000))
    assert set(drawn) == {good, bad}
    assert drawn[good] / 2000 == pytest.approx(0.75, abs=0.03)


def test_memory_is_used_once_half_of_it_is_full_and_more_as_time_goes_on():
    made = sampler(memory=4, exploit=0.1, growth=0.3, random=1, candidates=1)
    space = made.space
    made._banks = [Bank(made._banks[1].rows, space.smallest())]
    known = [space.largest(), space.smallest(), space.config(w0=1, w1=16, w2=1)]

    def share(step):
        taken = [made.sample(step, 60)[0].config in known[:2] for _ in range(400)]
        return sum(taken) / 400

    made._memory[0] = dict.fromkeys(known[:2], 0.0)
    assert share(59) == 0
    made._memory[0] = {known[0]: 0.0, known[1]: 0.0, known[2]: 50.0}
    assert share(9) == pytest.approx(0.1, abs=0.05)
    assert share(10) == pytest.approx(0.4, abs=0.08)
    assert share(59) == 1.0


def stack():
    """Three blocks of a width each, of which the last ones can be skipped."""
    sites = [Site("depth", "depth", (1, 2, 3), 3), Site("w1", "width", (1, 2, 6), 6)]
    for n in (2, 3):
        inside = (("depth", frozenset(range(n, 4))),)
        sites.append(Site(f"w{n}", "width", (1, 2, 6), 6, inside))
    space = Space(sites)

    def price(rows):
        chosen, there = space.choices_of(rows)[:, 1:], space.present(rows)[:, 1:]
        return (chosen * there).sum(1)

    return space, price


def test_width_is_preferred_to_depth_at_one_cost():
    space, price = stack()
    wide, deep = space.config(depth=1, w1=6), space.config(depth=3, w1=2, w2=2, w3=2)
    rows = space.encode_many([deep, wide])
    assert price(rows).tolist() == [6, 6]
    anchor = space.config(depth=2, w1=1, w2=1)
    # By hand: with the anchor's widths 1 + 1 + 2 and 1, with its depth 2 + 2 and 6 + 1.
    assert prefer_width(space, price, rows, anchor).tolist() == [4 - 4, 1 - 7]


def test_the_best_candidate_is_taken_by_the_anchor_of_the_cheapest_bank():
    space, price = stack()
    method = ElasticViT(memory=1, exploit=0.0, growth=0.0, random=1, candidates=64)
    made = AdjacentCostSampler(space, torch.Generator().manual_seed(0), method)
    wide, deep = space.config(depth=1, w1=6), space.config(depth=3, w1=2, w2=2, w3=2)
    bank = Bank(space.encode_many([deep, wide]), space.smallest())
    made._banks, made._price = [bank, bank], price
    made._memory = {0: {space.config(depth=2, w1=1, w2=1): 0.0, deep: 1.0}, 1: {wide: 0.0}}
    assert {made.sample(step, None)[0].config for step in range(20)} == {wide}
    made._memory.clear()  # too early to choose
    assert len({made.sample(step, None)[0].config for step in range(20)}) == 2


@pytest.mark.parametrize("teacher", [False, True])
def test_a_step_teaches_the_small_size_by_the_mean_of_the_random_ones(teacher):
    net, batch = Priced(stub.mlp().module), stub.vectors()[0]
    before = stub.weights(net.module)
    divergence = {"alphas": (-1.0,), "limit": 0.9}
    method = ElasticViT(banks=1, random=2, pretrained=teacher, labels=0.25, **divergence)
    start(method, net, seed=5).step(batch)
    other = stub.mlp()
    full = other.module(batch[0]).detach().softmax(-1)
    *randoms, smallest = net.active
    outputs = []
    for config in randoms:
        with other.at(config):
            outputs.append(other.module(batch[0]))
            loss = stub.loss(outputs[-1], batch)
            if teacher:
                soft = -(full * outputs[-1].log_softmax(-1)).sum(-1).mean()
                loss = 0.25 * loss + 0.75 * soft
            loss.backward(retain_graph=True)
    assert len(randoms) == 2
    mean = sum(one.detach().softmax(-1) for one in outputs) / 2
    with other.at(smallest):
        student = other.module(batch[0])
        adaptive_divergence(student, mean.log(), **divergence).backward()
    for name, p in other.module.named_parameters():
        expected = before[name] - 0.1 * (0 if p.grad is None else p.grad)
        torch.testing.assert_close(net.module.get_parameter(name).detach(), expected)


def test_what_was_remembered_survives_a_resume():
    x = torch.randn(17, 5, generator=torch.Generator().manual_seed(1))
    net = network()
    run = start(ElasticViT(banks=2, memory=3), net)
    for _ in range(6):
        run.step((x, torch.arange(17) % 3))
    again = start(ElasticViT(banks=2, memory=3), net)
    again.load_state_dict(run.state_dict())
    assert run.sampler._memory
    for name in ("_memory", "_level", "_bank"):
        assert getattr(again.sampler, name) == getattr(run.sampler, name)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("banks", 0),
        ("window", 0.0),
        ("random", 0),
        ("memory", 0),
        ("exploit", 1.5),
        ("growth", -0.1),
        ("candidates", 0),
        ("labels", 2.0),
        ("alphas", ()),
        ("limit", 0.0),
    ],
)
def test_settings_are_checked(name, value):
    with pytest.raises(SettingError, match=name):
        ElasticViT(**{name: value})
