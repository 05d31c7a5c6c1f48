"""Measures what a network costs on the device at hand."""

from __future__ import annotations

import contextlib
import gc
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from supple.cost.count import activation_bytes, inference, run_forward
from supple.cost.energy import energy_of
from supple.errors import SettingError, nearest
from supple.quantity import show

__all__ = [
    "Measurement",
    "Timing",
    "device_name",
    "interleaved",
    "measure",
    "measure_named",
    "parse_cost",
    "quiet_threads",
    "with_batch",
    "without_drift",
]

FloatArray = NDArray[np.float64]

WHAT = ("latency", "memory", "energy")


@dataclass(frozen=True)
class Timing:
    """Seconds per forward over many repeats.

    Args:
        median: The middle one.
        low: First quartile.
        high: Third quartile.
        repeats: How many were timed.
    """

    median: float
    low: float
    high: float
    repeats: int

    @property
    def spread(self) -> float:
        """The interquartile range in seconds."""
        return self.high - self.low


@dataclass(frozen=True)
class Measurement:
    """What was measured, and where.

    Args:
        device: Name of the device, with the number of CPU threads.
        threads: Number of CPU threads that were used.
        latency: Seconds per forward, or None where it wasn't asked for.
        memory: Bytes that tensors hold at the peak of one forward, or None likewise.
        energy: Joules per forward, or None likewise.
    """

    device: str
    threads: int
    latency: Timing | None = None
    memory: int | None = None
    energy: float | None = None

    @property
    def values(self) -> dict[str, float]:
        """The figures by name, in seconds, bytes and joules."""
        found: dict[str, float] = {}
        if self.latency is not None:
            found["latency"] = self.latency.median
        if self.memory is not None:
            found["memory"] = float(self.memory)
        if self.energy is not None:
            found["energy"] = self.energy
        return found

    def __str__(self) -> str:
        figures = []
        if self.latency is not None:
            figures.append(
                f"latency {show(self.latency.median, 's')} "
                f"({show(self.latency.low, 's')} to {show(self.latency.high, 's')})"
            )
        if self.memory is not None:
            figures.append(f"memory {show(self.memory, 'B')}")
        if self.energy is not None:
            figures.append(f"energy {show(self.energy, 'J')}")
        return f"{', '.join(figures)} on {self.device}"


def measure(
    module: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    what: Sequence[str] = ("latency", "memory"),
    *,
    batch: int | None = None,
    threads: int = 1,
    repeats: int | None = None,
) -> Measurement:
    """Runs a network on its device and measures forwards in eval mode without gradients.

    *Latency* is timed after a warm-up, with the number of CPU threads pinned and Python's
    garbage collector off; report the median with its quartiles.

    *Memory* is the number of bytes that tensors hold at the peak of one forward: weights,
    buffers, inputs and activations. On a CPU, PyTorch keeps no such account, so it is the sum
    over all tensors by their lifetimes (see `supple.cost.count`): scratch memory inside an
    operator and the allocator's slack aren't in it. On a GPU it is the allocator's own peak.

    *Energy* is what the processor's counters say (see `supple.cost.energy`), the mean over a
    second of forwards, with the idle power and whatever else runs. Where a machine has no such
    counters it is refused.

    Args:
        module: The network; its mode and the number of threads are restored.
        args: Example inputs by position, on the module's device.
        kwargs: Example inputs by name.
        what: Any of `"latency"`, `"memory"` and `"energy"`.
        batch: Batch size to measure at: example inputs are cut or repeated along their first
            dimension. As given by default.
        threads: Number of CPU threads, 1 or more.
        repeats: Number of timed forwards; as many as fit half a second by default, 10 to 1000.

    Returns:
        The figures, with the device's name.

    Raises:
        SettingError: A setting can't be used, or energy is not measurable here.
        UnsupportedModelError: The forward fails on these inputs.

    Example:
        >>> found = measure(nn.Linear(8, 8), (torch.zeros(4, 8),), repeats=5)
        >>> found.memory, found.latency.median > 0
        (544, True)
    """
    for name in what:
        if name not in WHAT:
            raise SettingError(
                f"can't measure '{name}'{nearest(name, WHAT)}; choose from {', '.join(WHAT)}"
            )
    for setting, value in {"threads": threads, "repeats": repeats, "batch": batch}.items():
        if value is not None and (not isinstance(value, int) or value < 1):
            raise SettingError(f"{setting} must be a whole number of at least 1, got {value!r}")
    if batch is not None:
        args, kwargs = with_batch(batch, args, kwargs)
    device = _device(module)
    with quiet_threads(threads):
        return Measurement(
            device=device_name(device, threads),
            threads=threads,
            latency=_latency(module, args, kwargs, repeats) if "latency" in what else None,
            memory=_memory(module, args, kwargs) if "memory" in what else None,
            energy=_energy(module, args, kwargs) if "energy" in what else None,
        )


def measure_named(
    module: nn.Module,
    name: str,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> float:
    """Measures one figure by a name with settings in brackets.

    Args:
        module: The network.
        name: Such as `"latency"`, `"memory"`, `"energy"` or `"latency[batch=1,threads=2]"`.
        args: Example inputs by position.
        kwargs: Example inputs by name.

    Returns:
        The median in seconds, or bytes, or joules.

    Raises:
        SettingError: The name or a setting is unknown.
        UnsupportedModelError: The forward fails on these inputs.

    Example:
        >>> measure_named(nn.Linear(8, 8), "memory[batch=1]", (torch.zeros(4, 8),))
        352.0
    """
    figure, settings = parse_cost(name)
    return measure(module, args, kwargs, (figure,), **settings).values[figure]


def device_name(device: torch.device | str | None = None, threads: int | None = None) -> str:
    """Names a device as reports show it.

    Args:
        device: The CPU by default.
        threads: Number of CPU threads; PyTorch's current number by default.

    Returns:
        Such as `"AMD EPYC 7B13, 1 thread"` or a GPU's name.
    """
    device = torch.device("cpu" if device is None else device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return str(device)
    number = torch.get_num_threads() if threads is None else threads
    return f"{_cpu_model()}, {number} thread{'s' if number != 1 else ''}"


def with_batch(
    batch: int, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Cuts or repeats example inputs to another batch size.

    The batch size is the first dimension of the first tensor; tensors whose first dimension has
    another size are left as they are.

    Args:
        batch: The size wanted.
        args: Inputs by position.
        kwargs: Inputs by name.

    Raises:
        SettingError: No input has a batch dimension.

    Example:
        >>> args, _ = with_batch(3, (torch.tensor([[1], [2]]),))
        >>> args[0].tolist()
        [[1], [2], [1]]
    """
    inputs = (tuple(args), dict(kwargs or {}))
    tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.dim()]
    if not tensors or not len(tensors[0]):
        raise SettingError(
            f"can't change the batch size to {batch}: no example input is a tensor with a "
            "batch dimension"
        )
    old = len(tensors[0])

    def resized(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.dim() or len(leaf) != old:
            return leaf
        return leaf[torch.arange(batch, device=leaf.device) % old]

    changed: tuple[tuple[Any, ...], dict[str, Any]] = tree_map(resized, inputs)
    return changed


def parse_cost(name: str) -> tuple[str, dict[str, int]]:
    """Reads the name of a measured cost.

    Args:
        name: Such as `"latency[batch=1,threads=2]"`.

    Returns:
        What is measured, and its settings.

    Raises:
        SettingError: It can't be read, or a setting is unknown.

    Example:
        >>> parse_cost("latency[batch=1]")
        ('latency', {'batch': 1})
    """
    match = re.fullmatch(r"\s*(\w+)\s*(?:\[(.*)\])?\s*", name)
    if match is None:
        raise SettingError(f"'{name}' is no name of a measured cost; try 'latency[batch=1]'")
    figure, inside = match.groups()
    settings: dict[str, int] = {}
    known = ("batch", "threads", "repeats")
    for part in filter(None, (inside or "").split(",")):
        key, _, value = (piece.strip() for piece in part.partition("="))
        if key not in known:
            raise SettingError(
                f"'{name}': no setting '{key}'{nearest(key, known)}; settings are "
                f"{', '.join(known)}"
            )
        if not value.isdecimal():
            raise SettingError(f"'{name}': {key} must be a whole number, got '{value}'")
        settings[key] = int(value)
    return figure, settings


@contextlib.contextmanager
def quiet_threads(number: int) -> Iterator[None]:
    """Pins the number of CPU threads and stops the garbage collector; restores both.

    Args:
        number: Number of CPU threads, 1 or more.
    """
    before, collecting = torch.get_num_threads(), gc.isenabled()
    torch.set_num_threads(number)
    gc.disable()
    try:
        yield
    finally:
        torch.set_num_threads(before)
        if collecting:
            gc.enable()


def interleaved(
    count: int,
    prepare: Callable[[int], Callable[[], object]],
    *,
    rounds: int,
    device: torch.device | str = "cpu",
    seconds: float = 0.01,
    seed: int = 0,
    tell: Callable[[], object] = lambda: None,
) -> FloatArray:
    """Times several things in turn, over and over, so that all meet the same disturbances.

    Each round visits all of them in a random order, and the next round in the reverse of it
    (as A B B A does for two): what a machine's drift adds to one early it adds to another late.
    Each visit begins with a call that isn't timed, and gives the lower quartile of its timed
    calls: other programs only ever add time. With one CPU thread, calls that another program
    interrupted are left out where others weren't.

    Args:
        count: How many things there are, at least 1.
        prepare: For a number in `range(count)`, what is to be timed, called without arguments.
        rounds: How often each is visited, at least 1.
        device: Where it computes.
        seconds: How long a visit lasts, at least three calls.
        seed: Of the order.
        tell: Called after each visit, for a progress bar.

    Returns:
        Seconds per call, shape (rounds, count). `without_drift` makes one figure each of them.
    """
    device = torch.device(device)
    random = np.random.default_rng(seed)
    times = np.empty((rounds, count))
    order = random.permutation(count)
    for turn in range(rounds):
        order = order[::-1] if turn % 2 else random.permutation(count)
        for index in order.tolist():
            times[turn, index] = _visit(prepare(index), device, seconds)
            tell()
    return times


def _visit(run: Callable[[], object], device: torch.device, seconds: float) -> float:
    _wait(device)
    run()
    # With one thread, a call that took longer than its own computing was interrupted by others.
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    times: list[float] = []
    whole: list[float] = []
    while (
        len(times) < 3
        or (sum(times) < seconds and len(times) < 1000)
        or (alone and len(whole) < 3 and sum(times) < 10 * seconds)
    ):
        _wait(device)
        computed, begin = time.thread_time(), time.perf_counter()
        run()
        _wait(device)
        times.append(time.perf_counter() - begin)
        if alone and times[-1] <= 1.05 * (time.thread_time() - computed) + 2e-6:
            whole.append(times[-1])
    low, _, _ = _quartiles(whole or times)
    return low


def without_drift(times: FloatArray) -> FloatArray:
    """Makes one figure of all visits: what was slower in a whole round is taken out.

    The logarithm of a time is taken as the sum of what is timed and of the round, found by
    alternating medians; of an item's visits, the lower quartile is taken then, so that
    disturbed ones don't count as long as some were not.

    Args:
        times: Seconds, shape (rounds, count), as `interleaved` gives them.

    Returns:
        Seconds, shape (count,).

    Example:
        >>> times = np.array([[1.0, 2.0, 4.0], [1.1, 2.2, 4.4], [1.0, 2.0, 9.0]])
        >>> without_drift(times).round(3).tolist()
        [1.0, 2.0, 4.0]
    """
    logs = np.log(times)
    drift = np.zeros((len(logs), 1))
    for _ in range(8):
        alone = np.median(logs - drift, axis=0)
        drift = np.median(logs - alone, axis=1, keepdims=True)
        drift -= np.median(drift)
    found: FloatArray = np.exp(np.quantile(logs - drift, 0.25, axis=0))
    return found


def _latency(
    module: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    repeats: int | None,
) -> Timing:
    device = _device(module)

    def once() -> float:
        _wait(device)
        begin = time.perf_counter()
        run_forward(module, args, kwargs)
        _wait(device)
        return time.perf_counter() - begin

    with inference(module, fused=True):
        _repeat(once, seconds=0.1, least=3, most=100)
        if repeats is None:
            times = _repeat(once, seconds=0.5, least=10, most=1000)
        else:
            times = [once() for _ in range(repeats)]
    low, median, high = _quartiles(times)
    return Timing(median, low, high, len(times))


def _repeat(once: Callable[[], float], *, seconds: float, least: int, most: int) -> list[float]:
    times: list[float] = []
    while len(times) < least or (sum(times) < seconds and len(times) < most):
        times.append(once())
    return times


def _quartiles(times: Sequence[float]) -> tuple[float, float, float]:
    if len(times) == 1:
        return times[0], times[0], times[0]
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    return low, median, high


def _memory(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> int:
    weights = _storage_bytes([*module.parameters(), *module.buffers()])
    device = _device(module)
    if device.type != "cuda":
        return weights + activation_bytes(module, args, kwargs)
    inputs = _storage_bytes(tree_leaves((tuple(args), dict(kwargs or {}))))
    with inference(module, fused=True):
        _wait(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run_forward(module, args, kwargs)
        _wait(device)
        return weights + inputs + torch.cuda.max_memory_allocated(device) - before


def _energy(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> float:
    with inference(module, fused=True):
        return energy_of(lambda: run_forward(module, args, kwargs), _device(module))


def _storage_bytes(values: Sequence[Any]) -> int:
    storages = [value.untyped_storage() for value in values if isinstance(value, Tensor)]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _device(module: nn.Module) -> torch.device:
    tensors = [*module.parameters(), *module.buffers()]
    return tensors[0].device if tensors else torch.device("cpu")


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)
        if found:
            return found.group(1).strip()
    return platform.processor() or f"{platform.machine()} ({os.cpu_count()} cores)"
