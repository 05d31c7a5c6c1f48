"""PA&DA: choices and examples with large gradients are drawn more often."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from supple.axes.depth import Depth
from supple.axes.operator import Operator
from supple.axes.width import Width
from supple.data.base import Dataset, TensorSource
from supple.errors import SettingError
from supple.layers.choice import Choice
from supple.network import Elastic, elastic
from supple.supernet.pa_da import PaDa, mixed
from supple.training.loop import train
from supple.training.step import StepOptions
from tests.training import stub


class Block(nn.Module):
    """A residual block that can be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x).tanh()


class Net(nn.Module):
    """One site of each kind: a width, a block, an operator without parameters or with."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6))
        self.blocks = nn.Sequential(Block(), Block())
        self.op = Choice(nn.Tanh(), nn.Linear(6, 6))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.op(self.blocks(self.wide(x))))


def network() -> Elastic:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Net()
    axes = [Width((0.5, 1.0), where="wide.0"), Depth(pattern="any"), Operator()]
    return elastic(model, torch.ones(2, 5), axes=axes, verify=False)


def started(method: PaDa, net: Elastic, steps: int = 4, lr: float = 0.1):
    optimizer = torch.optim.SGD(net.module.parameters(), lr=lr)
    generator = torch.Generator().manual_seed(1)
    options = StepOptions(steps=steps)
    return method.start(net, optimizer, loss=stub.loss, generator=generator, options=options)


def examples(count: int = 24, batch_size: int = 5) -> Dataset:
    source = torch.Generator().manual_seed(3)
    xs = torch.randn(count, 5, generator=source)
    ys = torch.randint(3, (count,), generator=source)
    return Dataset(source=TensorSource((xs, ys)), batch_size=batch_size)


def step_at(run, batch):
    """Makes a step and tells the size that it trained."""
    drawn = run.sampler.sample(run.steps, 4)
    run.sampler.sample = lambda step, steps: drawn
    run.step(batch)
    del run.sampler.sample
    return drawn[0].config


def test_a_choice_is_scored_by_the_gradients_of_what_runs_because_of_it():
    net = network()
    run = started(PaDa(data=False, strength=0.0), net, lr=0.0)
    concerned = {
        "wide.0": lambda _: ["wide.0.weight", "wide.0.bias", "wide.2.weight"],
        "blocks.0.keep": lambda on: ["blocks.0.linear.weight", "blocks.0.linear.bias"] * on,
        "blocks.1.keep": lambda on: ["blocks.1.linear.weight", "blocks.1.linear.bias"] * on,
        "op": lambda on: ["op.options.1.weight", "op.options.1.bias"] * on,
    }
    expected = {name: [0.0, 0.0] for name in net.space.names}
    for batch in stub.vectors(count=12):
        config = step_at(run, batch)
        net.module.zero_grad()
        with net.at(config):
            stub.loss(net.module(batch[0]), batch).backward()
        for site, choice in config.items():
            names = concerned[site](choice)
            new = sum(float(net.module.get_parameter(name).grad.norm()) for name in names)
            index = net.space.site(site).choices.index(choice)
            old = expected[site][index]
            expected[site][index] = (old + new) / 2 if old else new
    found = run.sampler.state_dict()["scores"]
    assert {name for name, values in found.items() if min(values) > 0} == {"wide.0"}
    assert all(max(values) > 0 for values in found.values())
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, rel=1e-5), name


def test_choices_are_drawn_by_their_scores_as_the_run_goes_on():
    sampler = PaDa(data=False, floor=0.2).sampler(network().space, torch.Generator())
    sampler.load_state_dict(
        {
            "scores": {"wide.0": [3.0, 1.0], "blocks.0.keep": [0.0, 2.0], "op": [0.0, 0.0]}
            | {"blocks.1.keep": [0.0, 0.0]},
            "strength": 0.0,
            "data": None,
        }
    )
    sampler.generator.manual_seed(0)
    shares = []
    for step in (0, 50, 99):
        drawn = [sampler.sample(step, 100)[0].config for _ in range(800)]
        shares.append(
            (
                np.mean([config["wide.0"] == 4 for config in drawn]),
                np.mean([config["blocks.0.keep"] for config in drawn]),
                np.mean([config["op"] for config in drawn]),
            )
        )
    # 0.8 is the most that the floor allows: 0.8 * 3/4 + 0.2 / 2 and 0.8 + 0.2 / 2.
    expected = [(0.5, 0.5, 0.5), (0.625, 0.75, 0.5), (0.7, 0.9, 0.5)]
    np.testing.assert_allclose(shares, expected, atol=0.06)


def test_examples_are_scored_by_softmax_less_one_hot():
    net, data = network(), examples(count=10)
    run = started(PaDa(strength=0.5), net, lr=0.0)
    reordered = run.sampler.data(data)
    scores = [0.0] * 10
    xs = data.source.tensors[0]
    for batch, same in zip(reordered.epoch(0, seed=4), data.epoch(0, seed=4), strict=True):
        assert torch.equal(batch[0], same[0])  # the first epoch reads each example once
        config = step_at(run, batch)
        with net.at(config), torch.no_grad():
            wrong = net.module(batch[0]).softmax(1) - nn.functional.one_hot(batch[1], 3)
        for x, row in zip(batch[0], wrong, strict=True):
            scores[int((xs == x).all(1).nonzero())] = float(row.norm())
    found = run.sampler.state_dict()["data"]["scores"].tolist()
    assert found == pytest.approx(scores, rel=1e-5)


def test_an_epoch_draws_examples_by_their_scores_with_replacement():
    run = started(PaDa(floor=0.0, strength=0.5), network())
    data = examples(count=2000, batch_size=100)
    reordered = run.sampler.data(data)
    run.sampler.sample(0, 4)
    known = reordered.state_dict()
    known["scores"] = torch.tensor([3.0, 1.0] * 1000, dtype=torch.float64)
    reordered.load_state_dict(known)
    first = [batch[0] for batch in reordered.epoch(1, seed=0)]
    assert [len(x) for x in first] == [100] * 20
    order = reordered.state_dict()["order"]
    # Half uniform, half three to one: 0.5 / 2 + 0.5 * 3/4.
    assert float((order % 2 == 0).float().mean()) == pytest.approx(0.625, abs=0.04)
    assert len(order.unique()) < 1500
    again = [batch[0] for batch in reordered.epoch(1, seed=0, start=3)]
    assert all(torch.equal(a, b) for a, b in zip(first[3:], again, strict=True))
    run.step(next(iter(reordered.epoch(1, seed=0))))
    changed = (reordered.state_dict()["scores"] != known["scores"]).nonzero().flatten()
    read = {tuple(row) for row in first[0].tolist()}
    assert {tuple(row) for row in data.source.tensors[0][changed].tolist()} == read
    list(reordered.epoch(2, seed=0))
    assert not torch.equal(order, reordered.state_dict()["order"])


@pytest.mark.parametrize("every", [12, 14])
def test_a_run_resumes_bitwise_at_the_end_and_in_the_middle_of_an_epoch(tmp_path, every):
    method = PaDa(floor=0.0, strength=1.0 if every == 14 else None)

    class StoppedError(Exception):
        pass

    def trained(folder, stop=None, every=None):
        net, seen = network(), []

        def loss(output, batch):
            seen.append(batch[0])
            if stop is not None and len(seen) == stop:
                raise StoppedError
            return stub.loss(output, batch)

        train(
            net,
            examples(count=60),
            loss,
            method=method,
            steps=24,
            lr=0.1,
            checkpoint=folder,
            checkpoint_every=every,
            progress=False,
        )
        return stub.weights(net.module), seen

    whole, read = trained(tmp_path / "whole", every=every)
    with pytest.raises(StoppedError):
        trained(tmp_path / "parted", stop=17, every=every)
    resumed, rest = trained(tmp_path / "parted", every=every)
    assert len(rest) == 24 - every  # the second epoch begins at step 12
    assert all(torch.equal(a, b) for a, b in zip(read[every:], rest, strict=True))
    assert stub.equal(whole, resumed)


def test_other_data_needs_the_second_part_off():
    batches = stub.vectors()
    with pytest.raises(SettingError, match=r"supple\.data.*got list.*PaDa\(data=False\)"):
        train(network(), batches, stub.loss, method=PaDa(), progress=False)
    method = PaDa(data=False)
    history = train(network(), batches, stub.loss, method=method, progress=False)
    assert len(history.rows) == 4


def test_an_output_without_a_row_for_each_example_is_refused():
    net = network()
    run = started(PaDa(), net)
    data = run.sampler.data(examples())
    batch = next(iter(data.epoch(0)))
    with pytest.raises(SettingError, match=r"one row for each of the 5 examples.*\(4, 3\)"):
        run.step(tuple(tensor[:4] for tensor in batch))


def test_probabilities_are_uniform_while_nothing_is_known():
    assert mixed(np.zeros(4), 1.0).tolist() == [0.25] * 4


def test_an_open_run_needs_a_strength():
    net = network()
    optimizer = torch.optim.SGD(net.module.parameters(), lr=0.1)
    with pytest.raises(SettingError, match="strength="):
        PaDa().start(net, optimizer, loss=stub.loss).step(stub.vectors()[0])


@pytest.mark.parametrize(("name", "value"), [("floor", -0.1), ("strength", 1.5)])
def test_settings_are_checked(name, value):
    with pytest.raises(SettingError, match=name):
        PaDa(**{name: value})
