import pytest
import torch
from torch import nn

from supple.errors import CheckpointError
from supple.recipe.weights import borrowed_weights, load_weights, renewed, save_weights


def net(width=5):
    torch.manual_seed(width)
    return nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 2))


def state(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a | b)


def test_weights_and_buffers_come_back_in_place(tmp_path):
    module = net()
    module(torch.randn(7, 3))
    before, owners = state(module), list(module.parameters())
    save_weights(module, tmp_path / "w.safetensors")
    other = renewed(net(), 3)
    assert not same(before, state(other))
    load_weights(other, tmp_path / "w.safetensors")
    assert same(before, state(other))
    load_weights(module, tmp_path / "w.safetensors")
    assert all(a is b for a, b in zip(owners, module.parameters(), strict=True))


def test_tied_weights_stay_tied(tmp_path):
    module = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    module[1].weight = module[0].weight
    save_weights(module, tmp_path / "w.safetensors")
    expected = module[0].weight.clone()
    renewed(module, 1)
    load_weights(module, tmp_path / "w.safetensors")
    assert module[1].weight is module[0].weight
    assert torch.equal(module[1].weight, expected)


@pytest.mark.parametrize("other", [net(7), nn.Linear(3, 2)])
def test_weights_of_another_network_are_refused(tmp_path, other):
    save_weights(net(), tmp_path / "w.safetensors")
    before = state(other)
    with pytest.raises(CheckpointError, match=r"w\.safetensors belongs to another network"):
        load_weights(other, tmp_path / "w.safetensors")
    assert same(before, state(other))


def test_borrowed_weights_are_given_back_also_after_an_exception(tmp_path):
    lender, borrower = net(), renewed(net(), 11)
    save_weights(lender, tmp_path / "w.safetensors")
    before = state(borrower)

    def fail_while_borrowing():
        with borrowed_weights(borrower, tmp_path / "w.safetensors"):
            assert same(state(borrower), state(lender))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_while_borrowing()
    assert same(state(borrower), before)


def test_new_weights_follow_the_seed_and_nothing_else():
    a, b, c = (renewed(net(), seed) for seed in (1, 1, 2))
    assert same(state(a), state(b))
    assert not same(state(a), state(c))
    assert a[1].running_mean.abs().sum() == 0


def test_drawing_new_weights_leaves_the_global_generator_alone():
    module = net()
    before = torch.get_rng_state()
    renewed(module, 5)
    assert torch.equal(before, torch.get_rng_state())
