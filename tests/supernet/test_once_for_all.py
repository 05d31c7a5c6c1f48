"""Once-for-all: what is enabled when, what each size learns, and what happens between."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from supple.axes.depth import Depth
from supple.axes.kernel import Kernel
from supple.axes.width import Width
from supple.errors import SettingError
from supple.network import Elastic, elastic
from supple.space import Site, Space
from supple.supernet._shrinking import within
from supple.supernet.once_for_all import PAPER, OnceForAll, Shrink
from supple.training.loop import train
from supple.training.step import SizesRun, StepOptions
from tests.graph.checks import shake


class Block(nn.Module):
    """An inverted residual: expand, filter, project."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Conv2d(4, 12, 1, bias=False)
        self.filter = nn.Conv2d(12, 12, 5, padding=2, groups=12, bias=False)
        self.norm = nn.BatchNorm2d(12)
        self.project = nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.project(self.norm(self.filter(self.expand(x))).relu())


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.blocks = nn.Sequential(*(Block() for _ in range(3)))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def network(*, transform: bool = True) -> Elastic:
    x = torch.randn(4, 1, 6, 6, generator=torch.Generator().manual_seed(1))
    axes = [
        Kernel((3, 5), transform=transform, where="blocks.*"),
        Depth((1, 2, 3)),
        Width((4, 8, 12), where="blocks.*.expand"),
    ]
    return elastic(shake(Net()).train(), x, axes=axes, verify=False)


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    source = torch.Generator().manual_seed(2)
    return [
        (torch.randn(6, 1, 6, 6, generator=source), torch.randint(3, (6,), generator=source))
        for _ in range(count)
    ]


def loss(output: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(output, batch[1])


def sgd(net: Elastic, lr: float = 0.1, momentum: float = 0.9) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.module.parameters(), lr=lr, momentum=momentum)


def begun(net: Elastic, method: OnceForAll, steps: int, optimizer: Any = None) -> SizesRun:
    return method.start(
        net,
        optimizer or sgd(net),
        loss=loss,
        generator=torch.Generator().manual_seed(3),
        options=StepOptions(steps=steps),
    )


def test_the_authors_phases_enable_kernels_then_depths_then_widths() -> None:
    net, steps = network(), 590
    run = begun(net, OnceForAll(), steps)
    seen: dict[int, dict[str, set[int]]] = {}
    counts: dict[int, set[int]] = {}
    ends = (180, 300, 325, 445, 470, 590)
    for step in range(steps):
        phase = sum(step >= end for end in ends)
        passes = run.sampler.sample(step, steps)
        counts.setdefault(phase, set()).add(len(passes))
        for entry in passes:
            assert (entry.weight, entry.parts, entry.regularise) == (1.0, 1, True)
            for site, choice in entry.config.items():
                axis = net.space.site(site).axis
                seen.setdefault(phase, {}).setdefault(axis, set()).add(choice)
    full = {"kernel": {5}, "depth": {3}, "width": {12}}
    kernels = full | {"kernel": {3, 5}}
    assert list(seen.values()) == [
        full,
        kernels,
        kernels | {"depth": {2, 3}},
        kernels | {"depth": {1, 2, 3}},
        kernels | {"depth": {1, 2, 3}, "width": {8, 12}},
        kernels | {"depth": {1, 2, 3}, "width": {4, 8, 12}},
    ]
    assert list(counts.values()) == [{1}, {1}, {2}, {2}, {4}, {4}]
    rates = [run.sampler.rate(step, steps) for step in range(steps)]
    starts = [rates[start] for start in (0, *ends[:-1])]
    assert starts == pytest.approx([1.0, 0.37, 0.031, 0.092, 0.031, 0.092])
    assert all(rates[end - 1] < 0.01 * start for end, start in zip(ends, starts, strict=True))


def test_phases_that_enable_nothing_here_are_left_out() -> None:
    space = Space([Site("a", "width", (2, 4, 8), 8)])
    sampler: Any = OnceForAll().sampler(space, torch.Generator())
    assert [phase.share for phase in sampler.phases] == [180, 25, 120]
    only = Space([Site("k", "kernel", (3, 5), 5)])
    sampler = OnceForAll().sampler(only, torch.Generator())
    assert [phase.share for phase in sampler.phases] == [180, 120]


def test_all_enables_axes_that_no_phase_names() -> None:
    space = Space([Site("a", "width", (2, 4), 4), Site("b", "bits", (2, 4, 8), 4)])
    sampler: Any = OnceForAll().sampler(space, torch.Generator().manual_seed(0))
    chosen = {sampler.sample(step, 300)[0].config["b"] for step in range(300)}
    assert chosen == {2, 4, 8}
    before = {sampler.sample(step, 325)[0].config["b"] for step in range(205)}
    assert before == {4}


def test_an_axis_that_is_never_enabled_is_an_error() -> None:
    with pytest.raises(SettingError, match="but not those of depth, width; end with"):
        begun(network(), OnceForAll(phases=(Shrink(1), Shrink(1, ("kernel", "depth:2")))), 4)


SHORT = (Shrink(1), Shrink(1, ("kernel", "depth"), 0.5, 2), Shrink(1, ("all",), 0.25, 2))


def test_a_step_sums_labels_and_soft_targets_of_the_frozen_full_network() -> None:
    net, data = network(), batches(2)
    method = OnceForAll(phases=SHORT[:1] + SHORT[2:], soft=0.7, temperature=2.0)
    run = begun(net, method, 2, sgd(net, momentum=0.0))
    run.step(data[0])
    twin = network()
    twin.module.load_state_dict(net.module.state_dict())
    teacher = network().module
    teacher.load_state_dict(net.module.state_dict())
    teacher.eval()
    passes: list[Any] = []
    sample = run.sampler.sample
    run.sampler.sample = lambda *at: passes.extend(sample(*at)) or passes  # type: ignore[method-assign]
    losses = run.step(data[1])

    # sorting has moved channels: the same by hand
    twin.sort({n: s for n, s in twin.importance("read_l1").items() if "expand" in n})
    soft = (teacher(data[1][0]) / 2).softmax(-1).detach()
    each = []
    for entry in passes:
        with twin.at(entry.config):
            output = twin.module(data[1][0])
            kd = -4.0 * (soft * (output / 2).log_softmax(-1)).sum(-1).mean()
            total = loss(output, data[1]) + 0.7 * kd
            total.backward()
            each.append(total.item())
    assert len(passes) == 2
    assert losses == {"random": pytest.approx(sum(each) / 2, rel=1e-5)}
    for (name, p), other in zip(
        net.module.named_parameters(), twin.module.parameters(), strict=True
    ):
        expected = other if other.grad is None else other - 0.1 * 0.25 * other.grad
        torch.testing.assert_close(p.detach(), expected.detach(), msg=name)


def test_without_soft_targets_no_teacher_is_kept() -> None:
    net = network()
    run = begun(net, OnceForAll(phases=SHORT, soft=0.0), 3)
    losses = [run.step(batch) for batch in batches(3)]
    assert run.state_dict()["teachers"] == {}
    assert [set(one) for one in losses] == [{"largest"}, {"random"}, {"random"}]


def test_a_pretrained_network_teaches_as_it_came() -> None:
    net = network()
    before = {n: t.clone() for n, t in net.module.named_parameters()}
    run = begun(net, OnceForAll(phases=SHORT[1:]), 4)
    for batch in batches(4):
        run.step(batch)
    saved = run.state_dict()["teachers"]["teacher"]
    assert all(torch.equal(saved[name], tensor) for name, tensor in before.items())


def test_channels_are_sorted_when_widths_are_enabled_and_within_those_that_are_on() -> None:
    net = network()
    phases = (Shrink(1), Shrink(1, ("width:2",)), Shrink(1, ("all",)))
    run = begun(net, OnceForAll(phases=phases), 6, sgd(net, lr=1e-9))
    x = net.args[0]
    scores = []
    for step, batch in enumerate(batches(6)):
        if step in (2, 4):
            net.eval()
            before = net(x)
            net.train()
        with torch.no_grad():
            if step in (0, 4):  # so that there is something to sort
                source = torch.Generator().manual_seed(step)
                weight = net.module.blocks[1].project.weight
                weight.copy_(torch.rand(weight.shape, generator=source))
                net.eval()
                before = net(x)
                net.train()
        run.step(batch)
        if step in (2, 4):
            net.eval()
            torch.testing.assert_close(net(x), before, rtol=1e-3, atol=1e-3)
            net.train()
        scores.append(net.importance("read_l1")["blocks.1.expand"])
    assert not (scores[1].diff() <= 0).all()
    assert (scores[2].diff() <= 1e-5).all()  # all of them
    assert (scores[4][:8].diff() <= 1e-5).all()  # the 8 that were on, and the 4 that were not
    assert (scores[4][8:].diff() <= 1e-5).all()
    assert not (scores[4].diff() <= 1e-5).all()


def test_nothing_is_sorted_while_widths_are_full() -> None:
    net = network()
    run = begun(net, OnceForAll(phases=SHORT), 3, sgd(net, lr=1e-9))
    weight = net.module.blocks[0].expand.weight
    before = weight.detach().clone()
    for batch in batches(2):
        run.step(batch)
    torch.testing.assert_close(weight.detach(), before)


def test_moments_are_new_in_each_phase() -> None:
    net = network()
    optimizer = sgd(net)
    run = begun(net, OnceForAll(phases=SHORT), 6, optimizer)
    kept = []
    for batch in batches(6):
        run.step(batch)
        head = net.module.head.bias
        kept.append(torch.equal(optimizer.state[head]["momentum_buffer"], head.grad))
    assert kept == [True, False] * 3


@pytest.mark.parametrize("stop", [2, 5])
def test_a_killed_run_goes_on_exactly_in_every_phase(stop: int, tmp_path: Any) -> None:
    def run(net: Elastic, killed: bool, folder: str) -> None:
        calls: list[int] = []

        def counted(output: Tensor, batch: Any) -> Tensor:
            calls.append(1)
            if killed and len(calls) == stop + 1:
                raise ZeroDivisionError
            return loss(output, batch)

        train(
            net,
            batches(6),
            counted,
            method=OnceForAll(phases=(SHORT[0], Shrink(1, ("kernel",)), Shrink(1, ("all",)))),
            optimizer="sgd",
            lr=0.05,
            ema=0.9,
            checkpoint=tmp_path / folder,
            checkpoint_every=1,
            progress=False,
        )

    whole, parted, anew = network(), network(), network()
    run(whole, False, "whole")
    with pytest.raises(ZeroDivisionError):
        run(parted, True, "parted")
    run(anew, False, "parted")
    for (name, one), other in zip(
        whole.module.state_dict().items(), anew.module.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other), name
    shutil.rmtree(tmp_path)


def test_scores_keep_units_within_the_sizes_that_are_on() -> None:
    scores = torch.tensor([0.0, 5.0, 1.0, 9.0, 7.0, 8.0])
    order = within(scores, (2, 5, 6)).argsort(descending=True).tolist()
    assert order == [1, 0, 3, 4, 2, 5]
    assert within(torch.zeros(3), (3,)).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OnceForAll(phases=()), "phases must be at least one"),
        (lambda: OnceForAll(soft=-1.0), "soft must be at least 0"),
        (lambda: OnceForAll(temperature=0.0), "temperature above 0"),
        (lambda: Shrink(0), "a share and a rate above 0"),
        (lambda: Shrink(1, sizes=0), "at least one size per step"),
        (lambda: Shrink(1, ("depth:0",)), "got 'depth:0'"),
        (lambda: Shrink(1, ("depth:x",)), "got 'depth:x'"),
    ],
)
def test_settings_are_checked(make: Any, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        make()


def test_the_defaults_are_the_authors() -> None:
    assert OnceForAll().phases == PAPER
    assert sum(phase.share for phase in PAPER) == 590
    assert OnceForAll().soft == OnceForAll().temperature == 1.0
    assert OnceForAll().aggregate == "sum"
