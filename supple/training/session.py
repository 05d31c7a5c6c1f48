"""A training run in progress: its epochs, records, checkpoints."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from supple.errors import SettingError
from supple.sharded import refuse_sharded, reshard
from supple.training import checkpoint as checkpoints
from supple.training import processes
from supple.training.batches import batches_of, moved
from supple.training.history import Display, History
from supple.training.seeds import kept, random_state, set_random_state
from supple.training.step import Network, module_of

__all__ = ["Run", "Session", "modes_kept", "shared_out"]


class Run(Protocol):
    """What the loop needs of training in progress."""

    passes: int

    @property
    def lr(self) -> float:
        """The learning rate of the last step."""

    def step(self, batch: Any) -> Mapping[str, float]:
        """Trains on one batch and gives the losses by role."""

    def state_dict(self) -> dict[str, Any]:
        """Gives everything needed to go on later."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what `state_dict` gave."""


@dataclass
class Session:
    """One call of `train`: where it is, and what belongs to it."""

    net: Network | nn.Module
    run: Run
    optimizer: Optimizer
    data: Any
    total: int
    seed: int
    history: History
    validate: Callable[[Any], Mapping[str, Any]] | None
    folder: str | os.PathLike[str] | None
    every: int | None
    log_every: int
    settings: dict[str, Any]
    done: int = 0
    epoch: int = 0
    position: int = 0  # batches of the epoch that are done
    seconds: float = 0.0
    _saved: int = 0
    _began: float = 0.0

    def resume(self) -> None:
        """Goes on from the last checkpoint, if there is one."""
        path = None if self.folder is None else checkpoints.latest(self.folder)
        if path is None:
            processes.agree("the first step")
            return
        processes.agree(f"going on from {path.name}")
        shared, own = checkpoints.load(path, module=module_of(self.net), settings=self.settings)
        self.optimizer.load_state_dict(shared["optimizer"])
        self.run.load_state_dict(shared["run"])
        self.history = History.from_json(shared["history"])
        self.done, self.epoch = shared["done"], shared["epoch"]
        self.position, self.seconds = shared["position"], shared["seconds"]
        set_random_state(own["random"])

    def go(self, display: Display) -> None:
        """Runs all epochs that are left."""
        self._saved = self.done
        self._began = time.perf_counter() - self.seconds
        while self.done < self.total:
            self._rest_of_epoch(display)
            processes.agree(f"the end of epoch {self.epoch}")
            # A run may end in the middle of an epoch, which is validated all the same.
            self._validate(display)
            self.epoch, self.position = self.epoch + 1, 0
            if self.every is None:
                self._save()
        if self._saved != self.done:
            self._save()

    def finish(self) -> None:
        """Leaves the network with what was trained, the same on all ranks."""
        self._equalise()
        average = getattr(self.run, "average", None)
        if average is not None:
            average.copy_to_module()
        if not isinstance(self.net, nn.Module):
            self.net.drop_statistics()
        processes.agree("the end of training")

    def _rest_of_epoch(self, display: Display) -> None:
        for batch in self._batches():
            losses = self.run.step(batch)
            watched = getattr(self.run, "watched", None)
            if watched is not None:
                self.history.watched.append(watched)
            self.done += 1
            self.position += 1
            self.seconds = time.perf_counter() - self._began
            self._log(losses, display)
            if self.done == self.total:
                return
            if self.every is not None and self.done % self.every == 0:
                self._save()

    def _batches(self) -> Iterator[Any]:
        device = next(module_of(self.net).parameters()).device
        each = processes.world_size() if shared_out(self.data) else 1
        batches = batches_of(
            self.data, seed=self.seed, epoch=self.epoch, start=self.position * each
        )
        for batch in _share(batches, each):
            yield moved(batch, device)
        if not self.position:  # nothing of this epoch was done, here or before a resume
            raise SettingError(
                f"data gave no batch in epoch {self.epoch}; it must be an iterable that can be "
                "read again in each epoch (a list, a DataLoader, a set of supple.data), not a "
                "generator, and not empty"
            )

    def _log(self, losses: Mapping[str, float], display: Display) -> None:
        display.step(self.done, losses)
        if self.done % self.log_every and self.done != self.total:
            return
        row = {
            "step": self.done - 1,
            "epoch": self.epoch,
            "lr": self.run.lr,
            "losses": dict(losses),
            "passes": self.run.passes,
            "seconds": round(self.seconds, 3),
        }
        self.history.rows.append(row)
        display.row(row)

    def _equalise(self) -> None:
        """Makes buffers the same on all ranks, also those that are averaged over time."""
        module = module_of(self.net)
        processes.average_buffers(module)
        average = getattr(self.run, "average", None)
        if average is not None and processes.world_size() > 1:
            with average.applied():
                processes.average_buffers(module)

    def _validate(self, display: Display) -> None:
        if self.validate is None:
            return
        self._equalise()
        average = getattr(self.run, "average", None)
        averaged = contextlib.nullcontext() if average is None else average.applied()
        with kept(), modes_kept(module_of(self.net)), averaged:
            metrics = {name: _plain(one) for name, one in self.validate(self.net).items()}
            reshard(module_of(self.net))
        row = {"step": self.done, "epoch": self.epoch, "metrics": metrics}
        self.history.validation.append(row)
        display.metrics(row)
        if not isinstance(self.net, nn.Module):
            self.net.drop_statistics()

    def _save(self) -> None:
        if self.folder is None:
            return
        refuse_sharded(module_of(self.net), "checkpoint=")
        self._equalise()
        checkpoints.save(
            self.folder,
            self.done,
            module=module_of(self.net),
            shared={
                "optimizer": self.optimizer.state_dict(),
                "run": self.run.state_dict(),
                "history": self.history.to_json(),
                "done": self.done,
                "epoch": self.epoch,
                "position": self.position,
                "seconds": self.seconds,
            },
            own={"random": random_state()},
            settings=self.settings,
        )
        self._saved = self.done


def _share(batches: Iterable[Any], each: int) -> Iterator[Any]:
    """Gives this rank's one of each so many batches; what is left over is left out by all."""
    own = processes.rank() if each > 1 else 0
    group: list[Any] = []
    for batch in batches:
        group.append(batch)
        if len(group) == each:
            yield group[own]
            group = []


def shared_out(data: Any) -> bool:
    """Tells whether all ranks read the same batches, which are then shared out among them.

    Args:
        data: What `train` was given.
    """
    if isinstance(data, DataLoader):
        return not isinstance(data.sampler, DistributedSampler)
    return callable(getattr(data, "epoch", None))


@contextlib.contextmanager
def modes_kept(module: nn.Module) -> Iterator[None]:
    """Leaves every part of a module in the mode it is in now, training or evaluation.

    Args:
        module: Any network.

    Yields:
        Nothing.
    """
    modes = [(part, part.training) for part in module.modules()]
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def _plain(value: Any) -> Any:
    """Makes a number of a metric that a tensor or NumPy holds."""
    return value.item() if callable(getattr(value, "item", None)) else value
