"""Controllable multi-task: representations that stay alike, and sizes by preference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import supple
from supple.errors import SettingError
from supple.supernet.controllable_multitask import (
    ControllableMultitask,
    PreferenceAllocator,
    distance,
)
from tests.training import stub


class TwoTasks(nn.Module):
    """An encoder that gives 6 features whatever its width, and two decoders."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6))
        self.left = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
        self.right = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.encoder(x)
        return self.left(x), self.right(x)


def network() -> supple.Elastic:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = TwoTasks()
    axes = [supple.Width((2, 4, 6, 8), where=f"{part}.0") for part in PARTS]
    return supple.elastic(model, torch.randn(2, 5), axes=axes, verify=False)


PARTS = ("encoder", "left", "right")


def loss(output: tuple[Tensor, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    left, right = output
    return F.cross_entropy(left, batch[1]) + right.square().mean()


def by_hand(own: Tensor, target: Tensor) -> Tensor:
    angle = F.cosine_similarity(own.flatten(1), target.detach().flatten(1))
    return (2 - 2 * angle).mean()


@pytest.mark.parametrize("invariance", [0.0, 0.7])
def test_a_step_sums_labels_of_all_and_the_distance_of_the_smaller_ones(invariance):
    net, batch = network(), stub.vectors(size=7)[0]
    before = stub.weights(net.module)
    run = ControllableMultitask(invariance=invariance, random=2).start(
        net,
        torch.optim.SGD(net.module.parameters(), lr=0.1),
        loss=loss,
        generator=torch.Generator().manual_seed(1),
    )
    entries = run.sampler.sample(0, None)
    assert [entry.role for entry in entries] == ["largest", "smallest", "random", "random"]
    run.load_state_dict({**run.state_dict(), "generator": generator_state(1)})
    run.step(batch)
    twin = network()
    target = twin.module.encoder(batch[0])
    for entry in entries:
        with twin.at(entry.config):
            total = loss(twin.module(batch[0]), batch)
            if entry.role != "largest":
                total = total + invariance * by_hand(twin.module.encoder(batch[0]), target)
            total.backward()
    for name, p in twin.module.named_parameters():
        expected = before[name] - 0.1 * p.grad
        torch.testing.assert_close(net.module.get_parameter(name).detach(), expected)


def generator_state(seed: int) -> Tensor:
    return torch.Generator().manual_seed(seed).get_state()


def test_several_representations_are_averaged():
    net, batch = network(), stub.vectors(size=7)[0]
    method = ControllableMultitask(features=("encoder", "left.0"), invariance=0.5, random=0)
    run = method.start(net, torch.optim.SGD(net.module.parameters(), lr=0.0), loss=loss)
    found = run.step(batch)["smallest"]
    model = net.module
    with torch.no_grad():
        encoded = model.encoder(batch[0])
        largest = model.left[0](encoded)
        with net.at(net.space.smallest()):
            small = model.encoder(batch[0])
            inner = model.left[0](small)
            expected = loss(model(batch[0]), batch)
    solved = torch.linalg.lstsq(inner, largest).solution
    apart = by_hand(small, encoded) + by_hand(inner @ solved, largest)
    assert found == pytest.approx(float(expected + 0.5 * apart / 2), rel=1e-3)


def test_the_distance_ignores_length_and_counts_opposites_as_four():
    a = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    assert distance(5 * a, a).item() == pytest.approx(0.0, abs=1e-6)
    assert distance(-a, 2 * a).item() == pytest.approx(4.0)
    assert distance(a, a.flip(1)).item() == pytest.approx(2.0)


def test_narrow_representations_are_mapped_by_least_squares_at_every_position():
    source = torch.Generator().manual_seed(0)
    own = torch.randn(5, 2, 11, generator=source, requires_grad=True)
    mix = torch.randn(3, 2, generator=source)
    target = torch.einsum("oc,nct->not", mix, own.detach())
    assert distance(own, target).item() < 1e-5
    other = torch.randn(5, 3, 11, generator=source).requires_grad_()
    flat, goal = (
        own.detach().movedim(1, 2).flatten(0, 1),
        other.detach().movedim(1, 2).flatten(0, 1),
    )
    fitted = (flat @ torch.linalg.lstsq(flat, goal).solution).reshape(5, 11, 3).movedim(2, 1)
    found = distance(own, other)
    assert found.item() == pytest.approx(by_hand(fitted, other).item(), rel=1e-2)
    found.backward()
    assert own.grad.isfinite().all()
    assert other.grad is None


def test_dead_representations_have_finite_gradients():
    own = torch.zeros(3, 2, requires_grad=True)
    distance(own, torch.randn(3, 4)).backward()
    assert own.grad.isfinite().all()


def test_other_sizes_must_agree():
    with pytest.raises(SettingError, match="second dimension only"):
        distance(torch.ones(2, 3, 5), torch.ones(2, 3, 7))


def test_modules_that_are_never_called_give_no_representation():
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(5, 8), nn.Linear(8, 3)])

        def forward(self, x: Tensor) -> Tensor:
            return self.layers[1](self.layers[0](x).relu())

    net = supple.elastic(Listed(), torch.randn(2, 5), verify=False)
    optimizer = torch.optim.SGD(net.module.parameters(), lr=0.1)
    run = ControllableMultitask(features=("layers",)).start(net, optimizer, loss=stub.loss)
    with pytest.raises(SettingError, match="'layers', which gave nothing"):
        run.step(stub.vectors()[0])


# ------------------------------------------------------------------------- sizes by preference


def allocator(net, **settings) -> PreferenceAllocator:
    return PreferenceAllocator(net, {"a": "left", "b": "right"}, **settings)


def macs(net, config) -> float:
    return float(net.costs(config)["macs"][0])


def test_who_is_preferred_gets_the_wider_decoder_and_the_encoder_what_is_left():
    net = network()
    choose = allocator(net)
    most = macs(net, net.space.largest())
    assert choose(most, {"a": 1, "b": 1}) == net.space.largest()
    assert dict(choose(most, {"a": 1.0, "b": 0.5})) == {
        "encoder.0": 8,
        "left.0": 8,
        "right.0": 4,
    }
    assert choose(most, {"a": 0.0, "b": 3.0})["left.0"] == 2
    config = choose(0.75 * most, {"a": 1.0, "b": 0.25})
    assert (config["left.0"], config["right.0"]) == (8, 2)
    rows = [
        c
        for c in (2, 4, 6, 8)
        if macs(net, net.space.config({**config, "encoder.0": c})) <= 0.75 * most
    ]
    assert config["encoder.0"] in (max(rows), max(rows) - 2)  # budgets are rounded down


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.5, 0.77, 1.0])
def test_no_size_exceeds_its_budget(share):
    net = network()
    low, high = macs(net, net.space.smallest()), macs(net, net.space.largest())
    budget = low + share * (high - low)
    for first in (0.0, 0.2, 0.5, 0.9):
        config = allocator(net)(budget, {"a": first, "b": 1 - first})
        assert macs(net, config) <= budget


def test_tight_budgets_narrow_all_decoders_together():
    net = network()
    low, high = macs(net, net.space.smallest()), macs(net, net.space.largest())
    config = allocator(net)(low + 0.4 * (high - low), {"a": 1.0, "b": 0.5})
    assert (config["left.0"], config["right.0"]) == (6, 2)  # 0.75, and half of it rounded


def test_the_encoder_that_scores_best_is_kept_and_scored_once():
    net, asked = network(), []

    def score(config):
        asked.append(config)
        return -abs(config["encoder.0"] - 4)

    choose = allocator(net, score=score, grid=10)
    most = macs(net, net.space.largest())
    first = choose(most, {"a": 0.61, "b": 0.6})
    assert first["encoder.0"] == 4
    assert len(asked) == 4
    assert choose(most * 1.01, {"a": 0.6, "b": 0.6}) == first
    assert len(asked) == 4


@pytest.mark.parametrize(
    "preferences", [{"a": 1.0}, {"a": 0.0, "b": 0.0}, {"a": -1.0, "b": 1.0}, {"a": 1, "c": 1}]
)
def test_preferences_are_checked(preferences):
    with pytest.raises(SettingError, match="preferences"):
        allocator(network())(1e9, preferences)


def test_settings_are_checked():
    net = network()
    with pytest.raises(SettingError, match="at least"):
        allocator(net)(1.0, {"a": 1, "b": 1})
    with pytest.raises(SettingError, match="middle"):
        PreferenceAllocator(net, {"a": "middle"})
    for settings in ({"grid": 0}, {"levels": (0.5, 0.75)}, {"levels": (1.0, 0.5)}):
        with pytest.raises(SettingError, match="grid"):
            allocator(net, **settings)
    for name, value in (("features", ()), ("invariance", -1.0), ("random", -1)):
        with pytest.raises(SettingError, match=name):
            ControllableMultitask(**{name: value})
    stubbed = stub.mlp()
    optimizer = torch.optim.SGD(stubbed.module.parameters(), lr=0.1)
    run = ControllableMultitask().start(stubbed, optimizer, loss=stub.loss)
    with pytest.raises(SettingError, match="no module 'encoder'"):
        run.step(stub.vectors()[0])
