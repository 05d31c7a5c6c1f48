"""One step of training at several sizes: the only place that runs backward and the optimizer.

A step is a combination of a few values, and a supernet method is a choice of them:

- a `Sampler` says which sizes run, in which order and role, on which part of the batch, how
  much each gradient counts and whether regularisation is on: a list of `Pass`;
- a `Criterion` (`supple.training.losses`) says what each role minimises;
- an aggregation says how gradients meet on the shared weights: `sum`, `mean` over the passes,
  or `masked_mean` over the passes that used the element;
- `StepOptions` hold what has nothing to do with sizes.
"""

from __future__ import annotations

import contextlib
import copy
import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from supple.errors import SettingError, SuppleError, nearest
from supple.space import Config, Space
from supple.training import processes
from supple.training.batches import Forward, mapped, run_model, split
from supple.training.ema import Average
from supple.training.losses import Criterion
from supple.training.norms import without_dropout
from supple.training.schedule import Schedule
from supple.training.touched import Touched, frozen
from supple.training.watch import Watch

__all__ = [
    "Aggregation",
    "Network",
    "Pass",
    "Sampler",
    "Seen",
    "SizesRun",
    "StepOptions",
    "WholeOnly",
    "module_of",
]

Aggregation = Literal["sum", "mean", "masked_mean"]
Precision = Literal["fp32", "bf16"]


class Network(Protocol):
    """What training needs of an elastic network."""

    @property
    def module(self) -> nn.Module:
        """The user's own module."""

    @property
    def space(self) -> Space:
        """The sizes it has."""

    def at(self, config: Config) -> AbstractContextManager[Any]:
        """Makes a size active inside a `with`."""

    def drop_statistics(self) -> None:
        """Forgets recalibrated running statistics, which change with the weights."""


def module_of(net: Network | nn.Module) -> nn.Module:
    """Gives the module of an elastic network, or the module itself."""
    return net if isinstance(net, nn.Module) else net.module


@dataclass(frozen=True)
class Pass:
    """One forward and backward of a step.

    Args:
        config: The size; None runs the module as it is.
        role: What the pass is there for, such as `"largest"` or `"random"`; losses are reported
            by role.
        weight: What its gradient is multiplied by: a learning rate of its own.
        regularise: Whether dropout is on. Weight decay is on in steps with such a pass.
        part: Which part of the batch it sees.
        parts: Into how many parts the batch is shared out.
    """

    config: Config | None
    role: str
    weight: float = 1.0
    regularise: bool = True
    part: int = 0
    parts: int = 1


@dataclass(frozen=True)
class Seen:
    """What a sampler is told of a pass.

    Args:
        entry: The pass.
        loss: Its detached loss, before `weight`.
        output: What the network gave.
        batch: What the pass saw of the batch.
        net: The network that trains.
    """

    entry: Pass
    loss: Tensor
    output: Any
    batch: Any
    net: Network | nn.Module


class Sampler(ABC):
    """Proposes the passes of each step, and may learn from how they went.

    Randomness comes from the generator that the sampler is made with, so that all ranks sample
    the same sizes. That generator's state is kept by the run, not here.
    """

    def begin(self, run: SizesRun) -> None:  # noqa: B027 - most samplers have one phase
        """Is called before each step: a new phase may change the network or the run here.

        Args:
            run: The run, which says where it is (`steps`, `options.steps`); `restart` and
                `keep_teacher` are for this.
        """

    def resumed(self, run: SizesRun) -> None:  # noqa: B027 - most have nothing in the network
        """Is called after `load_state_dict`: puts into the network what belongs there.

        Args:
            run: The run that goes on.
        """

    def rate(self, step: int, steps: int | None) -> float | None:
        """Gives the learning rate of a step relative to the run's, on top of its schedule.

        Args:
            step: Counted from 0.
            steps: How many there will be, None where that is open.

        Returns:
            The factor; None leaves the rate to the schedule, or to whoever else sets it.
        """
        return None

    @abstractmethod
    def sample(self, step: int, steps: int | None) -> Sequence[Pass]:
        """Gives the passes of a step, in the order in which they run.

        Args:
            step: Counted from 0.
            steps: How many there will be, None where that is open.
        """

    def data(self, data: Any) -> Any:
        """Gives the data that training reads: the user's, or the same in an order of its own.

        `supple.train` calls it once, before the first step.

        Args:
            data: What the user gave.
        """
        return data

    def observe(self, seen: Seen) -> None:  # noqa: B027 - most samplers don't look
        """Is told of each pass after its backward; gradients so far are in `.grad`.

        Args:
            seen: What the pass was and how it went.
        """

    def state_dict(self) -> dict[str, Any]:
        """Gives what was learned from `observe`."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Goes on from what `state_dict` gave."""


@dataclass(frozen=True)
class WholeOnly(Sampler):
    """Trains one size alone: ordinary training.

    Args:
        config: The size; None for the module as it is.
        role: Under which name its loss is reported.
    """

    config: Config | None = None
    role: str = "largest"

    def sample(self, step: int, steps: int | None) -> Sequence[Pass]:
        """Gives the one pass."""
        return (Pass(self.config, self.role),)


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """What a step does beside running the sizes.

    Args:
        clip: Largest norm of the gradient of all owners together, above 0; None for any.
        precision: `"bf16"` runs forward passes and losses under autocast to bfloat16.
        freeze_inactive: Whether elements that no pass of a step used stay as they are, moments
            included. By default their gradient is zero, and momentum and decay move them.
        ema: Decay of the running average of the weights, in [0, 1); None for no average.
        schedule: Factor of the learning rate by `(step, steps)`; None keeps it constant.
        steps: How many steps there will be; None where that is open, and then there is no
            schedule.
        watch: Every so many steps, `SizesRun.watched` says what each size was like (loss,
            gradient, agreement with the others); 0 for never.
    """

    clip: float | None = None
    precision: Precision = "fp32"
    freeze_inactive: bool = False
    ema: float | None = None
    schedule: Schedule | None = None
    steps: int | None = None
    watch: int = 0

    def __post_init__(self) -> None:
        if self.watch < 0:
            raise SettingError(f"watch must be at least 0, got {self.watch}")
        if self.clip is not None and not self.clip > 0:
            raise SettingError(f"clip must be above 0, got {self.clip}")
        _check_option("precision", self.precision, get_args(Precision))
        if self.schedule is not None and not self.steps:
            raise SettingError("a schedule needs to know the number of steps; pass steps=")


class SizesRun:
    """Training in progress: what a supernet method's `start` returns.

    Args:
        net: An elastic network, or a plain module for passes without a config.
        optimizer: Over the module's parameters.
        sampler: Which passes each step has.
        criterion: What each role minimises.
        forward: `forward(model, batch) -> output`; by default by the batch's type.
        aggregate: How gradients of several passes meet.
        generator: The one that the sampler draws from; its state is saved with the run.
        teachers: Frozen networks by role; each runs once per part of a batch, in eval mode and
            without gradients, and criteria find its output under that role.
        options: Everything else.

    Raises:
        SettingError: A value can't be used, or the optimizer holds none of the parameters.
    """

    def __init__(
        self,
        net: Network | nn.Module,
        optimizer: Optimizer,
        sampler: Sampler,
        criterion: Criterion,
        *,
        forward: Forward | None = None,
        aggregate: Aggregation = "sum",
        generator: torch.Generator | None = None,
        teachers: Mapping[str, nn.Module] | None = None,
        options: StepOptions | None = None,
    ) -> None:
        _check_option("aggregate", aggregate, get_args(Aggregation))
        self.net = net
        self.optimizer = optimizer
        self.sampler = sampler
        self.criterion = criterion
        self.options = options or StepOptions()
        self.steps = 0
        self.passes = 0
        self.watched: dict[str, Any] | None = None
        self.batch: Any = None  # the present step's, for samplers that look ahead in `begin`
        self._module = module_of(net)
        self._forward = forward or run_model
        self._aggregate = aggregate
        self._generator = generator
        self._teachers = {role: teacher.eval() for role, teacher in (teachers or {}).items()}
        self._kept: set[str] = set()
        self._owners = _trained(self._module, optimizer)
        self._reached: set[int] = set()
        self._base_lr = [float(group["lr"]) for group in optimizer.param_groups]
        ema = self.options.ema
        self.average = None if ema is None else Average(self._module, ema)

    @property
    def lr(self) -> float:
        """The learning rate of the last step, of the optimizer's first group."""
        return float(self.optimizer.param_groups[0]["lr"])

    def step(self, batch: Any) -> dict[str, float]:
        """Trains on one batch: all passes, then one update of the shared weights.

        Args:
            batch: As the data gives it.

        Returns:
            The loss by role, averaged over the passes of that role, before `weight`.

        Raises:
            SuppleError: A loss is not finite; the weights are as before the step.
            SettingError: A loss is no scalar that depends on the weights.
            RankError: Another rank has failed, is gone, or has sampled other sizes.
        """
        self.batch = batch
        self.sampler.begin(self)
        entries = list(self.sampler.sample(self.steps, self.options.steps))
        if not entries:
            raise SettingError(f"the sampler gave no pass for step {self.steps}")
        self._set_lr()
        self.optimizer.zero_grad(set_to_none=True)
        touched = self._counter()
        every = self.options.watch
        watch = Watch(self.net, self._owners) if every and self.steps % every == 0 else None
        ran, losses = self._run_all(entries, batch, touched, watch)
        values: list[float] = torch.stack(losses).tolist()
        self._check_finite(ran, values)
        self.watched = None if watch is None else watch.row(self.steps)
        self._finish_gradients(ran, touched)
        self._update(ran, touched)
        self.steps += 1
        self.passes += len(ran)
        return _by_role(ran, values)

    def gradients(self, entry: Pass, batch: Any) -> dict[str, Tensor]:
        """Gives the gradient of one pass by itself, without a step.

        Weights, gradients, random state of the sampler, and running statistics stay as they
        are. Criteria that look at earlier passes find the teachers' outputs only.

        Args:
            entry: The pass.
            batch: As the data gives it.

        Returns:
            Parameter name to gradient, of the shape of the full owner; parameters that the
            pass does not reach are left out.
        """
        held = [owner.grad for owner in self._owners]
        names = {id(p): name for name, p in self._module.named_parameters()}
        buffers = {name: b.clone() for name, b in self._module.named_buffers()}
        self.optimizer.zero_grad(set_to_none=True)
        try:
            part = split(batch, entry.parts)[entry.part]
            with self._active(entry), self._autocast():
                output = self._forward(self._module, part)
                loss = self.criterion(entry, output, part, self._taught(part))
                _check_loss(loss, entry)
                (loss * entry.weight).backward()  # type: ignore[no-untyped-call]
            return {names[id(p)]: p.grad for p in self._owners if p.grad is not None}
        finally:
            for owner, before in zip(self._owners, held, strict=True):
                owner.grad = before
            with torch.no_grad():
                for name, buffer in self._module.named_buffers():
                    buffer.copy_(buffers[name])

    def restart(self) -> None:
        """Forgets the optimizer's moments and the average, as if the run began here.

        To be called where weights were reordered or replaced: moments of other weights would
        be wrong. Methods that train in phases make a new optimizer for each.

        Raises:
            SettingError: The optimizer is one that makes its state when it is built.
        """
        if isinstance(self.optimizer, torch.optim.Adagrad):
            raise SettingError(
                "Adagrad can't be restarted, as methods with phases do: it makes its sums when "
                "it is built; use sgd, adam, adamw or rmsprop"
            )
        self.optimizer.state.clear()
        if self.average is not None:
            self.average = Average(self._module, self.average.decay)

    def sort(self, importance: Mapping[str, Tensor] | str = "l1") -> None:
        """Reorders the network's units as `net.sort` does, and their moments and average along.

        Args:
            importance: What `net.sort` takes.

        Raises:
            SettingError: The network can't be sorted so.
        """
        sort = getattr(self.net, "sort", None)
        if sort is None:
            raise SettingError(
                f"a {type(self.net).__name__} can't be sorted: it is not elastic"
            )
        beside: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for name, parameter in self._module.named_parameters():
            for kind, moment in self.optimizer.state.get(parameter, {}).items():
                if isinstance(moment, Tensor) and moment.shape == parameter.shape:
                    beside[kind][name] = moment
        averages = [] if self.average is None else [self.average.state_dict()["average"]]
        sort(importance, beside=[*beside.values(), *averages])

    def keep_teacher(self, role: str) -> None:
        """Lets a frozen copy of the whole network, as it is now, teach from here on.

        It is saved with the run.

        Args:
            role: Under which criteria find its output.
        """
        processes.average_buffers(self._module)
        self._teachers[role] = _frozen_copy(self._module)
        self._kept.add(role)

    def state_dict(self) -> dict[str, Any]:
        """Gives everything needed to go on later but the weights and the optimizer's state."""
        return {
            "teachers": {
                role: _tensors_of(self._teachers[role]) for role in sorted(self._kept)
            },
            "steps": self.steps,
            "passes": self.passes,
            "base_lr": list(self._base_lr),
            "reached": sorted(self._reached),
            "sampler": self.sampler.state_dict(),
            "generator": None if self._generator is None else self._generator.get_state(),
            "average": None if self.average is None else self.average.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what `state_dict` gave."""
        self.steps = state["steps"]
        self.passes = state["passes"]
        self._base_lr = list(state["base_lr"])
        self._reached = set(state["reached"])
        self.sampler.load_state_dict(state["sampler"])
        if self._generator is not None:
            self._generator.set_state(state["generator"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        for role, saved in state["teachers"].items():
            self._teachers[role] = _frozen_copy(self._module)
            with torch.no_grad():
                for name, tensor in _tensors_of(self._teachers[role]).items():
                    tensor.copy_(saved[name])
            self._kept.add(role)
        self.sampler.resumed(self)

    # ------------------------------------------------------------------ passes

    def _run_all(
        self, entries: list[Pass], batch: Any, touched: Touched | None, watch: Watch | None
    ) -> tuple[list[Pass], list[Tensor]]:
        parts = {count: split(batch, count) for count in {entry.parts for entry in entries}}
        # A last batch may have fewer examples than parts.
        entries = [entry for entry in entries if entry.part < len(parts[entry.parts])]
        scale = 1 / len(entries) if self._aggregate == "mean" else 1.0
        seen: dict[tuple[int, int], dict[str, list[Any]]] = {}
        losses = []
        for entry in entries:
            part = parts[entry.parts][entry.part]
            place = (entry.part, entry.parts)
            if place not in seen:
                seen[place] = self._taught(part)
            losses.append(self._run(entry, part, seen[place], scale, touched))
            if watch is not None:
                watch.saw(entry, losses[-1], scale * entry.weight)
        return entries, losses

    def _run(
        self,
        entry: Pass,
        batch: Any,
        earlier: dict[str, list[Any]],
        scale: float,
        touched: Touched | None,
    ) -> Tensor:
        # Backward stays inside: recomputed activations must see the same modes.
        with self._active(entry), self._counted(touched):
            with self._autocast():
                output = self._forward(self._module, batch)
                loss = self.criterion(entry, output, batch, earlier)
            _check_loss(loss, entry)
            (loss * (scale * entry.weight)).backward()  # type: ignore[no-untyped-call]
            if entry.role in self.criterion.teachers:
                earlier.setdefault(entry.role, []).append(mapped(output, Tensor.detach))
            self.sampler.observe(Seen(entry, loss.detach(), output, batch, self.net))
        return loss.detach().float()

    def _taught(self, batch: Any) -> dict[str, list[Any]]:
        with torch.no_grad(), self._autocast():
            return {
                role: [self._forward(teacher, batch)]
                for role, teacher in self._teachers.items()
            }

    @contextlib.contextmanager
    def _active(self, entry: Pass) -> Iterator[None]:
        size: AbstractContextManager[Any] = contextlib.nullcontext()
        if entry.config is not None:
            if isinstance(self.net, nn.Module):
                raise SettingError("a plain module has no sizes; pass an elastic network")
            size = self.net.at(entry.config)
        mode = contextlib.nullcontext() if entry.regularise else without_dropout(self._module)
        with mode, size:  # a size may copy the modes it finds
            yield

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.options.precision == "fp32":
            return contextlib.nullcontext()
        device = self._owners[0].device.type
        return torch.autocast(device, dtype=torch.bfloat16)

    # --------------------------------------------------------------- gradients

    def _counter(self) -> Touched | None:
        needed = self.options.freeze_inactive or self._aggregate == "masked_mean"
        return Touched(self._owners) if needed else None

    def _counted(self, touched: Touched | None) -> AbstractContextManager[None]:
        return contextlib.nullcontext() if touched is None else touched.counting(self._module)

    def _finish_gradients(self, ran: Sequence[Pass], touched: Touched | None) -> None:
        if touched is not None and self._aggregate == "masked_mean":
            touched.divide()
        processes.agree(f"step {self.steps} of {_described(ran)}")
        processes.average_gradients(self._owners)
        for index, owner in enumerate(self._owners):
            if owner.grad is not None:
                self._reached.add(index)
            elif index in self._reached and not self.options.freeze_inactive:
                # A skipped block is like the tail of a slice: a zero gradient, not none.
                owner.grad = torch.zeros_like(owner)
        if self.options.clip is not None:
            nn.utils.clip_grad_norm_(self._owners, self.options.clip)

    def _update(self, ran: Sequence[Pass], touched: Touched | None) -> None:
        decayed = any(entry.regularise for entry in ran)
        freeze = touched is not None and self.options.freeze_inactive
        with contextlib.ExitStack() as stack:
            if not decayed:
                stack.enter_context(_without_decay(self.optimizer))
            if touched is not None and freeze:
                stack.enter_context(frozen(self.optimizer, touched))
            self.optimizer.step()
        if not isinstance(self.net, nn.Module):
            self.net.drop_statistics()
        if self.average is not None:
            self.average.update()

    def _set_lr(self) -> None:
        schedule, steps = self.options.schedule, self.options.steps
        rate = self.sampler.rate(self.steps, steps)
        if rate is None and schedule is None:
            return
        factor = 1.0 if rate is None else rate
        if schedule is not None and steps is not None:
            factor *= schedule(self.steps, steps)
        for group, base in zip(self.optimizer.param_groups, self._base_lr, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(base * factor)
            else:
                group["lr"] = base * factor

    def _check_finite(self, ran: Sequence[Pass], values: Sequence[float]) -> None:
        for entry, value in zip(ran, values, strict=True):
            if not math.isfinite(value):
                self.optimizer.zero_grad(set_to_none=True)
                raise SuppleError(
                    f"the loss of role '{entry.role}' is {value} at step {self.steps}"
                    f"{'' if entry.config is None else f' ({entry.config})'}; the weights are "
                    "as before this step: lower lr, set clip=, or look at this batch"
                )


def _trained(module: nn.Module, optimizer: Optimizer) -> list[nn.Parameter]:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    owners = [p for p in module.parameters() if p.requires_grad and id(p) in held]
    if not owners:
        raise SettingError(
            "the optimizer holds none of the network's parameters that require a gradient; "
            "make it from net.module.parameters()"
        )
    return owners


def _frozen_copy(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).eval().requires_grad_(False)


def _tensors_of(module: nn.Module) -> dict[str, Tensor]:
    tensors = (*module.named_parameters(), *module.named_buffers())
    return {name: tensor.detach() for name, tensor in tensors}


def _by_role(ran: Sequence[Pass], values: Sequence[float]) -> dict[str, float]:
    grouped: dict[str, list[float]] = defaultdict(list)
    for entry, value in zip(ran, values, strict=True):
        grouped[entry.role].append(value)
    return {role: sum(each) / len(each) for role, each in grouped.items()}


def _described(ran: Sequence[Pass]) -> str:
    sizes = ["all" if entry.config is None else entry.config.to_json() for entry in ran]
    return f"sizes {', '.join(sizes)}"


@contextlib.contextmanager
def _without_decay(optimizer: Optimizer) -> Iterator[None]:
    groups = [group for group in optimizer.param_groups if "weight_decay" in group]
    before = [group["weight_decay"] for group in groups]
    for group in groups:
        group["weight_decay"] = 0.0
    try:
        yield
    finally:
        for group, decay in zip(groups, before, strict=True):
            group["weight_decay"] = decay


def _check_loss(loss: Any, entry: Pass) -> None:
    if (
        not isinstance(loss, Tensor)
        or loss.numel() != 1
        or loss.dim()
        or not loss.requires_grad
    ):
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise SettingError(
            f"the loss of role '{entry.role}' must be a scalar tensor that depends on the "
            f"weights, got {got}; loss= is called as loss(output, batch)"
        )


def _check_option(name: str, value: str, options: Sequence[str]) -> None:
    if value not in options:
        raise SettingError(
            f"{name} must be one of {', '.join(options)}, got {value!r}"
            f"{nearest(str(value), options)}"
        )
