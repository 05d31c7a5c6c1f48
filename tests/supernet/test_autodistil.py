"""AutoDistil: uniform students, sub-spaces with their own weights, relations of a teacher."""

from __future__ import annotations

import copy

import pytest
import torch

from supple.axes.copies import Copies
from supple.axes.width import Width
from supple.errors import SettingError
from supple.network import elastic
from supple.space import Site, Space
from supple.supernet.autodistil import AutoDistil, parts_of, students
from supple.training.relations import WithAttended, attended, relation_loss
from supple.training.step import StepOptions
from tests.training import stub

BATCH = stub.vectors()[0]
APART = ({"query": (6, 8)}, {"query": (2, 4)})


def network():
    axes = [Width((2, 4, 6, 8))]
    return elastic(AutoDistil.toy(), (BATCH[0],), axes=axes, verify=False)


def start(method, net, rate=0.1):
    optimizer = torch.optim.SGD(net.module.parameters(), lr=rate)
    return method.start(net, optimizer, loss=stub.loss, options=StepOptions(steps=6))


def deep():
    sites = [Site(f"layer.{i}.up", "width", (2, 4, 8), 8) for i in range(3)]
    depth = Site("depth", "depth", (1, 2, 3), 3)
    return Space([depth, *sites])


def total_loss(net, teacher, configs, labels):
    run = WithAttended(attended(net.module))
    taught = run(teacher, BATCH)
    total = 0.0
    for config in configs:
        with net.at(config):
            seen = run(net.module, BATCH)
        each = [
            relation_loss(seen.features[kind], taught.features[kind], 2)
            for kind in ("queries", "keys", "values")
        ]
        total = total + sum(each) / 3 + labels * stub.loss(seen.output, BATCH)
    return total


def test_students_are_uniform():
    space = deep()
    (part,) = parts_of(space, [{"depth": (2, 3), "layer.*": (2, 8)}])
    found = students(space, part)
    sizes = [
        (config["depth"], *(config.get(f"layer.{i}.up") for i in range(3))) for config in found
    ]
    assert sizes == [(2, 2, 2, 2), (2, 8, 8, 8), (3, 2, 2, 2), (3, 8, 8, 8)]


def test_each_step_draws_students_of_one_subspace_in_turn():
    space = deep()
    narrow, wide = {"layer.*": (2,)}, {"layer.*": (4, 8), "depth": (2, 3)}
    method = AutoDistil(subspaces=(wide, narrow), random=3)
    sampler = method.sampler(space, torch.Generator().manual_seed(0))
    parts = parts_of(space, (wide, narrow))
    for step in range(10):
        passes = sampler.sample(step, None)
        assert [entry.role for entry in passes] == ["largest", "smallest", *["random"] * 3]
        inside = students(space, parts[step % 2])
        assert all(entry.config in inside for entry in passes)
        assert passes[0].config == inside[-1]
        assert passes[1].config == inside[0]


@pytest.mark.parametrize("labels", [0.0, 0.5])
def test_a_step_learns_the_teachers_relations_in_its_subspace_only(labels):
    method = AutoDistil(subspaces=APART, heads=2, random=0, labels=labels)
    net, twin = network(), network()
    with torch.no_grad():  # the students must differ from the teacher
        method.adapt(twin)
    teacher = copy.deepcopy(twin.module).eval()
    run = start(method, net)
    for number in (0, 1):
        part = parts_of(twin.space, APART)[number]
        inside = students(twin.space, part)
        total = total_loss(twin, teacher, (inside[-1], inside[0]), labels)
        names = dict(twin.module.named_parameters())
        gradients = torch.autograd.grad(total, list(names.values()), allow_unused=True)
        for (name, _), gradient in zip(names.items(), gradients, strict=True):
            copied = "supple_copy_1" in name
            assert gradient is None or not gradient.any() or copied == bool(number), name
        run.step(BATCH)
        with torch.no_grad():
            for p, gradient in zip(names.values(), gradients, strict=True):
                p.sub_(0.1 * (0 if gradient is None else gradient))
        for name, expected in names.items():
            torch.testing.assert_close(net.module.get_parameter(name), expected, msg=name)


def test_the_teacher_stays_as_it_was_also_when_resumed():
    method = AutoDistil(heads=2)
    net = network()
    before = {name: p.clone() for name, p in net.module.named_parameters()}
    run = start(method, net)
    run.step(BATCH)
    again = start(method, net)
    again.load_state_dict(run.state_dict())
    again.step(BATCH)
    kept = again.state_dict()["teachers"]["teacher"]
    assert all(torch.equal(kept[name], value) for name, value in before.items())
    assert not torch.equal(net.module.value.weight, before["value.weight"])


def test_one_subspace_is_one_set_of_weights():
    net = network()
    AutoDistil(heads=2).adapt(net)
    assert net.sharing is None
    AutoDistil(subspaces=APART, heads=2).adapt(net)
    assert isinstance(net.sharing, Copies)
    assert net.sharing.count == 2


@pytest.mark.parametrize(
    ("subspaces", "message"),
    [(({"qeury": (8,)},), "'query'"), (({"query": (3,)},), r"offers \(2, 4, 6, 8\)")],
)
def test_subspaces_name_what_there_is(subspaces, message):
    with pytest.raises(SettingError, match=message):
        parts_of(network().space, subspaces)


@pytest.mark.parametrize(
    ("name", "value"),
    [("subspaces", ()), ("heads", 0), ("random", -1), ("labels", -0.1)],
)
def test_settings_are_checked(name, value):
    with pytest.raises(SettingError, match=name):
        AutoDistil(**{name: value})
