"""LightHuBERT: two stages, masks that the teacher does not see, and its layers as targets."""

from __future__ import annotations

import copy

import pytest
import torch

from supple.axes.copies import Copies
from supple.axes.depth import Depth
from supple.axes.width import Width
from supple.errors import SettingError
from supple.network import elastic
from supple.supernet.lighthubert import LightHuBERT, spans, target
from supple.training.step import StepOptions
from tests.training import stub

BATCH = stub.vectors()[0]
SETTINGS = {"masked": "embed", "layers": "blocks.*", "top": 2, "coverage": 0.4, "span": 2}
RATE = 0.1


def network():
    axes = [Width((2, 4, 8), divisor=1), Depth()]
    return elastic(LightHuBERT.toy(), (BATCH[0],), axes=axes, verify=False)


def start(method, net, steps=4, seed=0):
    optimizer = torch.optim.SGD(net.module.parameters(), lr=RATE)
    source = torch.Generator().manual_seed(seed)
    options = StepOptions(steps=steps)
    return method.start(net, optimizer, loss=stub.loss, generator=source, options=options)


def blocks(model, states):
    found = []
    for block in model.blocks:
        states = block(states)
        found.append(states)
    return found


def embedded(model, x):
    return model.embed(x[..., None])


def standardised(states):
    away = states - states.mean(1, keepdim=True)
    return away / (away.pow(2).mean(1, keepdim=True) + 1e-5).sqrt()


def targets(teacher, x):
    layers = blocks(teacher, embedded(teacher, x) * teacher.place)
    return (standardised(layers[-1]) + standardised(layers[-2])) / 2


def by_hand(net, teacher, config, hidden, method):
    """The loss of a size, without any of the method's code."""
    x, model = BATCH[0], net.module
    with net.at(config):
        seen = embedded(model, x)
        vector = model.supple_mask[: seen.shape[-1]]
        seen = torch.stack(
            [
                torch.stack([vector if h else token for token, h in zip(*pair, strict=True)])
                for pair in zip(seen, hidden, strict=True)
            ]
        )
        last = blocks(model, seen * model.place)[-1]
        predicted = last @ model.supple_head[:, : last.shape[-1]].T
        away = predicted[hidden] - targets(teacher, x)[hidden]
        loss = away.abs().mean() if method.distance == "l1" else away.pow(2).mean()
        return loss + method.labels * stub.loss(model.read(last.mean(1)), BATCH)


@pytest.mark.parametrize(("distance", "labels"), [("l2", 0.0), ("l1", 0.5)])
def test_both_stages_steps_are_those_computed_by_hand(distance, labels):
    method = LightHuBERT(**SETTINGS, tune=0.5, distance=distance, labels=labels)
    net, twin = network(), network()
    run = start(method, net, steps=2)
    method.adapt(twin)
    twin.module.load_state_dict(net.module.state_dict())
    teacher = copy.deepcopy(twin.module)
    source = torch.Generator().manual_seed(0)
    for stage in range(2):
        largest = twin.space.largest()
        config = largest if stage == 0 else twin.space.random(source)
        assert stage == 0 or config != largest
        hidden = spans(*BATCH[0].shape, 0.4, 2, source)
        owners = dict(twin.module.named_parameters())
        total = by_hand(twin, teacher, config, hidden, method)
        gradients = torch.autograd.grad(total, list(owners.values()), allow_unused=True)
        role = "largest" if stage == 0 else "random"
        assert run.step(BATCH) == {role: pytest.approx(total.item())}
        with torch.no_grad():
            for owner, gradient in zip(owners.values(), gradients, strict=True):
                if gradient is not None:
                    owner.sub_(RATE * gradient)
        for name, owner in net.module.named_parameters():
            torch.testing.assert_close(owner, owners[name])


def test_stage_one_trains_the_largest_size_alone():
    net = network()
    sampler = LightHuBERT(**SETTINGS, tune=0.25).sampler(net.space, torch.Generator())
    drawn = [sampler.sample(step, 40)[0] for step in range(40)]
    assert all(entry.config == net.space.largest() for entry in drawn[:10])
    assert [entry.role for entry in drawn] == ["largest"] * 10 + ["random"] * 30
    assert len({entry.config for entry in drawn[10:]}) > 5
    sampler = LightHuBERT(**SETTINGS, tune=0.0).sampler(net.space, torch.Generator())
    assert sampler.sample(0, 40)[0].role == "random"


def test_the_teacher_is_the_network_at_the_start_also_when_resumed():
    method = LightHuBERT(**SETTINGS, tune=0.5)
    net = network()
    run = start(method, net)
    before = {name: p.detach().clone() for name, p in net.module.named_parameters()}
    run.step(BATCH)
    again = start(method, net, seed=5)
    again.load_state_dict(run.state_dict())
    for _ in range(3):
        again.step(BATCH)
    kept = again.state_dict()["teachers"]["teacher"]
    assert all(torch.equal(kept[name], value) for name, value in before.items())
    assert not torch.equal(net.module.blocks[0].up.weight, before["blocks.0.up.weight"])


def test_another_teacher_may_be_wider():
    teacher = LightHuBERT.toy()
    teacher.blocks.append(torch.nn.Linear(8, 11))
    teacher.read = torch.nn.Linear(11, 3)
    teacher.requires_grad_(False)
    net = network()
    run = start(LightHuBERT(**{**SETTINGS, "top": 1}, teacher=teacher), net)
    assert net.module.supple_head.shape == (11, 8)
    run.step(BATCH)
    assert not run.state_dict()["teachers"]
    with pytest.raises(SettingError, match="teacher's 4 layers, got 7"):
        start(LightHuBERT(**{**SETTINGS, "top": 7}, teacher=teacher), network()).step(BATCH)


def test_spans_have_their_length_and_share():
    source = torch.Generator().manual_seed(1)
    masked = spans(400, 20, 0.3, 4, source)
    for row in masked[:50].int().tolist():
        runs = [len(run) for run in "".join(map(str, row)).split("0") if run]
        assert runs
        assert min(runs) >= 4
    single = torch.cat([spans(50, 20, 0.25, 1, source) for _ in range(5)])
    assert single.sum(1).tolist() == [5] * 250  # no token is chosen twice
    assert spans(3, 4, 0.5, 10, source).all()
    assert spans(2, 50, 0.01, 1, source).any(1).all()
    drawn = [spans(1, 10, 0.25, 5, source).sum().item() for _ in range(20)]
    assert set(drawn) == {5}


def test_padding_is_neither_masked_nor_counted():
    states = torch.randn(2, 4, 3)
    where = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    cut = target([states[:1, :3]], "instance")
    torch.testing.assert_close(target([states], "instance", where)[:1, :3], cut)
    method = LightHuBERT(**{**SETTINGS, "coverage": 1.0, "span": 5})
    net = network()
    source = torch.Generator().manual_seed(0)
    method.adapt(net)
    forward = method.prediction(net.module, source, lambda model, batch: model(batch["x"]))
    x = BATCH[0][:2]
    where = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])
    seen = forward(net.module, {"x": x, "attention_mask": where})
    assert torch.equal(seen.features["masked"], where.bool())
    assert seen.features["prediction"].shape == (2, 5, 8)


def test_targets_are_normalised_so_that_no_layer_outweighs_others():
    small, large = torch.randn(3, 6, 4), 1000 * torch.randn(3, 6, 4)
    for norm, dim in (("instance", 1), ("layer", 2)):
        for state in (small, large):
            normed = target([state], norm)
            spread = normed.pow(2).mean(dim)
            torch.testing.assert_close(spread, torch.ones_like(spread), atol=1e-2, rtol=0)
        mean = (target([small], norm) + target([large], norm)) / 2
        torch.testing.assert_close(target([small, large], norm), mean)


def test_the_head_is_no_part_of_extracted_networks():
    net = network()
    start(LightHuBERT(**SETTINGS), net).step(BATCH)
    small = net.extract(net.space.smallest())
    assert not [name for name, _ in small.named_parameters() if "supple" in name]


def test_networks_that_share_otherwise_are_refused():
    net = network()
    net.share(Copies(({},)))
    with pytest.raises(SettingError, match="share all weights"):
        start(LightHuBERT(**SETTINGS), net)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("tune", 1.0, "tune"),
        ("coverage", 0.0, "coverage"),
        ("top", 0, "top"),
        ("span", 0, "span"),
        ("norm", "batch", "norm must be instance or layer, got 'batch'"),
        ("distance", "l3", "distance must be l1 or l2, got 'l3'"),
        ("labels", -0.1, "labels"),
    ],
)
def test_settings_are_checked(name, value, message):
    with pytest.raises(SettingError, match=message):
        LightHuBERT(**{name: value})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [("layers", "layer.*", "it has blocks.0"), ("masked", "embedd", "did you mean 'embed'")],
)
def test_modules_that_are_not_there_are_told(name, value, message):
    with pytest.raises(SettingError, match=message):
        start(LightHuBERT(**{**SETTINGS, name: value}), network())
