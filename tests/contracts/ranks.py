"""What each of two processes does in the tests of training in several processes.

All of it runs in one pair of processes, since starting one takes seconds; each scenario leaves
tensors and plain facts behind, which the tests look at.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import supple
from supple.errors import SuppleError
from supple.supernet.bignas import BigNAS
from supple.training import processes

RANKS, STEPS = 2, 6
Batch = tuple[Tensor, Tensor]
OPTIMIZERS = {"sgd": {"lr": 0.1}, "adamw": {"lr": 0.01}}


class Block(nn.Module):
    """A residual branch of its own width."""

    def __init__(self, norm: bool, dropout: float) -> None:
        super().__init__()
        self.up = nn.Linear(8, 16)
        self.norm = nn.BatchNorm1d(16) if norm else nn.Identity()
        self.drop = nn.Dropout(dropout)
        self.down = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.drop(self.norm(self.up(x)).relu()))


class Net(nn.Module):
    """Two blocks that can be left out."""

    def __init__(self, norm: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.stem = nn.Linear(5, 8)
        self.blocks = nn.ModuleList(Block(norm, dropout) for _ in range(2))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def made(seed: int = 0, *, norm: bool = False, dropout: float = 0.0) -> Any:
    """An elastic network with fixed weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return supple.elastic(Net(norm, dropout), torch.ones(4, 5), verify=False)


def batches(count: int = RANKS * STEPS, size: int = 6) -> list[Batch]:
    """All batches there are; rank r takes number r, r + 2 and so on."""
    source = torch.Generator().manual_seed(3)
    return [
        (torch.randn(size, 5, generator=source), torch.randint(3, (size,), generator=source))
        for _ in range(count)
    ]


def joint() -> list[Batch]:
    """What the two ranks see together: their batches, one after the other."""
    each = batches()
    pairs = zip(each[::RANKS], each[1::RANKS], strict=True)
    return [(torch.cat([a[0], b[0]]), torch.cat([a[1], b[1]])) for a, b in pairs]


def loss(output: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy to the labels."""
    return nn.functional.cross_entropy(output, batch[1])


def trained(net: Any, data: list[Batch], **settings: Any) -> dict[str, Tensor]:
    """Trains by the sandwich rule with distillation and clipping, and gives the weights."""
    given = {"method": BigNAS(), "optimizer": "sgd", "clip": 0.5, "progress": False, **settings}
    given = OPTIMIZERS.get(given["optimizer"], {}) | given
    supple.train(net, data, given.pop("loss", loss), **given)
    return {name: tensor.detach().clone() for name, tensor in net.module.state_dict().items()}


@dataclass
class Left:
    """What a rank leaves behind: tensors and facts, by scenario."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]

    def of(self, scenario: str) -> dict[str, Tensor]:
        """The tensors of one scenario."""
        start = f"{scenario}/"
        return {k[len(start) :]: v for k, v in self.tensors.items() if k.startswith(start)}


class Rank:
    """One process at work.

    Args:
        folder: Where everything is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.number = dist.get_rank()
        self.own = batches()[self.number :: RANKS]
        self.left = Left({}, {})

    def keep(self, scenario: str, tensors: dict[str, Tensor]) -> None:
        """Leaves the tensors of a scenario."""
        self.left.tensors |= {f"{scenario}/{k}": v.contiguous() for k, v in tensors.items()}

    def refused(self, name: str, work: Callable[[], object]) -> None:
        """Leaves the error that a piece of work ends in, and how long it took."""
        start = time.perf_counter()
        try:
            work()
        except Exception as error:
            words = [type(error).__name__, str(error), time.perf_counter() - start]
            self.left.facts[name] = words

    def equal_training(self) -> None:
        """Weights that differ at the start are made equal; each rank has its own batches."""
        for name in OPTIMIZERS:
            net = made(seed=self.number)
            with reductions() as sizes, active(net) as configs:
                self.keep(name, trained(net, self.own, optimizer=name))
            self.left.facts[name] = {"all_reduce": sizes, "configs": configs}

    def statistics(self) -> None:
        """Batch normalization, dropout and an average: what ranks hold of their own."""
        net = made(norm=True, dropout=0.3)
        drawn: list[float] = []

        def watched(output: Tensor, batch: Batch) -> Tensor:
            drawn.append(float(output.detach().sum()))
            return loss(output, batch)

        same = [batches()[0]] * 2  # equal on both ranks: what differs is drawn
        self.keep("norms", trained(net, same, loss=watched, ema=0.5))
        self.left.facts["drawn"] = drawn
        norm = nn.BatchNorm1d(1)
        assert norm.running_mean is not None
        norm.running_mean.fill_(self.number)
        norm.register_buffer("other", torch.full((1,), float(5 + self.number)))
        processes.average_buffers(norm)
        self.keep("buffers", {k: v for k, v in norm.named_buffers() if v.dim()})

    def gradients(self) -> None:
        """Experts that only one rank used have a gradient on both, unused ones on none."""
        module = nn.ModuleList([nn.Linear(1, 1, bias=False) for _ in range(3)])
        weights = list(module.parameters())
        weights[self.number].grad = torch.full((1, 1), 4.0 + self.number)
        processes.average_gradients(weights)
        self.left.facts["gradients"] = [
            None if p.grad is None else p.grad.item() for p in weights
        ]

    def resuming(self) -> None:
        """A run that rank 1 breaks off, and that both then go on with."""
        settings = {"dropout": 0.3, "norm": True}

        def run(folder: str, stop: int | None = None) -> dict[str, Tensor]:
            calls: list[int] = []

            def stopping(output: Tensor, batch: Batch) -> Tensor:
                calls.append(1)
                if len(calls) == stop and self.number == 1:
                    raise ZeroDivisionError("stopped")
                return loss(output, batch)

            return trained(
                made(**settings),
                self.own,
                loss=stopping,
                epochs=2,
                ema=0.9,
                schedule="cosine",
                checkpoint=self.folder / folder,
                checkpoint_every=4,
            )

        self.keep("whole", run("whole"))
        self.refused("broken", lambda: run("broken", stop=10))
        self.left.facts["left"] = sorted(p.name for p in (self.folder / "broken").glob("s*"))
        processes.barrier()
        self.keep("resumed", run("broken"))

    def failing(self) -> None:
        """What goes wrong on one rank only."""

        def broken(output: Tensor, batch: Batch) -> Tensor:
            if self.number == 1:
                raise ZeroDivisionError("rank 1 divides")
            return loss(output, batch)

        def reading() -> Iterator[Batch]:
            yield self.own[0]
            if self.number == 1:
                raise OSError("the disk of rank 1")
            yield self.own[1]

        class Data:
            def __iter__(self) -> Iterator[Batch]:
                return reading()

        def judged(net: Any) -> dict[str, float]:
            return {"one": 1 / (1 - self.number)}

        few = self.own[: 3 - self.number]
        one = self.number == 1
        seeds = {"seed": self.number}
        self.refused("loss", lambda: trained(made(), self.own, loss=broken))
        self.refused("data", lambda: trained(made(), Data(), steps=4))  # type: ignore[arg-type]
        self.refused("validate", lambda: trained(made(), self.own, validate=judged))
        self.refused("uneven", lambda: trained(made(), few, steps=6))
        self.refused("seeds", lambda: trained(made(), self.own, **seeds))
        self.refused("networks", lambda: trained(made(norm=one), self.own))
        self.refused("settings", lambda: trained(made(), self.own, clip=-1.0 if one else 1.0))

    def sharded(self) -> None:
        """The same training with parameters sharded by FSDP2, and what it refuses."""
        for name in OPTIMIZERS:
            net = made()
            for block in net.module.blocks:
                fully_shard(block)
            fully_shard(net.module)

            def judged(net: Any) -> dict[str, float]:
                with torch.no_grad(), net.at(net.space.smallest()):
                    return {"mean": net(torch.ones(2, 5)).mean()}

            trained(net, self.own, optimizer=name, validate=judged, ema=0.5)
            net.module.reshard()
            whole = {n: p.full_tensor() for n, p in net.module.named_parameters()}  # type: ignore[attr-defined]
            self.keep(f"sharded-{name}", whole)
        shares = [p.to_local().numel() for p in net.module.parameters()]
        self.left.facts["shares"] = [
            sum(shares),
            sum(p.numel() for p in net.module.parameters()),
        ]
        self.pending(net)
        self.refused("extract", lambda: net.extract(net.space.smallest()))
        self.refused("save", lambda: net.save(self.folder / "sharded"))
        self.refused("sort", net.sort)
        self.refused("elastic", lambda: supple.elastic(net.module, torch.ones(2, 5)))
        self.refused(
            "checkpoint", lambda: trained(net, self.own, checkpoint=self.folder / "no")
        )

    def pending(self, net: Any) -> None:
        """Two sizes run before either's backward, with the joint batch on both ranks."""
        net.module.zero_grad()
        x, _ = batches()[0]
        total = torch.zeros(())
        for config in (net.space.smallest(), net.space.largest()):
            with net.at(config):
                total = total + net(x).square().mean()
        total.backward()  # type: ignore[no-untyped-call]
        self.keep(
            "pending", {n: p.grad.full_tensor() for n, p in net.module.named_parameters()}
        )
        net.module.zero_grad()


@contextlib.contextmanager
def reductions() -> Iterator[list[int]]:
    """Counts the elements of every all-reduce."""
    sizes: list[int] = []
    reduce = dist.all_reduce

    def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(tensor.numel())
        return reduce(tensor, *args, **kwargs)

    dist.all_reduce = counted
    try:
        yield sizes
    finally:
        dist.all_reduce = reduce


@contextlib.contextmanager
def active(net: Any) -> Iterator[list[str]]:
    """Records every size that becomes active."""
    configs: list[str] = []
    at = net.at

    def recorded(config: Any) -> Any:
        configs.append(config.to_json())
        return at(config)

    net.at = recorded
    try:
        yield configs
    finally:
        del net.at


def work(rank: int, port: int, folder: str, paths: list[str]) -> None:
    """What each process does."""
    sys.path[:] = paths
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    one = Rank(Path(folder))
    for scenario in (
        one.equal_training,
        one.statistics,
        one.gradients,
        one.resuming,
        one.failing,
        one.sharded,
    ):
        scenario()
    save_file(one.left.tensors, f"{folder}/{rank}.safetensors")
    Path(f"{folder}/{rank}.json").write_text(json.dumps(one.left.facts), encoding="utf-8")
    dist.destroy_process_group()


def left_by(folder: Path, rank: int) -> Left:
    """Reads what a rank left behind."""
    facts = json.loads((folder / f"{rank}.json").read_text(encoding="utf-8"))
    return Left(load_file(folder / f"{rank}.safetensors"), facts)


def free_port() -> int:
    """Finds a port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


# ---------------------------------------------------------------- two processes that get killed


def child(folder: str, seconds: float) -> None:
    """A long run of one rank, started by `pair`; saves its weights when it gets to the end."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")

    def slow(output: Tensor, batch: Batch) -> Tensor:
        time.sleep(seconds)
        return loss(output, batch)

    own = batches()[dist.get_rank() :: RANKS]
    try:
        weights = trained(
            made(norm=True, dropout=0.3),
            own,
            loss=slow,
            epochs=3,
            checkpoint=f"{folder}/run",
            checkpoint_every=4,
        )
    except SuppleError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    save_file(weights, f"{folder}/{dist.get_rank()}.safetensors")
    dist.destroy_process_group()


@contextlib.contextmanager
def pair(folder: Path, seconds: float = 0.0) -> Iterator[list[subprocess.Popen[str]]]:
    """Starts two ranks of `child`; whoever is left at the end is killed."""
    root = Path(__file__).parents[2]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    code = f"from tests.contracts.ranks import child; child({str(folder)!r}, {seconds})"
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={**os.environ, **place, "RANK": str(rank), "OMP_NUM_THREADS": "1"},
            cwd=root,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(RANKS)
    ]
    try:
        yield ranks
    finally:
        for one in ranks:
            if one.poll() is None:
                one.kill()
            one.wait()
            if one.stderr is not None:
                one.stderr.close()
