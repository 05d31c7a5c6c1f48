"""The contract "Optimizers": each test names the sentence that it holds to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from supple.network import Elastic
from supple.training.losses import Labels
from supple.training.step import Pass, SizesRun, StepOptions
from tests.contracts.ranks import batches, loss, made
from tests.training.stub import weights
from tests.training.test_step import Fixed

OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.3),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.3),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.3),
}


def started(net: Elastic, optimizer: Any, **options: Any) -> SizesRun:
    """A run that trains the full network in its first step and the smallest in its second."""
    net.module.train()
    passes = (Pass(net.space.largest(), "largest"),)
    run = SizesRun(net, optimizer, Fixed(passes), Labels(loss), options=StepOptions(**options))
    run.step(batches()[0])
    object.__setattr__(run.sampler, "passes", (Pass(net.space.smallest(), "smallest"),))
    return run


def moments(optimizer: Any, parameter: Tensor) -> dict[str, Tensor]:
    """Copies of the state that has the parameter's shape."""
    state = optimizer.state[parameter].items()
    return {k: v.clone() for k, v in state if isinstance(v, Tensor) and v.dim()}


def unused(net: Elastic) -> dict[str, Tensor]:
    """Which elements the smallest size leaves out, by hand."""
    outside = {name: torch.ones_like(p).bool() for name, p in net.module.named_parameters()}
    stem, up = 2, 4
    outside["stem.weight"][:stem] = False
    outside["stem.bias"][:stem] = False
    outside["blocks.0.up.weight"][:up, :stem] = False
    outside["blocks.0.up.bias"][:up] = False
    outside["blocks.0.down.weight"][:stem, :up] = False
    outside["blocks.0.down.bias"][:stem] = False
    outside["head.weight"][:, :stem] = False
    outside["head.bias"][:] = False
    return outside


@pytest.fixture
def net() -> Elastic:
    found: Elastic = made()
    smallest = {"stem": 2, "blocks.0.up": 4, "blocks.depth": 1}
    assert found.space.smallest() == found.space.config(smallest)
    return found


def owners(net: Elastic) -> dict[str, nn.Parameter]:
    return dict(net.module.named_parameters())


def test_elements_that_no_size_used_get_a_zero_gradient(net):
    """ "Elements that no sampled size of a step used get a zero gradient"."""
    run = started(net, OPTIMIZERS["sgd"](net.module.parameters()))
    run.step(batches()[1])
    for name, outside in unused(net).items():
        gradient = owners(net)[name].grad
        assert gradient is not None, name
        assert not gradient[outside].any(), name
        assert outside.all() or gradient[~outside].any(), name


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_they_follow_the_optimizers_rule(net, name):
    """ "and follow the optimizer's rule (momentum and decay move them)": the formulas."""
    optimizer = OPTIMIZERS[name](net.module.parameters())
    run = started(net, optimizer)
    before = weights(net.module)
    state = {key: moments(optimizer, p) for key, p in owners(net).items()}
    run.step(batches()[1])
    for key, outside in unused(net).items():
        w, held = before[key][outside], {k: v[outside] for k, v in state[key].items()}
        if name == "sgd":
            moved = w - 0.1 * (0.9 * held["momentum_buffer"] + 0.3 * w)
        else:
            decay = 0.3 * w if name == "adam" else torch.zeros_like(w)
            first = 0.9 * held["exp_avg"] + 0.1 * decay
            second = 0.999 * held["exp_avg_sq"] + 0.001 * decay.square()
            step = (first / (1 - 0.9**2)) / ((second / (1 - 0.999**2)).sqrt() + 1e-8)
            start = w if name == "adam" else w * (1 - 0.1 * 0.3)
            moved = start - 0.1 * step
        torch.testing.assert_close(owners(net)[key].detach()[outside], moved, msg=key)
        assert not outside.any() or (moved - w).abs().max() > 1e-4, key


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_freeze_inactive_freezes_them_and_their_moments(net, name):
    """ "`freeze_inactive=True` freezes them and their moments", and changes nothing else."""
    plain = made()
    runs = {}
    for one, freeze in ((net, True), (plain, False)):
        optimizer = OPTIMIZERS[name](one.module.parameters())
        runs[freeze] = started(one, optimizer, freeze_inactive=freeze)
    before = weights(net.module)
    state = {key: moments(runs[True].optimizer, p) for key, p in owners(net).items()}
    for run in runs.values():
        run.step(batches()[1])
    for key, outside in unused(net).items():
        found, other = owners(net)[key].detach(), owners(plain)[key].detach()
        assert torch.equal(found[outside], before[key][outside]), key
        assert torch.equal(found[~outside], other[~outside]), key
        now = moments(runs[True].optimizer, owners(net)[key])
        assert now.keys() == state[key].keys()
        assert now, key
        for kind, value in now.items():
            assert torch.equal(value[outside], state[key][kind][outside]), (key, kind)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moments_that_a_step_creates_are_zero_where_nothing_was_used(net, name):
    """Decay must not enter the moments of frozen elements by the back door."""
    optimizer = OPTIMIZERS[name](net.module.parameters())
    net.module.train()
    passes = (Pass(net.space.smallest(), "smallest"),)
    options = StepOptions(freeze_inactive=True)
    SizesRun(net, optimizer, Fixed(passes), Labels(loss), options=options).step(batches()[0])
    outside = unused(net)["stem.weight"]
    for value in moments(optimizer, net.module.stem.weight).values():
        assert not value[outside].any()
        assert value[~outside].any()
    assert net.module.blocks[1].up.weight not in optimizer.state
