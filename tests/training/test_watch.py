"""What the sizes of a step are like."""

from __future__ import annotations

import pytest
import torch

import supple
from supple.errors import SettingError
from supple.supernet.bignas import BigNAS
from supple.training import watch as watching
from supple.training.history import History
from supple.training.loop import train
from supple.training.step import Pass, StepOptions
from tests.training import stub
from tests.training.test_step import started


def passes(net):
    space = net.space
    return [Pass(space.largest(), "largest"), Pass(space.smallest(), "smallest", weight=0.5)]


def by_hand(net, entry, batch):
    net.module.zero_grad()
    with net.at(entry.config):
        loss = stub.loss(net.module(batch[0]), batch)
        loss.backward()
    grads = [
        p.grad if p.grad is not None else torch.zeros_like(p) for p in net.module.parameters()
    ]
    return loss.item(), torch.cat([g.flatten() for g in grads])


@pytest.mark.parametrize("aggregate", ["sum", "mean"])
def test_each_pass_is_seen_by_itself_whatever_its_weight(aggregate):
    net, batch = stub.mlp(), stub.vectors()[0]
    expected = [by_hand(net, entry, batch) for entry in passes(net)]
    run = started(net, passes(net), aggregate=aggregate, options=StepOptions(watch=1))
    run.step(batch)
    row = run.watched
    assert [size["role"] for size in row["sizes"]] == ["largest", "smallest"]
    for size, (loss, gradient) in zip(row["sizes"], expected, strict=True):
        assert size["loss"] == pytest.approx(loss, rel=1e-5)
        assert size["norm"] == pytest.approx(gradient.norm().item(), rel=1e-5)
    [(first, second, cosine)] = row["cosines"]
    assert (first, second) == (0, 1)
    gradients = [gradient for _, gradient in expected]
    assert cosine == pytest.approx(torch.cosine_similarity(*gradients, dim=0).item(), rel=1e-4)


def test_a_large_gradient_is_sampled(monkeypatch):
    net, batch = stub.mlp(), stub.vectors()[0]
    whole = by_hand(net, passes(net)[0], batch)[1].norm().item()
    monkeypatch.setattr(watching, "_LARGEST", 60)
    run = started(net, passes(net), options=StepOptions(watch=1))
    run.step(batch)
    assert run.watched["sizes"][0]["norm"] == pytest.approx(whole, rel=0.5)


def test_only_watched_steps_enter_the_history_and_the_weights_are_the_same():
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(1))
    y = torch.arange(8) % 3
    weights = []
    for watch in (0, 2):
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Linear(5, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3)
        )
        net = supple.elastic(model, x, axes=[supple.Width((0.5, 1.0))], verify=False)
        loss = lambda output, batch: torch.nn.functional.cross_entropy(output, batch[1])  # noqa: E731
        history = train(
            net, [(x, y)], loss, method=BigNAS(random=1), steps=5, watch=watch, progress=False
        )
        weights.append(net.module[0].weight.detach().clone())
    assert torch.equal(*weights)
    assert [row["step"] for row in history.watched] == [0, 2, 4]
    assert [size["cost"] for size in history.watched[0]["sizes"]][:2] == [1.0, 0.5]
    assert History.from_json(history.to_json()).watched == history.watched


def test_watch_is_checked():
    with pytest.raises(SettingError, match="watch must be at least 0"):
        StepOptions(watch=-1)
