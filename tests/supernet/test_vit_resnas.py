"""ViT-ResNAS: a sub-network for each example."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import supple
from supple.axes.depth import Depth
from supple.axes.heads import Heads
from supple.axes.kernel import Kernel
from supple.axes.width import Width
from supple.errors import SettingError, UnsupportedModelError
from supple.models.base import build
from supple.space import Site, Space
from supple.supernet._per_example import check_masks, masked, masked_layer_norm
from supple.supernet.vit_resnas import PerExampleSampler, ViTResNAS
from supple.training.step import StepOptions
from tests.training import stub

IMAGES = (5, 1, 4, 4)


def source(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def vit():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build(
            "multi-stage-vit",
            image_size=4,
            patch_size=1,
            dims=(6, 12),
            heads=(2, 3),
            blocks=(1, 2),
            channels=1,
            classes=3,
        )
        with torch.no_grad():  # biases and positions of fresh weights would hide leaks
            for p in model.parameters():
                p.add_(0.3 * torch.randn_like(p))
    axes = [Width((0.5, 1.0)), Heads(), Depth()]
    return supple.elastic(model, torch.randn(IMAGES, generator=source()), axes=axes)


def mixed(net, count=IMAGES[0]):
    return [net.space.smallest(), *(net.space.random(source(i)) for i in range(1, count))]


def test_masked_layer_norm_is_that_of_the_slice():
    x = torch.randn(3, 4, 8, generator=source()) * 5 + 2
    norm = nn.LayerNorm(8)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2, generator=source(1))
        norm.bias.uniform_(-1, 1, generator=source(2))
    widths = (2, 5, 8)
    keep = torch.stack([(torch.arange(8) < width).float() for width in widths])[:, None]
    given = masked_layer_norm(x, keep, norm.weight, norm.bias, norm.eps)
    for i, width in enumerate(widths):
        own = F.layer_norm(x[i, :, :width], (width,), norm.weight[:width], norm.bias[:width])
        torch.testing.assert_close(given[i, :, :width], own, rtol=0, atol=1e-5)
        assert not given[i, :, width:].any()


def test_each_example_comes_out_as_from_its_own_network(vit):
    x = torch.randn(IMAGES, generator=source(3))
    configs = mixed(vit)
    assert len(set(configs)) == len(configs)
    with masked(vit, configs):
        together = vit.module(x)
    for i, config in enumerate(configs):
        with vit.at(config):
            alone = vit.module(x[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(vit.extract(configs[0])(x)[:1], together[:1])
    assert not any("forward" in vars(part) for part in vit.module.modules())


def test_one_step_has_the_mean_of_the_gradients_of_all_examples(vit):
    batch = (torch.randn(IMAGES, generator=source(4)), torch.tensor([0, 1, 2, 0, 1]))
    before = stub.weights(vit.module)
    optimizer = torch.optim.SGD(vit.module.parameters(), lr=0.1)
    run = ViTResNAS(ramp=0).start(vit, optimizer, loss=stub.loss, generator=source(5))
    losses = run.step(batch)
    drawn = run.sampler.drawn
    assert len(set(drawn)) == IMAGES[0]
    after = stub.weights(vit.module)
    vit.module.load_state_dict(before)
    vit.module.zero_grad()
    total = 0.0
    for i, config in enumerate(drawn):
        one = tuple(tensor[i : i + 1] for tensor in batch)
        with vit.at(config):
            loss = stub.loss(vit.module(one[0]), one) / IMAGES[0]
        loss.backward()
        total += loss.item()
    assert losses == {"examples": pytest.approx(total, rel=1e-5)}
    for name, p in vit.module.named_parameters():
        expected = before[name] if p.grad is None else before[name] - 0.1 * p.grad
        torch.testing.assert_close(after[name], expected, rtol=1e-4, atol=1e-5)


def test_choices_are_balanced_and_let_in_from_the_largest_down():
    space = Space([Site("a", "width", (1, 2, 3, 4), 4), Site("b", "width", (5, 6), 6)])
    sampler = PerExampleSampler(space, source(), per_size=2, ramp=0.5)
    sampler._count = 8
    seen = []
    for step in (0, 9, 10, 20, 29, 30, 59):
        (entry,) = sampler.sample(step, 60)
        assert entry.config == space.largest()
        seen.append(Counter(config["a"] for config in sampler.drawn))
    assert seen[0] == seen[1] == {4: 8}
    assert seen[2] == {4: 4, 3: 4}
    assert sorted(seen[3]) == sorted(seen[4]) == [2, 3, 4]
    assert seen[5] == seen[6] == {1: 2, 2: 2, 3: 2, 4: 2}
    pairs = {(c["a"], c["b"]) for _ in range(9) for c in _drawn(sampler)}
    assert len(pairs) == 8  # sites are shuffled apart


def _drawn(sampler):
    sampler.sample(59, 60)
    return sampler.drawn


def test_examples_share_a_size_where_that_is_asked_for(vit):
    optimizer = torch.optim.SGD(vit.module.parameters(), lr=0.0)
    method = ViTResNAS(per_size=2, ramp=0)
    run = method.start(vit, optimizer, loss=stub.loss)
    run.step((torch.randn(IMAGES, generator=source()), torch.tensor([0, 1, 2, 0, 1])))
    assert len(run.sampler.drawn) == 3


class Mean(nn.Module):
    """A mean over channels divides by all of them, which masks can't know."""

    def __init__(self):
        super().__init__()
        self.up, self.out = nn.Linear(5, 8), nn.Linear(5, 3)

    def forward(self, x):
        return self.out(x) + self.up(x).relu().mean(1, keepdim=True)


@pytest.mark.parametrize(
    ("model", "x", "axes", "named"),
    [
        (Mean(), torch.randn(2, 5), [Width((0.5, 1.0))], "at fault: up"),
        (
            nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 3, 3)),
            torch.randn(2, 1, 6, 6),
            [Width((0.5, 1.0))],
            "'1' takes its statistics",
        ),
        (
            nn.Sequential(nn.Conv2d(1, 8, 5, padding=2), nn.Flatten()),
            torch.randn(2, 1, 6, 6),
            [Kernel()],
            "shrink or leave out",
        ),
    ],
)
def test_what_masks_do_not_reach_is_refused(model, x, axes, named):
    net = supple.elastic(model.eval(), x, axes=axes, verify=False)
    with pytest.raises(UnsupportedModelError, match=named):
        check_masks(net)


@pytest.mark.parametrize(("name", "value"), [("per_size", 0), ("ramp", 1.5)])
def test_settings_are_checked(name, value):
    with pytest.raises(SettingError, match=name):
        ViTResNAS(**{name: value})


def test_a_plain_module_and_an_open_end_are_refused(vit):
    optimizer = torch.optim.SGD(vit.module.parameters(), lr=0.1)
    with pytest.raises(SettingError, match="elastic"):
        ViTResNAS().start(vit.module, optimizer, loss=stub.loss)
    run = ViTResNAS().start(vit, optimizer, loss=stub.loss, options=StepOptions())
    with pytest.raises(SettingError, match="steps="):
        run.step((torch.randn(IMAGES), torch.zeros(5, dtype=torch.long)))


class Shifted(nn.Module):
    """A parameter that is used by itself, and read without a norm in between."""

    def __init__(self):
        super().__init__()
        self.up, self.out = nn.Linear(5, 8), nn.Linear(8, 3)
        self.shift = nn.Parameter(torch.linspace(1.0, 2.0, 8))

    def forward(self, x):
        return self.out(self.up(x)[:, None] + self.shift)[:, 0]


def test_a_parameter_that_is_used_by_itself_does_not_leak():
    x = torch.randn(2, 5, generator=source())
    net = supple.elastic(Shifted(), x, axes=[Width((0.5, 1.0))], verify=False)
    configs = [net.space.smallest(), net.space.largest()]
    with masked(net, configs):
        together = net.module(x)
    for i, config in enumerate(configs):
        with net.at(config):
            torch.testing.assert_close(together[i], net.module(x)[i])
