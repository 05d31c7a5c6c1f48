"""What `method="auto"` picks."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import supple
from supple.errors import SettingError
from supple.training import choose as choosing
from supple.training.choose import choose
from supple.training.loop import train

X = torch.randn(32, 5, generator=torch.Generator().manual_seed(1))
Y = (X[:, 0] > 0).long() + (X[:, 1] > 0).long()
DATA = [(X, Y)]


def loss(output, batch):
    return F.cross_entropy(output, batch[1])


@pytest.fixture
def net():
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    return supple.elastic(model, X, axes=[supple.Width((0.5, 1.0))], verify=False)


@pytest.mark.parametrize(("steps", "key"), [(10, "pa-da"), (choosing._ENOUGH, "deps")])
def test_from_scratch_the_number_of_steps_decides(net, steps, key):
    assert choose(net, DATA, loss, steps).method.key == f"supernet/{key}"


def test_trained_weights_are_seen_by_their_loss(net):
    train(net, DATA, loss, steps=60, lr=0.03, progress=False)
    before = {name: value.clone() for name, value in net.module.state_dict().items()}
    choice = choose(net, DATA, loss, 10)
    assert choice.method.key == "supernet/instatune"
    assert "guessing has 1.10" in str(choice)
    assert all(
        torch.equal(value, before[name]) for name, value in net.module.state_dict().items()
    )
    assert not net.module[0].weight.grad_fn


def test_without_logits_sizes_learn_from_labels():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 3)

        def forward(self, x):
            return {"mean": self.b(self.a(x).relu())}

    net = supple.elastic(Pair(), X, axes=[supple.Width((0.5, 1.0))], verify=False)
    squares = lambda output, batch: output["mean"].square().mean()  # noqa: E731
    assert choose(net, DATA, squares, 10).method.key == "supernet/sortednet"


def test_train_prints_its_choice_and_leaves_random_numbers_alone(net, capsys):
    state = torch.get_rng_state()
    train(net, DATA, loss, method="auto", steps=2, progress=False)
    said = "method: supernet/pa-da (from scratch, and 2 steps are few)"
    assert said in capsys.readouterr().out
    assert torch.equal(state, torch.get_rng_state())


def test_a_plain_module_has_no_sizes_to_pick_for(net):
    with pytest.raises(SettingError, match="make it elastic first"):
        train(net.module, DATA, loss, method="auto", steps=1, progress=False)


def test_no_batch_is_an_error(net):
    with pytest.raises(SettingError, match="no batches"):
        choose(net, [], loss, 1)
