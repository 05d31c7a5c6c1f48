"""`train`: from a network, data and a loss to a run of steps over many sizes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sized
from typing import Any, Literal, cast

import torch
from rich.console import Console
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from supple.errors import SettingError, nearest
from supple.sharded import reshard
from supple.technique import Rule, settings
from supple.training import checkpoint as checkpoints
from supple.training import processes
from supple.training.batches import Forward, Loss
from supple.training.choose import choose
from supple.training.history import Display, History
from supple.training.losses import Labels
from supple.training.schedule import Schedule, schedule_of
from supple.training.seeds import derive, generator, kept
from supple.training.session import Run, Session, modes_kept, shared_out
from supple.training.step import Network, SizesRun, StepOptions, WholeOnly, module_of

__all__ = ["make_optimizer", "train"]

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


def train(
    net: Network | nn.Module,
    data: Any,
    loss: Loss,
    *,
    method: Rule | Literal["auto"] | None = None,
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
    watch: int = 0,
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
        method: How sizes are trained, such as `BigNAS()`; None trains the full network alone,
            and `"auto"` picks a method, and says which and why.
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
        watch: Every so many steps, the loss and the gradient of each size enter the history,
            to see which sizes are under-trained or in conflict; 0 for never. A watched step
            keeps a copy of the gradient for each of its passes.

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
    with processes.failing_together(), _in_training(module, seed):
        total = epochs * _length(data) if steps is None else steps
        if method == "auto":
            method = _picked(net, data, loss, total, forward)
        schedule = _suggested(method) if schedule is None else schedule
        options = StepOptions(
            clip=clip,
            precision=precision,
            freeze_inactive=freeze_inactive,
            ema=ema,
            schedule=schedule_of(schedule, warmup),
            steps=total,
            watch=watch,
        )
        made = make_optimizer(module, optimizer, lr=lr, weight_decay=weight_decay)
        if isinstance(method, Rule) and not _resumes(checkpoint):
            getattr(method, "prepare", lambda net: None)(net)
        run = _start(net, made, method, loss, forward, generator(seed, "sizes"), options)
        session = Session(
            net=net,
            run=run,
            optimizer=made,
            data=run.sampler.data(data) if isinstance(run, SizesRun) else data,
            total=total,
            seed=seed,
            history=History(),
            validate=validate,
            folder=checkpoint,
            every=checkpoint_every,
            log_every=log_every,
            settings=_surroundings(module)
            | _settings_of(options, method)
            | {
                "optimizer": optimizer if isinstance(optimizer, str) else _named(made),
                "lr": lr,
                "weight_decay": weight_decay,
                "schedule": schedule if isinstance(schedule, str) else _named(schedule),
                "warmup": warmup,
                "seed": seed,
            },
        )
        _run(session, progress=progress, log_dir=log_dir)
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


def _picked(
    net: Network | nn.Module, data: Any, loss: Loss, steps: int, forward: Forward | None
) -> Rule:
    if isinstance(net, nn.Module):
        raise SettingError(
            f"method='auto' picks how sizes are trained, and a plain {type(net).__name__} has "
            "none; make it elastic first, or leave method out"
        )
    choice = choose(net, data, loss, steps, forward)
    if processes.rank() == 0:
        Console().print(str(choice), highlight=False)
    return choice.method


def _suggested(method: Rule | None) -> str | Schedule | None:
    """Gives the schedule that a method suggests, if it does."""
    suggests = getattr(method, "schedule", None)
    return None if suggests is None else cast(Schedule, suggests())


def _surroundings(module: nn.Module) -> dict[str, Any]:
    """Gives what a run must have in common, beside its settings, to resume bitwise."""
    return {
        "world_size": processes.world_size(),
        "threads": torch.get_num_threads(),
        "device": next(module.parameters()).device.type,
    }


def _settings_of(options: StepOptions, method: Rule | None) -> dict[str, Any]:
    names = ("steps", "precision", "clip", "ema", "freeze_inactive")
    own = {name: getattr(options, name) for name in names}
    return {"method": None if method is None else [method.key, settings(method)], **own}


def _run(session: Session, *, progress: bool, log_dir: str | os.PathLike[str] | None) -> None:
    """Goes through a session; only rank 0 shows and logs it."""
    session.resume()
    first = processes.rank() == 0
    with Display(
        progress=progress and first,
        log_dir=log_dir if first else None,
        steps=session.total,
        start=session.done,
    ) as display:
        session.go(display)
    session.finish()


def _length(data: Any) -> int:
    """Gives the number of steps of an epoch."""
    if isinstance(data, Sized):
        with contextlib.suppress(TypeError):  # a loader over a stream has no length
            length = len(data)
            if shared_out(data):
                length //= processes.world_size()
            if length:
                return length
            raise SettingError(f"data of type {type(data).__name__} has no batches")
    raise SettingError(
        f"data of type {type(data).__name__} has no length, so epochs can't be counted; pass "
        "steps="
    )


@contextlib.contextmanager
def _in_training(module: nn.Module, seed: int) -> Iterator[None]:
    """Trains inside, from rank 0's weights; modes and global randomness are put back."""
    with kept(derive(seed, "network", processes.rank())), modes_kept(module):
        module.train()
        reshard(module)
        processes.broadcast(module)
        yield


def _resumes(folder: str | os.PathLike[str] | None) -> bool:
    return folder is not None and checkpoints.latest(folder) is not None


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
