"""Training the real elastic network: what a size learns is what it would learn by itself."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor, nn
from torch.utils import checkpoint as torch_checkpoint
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

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


def test_dropout_is_off_and_batch_statistics_on_without_regularisation(net):
    net.module.train()
    config, batch = net.space.config(thin(net)), stub.images()[0]
    losses = [
        started(net, Pass(config, "a", regularise=flag), clip=1e-9).step(batch)["a"]
        for flag in (False, False, True, True)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[2] != pytest.approx(losses[3], rel=1e-5)


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


class Recomputed(nn.Module):
    """Runs each residual block under gradient checkpointing, if it is told how."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(5, 8)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 12), nn.Dropout(0.3), nn.Tanh(), nn.Linear(12, 8))
            for _ in range(2)
        )
        self.head = nn.Linear(8, 3)
        self.reentrant: bool | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            if self.reentrant is None:
                x = x + block(x)
            else:
                x = x + checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x)


def recomputed() -> Elastic:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return elastic(Recomputed(), torch.ones(2, 5), verify=False)


def owners_gradients(net: Elastic) -> dict[str, Tensor]:
    owners = net.module.named_parameters()
    return {name: p.grad.clone() for name, p in owners if p.grad is not None}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_training_with_checkpointing_gives_the_same_weights(reentrant, precision):
    found = []
    for mode in (None, reentrant):
        net = recomputed()
        net.module.reentrant = mode
        settings = {"optimizer": "sgd", "lr": 0.1, "clip": 1.0, "precision": precision}
        train(net, stub.vectors(), stub.loss, method=BigNAS(), progress=False, **settings)
        found.append(stub.weights(net.module))
    assert stub.equal(*found)
    assert not stub.equal(found[0], stub.weights(recomputed().module))


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_sizes_that_wait_for_their_backward_are_recomputed_as_they_were(reentrant, inside):
    """Several sizes pending, and backward in the block of another one or after all."""
    found = []
    for mode in (None, reentrant):
        net = recomputed()
        net.module.reentrant = mode
        smallest, largest = net.space.smallest(), net.space.largest()
        middle = net.space.config({"stem": 4})
        x = stub.vectors(1)[0][0]
        total = torch.zeros(())
        with torch.random.fork_rng():
            torch.manual_seed(1)
            for config in (smallest, largest, middle):
                with net.at(config):
                    total = total + net(x).square().mean()
            with net.at(smallest) if inside else contextlib.nullcontext():
                total.backward()
        found.append(owners_gradients(net))
    assert stub.equal(*found)
    assert len(found[0]) == len(list(net.module.parameters()))
    assert torch_checkpoint.CheckpointFunction.__module__.startswith("torch.")


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("reentrant", [False, True])
def test_the_checkpointing_of_transformers_gives_the_same_gradients(reentrant):
    settings = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 17}
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=3, use_cache=False, **settings
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).train()
    tokens = torch.arange(10).reshape(2, 5)
    net = elastic(model, kwargs={"input_ids": tokens}, verify=False)
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            kwargs = {"use_reentrant": reentrant}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
            model.enable_input_require_grads()
        model.zero_grad()
        losses = []
        for size in (net.space.smallest(), net.space.largest()):
            with net.at(size):
                losses.append(net(input_ids=tokens, labels=tokens).loss)
        sum(losses).backward()
        found.append(owners_gradients(net))
    assert stub.equal(*found)
    assert found[0]


def test_bf16_at_a_size_is_bf16_of_the_size_by_itself():
    net, batch = recomputed(), stub.vectors()[0]
    config = net.space.config({"stem": 4})
    small = net.extract(config)
    run = started(net, Pass(config, "a", regularise=False), precision="bf16")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stub.loss(small.eval()(batch[0]), batch).backward()
    run.step(batch)
    for name, p in small.named_parameters():
        inside = tuple(slice(0, size) for size in p.shape)
        assert torch.equal(net.module.get_parameter(name).grad[inside], p.grad), name
