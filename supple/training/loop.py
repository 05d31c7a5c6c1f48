"""The training loop: data in, steps, validation, checkpoints, history out."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from supple.errors import SettingError, nearest
from supple.technique import Rule, settings
from supple.training import checkpoint as checkpoints
from supple.training import processes
from supple.training.batches import Forward, Loss, batches_of, moved
from supple.training.history import Display, History
from supple.training.losses import Labels
from supple.training.schedule import Schedule, schedule_of
from supple.training.seeds import derive, generator, kept, random_state, set_random_state
from supple.training.step import Network, SizesRun, StepOptions, WholeOnly, module_of

__all__ = ["Run", "make_optimizer", "train"]

OptimizerName = Literal["adamw", "adam", "sgd", "rmsprop"]
MakeOptimizer = Callable[[list[nn.Parameter]], Optimizer]
_OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "adamw": AdamW,
    "adam": Adam,
    "sgd": lambda groups, **k: SGD(groups, momentum=0.9, nesterov=True, **k),
    "rmsprop": lambda groups, **k: RMSprop(groups, momentum=0.9, **k),
}
_DEFAULT_LR = 1e-3
_DEFAULT_DECAY = 0.01


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


def train(
    net: Network | nn.Module,
    data: Any,
    loss: Loss,
    *,
    method: Rule | None = None,
    epochs: int = 1,
    steps: int | None = None,
    optimizer: OptimizerName | MakeOptimizer = "adamw",
    lr: float | None = None,
    weight_decay: float | None = None,
    schedule: str | Schedule | None = None,
    warmup: int | float = 0,
    clip: float | None = None,
    ema: float | None = None,
    precision: Literal["fp32", "bf16"] = "fp32",
    forward: Forward | None = None,
    validate: Callable[[Any], Mapping[str, Any]] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int | None = None,
    log_every: int = 1,
    log_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
    seed: int = 0,
    freeze_inactive: bool = False,
) -> History:
    """Trains an elastic network at many sizes, or any module alone.

    The weights change in place. Global random numbers, and which modules are in training mode,
    are left as they were. With `checkpoint`, a run that was killed goes on from its last
    checkpoint and ends with bitwise the same weights as one that was not.

    In several processes (`torch.distributed` initialised, no wrapper) each rank trains on its
    share of the data: sets with `epoch(n)` and loaders without a `DistributedSampler` are
    shared out batch by batch, and anything else is taken as the rank's own share. All ranks
    must have equally many batches.

    Args:
        net: What `supple.elastic` gives, or a plain module.
        data: Batches, to be read once per epoch: a set of `supple.data`, a `DataLoader`, or
            any iterable of tuples or mappings. Its order, and what augmentations draw from the
            global generators, depend on `seed` and the epoch alone.
        loss: `loss(output, batch) -> scalar`, averaged over the batch.
        method: How sizes are trained, such as `BigNAS()`; None trains the full network alone.
        epochs: Passes through the data, at least 1; ignored where `steps` is given.
        steps: Number of optimizer steps, at least 1.
        optimizer: A name, whose weight decay leaves out biases and norm gains (tensors with
            fewer than two dimensions), or a function from parameters to an optimizer.
        lr: Peak learning rate, above 0, 1e-3 by default; only for a named optimizer.
        weight_decay: At least 0, 0.01 by default; only for a named optimizer.
        schedule: `"constant"`, `"cosine"`, `"exponential"`, or a function `(step, steps) ->
            factor of lr`; None takes what the method suggests, else constant.
        warmup: Steps (an int) or share of the steps (a float) in which the rate grows to `lr`.
        clip: Largest norm of the whole gradient; None for any.
        ema: Decay of a running average of the weights; validation sees the average, and the
            network holds it in the end.
        precision: `"bf16"` computes under autocast to bfloat16.
        forward: `forward(model, batch) -> output`; by default a mapping gives keywords, and a
            tuple or list its first item.
        validate: Called as `validate(net)` after each epoch and at the end; its numbers enter
            the history.
        checkpoint: Folder for checkpoints; a run resumes from what lies there.
        checkpoint_every: Steps between checkpoints; None for one per epoch.
        log_every: Steps between rows of the history.
        log_dir: Folder for TensorBoard's files.
        progress: Whether to show a progress bar.
        seed: Of everything random, an integer of at least 0.
        freeze_inactive: Whether weights that no size of a step used stay bitwise as they are,
            with their moments.

    Returns:
        What happened, step by step.

    Raises:
        SettingError: A setting can't be used, or the data can't be read again.
        CheckpointError: A checkpoint is damaged, was written by another kind of run (the
            message names the setting that differs), or can't be written.
        MissingExtraError: `log_dir` is given and TensorBoard is not installed.
        SuppleError: A loss is not finite.

    Example:
        >>> import torch
        >>> data = [(torch.ones(2, 3), torch.ones(2, 1))]
        >>> net = torch.nn.Linear(3, 1)
        >>> loss = lambda output, batch: (output - batch[1]).square().mean()
        >>> history = train(net, data, loss, epochs=50, lr=0.1, progress=False)
        >>> history.losses("largest")[1][-1] < 0.1
        True
    """
    _check_counts(epochs=epochs, steps=steps, log_every=log_every, every=checkpoint_every)
    module = module_of(net)
    with kept(derive(seed, "network", processes.rank())), _training(module):
        processes.broadcast(module)
        length = _length(data, steps)
        total = epochs * length if steps is None else steps
        if schedule is None:
            schedule = getattr(method, "schedule", lambda: None)()
        options = StepOptions(
            clip=clip,
            precision=precision,
            freeze_inactive=freeze_inactive,
            ema=ema,
            schedule=schedule_of(schedule, warmup),
            steps=total,
        )
        made = make_optimizer(module, optimizer, lr=lr, weight_decay=weight_decay)
        if isinstance(method, Rule) and not _resumes(checkpoint):
            getattr(method, "prepare", lambda net: None)(net)
        run = _start(net, made, method, loss, forward, generator(seed, "sizes"), options)
        session = _Session(
            net=net,
            run=run,
            optimizer=made,
            data=data,
            total=total,
            seed=seed,
            history=History(),
            validate=validate,
            folder=checkpoint,
            every=checkpoint_every,
            log_every=log_every,
            settings={
                "world_size": processes.world_size(),
                "threads": torch.get_num_threads(),
                "device": next(module.parameters()).device.type,
                "optimizer": optimizer if isinstance(optimizer, str) else _named(made),
                "lr": lr,
                "weight_decay": weight_decay,
                "method": None if method is None else [method.key, settings(method)],
                "schedule": schedule if isinstance(schedule, str) else _named(schedule),
                "warmup": warmup,
                "steps": total,
                "seed": seed,
                "precision": precision,
                "clip": clip,
                "ema": ema,
                "freeze_inactive": freeze_inactive,
            },
        )
        session.resume()
        with Display(
            progress=progress and processes.rank() == 0,
            log_dir=log_dir if processes.rank() == 0 else None,
            steps=total,
            start=session.done,
        ) as display:
            session.go(display)
        session.finish()
    return session.history


def make_optimizer(
    module: nn.Module,
    optimizer: str | MakeOptimizer = "adamw",
    *,
    lr: float | None = None,
    weight_decay: float | None = None,
) -> Optimizer:
    """Makes an optimizer over a module's parameters that require a gradient.

    Args:
        module: The network.
        optimizer: `"adamw"`, `"adam"`, `"sgd"` (Nesterov, momentum 0.9), `"rmsprop"` (momentum
            0.9), or a function from a list of parameters to an optimizer.
        lr: Learning rate, above 0; only for a name.
        weight_decay: At least 0; only for a name. Tensors with fewer than two dimensions
            (biases, norm gains) are left out.

    Returns:
        The optimizer.

    Raises:
        SettingError: The name is unknown, a value is out of range, or `lr` or `weight_decay`
            are given beside a function, which decides them itself.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    if not parameters:
        raise SettingError("the network has no parameter that requires a gradient")
    if not isinstance(optimizer, str):
        if lr is not None or weight_decay is not None:
            raise SettingError(
                "lr and weight_decay belong to the function given as optimizer=; leave them out"
            )
        return optimizer(parameters)
    if optimizer not in _OPTIMIZERS:
        raise SettingError(
            f"there is no optimizer '{optimizer}'{nearest(optimizer, _OPTIMIZERS)} "
            f"(optimizers: {', '.join(_OPTIMIZERS)}, or a function from parameters to one)"
        )
    lr = _DEFAULT_LR if lr is None else lr
    decay = _DEFAULT_DECAY if weight_decay is None else weight_decay
    if not lr > 0 or not decay >= 0:
        raise SettingError(
            f"lr must be above 0 and weight_decay at least 0, got {lr} and {decay}"
        )
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return _OPTIMIZERS[optimizer]([group for group in groups if group["params"]], lr=lr)


@dataclass
class _Session:
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

    def resume(self) -> None:
        """Goes on from the last checkpoint, if there is one."""
        path = None if self.folder is None else checkpoints.latest(self.folder)
        if path is None:
            return
        shared, own = checkpoints.load(path, module=module_of(self.net), settings=self.settings)
        self.optimizer.load_state_dict(shared["optimizer"])
        self.run.load_state_dict(shared["run"])
        self.history = History.from_json(shared["history"])
        self.done, self.epoch = shared["done"], shared["epoch"]
        self.position, self.seconds = shared["position"], shared["seconds"]
        set_random_state(own["random"])

    def go(self, display: Display) -> None:
        """Runs all epochs that are left."""
        saved = self.done if self.done else None
        began, before = time.perf_counter(), self.seconds
        while self.done < self.total:
            for batch in self._batches():
                losses = self.run.step(batch)
                self.done += 1
                self.position += 1
                self.seconds = before + time.perf_counter() - began
                self._log(losses, display)
                if self.done == self.total:
                    break
                if self.every is not None and self.done % self.every == 0:
                    saved = self._save()
            # A run may end in the middle of an epoch, which is validated all the same.
            self._validate(display)
            self.epoch, self.position = self.epoch + 1, 0
            if self.every is None or self.done == self.total:
                saved = self._save()
        if saved != self.done:
            self._save()

    def finish(self) -> None:
        """Leaves the network with what was trained."""
        processes.average_buffers(module_of(self.net))
        average = getattr(self.run, "average", None)
        if average is not None:
            average.copy_to_module()
        if not isinstance(self.net, nn.Module):
            self.net.drop_statistics()

    def _batches(self) -> Iterator[Any]:
        device = next(module_of(self.net).parameters()).device
        each = processes.world_size() if _shared_out(self.data) else 1
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

    def _validate(self, display: Display) -> None:
        if self.validate is None:
            return
        processes.average_buffers(module_of(self.net))
        average = getattr(self.run, "average", None)
        averaged = contextlib.nullcontext() if average is None else average.applied()
        with kept(), _modes_kept(module_of(self.net)), averaged:
            metrics = {name: _plain(one) for name, one in self.validate(self.net).items()}
        row = {"step": self.done, "epoch": self.epoch, "metrics": metrics}
        self.history.validation.append(row)
        display.metrics(row)
        if not isinstance(self.net, nn.Module):
            self.net.drop_statistics()

    def _save(self) -> int:
        if self.folder is None:
            return self.done
        processes.average_buffers(module_of(self.net))
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
        return self.done


def _start(
    net: Network | nn.Module,
    optimizer: Optimizer,
    method: Rule | None,
    loss: Loss,
    forward: Forward | None,
    source: torch.Generator,
    options: StepOptions,
) -> Run:
    if method is None:
        whole = WholeOnly(None if isinstance(net, nn.Module) else net.space.largest())
        return SizesRun(net, optimizer, whole, Labels(loss), forward=forward, options=options)
    if not isinstance(method, Rule):
        raise SettingError(
            f"method must be a training rule such as supple.supernet.bignas.BigNAS(), got "
            f"{method!r}"
        )
    run = method.start(
        net, optimizer, loss=loss, forward=forward, generator=source, options=options
    )
    return cast(Run, run)


def _share(batches: Iterable[Any], each: int) -> Iterator[Any]:
    """Gives this rank's one of each so many batches; what is left over is left out by all."""
    own = processes.rank() if each > 1 else 0
    group: list[Any] = []
    for batch in batches:
        group.append(batch)
        if len(group) == each:
            yield group[own]
            group = []


def _shared_out(data: Any) -> bool:
    if isinstance(data, DataLoader):
        return not isinstance(data.sampler, DistributedSampler)
    return callable(getattr(data, "epoch", None))


def _length(data: Any, steps: int | None) -> int:
    """Gives the number of steps of an epoch, which only matters where `steps` is not given."""
    if steps is not None:
        return 0
    if isinstance(data, Sized):
        with contextlib.suppress(TypeError):  # a loader over a stream has no length
            length = len(data)
            if _shared_out(data):
                length //= processes.world_size()
            if length:
                return length
            raise SettingError(f"data of type {type(data).__name__} has no batches")
    raise SettingError(
        f"data of type {type(data).__name__} has no length, so epochs can't be counted; pass "
        "steps="
    )


@contextlib.contextmanager
def _training(module: nn.Module) -> Iterator[None]:
    with _modes_kept(module):
        module.train()
        yield


@contextlib.contextmanager
def _modes_kept(module: nn.Module) -> Iterator[None]:
    modes = [(part, part.training) for part in module.modules()]
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def _resumes(folder: str | os.PathLike[str] | None) -> bool:
    return folder is not None and checkpoints.latest(folder) is not None


def _plain(value: Any) -> Any:
    """Makes a number of a metric that a tensor or NumPy holds."""
    return value.item() if callable(getattr(value, "item", None)) else value


def _named(value: Any) -> str | None:
    if value is None:
        return None
    # A function's repr holds its address, which changes; a schedule's repr its settings.
    return getattr(value, "__qualname__", None) or (
        type(value).__name__ if isinstance(value, Optimizer) else repr(value)
    )


def _check_counts(**counts: int | None) -> None:
    for name, count in counts.items():
        if count is not None and count < 1:
            shown = "checkpoint_every" if name == "every" else name
            raise SettingError(f"{shown} must be at least 1, got {count}")
