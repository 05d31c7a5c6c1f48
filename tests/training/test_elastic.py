"""Training the real elastic network: what a size learns is what it would learn by itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from supple.network import Elastic, elastic
from supple.supernet.bignas import BigNAS
from supple.supernet.sortednet import SortedNet
from supple.training.loop import train
from supple.training.losses import Labels
from supple.training.recalibrate import recalibrate
from supple.training.step import Pass, SizesRun, StepOptions
from tests.training import stub
from tests.training.test_step import Fixed


class Net(nn.Module):
    """Two residual blocks that can be skipped, with batch normalization and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.3)
        self.up = nn.Conv2d(8, 8, 1)
        self.norm = nn.BatchNorm2d(8)
        self.down = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.norm(self.up(self.drop(x))).relu())


@pytest.fixture
def net() -> Elastic:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = elastic(Net(), torch.ones(2, 2, 5, 5), verify=False)
    assert {site.axis for site in made.space.sites} == {"width", "depth"}
    return made


def started(net: Elastic, *passes: Pass, **options: object) -> SizesRun:
    optimizer = torch.optim.SGD(net.module.parameters(), lr=0.1, momentum=0.9)
    return SizesRun(
        net,
        optimizer,
        Fixed(passes),
        Labels(stub.loss),
        options=StepOptions(**options),
    )


def shapes(module: nn.Module) -> list[tuple[int, ...]]:
    return [tuple(p.shape) for p in module.parameters()]


def thin(net: Elastic) -> dict[str, int]:
    """The smallest widths at full depth, so that names are the same in what is extracted."""
    sites = [site for site in net.space.sites if site.axis != "depth"]
    return dict(net.space.config({site.name: site.choices[0] for site in sites}))


@pytest.mark.filterwarnings("ignore:the running statistics")
def test_a_size_gets_the_gradients_that_it_has_by_itself(net):
    config, batch = net.space.config(thin(net)), stub.images()[0]
    small = net.extract(config).train()
    net.module.train()
    run = started(net, Pass(config, "a", regularise=False), freeze_inactive=True)
    for part in small.modules():
        part.train(isinstance(part, nn.BatchNorm2d))
    stub.loss(small(batch[0]), batch).backward()
    loss = run.step(batch)["a"]
    with torch.no_grad():
        assert loss == pytest.approx(stub.loss(small(batch[0]), batch).item(), rel=1e-5)
    assert shapes(small) != shapes(net.module)
    for name, p in small.named_parameters():
        owner = net.module.get_parameter(name).grad
        inside = tuple(slice(0, size) for size in p.shape)
        torch.testing.assert_close(owner[inside], p.grad)
        outside = torch.ones_like(owner, dtype=torch.bool)
        outside[inside] = False
        assert not owner[outside].any()


def test_freeze_inactive_moves_exactly_what_the_size_uses(net):
    before = stub.weights(net.module)
    smallest = net.space.smallest()
    started(net, Pass(smallest, "a"), freeze_inactive=True).step(stub.images()[0])
    moved = {
        name: p.detach() != before[name]
        for name, p in net.module.named_parameters()
        if not torch.equal(p.detach(), before[name])
    }
    assert {"stem.weight", "blocks.0.up.weight", "head.weight"} <= moved.keys()
    assert not [name for name in moved if name.startswith("blocks.1.")]
    width = thin(net)["stem"]
    assert 0 < width < 8
    assert not moved["stem.weight"][width:].any()
    assert moved["stem.weight"][:width].any()


def test_partial_sizes_leave_running_statistics_alone(net):
    net.module.train()
    before = dict(stub.weights(net.module))
    started(net, Pass(net.space.smallest(), "a")).step(stub.images()[0])
    for name, buffer in net.module.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_dropout_is_off_and_batch_statistics_on_without_regularisation(net):
    net.module.train()
    config, batch = net.space.config(thin(net)), stub.images()[0]
    losses = [
        started(net, Pass(config, "a", regularise=flag), clip=1e-9).step(batch)["a"]
        for flag in (False, False, True, True)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[2] != pytest.approx(losses[3], rel=1e-3)


@pytest.mark.parametrize("pick", ["smallest", "thin", "largest"])
def test_recalibrated_statistics_are_those_of_the_extracted_network(net, pick):
    config = net.space.config(thin(net)) if pick == "thin" else getattr(net.space, pick)()
    data = stub.images(3)
    net.module.train()
    before = stub.weights(net.module)
    recalibrate(net, config, data)
    small = net.extract(config).eval()
    inside = [part for part in small.modules() if isinstance(part, nn.BatchNorm2d)]
    held = [part.running_mean.clone() for part in inside]
    for part in inside:
        part.train()
        part.momentum = None
        part.reset_running_stats()
    with torch.no_grad():
        for x, _ in data:
            small(x)
    for part, mean in zip(inside, held, strict=True):
        torch.testing.assert_close(mean, part.running_mean)
        assert mean.abs().max() > 1e-3
    net.module.eval()
    small.eval()
    with torch.no_grad(), net.at(config):
        torch.testing.assert_close(net(data[0][0]), small(data[0][0]))
    if pick != "largest":
        assert stub.equal(stub.weights(net.module), before)


@pytest.mark.parametrize("method", [BigNAS(), SortedNet(micro_steps=2)])
def test_every_size_learns(net, method):
    x = torch.randn(24, 2, 5, 5, generator=torch.Generator().manual_seed(0))
    labels = (x.mean((1, 2, 3)) > 0).long()
    data = [(x, labels)]

    def losses() -> list[float]:
        found = []
        for config in (net.space.smallest(), net.space.config(thin(net)), net.space.largest()):
            recalibrate(net, config, data)
            net.module.eval()
            with torch.no_grad(), net.at(config):
                found.append(stub.loss(net(x), data[0]).item())
        return found

    before = losses()
    settings = {"epochs": 60, "lr": 0.02, "schedule": "constant", "progress": False}
    train(net, data, stub.loss, method=method, **settings)
    assert all(b < 0.6 * a for a, b in zip(before, losses(), strict=True))
