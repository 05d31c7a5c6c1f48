"""Checks of techniques that train."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from supple.axes.base import added
from supple.axes.width import Width
from supple.network import Elastic, elastic
from supple.space import Config
from supple.technique import Rule
from supple.testing.toys import (
    PlannedError,
    assert_same,
    copied,
    generator,
    global_random_untouched,
    mlp,
    output,
)
from supple.training.step import StepOptions

__all__ = ["CHECKS", "network"]


def check_rule_learns(technique: Rule) -> None:
    """Training lowers the loss at the smallest and at the largest size, and stays finite."""
    net = network(technique)
    sizes = (net.space.smallest(), net.space.largest())
    before = [_loss_at(net, size) for size in sizes]
    batches = _batches() * 3
    run = _start(technique, net, steps=len(batches))
    for batch in batches:
        for role, loss in run.step(batch).items():
            assert math.isfinite(loss), f"the loss of role '{role}' is {loss}"
    after = [_loss_at(net, size) for size in sizes]
    for size, old, new in zip(sizes, before, after, strict=True):
        assert new < old, f"the loss at {size} went from {old:.4f} to {new:.4f}"


def check_rule_leaves_the_network_whole(technique: Rule) -> None:
    """Steps, also such that raise, leave the owners in place and the module at full size."""
    net = network(technique)
    owners = dict(net.module.named_parameters())
    shapes = {name: owner.shape for name, owner in owners.items()}
    run = _start(technique, net)
    run.step(_batches()[0])
    with contextlib.suppress(PlannedError):
        _start(technique, net, loss=_failing_loss).step(_batches()[0])
        raise AssertionError("an error in the loss was swallowed")
    named = net.module.named_parameters()
    now = {name: p for name, p in named if name in owners or not added(name)}
    assert list(now) == list(owners), "the owners have other names or another order"
    replaced = [name for name, owner in owners.items() if now[name] is not owner]
    assert not replaced, f"owners were replaced: {', '.join(replaced)}"
    resized = [name for name, owner in now.items() if owner.shape != shapes[name]]
    assert not resized, f"owners were resized: {', '.join(resized)}"
    assert net.module.training, "the module was left in eval mode"
    with net.at(net.space.largest()):
        inside = output(net.module, (_batches()[0][0],))
    torch.testing.assert_close(output(net.module, (_batches()[0][0],)), inside)


def check_rule_repeats(technique: Rule) -> None:
    """The same generator gives the same weights, and global random state is untouched."""
    with global_random_untouched():
        again = _trained(technique)
    assert_same(again.module, _weights(technique), "the same generator gave other weights")


def check_rule_resumes(technique: Rule) -> None:
    """A run that goes on from its state gives bitwise the weights of one that never stopped."""
    parted = network(technique)
    optimizer = _optimizer(parted)
    first = _start(technique, parted, optimizer)
    for batch in _batches()[:2]:
        first.step(batch)
    state = first.state_dict()
    assert _is_plain(state), "state_dict holds more than numbers, text, lists and tensors"
    state = copy.deepcopy(state)
    second = _start(technique, parted, optimizer, seed=23)
    second.load_state_dict(state)
    for batch in _batches()[2:]:
        second.step(batch)
    assert_same(parted.module, _weights(technique), "the resumed run went another way")


def _trained(technique: Rule) -> Elastic:
    """Trains a network on all batches."""
    net = network(technique)
    run = _start(technique, net)
    for batch in _batches():
        run.step(batch)
    return net


@functools.lru_cache(maxsize=4)
def _weights(technique: Rule) -> dict[str, Tensor]:
    """Gives the weights after all batches, which several checks compare with."""
    return copied(_trained(technique).module)


def network(technique: Rule | None = None) -> Elastic:
    """Gives a small elastic network in training mode; also learns the operators' rules."""
    x = torch.randn(2, 5, generator=generator())
    toy = None if technique is None else technique.toy()
    if isinstance(toy, Elastic):
        return toy
    if toy is not None:
        return elastic(toy.train(), (x,), verify=False)
    return elastic(mlp().train(), (x,), axes=[Width((0.5, 1.0))], verify=False)


def _batches() -> list[tuple[Tensor, Tensor]]:
    """Gives four batches of a problem with a linear answer."""
    source = generator(13)
    truth = torch.randn(5, 3, generator=source)
    xs = [torch.randn(17, 5, generator=source) for _ in range(4)]
    return [(x, (x @ truth).argmax(1)) for x in xs]


def _loss(output: Tensor, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(output, batch[1])


def _failing_loss(output: Tensor, batch: Any) -> Tensor:
    raise PlannedError


def _optimizer(net: Elastic) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.module.parameters(), lr=0.1, momentum=0.5)


def _start(
    technique: Rule,
    net: Elastic,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    loss: Callable[[Tensor, Any], Tensor] = _loss,
    seed: int = 7,
    steps: int = 4,
) -> Any:
    return technique.start(
        net,
        optimizer or _optimizer(net),
        loss=loss,
        generator=generator(seed),
        options=StepOptions(steps=steps),
    )


def _loss_at(net: Elastic, size: Config) -> float:
    with net.at(size):
        losses = [_loss(output(net.module, (x,)), (x, y)) for x, y in _batches()]
    return float(torch.stack(losses).mean())


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_plain(one) for key, one in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str, Tensor))


CHECKS: tuple[Callable[[Rule], None], ...] = (
    check_rule_learns,
    check_rule_leaves_the_network_whole,
    check_rule_repeats,
    check_rule_resumes,
)
