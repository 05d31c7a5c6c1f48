"""BitStack: blocks, their order, and networks that grow and shrink."""

from __future__ import annotations

import math
import threading

import pytest
import torch
from torch import nn

import supple
from supple.cost.count import weight_bytes
from supple.errors import BudgetError, CheckpointError, SettingError
from supple.layers.stacked_signs import SignBlock, StackedSigns
from supple.quantize.bitstack import BitStack, Stack
from supple.testing.toys import generator

X = torch.randn(12, 20, generator=generator(3))


def network() -> nn.Module:
    model = nn.Sequential(nn.LayerNorm(20), nn.Linear(20, 24), nn.ReLU(), nn.Linear(24, 7))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator(5)))
    return model.eval()


TARGET = network()(X).detach()


def loss(output, batch):
    return (output - network()(batch[0]).detach()).square().mean()


def places(model: nn.Module) -> list[int]:
    return [place for layer in (model[1], model[3]) for place in layer.places.tolist()]


def stacked(**settings) -> nn.Module:
    method = BitStack(**{"rank": 2, "levels": 4, "rows": 6, **settings})
    return method.apply(network(), calibration=[(X,)], loss=loss, generator=generator())


def test_blocks_are_signs_times_singular_values_of_what_is_left() -> None:
    matrix = network()[1].weight.detach()
    layer = StackedSigns.from_linear(network()[1], rank=3, levels=3)
    left = matrix.double()
    for number in range(3):
        u, s, v = torch.linalg.svd(left.abs())
        block = torch.where(left >= 0, 1.0, -1.0) * ((u[:, :3] * s[:3]) @ v[:3])
        left = left - block
        found = matrix - layer.dense_weight(number + 1)
        assert (found.double() - left).abs().max() < 0.01
    whole = StackedSigns.from_linear(network()[1], rank=20, levels=1)
    torch.testing.assert_close(whole.dense_weight(), matrix, rtol=0, atol=5e-3)
    zero = SignBlock.nearest(torch.zeros(3, 5), 1)
    assert int(zero.get_buffer("signs")[0]) == 255


def test_plain_products_take_as_many_bytes_and_lose_more() -> None:
    signed = StackedSigns.from_linear(nn.Linear(256, 128), rank=2, levels=2)
    linear = nn.Linear(256, 128)
    plain = BitStack(rank=2, levels=2, signs=False, layers="0", scaled=False, sort=False)
    model = plain.apply(nn.Sequential(linear), calibration=[(torch.ones(1, 256),)], loss=loss)
    (block, *_), (other, *_) = signed.blocks, model[0].blocks
    assert other.nbytes == pytest.approx(block.nbytes, rel=0.05)
    signed = StackedSigns.from_linear(linear, rank=2, levels=2)
    errors = [(one.dense_weight() - linear.weight).norm() for one in (signed, model[0])]
    assert errors[0] < 0.7 * errors[1]


def test_scaling_changes_nothing_but_what_blocks_keep() -> None:
    method, model = BitStack(rank=20, levels=3), network()
    # Full rank keeps everything, so the network must compute what it did.
    found = method.apply(model, calibration=[(X[:5],), (X[5:],)], loss=loss)
    torch.testing.assert_close(found(X), TARGET, rtol=1e-2, atol=1e-2)
    norms = X.new_zeros(20)
    seen = model[0](X)
    for row in seen:
        norms += row.abs()
    gain = model[0].weight / (norms / len(X) + 1e-3)
    torch.testing.assert_close(found[0].weight, gain.detach(), rtol=1e-4, atol=1e-5)
    assert not torch.equal(found[3].dense_weight(), model[3].weight)


def test_blocks_of_a_level_are_sorted_by_the_loss_with_them() -> None:
    model = stacked(levels=3)
    layers = {"1": model[1], "3": model[3]}
    assert sorted(places(model)) == list(range(6))
    for level in (1, 2):
        losses = {}
        for path in layers:
            for other, layer in layers.items():
                layer.keep(level + (other == path))
            with torch.no_grad():
                found = [float(loss(model(x[None]), (x[None],))) for x in X[:6]]
            losses[path] = sum(found)
        best = min(losses, key=losses.__getitem__)
        assert layers[best].places[level] == 2 * level
    for layer in layers.values():
        layer.keep(None)
    unsorted = stacked(levels=3, sort=False)
    assert {int(p) for layer in (unsorted[1], unsorted[3]) for p in layer.places} == set(
        range(6)
    )


def test_losses_that_are_not_finite_come_last() -> None:
    def failing(output, batch):
        return torch.tensor(math.nan)

    model = BitStack(rank=2, levels=3).apply(network(), calibration=[(X,)], loss=failing)
    assert sorted(int(p) for layer in (model[1], model[3]) for p in layer.places) == list(
        range(6)
    )


def test_a_budget_holds_a_prefix_of_the_stack() -> None:
    model = stacked()
    stack, errors = Stack(model), []
    whole = stack.nbytes
    assert whole == weight_bytes(model)
    for budget in range(whole, stack.least - 1, -((whole - stack.least) // 7)):
        assert stack.fit(budget) == weight_bytes(model) <= budget
        held = [
            p for one in (model[1], model[3]) for p in one.places[: len(one.blocks)].tolist()
        ]
        assert sorted(held) == list(range(len(held)))
        errors.append((model(X) - TARGET).square().mean().item())
    assert errors[-1] > 2 * errors[0]
    with pytest.raises(BudgetError, match="one block of each layer takes"):
        stack.fit(stack.least - 1)
    assert len(model[1].blocks) == len(model[3].blocks) == 1
    with pytest.raises(SettingError, match="no folder to read them from"):
        stack.fit(whole)


def test_a_stack_is_read_to_a_budget_and_grows_by_what_is_missing(tmp_path) -> None:
    model = stacked()
    whole = weight_bytes(model)
    expected = model(X)
    full = Stack(model)
    full.save(tmp_path / "store")
    torch.testing.assert_close(model(X), expected)
    middle = (full.least + whole) // 2
    stack = Stack.load(tmp_path / "store", middle, model=network())
    small = stack.model
    assert stack.nbytes <= middle
    before = {id(b) for one in (small[1], small[3]) for b in one.blocks}
    held = stack.nbytes
    assert stack.fit(whole) == whole
    assert stack.moved == whole - held
    assert before <= {id(b) for one in (small[1], small[3]) for b in one.blocks}
    torch.testing.assert_close(small(X), expected)
    stack.fit(middle)
    again = Stack.load(tmp_path / "store", middle, model=network())
    assert torch.equal(again.model(X), small(X))
    supple.save(small, tmp_path / "small")  # also of a network that was cut
    assert torch.equal(supple.load(tmp_path / "small", model=network())(X), small(X))
    (tmp_path / "store" / "blocks.safetensors").unlink()
    with pytest.raises(CheckpointError, match="lacks blocks"):
        stack.fit(whole)


def test_a_network_in_use_may_grow_and_shrink(tmp_path) -> None:
    model = stacked()
    stack = Stack(model)
    stack.save(tmp_path)
    whole, failures, done = stack.nbytes, [], threading.Event()

    def serve() -> None:
        while not done.is_set():
            try:
                assert model(X).isfinite().all()
            except Exception as error:
                failures.append(error)

    thread = threading.Thread(target=serve)
    thread.start()
    for _ in range(8):
        stack.fit(stack.least)
        stack.fit(whole)
    done.set()
    thread.join()
    assert not failures


def test_settings_that_can_not_be_used_say_so() -> None:
    for settings, match in (
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"budget": "3 ms"}, "should be"),
    ):
        with pytest.raises(SettingError, match=match):
            BitStack(**settings)
    with pytest.raises(SettingError, match="without stacked layers"):
        Stack(network())
    with pytest.raises(SettingError, match="matches no linear layer"):
        BitStack().apply(nn.Conv2d(1, 1, 1), calibration=[(torch.ones(1, 1, 1, 1),)], loss=loss)
    model = stacked()
    Stack(model).fit(Stack(model).least)
    with pytest.raises(SettingError, match="before blocks are dropped"):
        Stack(model).save("nowhere")
