"""EfficientTDNN: what is enabled when, the cycles, and one path learning from labels alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from supple.axes.depth import Depth
from supple.axes.kernel import Kernel
from supple.axes.width import Width
from supple.errors import SettingError
from supple.models.tdnn import build
from supple.network import Elastic, elastic
from supple.supernet._shrinking import Shrink
from supple.supernet.efficienttdnn import EfficientTDNN
from supple.training.step import SizesRun, StepOptions
from tests.training import stub


def network() -> Elastic:
    settings = {"features": 5, "channels": 8, "blocks": 3, "scale": 2, "joint": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build(**settings, bottleneck=4, embedding=3)
        x = torch.randn(4, 5, 11)
    axes = [
        Kernel((1, 3, 5), transform=True),
        Depth((1, 2, 3), joined=True),
        Width((2, 4, 6, 8), where="front.conv"),
    ]
    return elastic(model, x, axes=axes, verify=False)


def begun(net: Any, method: EfficientTDNN, steps: int, momentum: float = 0.0) -> SizesRun:
    return method.start(
        net,
        torch.optim.SGD(net.module.parameters(), lr=0.1, momentum=momentum),
        loss=stub.loss,
        generator=torch.Generator().manual_seed(3),
        options=StepOptions(steps=steps),
    )


def test_kernels_then_depths_then_three_widths_then_all_are_enabled():
    net, steps = network(), 250
    sampler = begun(net, EfficientTDNN(), steps).sampler
    seen: list[dict[str, set[int]]] = [{} for _ in range(5)]
    for step in range(steps):
        passes = sampler.sample(step, steps)
        assert len(passes) == 1
        for site, choice in passes[0].config.items():
            seen[step // 50].setdefault(net.space.site(site).axis, set()).add(choice)
    largest = {"kernel": {5}, "depth": {3}, "width": {8}}
    kernels = largest | {"kernel": {1, 3, 5}}
    depths = kernels | {"depth": {1, 2, 3}}
    assert seen == [
        largest,
        kernels,
        depths,
        depths | {"width": {4, 6, 8}},
        depths | {"width": {2, 4, 6, 8}},
    ]


def test_in_each_phase_the_rate_goes_up_and_down_each_time_half_as_high():
    sampler = begun(network(), EfficientTDNN(cycles=2), 40).sampler
    rates = [sampler.rate(step, 40) for step in range(16)]
    phase = [0.0, 0.5, 1.0, 0.5, 0.0, 0.25, 0.5, 0.25]
    assert rates == pytest.approx([*phase, *phase], abs=1e-4)
    assert min(rates) > 0


def test_a_step_follows_the_label_gradient_of_the_one_size_that_was_drawn():
    net, batch = stub.mlp(), stub.vectors(size=6)[0]
    before = stub.weights(net.module)
    run = begun(net, EfficientTDNN(phases=(Shrink(1, ("all",)),), cycles=1), 2)
    run.sampler.rate = lambda step, steps: 1.0  # the first step's is nearly 0
    assert list(run.step(batch)) == ["random"]
    (drawn,) = net.active
    other = stub.mlp()
    with other.at(drawn):
        F.cross_entropy(other.module(batch[0]), batch[1]).backward()
    for name, p in other.module.named_parameters():
        grad = torch.zeros_like(p) if p.grad is None else p.grad
        expected = before[name] - 0.1 * grad
        torch.testing.assert_close(net.module.get_parameter(name).detach(), expected)


def test_each_phase_begins_with_new_moments():
    net = stub.mlp()
    phases = (Shrink(1), Shrink(1, ("all",)))
    run = begun(net, EfficientTDNN(phases=phases, cycles=1), 6, momentum=0.9)
    batches = stub.vectors(4)
    moments = []
    for batch in batches:
        run.sampler.begin(run)
        moments.append(bool(run.optimizer.state))
        run.step(batch)
    assert moments == [False, True, True, False]


@pytest.mark.parametrize("sort", [False, True])
def test_units_are_sorted_only_where_that_is_asked_for(sort):
    net = network()
    gains = net.module.front.norm.weight
    torch.nn.init.constant_(gains, 1.0)
    for reader in (block.enter.conv.weight for block in net.module.blocks):
        reader.data[:, :4] = 0.0
    reader = net.module.join.weight
    reader.data.fill_(1e-3)
    first = net.module.front.conv.weight.detach().clone()
    run = begun(net, EfficientTDNN(sort=sort, cycles=1), 5)
    run.steps = 4
    run.sampler.begin(run)
    assert net.module.front.conv.weight.equal(first) is not sort


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"cycles": 0}, "cycles"),
        ({"phases": ()}, "phases"),
        ({"phases": (Shrink(1),)}, "phases"),
    ],
)
def test_settings_are_checked(settings, named):
    with pytest.raises(SettingError, match=named):
        begun(network(), EfficientTDNN(**settings), 4)
