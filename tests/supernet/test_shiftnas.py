"""ShiftNAS: bands that still improve are drawn more often; a generator gives the sizes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from supple.axes.copies import Copies
from supple.axes.depth import Depth
from supple.axes.width import Width
from supple.errors import SettingError
from supple.models.base import build
from supple.network import Elastic, elastic
from supple.storage import load
from supple.supernet.shiftnas import ShiftNas, _Masks, cost_of
from supple.training.loop import train
from supple.training.step import StepOptions
from tests.training import stub

GENERATOR = "supple_generator_"


def convolutions() -> Elastic:
    """Widths, blocks and batch norms."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build("digits-cnn", widths=(4, 6), blocks=(1, 2))
    axes = [Width((0.5, 1.0)), Depth(pattern="any")]
    return elastic(model, torch.zeros(2, 1, 8, 8), axes=axes, verify=False)


def layers() -> Elastic:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)
        )
    return elastic(model, torch.zeros(2, 5), axes=[Width(None)], verify=False)


def started(net: Elastic, method: ShiftNas, seed: int = 1, lr: float = 0.1):
    optimizer = torch.optim.SGD(net.module.parameters(), lr=lr)
    generator = torch.Generator().manual_seed(seed)
    options = StepOptions(steps=8)
    return method.start(net, optimizer, loss=stub.loss, generator=generator, options=options)


def one_hots(net: Elastic, config) -> list[torch.Tensor]:
    row = net.space.encode(config)
    return [
        nn.functional.one_hot(torch.tensor(index), len(site.choices)).float().requires_grad_()
        for index, site in zip(row, net.space.sites, strict=True)
    ]


def test_the_masked_network_computes_what_the_size_does_and_trains_no_weight():
    net = convolutions()
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    masks = _Masks(net)
    before = stub.weights(net.module)
    for seed in range(6):
        config = net.space.random(seed)
        hots = one_hots(net, config)
        with masks.on(config, hots):
            masked = net.module(x)
        with net.at(config), torch.no_grad():
            sliced = net.module(x)
        torch.testing.assert_close(masked, sliced, rtol=1e-4, atol=1e-5)
        masked.square().sum().backward()
        for site, hot in zip(net.space.sites, hots, strict=True):
            reached = hot.grad is not None and bool(hot.grad.any())
            assert reached == (site.axis == "width" and site.name in config), site.name
    assert all(p.grad is None for p in net.module.parameters())
    partial = {name for name in before if "running" in name or "num_batches" in name}
    assert len(partial) == 24
    # the largest size is among none of them
    assert all(torch.equal(before[name], net.module.state_dict()[name]) for name in partial)


def test_costs_are_exact_and_their_slopes_those_of_every_other_choice():
    net = convolutions()
    price = lambda rows: net.costs(rows)["macs"]  # noqa: E731
    rows = net.space.random_many(3, 0)
    drawn = [
        nn.functional.one_hot(torch.from_numpy(rows[:, i]), len(site.choices)).double()
        for i, site in enumerate(net.space.sites)
    ]
    hots = [each.requires_grad_() for each in drawn]
    costs = cost_of(hots, rows, net.space, price)
    assert costs.tolist() == price(net.space.canonical_many(rows)).tolist()
    costs.sum().backward()
    for i, site in enumerate(net.space.sites):
        for choice in range(len(site.choices)):
            other = rows.copy()
            other[:, i] = choice
            expected = price(net.space.canonical_many(other))
            np.testing.assert_allclose(hots[i].grad[:, choice].numpy(), expected)


def test_bands_whose_loss_falls_are_drawn_more_often():
    net = layers()
    run = started(net, ShiftNas(bands=4, temperature=0.1, floor=0.2))
    run.step(stub.vectors()[0])
    sampler = run.sampler
    state = {"losses": [1.0, 1.0, 1.0, 1.0], "falls": [0.0, 0.1, 0.0, 0.0]}
    sampler.load_state_dict(state)
    powers = np.array([1, np.e, 1, 1])
    expected = 0.8 * powers / powers.sum() + 0.05
    np.testing.assert_allclose(sampler.probabilities(0, 8), expected)
    _, entry = sampler.sample(0, 8)
    band = int(entry.role[-1])
    sampler.asked = None
    seen = type("Seen", (), {"entry": entry, "loss": torch.tensor(0.5)})()
    sampler.observe(seen)
    now = sampler.state_dict()
    assert now["falls"][band] == pytest.approx(0.9 * state["falls"][band] + 0.1 * 0.5)
    assert now["losses"][band] == pytest.approx(0.9 * 1.0 + 0.1 * 0.5)


def test_a_band_without_sizes_is_never_drawn():
    model = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 3))
    net = elastic(model, torch.zeros(2, 5), axes=[Width((0.25, 1.0))], verify=False)
    run = started(net, ShiftNas(bands=4))
    roles = {role for _ in range(8) for role in run.step(stub.vectors()[0])}
    assert roles == {"generator", "band-0", "band-3"}
    assert run.sampler.probabilities(0, 8).tolist()[1:3] == [0.0, 0.0]


def test_sizes_are_of_the_band_also_where_the_generator_misses_it():
    net = layers()
    run = started(net, ShiftNas(bands=3))
    run.sampler.begin(run)
    edges = run.sampler._edges
    missed = 0
    for _ in range(12):
        _, entry = run.sampler.sample(0, 8)
        band = int(entry.role[-1])
        assert edges[band] <= net.costs(entry.config)["macs"][0] <= edges[band + 1]
        missed += run.sampler.asked.config != entry.config
    assert 0 < missed < 12


def test_a_step_gives_the_weights_the_gradient_of_the_size_in_the_band_alone():
    net, batch = layers(), stub.vectors()[0]
    run = started(net, ShiftNas(bands=3))
    before = stub.weights(net.module)
    run.sampler.begin(run)
    passes = list(run.sampler.sample(0, 8))
    run.sampler.sample = lambda step, steps: passes
    assert passes[0].role == "generator"
    config = passes[1].config
    run.step(batch)
    other = layers()
    with other.at(config):
        stub.loss(other.module(batch[0]), batch).backward()
    for name, p in other.module.named_parameters():
        grad = torch.zeros_like(p) if p.grad is None else p.grad
        found = net.module.get_parameter(name).detach()
        torch.testing.assert_close(found, before[name] - 0.1 * grad)
    moved = [
        name
        for name, p in net.module.named_parameters()
        if name.startswith(GENERATOR) and not torch.equal(before[name], p.detach())
    ]
    # the ends of the costs are noted at the beginning; all others have learned
    assert len(moved) == 6


def test_the_generator_learns_to_give_sizes_of_the_cost_asked_for():
    net = layers()
    most = float(net.costs(net.space.largest())["macs"][0])

    def given(share: float) -> float:
        """The mean share of the largest cost that sizes have."""
        sizes = ShiftNas.propose(net, share * most, 64)
        return float(net.costs(sizes)["macs"].mean()) / most

    started(net, ShiftNas()).step(stub.vectors()[0])
    assert abs(given(0.8) - given(0.2)) < 0.1
    method = ShiftNas(penalty=3.0, entropy=0.0)
    train(net, stub.vectors(), stub.loss, method=method, steps=40, lr=0.03, progress=False)
    assert given(0.2) < 0.3 < 0.5 < given(0.8)
    wanted = 0.5 * most
    small = net.extract(ShiftNas.propose(net, wanted)[0])
    assert not any(name.startswith("supple") for name, _ in small.named_parameters())


def test_a_run_resumes_bitwise_with_its_generator(tmp_path):
    class StoppedError(Exception):
        pass

    def trained(folder, stop=None):
        net, count = layers(), [0]

        def loss(output, batch):
            count[0] += 1
            if count[0] == stop:
                raise StoppedError
            return stub.loss(output, batch)

        settings = {"steps": 9, "checkpoint": folder, "checkpoint_every": 3}
        train(net, stub.vectors(), loss, method=ShiftNas(), progress=False, **settings)
        return stub.weights(net.module)

    whole = trained(tmp_path / "whole")
    with pytest.raises(StoppedError):
        trained(tmp_path / "parted", stop=13)
    assert stub.equal(whole, trained(tmp_path / "parted"))


def test_the_generator_is_saved_with_the_network(tmp_path):
    net = layers()
    started(net, ShiftNas()).step(stub.vectors()[0])
    net.save(tmp_path / "net")
    again = load(tmp_path / "net", model=layers().module)
    sizes = ShiftNas.propose(net, 200.0, 8)
    assert len(set(sizes)) > 1
    assert ShiftNas.propose(again, 200.0, 8) == sizes


def test_a_network_without_generator_proposes_nothing():
    with pytest.raises(SettingError, match="no size generator"):
        ShiftNas.propose(layers(), 100.0)


def test_sizes_with_weights_of_their_own_are_refused():
    net = layers()
    site = net.space.sites[0]
    parts = ({site.name: site.choices[:4]}, {site.name: site.choices[4:]})
    net.share(Copies(parts, (0, 1), 2))
    with pytest.raises(SettingError, match="weights of their own"):
        started(net, ShiftNas())


@pytest.mark.parametrize(
    ("name", "value"),
    [("bands", 0), ("temperature", 0.0), ("floor", 2.0), ("penalty", -1.0), ("entropy", -1.0)],
)
def test_settings_are_checked(name, value):
    with pytest.raises(SettingError, match=name):
        ShiftNas(**{name: value})
