"""The contract "Running statistics": each test names the sentence that it holds to."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import supple
from supple.errors import SuppleWarning
from supple.network import Elastic
from supple.supernet.bignas import BigNAS
from supple.supernet.sortednet import SortedNet
from tests.contracts.ranks import Net, batches, loss, made, trained
from tests.training.stub import equal, weights


@pytest.fixture
def net() -> Elastic:
    found: Elastic = made(norm=True, dropout=0.3)
    return found


def statistics(module: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in module.state_dict().items() if "running" in k}


def spoilt(net: Elastic) -> Elastic:
    """The same weights, with running statistics that would ruin every output."""
    for part in net.module.modules():
        if isinstance(part, nn.BatchNorm1d):
            assert part.running_mean is not None
            assert part.running_var is not None
            part.running_mean.fill_(1e4)
            part.running_var.fill_(1e-4)
    config = net.space.smallest()
    net.statistics[config] = {
        name: torch.full_like(value, 1e4) for name, value in measured(made(norm=True)).items()
    }
    return net


def measured(net: Elastic, config: Any = None) -> dict[str, Tensor]:
    where = net.space.smallest() if config is None else config
    return supple.recalibrate(net, where, batches(3))


def thin(net: Elastic) -> Any:
    """Smaller widths at full depth, so that names are the same in what is extracted."""
    sites = [site for site in net.space.sites if site.axis == "width"]
    return net.space.config({site.name: site.choices[1] for site in sites})


@pytest.mark.parametrize("method", [BigNAS(), SortedNet(micro_steps=2)])
def test_training_never_uses_the_running_statistics_of_a_partial_size(net, method):
    """Whatever they hold, training comes to the same weights."""
    bad = spoilt(made(norm=True, dropout=0.3))
    for one in (net, bad):
        trained(one, batches(), method=method)
    for name, parameter in net.module.named_parameters():
        assert torch.equal(parameter, bad.module.get_parameter(name)), name


def test_training_at_a_partial_size_does_not_reach_the_modules_own(net):
    """ "Training never uses ..." nor changes them."""
    before = weights(net.module)
    net.module.train()
    for config in (net.space.smallest(), thin(net)):
        with net.at(config):
            net(batches()[0][0])
    assert equal(weights(net.module), before)


def test_recalibrate_stores_per_canonical_config(net):
    """ "stores them per canonical config inside `Elastic`": one entry, however it is spelt."""
    shallow = {"blocks.depth": 1}
    for choice in (4, 8, 16):  # the width of a block that is left out means nothing
        supple.recalibrate(net, {**shallow, "blocks.1.up": choice}, batches(2))
    assert list(net.statistics) == [net.space.config(shallow)]


@pytest.mark.parametrize("pick", ["smallest", "thin"])
def test_they_are_the_means_over_batches_of_what_the_size_sees(net, pick):
    """ "`at` in eval mode and `extract` use them": both equal a network measured by hand."""
    config = thin(net) if pick == "thin" else net.space.smallest()
    before = weights(net.module)
    measured(net, config)
    assert equal(weights(net.module), before)
    small = net.extract(config).eval()
    norms = [part for part in small.modules() if isinstance(part, nn.BatchNorm1d)]
    held = [(part.running_mean.clone(), part.running_var.clone()) for part in norms]
    for part in norms:
        part.reset_running_stats()
        part.momentum = None
        part.train()
    with torch.no_grad():
        for x, _ in batches(3):
            small(x)
    for part, (mean, var) in zip(norms, held, strict=True):
        torch.testing.assert_close(mean, part.running_mean)
        torch.testing.assert_close(var, part.running_var)
    small.eval()
    net.module.eval()
    x = batches(5)[4][0]
    with torch.no_grad():
        with net.at(config):
            torch.testing.assert_close(net(x), small(x))
            own = net(x)
        net.drop_statistics()
        with net.at(config):
            assert (net(x) - own).abs().max() > 1e-3


def test_they_are_saved(net, tmp_path):
    """ "saved": they come back with the network."""
    kept = measured(net)
    net.save(tmp_path / "net")
    loaded = supple.load(tmp_path / "net", model=Net(norm=True, dropout=0.3))
    assert isinstance(loaded, Elastic)
    assert list(loaded.statistics) == [net.space.smallest()]
    assert equal(loaded.statistics[net.space.smallest()], kept)


@pytest.mark.parametrize("how", ["load_state_dict", "optimizer", "by hand", "replaced"])
def test_statistics_are_dropped_when_the_user_changes_weights(net, how):
    """ "dropped when weights change", by whatever means."""
    measured(net)
    assert net.statistics
    module = net.module
    layer = next(m for m in module.modules() if isinstance(m, nn.Linear))
    if how == "load_state_dict":
        module.load_state_dict({k: v + 1 for k, v in module.state_dict().items()})
    elif how == "optimizer":
        layer.weight.grad = torch.ones_like(layer.weight)
        torch.optim.SGD([layer.weight], lr=0.1).step()
    elif how == "by hand":
        with torch.no_grad():
            layer.weight[0, 0] += 1
    else:
        layer.weight = nn.Parameter(layer.weight.detach().clone())
    assert not net.statistics


def test_statistics_stay_while_weights_do(net):
    """A forward, a backward and an active size change no weights."""
    measured(net)
    with net.at(net.space.smallest()):
        net.module(batches(1)[0][0]).sum().backward()
    assert net.statistics


@pytest.mark.parametrize("change", ["train", "sort"])
def test_they_are_dropped_when_weights_change(net, change):
    """ "dropped when weights change"."""
    measured(net)
    assert net.statistics
    if change == "train":
        supple.train(net, batches(1), loss, method=SortedNet(micro_steps=2), progress=False)
    else:
        net.sort()
    assert not net.statistics


def test_extract_warns_where_they_are_missing(net):
    """ "where they are missing and the network has BN, `extract` warns"."""
    with pytest.warns(SuppleWarning, match=r"call supple\.recalibrate"):
        net.extract(net.space.smallest())
    measured(net)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net.extract(net.space.smallest())
        net.extract(net.space.largest())
        plain = made()
        plain.extract(plain.space.smallest())


def test_pareto_recalibrates_by_itself(net):
    """ "`pareto` recalibrates itself": each size is judged with statistics of its own."""
    seen: list[dict[str, Tensor]] = []

    def look(module: nn.Module) -> float:
        norms = {k: m for k, m in module.named_modules() if isinstance(m, nn.BatchNorm1d)}
        seen.append({f"{k}.running_mean": m.running_mean.clone() for k, m in norms.items()})
        return float(len(seen))

    front = supple.pareto(
        net,
        look,
        ["params"],
        evaluations=3,
        study=":memory:",
        data=batches(3),
        progress=False,
    )
    twin = made(norm=True, dropout=0.3)
    for point, means in zip(front.evaluated, seen, strict=True):
        expected = statistics(net.module)  # the full network's are the module's own
        if point.config != net.space.largest():
            expected = supple.recalibrate(twin, point.config, batches(3))
            assert max(value.abs().max() for value in expected.values()) > 1e-3
        for name in means.keys() & expected.keys():
            torch.testing.assert_close(means[name], expected[name])
        assert "blocks.0.norm.running_mean" in means.keys() & expected.keys()


def test_the_largest_configs_are_the_modules_own(net):
    """ "The largest config's are the module's own": trained, measured, extracted as such."""
    trained(net, batches())
    own = statistics(net.module)
    assert not equal(own, statistics(made(norm=True).module))
    whole = net.extract(net.space.largest())
    assert equal(statistics(whole), own)
    found = measured(net, net.space.largest())
    assert equal({k: v for k, v in found.items() if "running" in k}, statistics(net.module))
    assert not equal(statistics(net.module), own)
    module = copy.deepcopy(net.module).eval()
    x = batches()[0][0]
    net.module.eval()
    with torch.no_grad(), net.at(net.space.largest()):
        assert torch.equal(net(x), module(x))
