"""Gradient matching: where a supernet is split, into what, and what becomes of the weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from supple.axes.base import added
from supple.axes.copies import Copies, copied
from supple.axes.width import Width
from supple.errors import SettingError
from supple.network import elastic
from supple.supernet.few_shot_nas_gm import FewShotNASGM, distances, two_groups
from supple.training.step import Pass, StepOptions
from tests.training import stub

BATCH = stub.vectors()[0]
TWO = FewShotNASGM(leaves=2, repeats=2, random=2)


def network(choices=(0.25, 0.5, 0.75, 1.0)):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = nn.Sequential(
            nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)
        )
    return elastic(model, (BATCH[0],), axes=[Width(choices)], verify=False)


def start(method, net, steps=4, momentum=0.9):
    optimizer = torch.optim.SGD(net.module.parameters(), lr=0.1, momentum=momentum)
    return method.start(net, optimizer, loss=stub.loss, options=StepOptions(steps=steps))


def split_at(run, site, near):
    """Lets a run believe that choices of one site disagree, and those of others don't."""
    state = run.sampler.state_dict()
    flat = torch.full((4, 4), 0.1, dtype=torch.float64)
    apart = flat.clone()
    for i in range(4):
        for j in range(4):
            if (i in near) != (j in near):
                apart[i, j] = 1.0
    sites = [s.name for s in run.net.space.sites]
    state["distances"] = [{s: apart if s == site else flat for s in sites}]
    run.sampler.load_state_dict(state)


def gradient(net, config, names):
    with net.at(config):
        loss = stub.loss(net.module(BATCH[0]), BATCH)
    found = torch.autograd.grad(loss, [net.module.get_parameter(n) for n in names])
    return torch.cat([g.flatten() for g in found])


def test_distances_are_cosines_over_all_parameters():
    a = {"w": torch.tensor([[3.0, 0.0]]), "b": torch.tensor([4.0])}
    b = {"w": torch.tensor([[0.0, 5.0]])}  # it does not reach the bias
    c = {"b": torch.tensor([2.0])}
    none = {"b": torch.tensor([0.0])}
    expected = [[0, 1, 0.2, 0], [1, 0, 1, 0], [0.2, 1, 0, 0], [0, 0, 0, 0]]
    torch.testing.assert_close(
        distances([a, b, c, none]), torch.tensor(expected, dtype=torch.float64)
    )


def test_groups_have_the_least_distance_within_and_two_members_at_least():
    alone = torch.full((4, 4), 1.0)
    alone[3, :] = alone[:, 3] = 50.0
    alone.fill_diagonal_(0.0)
    assert len(two_groups(alone)[0]) == 2  # although 3 by itself would cost less
    # 4 is far from all others, yet not alone; it costs least beside 1.
    table = torch.full((5, 5), 2.0)
    table[4, :] = table[:, 4] = 9.0
    table[1, 4] = table[4, 1] = 3.0
    table.fill_diagonal_(0.0)
    group, between = two_groups(table)
    assert group == (0, 2, 3)
    assert between == pytest.approx((3 * 2 + 3 * 9) / 6)
    assert two_groups(torch.tensor([[0.0, 4, 1], [4, 0, 4], [1, 4, 0]])) == ((0, 2), 4.0)
    assert two_groups(torch.tensor([[0.0, 0.5], [0.5, 0]])) == ((0,), 0.5)


def test_what_is_compared_are_gradients_outside_the_site():
    net = network()
    run = start(TWO, net)
    run.batch = BATCH
    run.sampler.begin(run)  # two steps before the split
    found = run.sampler.state_dict()["distances"][0]
    assert set(found) == {"0", "2"}
    # The site "0" concerns the first two layers, so that the last one is what is compared.
    others = [
        torch.stack(
            [
                gradient(net, {"0": choice, "2": other}, ["4.weight", "4.bias"])
                for choice in (2, 4, 6, 8)
            ]
        )
        for other in (2, 4, 6, 8)
    ]
    candidates = [1 - torch.cosine_similarity(g[:, None], g[None], dim=2) for g in others]
    off = [(found["0"] - each).abs().max().item() for each in candidates]
    assert min(off) < 1e-5
    assert sorted(off)[1] > 1e-3  # the random other choice matters


def test_distances_are_added_up_and_forgotten_at_the_split():
    net = network()
    run = start(TWO, net)
    sums = []
    for _ in range(2):
        run.step(BATCH)
        sums.append(run.sampler.state_dict()["distances"][0])
    assert all((sums[1][s] - sums[0][s]).fill_diagonal_(1.0).min() > 0 for s in ("0", "2"))
    means = {name: two_groups(each) for name, each in sums[1].items()}
    site = max(means, key=lambda name: means[name][1])
    run.step(BATCH)
    assert run.sampler.state_dict()["distances"] == [{}, {}]
    first, second = net.sharing.parts
    assert set(first) == set(second) == {site}
    together = tuple((2, 4, 6, 8)[i] for i in means[site][0])
    assert together in (first[site], second[site])


@pytest.mark.parametrize(
    ("site", "near", "own", "other"),
    [("0", (0, 1), (6, 8), (2, 4)), ("2", (0, 3), (2, 8), (4, 6))],
)
def test_the_site_that_disagrees_most_is_split_and_the_full_size_keeps_the_module(
    site, near, own, other
):
    net = network()
    run = start(TWO, net)
    run.step(BATCH)
    run.step(BATCH)
    split_at(run, site, near)
    run.step(BATCH)
    assert net.sharing == Copies(({site: own}, {site: other}), count=2)
    assert net.sharing.chosen(net.space.largest()) == 0


def test_children_begin_with_the_weights_and_moments_of_their_parent():
    net = network()
    run = start(TWO, net)
    run.step(BATCH)
    run.step(BATCH)
    split_at(run, "0", (0, 1))
    run.batch = BATCH
    parameters = dict(net.module.named_parameters())
    assert not torch.equal(parameters["0.weight"], parameters[copied("0.weight", 1)])
    run.sampler.begin(run)
    for name, owner in parameters.items():
        if not added(name):
            child = parameters[copied(name, 1)]
            assert torch.equal(owner, child), name
            moments = [run.optimizer.state[p]["momentum_buffer"] for p in (owner, child)]
            assert torch.equal(*moments), name
            assert moments[0] is not moments[1]


def test_a_step_sums_the_gradients_of_each_sub_supernet_in_its_own_weights():
    net = network()
    run = start(TWO, net, momentum=0.0)
    for _ in range(2):
        run.step(BATCH)
    split_at(run, "0", (0, 1))
    run.batch = BATCH
    run.sampler.begin(run)
    state = run._generator.get_state()
    first, second = run.sampler.sample(run.steps, 4)
    run._generator.set_state(state)
    assert (first.role, second.role) == ("leaf-0", "leaf-1")
    assert first.config["0"] in (6, 8)
    assert second.config["0"] in (2, 4)
    before = stub.weights(net.module)
    one, two = run.gradients(first, BATCH), run.gradients(second, BATCH)
    assert not any(added(name) for name in one)
    assert all(added(name) for name in two)
    run.step(BATCH)
    for name, parameter in net.module.named_parameters():
        grad = {**one, **two}[name]
        torch.testing.assert_close(parameter.detach(), before[name] - 0.1 * grad)


def test_passes_go_round_and_each_sub_supernet_gets_as_many():
    net = network()
    run = start(FewShotNASGM(leaves=4, until=0.2, repeats=1, random=3), net, steps=10)
    run.step(BATCH)
    run.step(BATCH)
    roles = [set(run.step(BATCH)) for _ in range(4)]
    assert set.union(*roles[:2]) == {f"leaf-{i}" for i in range(4)}
    assert len(net.sharing.parts) == 4
    passes = [run.sampler.sample(step, 10) for step in range(4)]
    counted = [entry.role for each in passes for entry in each]
    assert {counted.count(f"leaf-{i}") for i in range(4)} == {3}


def test_splits_come_at_even_intervals():
    net = network()
    run = start(FewShotNASGM(leaves=4, until=0.5, by="random"), net, steps=8)
    counts = []
    for _ in range(8):
        run.step(BATCH)
        counts.append(len(net.sharing.parts))
    assert counts == [1, 1, 2, 2, 4, 4, 4, 4]


def test_a_second_split_takes_another_site():
    net = network()
    run = start(FewShotNASGM(leaves=4, repeats=1), net, steps=8)
    for _ in range(5):
        run.step(BATCH)
    assert all(set(part) == {"0", "2"} for part in net.sharing.parts)
    sizes = net.space.decode_many(net.space.every())
    assert {net.sharing.chosen(config) for config in sizes} == {0, 1, 2, 3}


def test_another_process_goes_on_with_the_split():
    net, other = network(), network()
    run = start(TWO, net, momentum=0.0)
    for _ in range(3):
        run.step(BATCH)
    again = start(TWO, other, momentum=0.0)
    other.module.load_state_dict(net.module.state_dict())
    assert other.sharing != net.sharing
    again.load_state_dict(run.state_dict())
    assert other.sharing == net.sharing
    run.step(BATCH)
    again.step(BATCH)
    assert stub.equal(stub.weights(net.module), stub.weights(other.module))


def test_a_network_that_is_split_is_trained_on_as_it_is():
    net = network()
    run = start(TWO, net)
    for _ in range(3):
        run.step(BATCH)
    split = net.sharing
    run = start(TWO, net)
    assert set(run.step(BATCH)) == {"leaf-0", "leaf-1"}
    assert net.sharing == split


def test_a_site_with_many_choices_is_judged_by_eight_of_them():
    net = network(None)
    run = start(TWO, net)
    run.batch = BATCH
    run.sampler.begin(run)
    assert run.sampler.state_dict()["distances"][0]["0"].shape == (8, 8)
    wide = elastic(nn.Sequential(nn.Linear(5, 20), nn.Linear(20, 3)), (BATCH[0],), verify=False)
    run = start(TWO, wide)
    run.batch = BATCH
    run.sampler.begin(run)
    run.sampler.begin(run)
    state = run.sampler.state_dict()
    apart = torch.zeros(8, 8)
    apart[:3, 3:] = apart[3:, :3] = 1.0
    state["distances"] = [{"0": apart}]
    run.sampler.load_state_dict(state)
    run.steps = 2
    run.sampler.begin(run)
    own, other = (part["0"] for part in wide.sharing.parts)
    assert sorted(own + other) == list(wide.space.site("0").choices)
    assert max(other) < min(own)


def test_random_splits_compare_nothing():
    net = network()
    run = start(FewShotNASGM(by="random", leaves=2), net)
    run.gradients = lambda *_: pytest.fail("gradients were compared")
    for _ in range(3):
        run.step(BATCH)
    (own,), (other,) = (part.values() for part in net.sharing.parts)
    assert len(own) == len(other) == 2


def test_with_one_leaf_it_is_one_shot_training():
    net = network()
    run = start(FewShotNASGM(leaves=1, random=3), net, steps=None)
    run.step(BATCH)
    assert run.passes == 3
    assert not net.added_parameters()


def test_the_number_of_steps_must_be_known():
    with pytest.raises(SettingError, match="pass steps="):
        start(TWO, network(), steps=None).step(BATCH)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("leaves", 0),
        ("leaves", 3),
        ("until", 0.0),
        ("until", 1.0),
        ("repeats", 0),
        ("random", 0),
        ("by", "loss"),
    ],
)
def test_settings_are_checked(name, value):
    with pytest.raises(SettingError, match=name):
        FewShotNASGM(**{name: value})


def test_the_pass_that_is_compared_has_no_dropout():
    seen = []
    net = network()
    run = start(TWO, net)
    gradients = run.gradients
    run.gradients = lambda entry, batch: seen.append(entry) or gradients(entry, batch)
    run.step(BATCH)
    assert seen
    assert all(isinstance(entry, Pass) and not entry.regularise for entry in seen)
