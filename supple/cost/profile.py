"""What a device is like: how fast its operators are, which channel counts pay, which threads.

A profile is measured once for each device and kept in a file. It is the ground on which latency
models stand (`supple.cost.latency`), and it says to what multiples channel counts are best
rounded.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from supple import files
from supple.cost.count import inference, run_forward
from supple.cost.measure import (
    device_name,
    interleaved,
    quiet_threads,
    with_batch,
    without_drift,
)
from supple.cost.operators import KINDS
from supple.errors import CheckpointError, SettingError

__all__ = [
    "DeviceProfile",
    "Divisor",
    "OperatorTable",
    "Progress",
    "ThreadTimes",
    "profile_device",
]

FloatArray = NDArray[np.float64]
Progress = Callable[[str, int, int], object]
_SCHEMA = 1


@dataclass(frozen=True, eq=False)
class OperatorTable:
    """Measured seconds of one kind of operator over a grid of sizes.

    Args:
        axes: What the sizes are called.
        grid: For each axis the sizes that were measured, ascending.
        seconds: Seconds by size, shape `(len(grid[0]), len(grid[1]), ...)`.

    Example:
        >>> table = OperatorTable(("elements",), ((100, 1000),), np.array([1e-6, 4e-6]))
        >>> table.at(np.array([10, 100, 316.2278, 2000])).round(9).tolist()
        [1e-06, 1e-06, 2e-06, 8e-06]
    """

    axes: tuple[str, ...]
    grid: tuple[tuple[int, ...], ...]
    seconds: FloatArray

    def at(self, *sizes: Any) -> FloatArray:
        """Seconds at any sizes, interpolated between those measured, on logarithmic scales.

        Below the smallest size the time is that of the smallest, where overhead rules; above
        the largest it grows with the work.

        Args:
            sizes: For each axis an array of sizes; all broadcast together.
        """
        found: FloatArray = np.zeros(np.broadcast_shapes(*(np.shape(size) for size in sizes)))
        places = [
            _place(np.asarray(s, float), g) for s, g in zip(sizes, self.grid, strict=True)
        ]
        logs = np.log(self.seconds)
        for corner in itertools.product((0, 1), repeat=len(places)):
            weight = math.prod(
                (share if up else 1 - share)
                for up, (_, share, _) in zip(corner, places, strict=True)
            )
            index = tuple(low + up for up, (low, _, _) in zip(corner, places, strict=True))
            found = found + weight * logs[index]
        return np.exp(found) * math.prod(beyond for _, _, beyond in places)


def _place(
    sizes: FloatArray, grid: Sequence[int]
) -> tuple[NDArray[Any], FloatArray, FloatArray]:
    """Lower grid point, share of the upper one, and how far beyond the grid (1 if inside)."""
    inside = np.clip(sizes, grid[0], grid[-1])
    logs = np.log(np.asarray(grid, float))
    low = np.clip(np.searchsorted(grid, inside, side="right") - 1, 0, len(grid) - 2)
    share = (np.log(inside) - logs[low]) / (logs[low + 1] - logs[low])
    return low, share, np.maximum(sizes / grid[-1], 1.0)


@dataclass(frozen=True)
class Divisor:
    """The multiple that channel counts of one kind of layer are best rounded to.

    Args:
        kind: `"conv"` or `"linear"`.
        divisor: The multiple; 1 where none was found to pay.
        savings: For each multiple tried, what going half a step below one of its multiples
            saved, as a share of what it should save (1: all of it, 0: nothing), with the
            bounds that hold with 95 % confidence: `(share, low, high)`.
    """

    kind: str
    divisor: int
    savings: Mapping[int, tuple[float, float, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class ThreadTimes:
    """How long the same work takes with different numbers of threads.

    Args:
        work: What was run, in words.
        batch: Its batch size.
        seconds: Seconds by number of threads.
    """

    work: str
    batch: int
    seconds: Mapping[int, float]

    @property
    def best(self) -> int:
        """The fewest threads that are within 5 % of the fastest."""
        limit = 1.05 * min(self.seconds.values())
        return min(number for number, time in self.seconds.items() if time <= limit)


@dataclass(frozen=True, eq=False)
class DeviceProfile:
    """What was measured on a device.

    Args:
        device: Its name.
        torch_version: Version of PyTorch.
        threads: Number of CPU threads that operators were measured with.
        date: When, in ISO format.
        fast: Whether the grids were the coarse ones.
        operators: Tables by kind of operator.
        divisors: What channel counts are best rounded to, by kind of layer.
        thread_times: Latency by number of threads.
    """

    device: str
    torch_version: str
    threads: int
    date: str
    fast: bool
    operators: Mapping[str, OperatorTable]
    divisors: Mapping[str, Divisor]
    thread_times: tuple[ThreadTimes, ...] = ()

    def divisor(self, kind: str) -> int:
        """The multiple that pays for a kind of layer; 1 where none does.

        Args:
            kind: `"conv"` or `"linear"`.
        """
        return self.divisors[kind].divisor if kind in self.divisors else 1

    def rate(self, kind: str) -> float:
        """The most work a second that was seen: MACs, or elements where there are none.

        Args:
            kind: A kind of operator.
        """
        table = self.operators[kind]
        work = np.ones(table.seconds.shape)
        for axis, sizes in enumerate(table.grid):
            shape = [-1 if other == axis else 1 for other in range(len(table.grid))]
            work = work * np.reshape(sizes, shape)
        return float((work / table.seconds).max())

    def differences(
        self, device: torch.device | str = "cpu", threads: int | None = None
    ) -> dict[str, str]:
        """Says in what this profile differs from the machine at hand; nothing if it fits.

        Args:
            device: Where a network will run.
            threads: With how many CPU threads; any by default.

        Returns:
            Sentences under `"device"`, `"threads"` and `"torch"`.
        """
        here = device_name(device, self.threads)
        found = {}
        if here != self.device:
            found["device"] = f"it is of {self.device}, this is {here}"
        if threads is not None and threads != self.threads:
            found["threads"] = f"it was measured with {_threads(self.threads)}, not {threads}"
        if torch.__version__ != self.torch_version:
            found["torch"] = (
                f"it was measured with torch {self.torch_version}, here is {torch.__version__}"
            )
        return found

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the profile as JSON, atomically.

        Raises:
            CheckpointError: The file can't be written.
        """
        files.write_json(path, self._to_json(), schema=_SCHEMA)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> DeviceProfile:
        """Reads a profile.

        Raises:
            CheckpointError: The file is missing, damaged, or no device profile.
        """
        read = files.read_json(path, schema=_SCHEMA)
        if read.get("kind") != _KIND:
            raise CheckpointError(f"{path} is no device profile; `supple profile` writes one")
        try:
            return cls._from_json(read)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path} is a damaged device profile ({error!r})") from error

    def _to_json(self) -> dict[str, Any]:
        return {
            "kind": _KIND,
            "device": self.device,
            "torch_version": self.torch_version,
            "threads": self.threads,
            "date": self.date,
            "fast": self.fast,
            "operators": {
                kind: {"axes": t.axes, "grid": t.grid, "seconds": t.seconds.tolist()}
                for kind, t in self.operators.items()
            },
            "divisors": {
                kind: {"divisor": d.divisor, "savings": _listed(d.savings)}
                for kind, d in self.divisors.items()
            },
            "thread_times": [
                {"work": t.work, "batch": t.batch, "seconds": _listed(t.seconds)}
                for t in self.thread_times
            ],
        }

    @classmethod
    def _from_json(cls, read: Mapping[str, Any]) -> DeviceProfile:
        return cls(
            device=str(read["device"]),
            torch_version=str(read["torch_version"]),
            threads=int(read["threads"]),
            date=str(read["date"]),
            fast=bool(read["fast"]),
            operators={kind: _table(entry) for kind, entry in read["operators"].items()},
            divisors={
                kind: Divisor(
                    kind,
                    int(entry["divisor"]),
                    {
                        int(d): (float(a), float(b), float(c))
                        for d, (a, b, c) in entry["savings"]
                    },
                )
                for kind, entry in read["divisors"].items()
            },
            thread_times=tuple(
                ThreadTimes(
                    str(entry["work"]),
                    int(entry["batch"]),
                    {int(number): float(seconds) for number, seconds in entry["seconds"]},
                )
                for entry in read["thread_times"]
            ),
        )


_KIND = "device profile"


def _listed(mapping: Mapping[int, Any]) -> list[list[Any]]:
    """A mapping as pairs, because JSON's keys are text."""
    return [[key, value] for key, value in mapping.items()]


def _table(entry: Mapping[str, Any]) -> OperatorTable:
    grid = tuple(tuple(int(size) for size in sizes) for sizes in entry["grid"])
    seconds = np.array(entry["seconds"], dtype=np.float64)
    if seconds.shape != tuple(map(len, grid)) or len(entry["axes"]) != len(grid):
        raise ValueError(
            f"a table of shape {seconds.shape} for a grid of {list(map(len, grid))}"
        )
    if not (np.isfinite(seconds).all() and (seconds > 0).all()):
        raise ValueError("seconds must be positive")
    return OperatorTable(tuple(map(str, entry["axes"])), grid, seconds)


def _threads(number: int) -> str:
    return f"{number} thread{'s' if number != 1 else ''}"


# --- operators --------------------------------------------------------------------------------

Make = Callable[..., Callable[[], object]]


@dataclass(frozen=True)
class _Operator:
    """A kind of operator and the sizes it is measured at; `make(device, *sizes)` gives a run.

    The product of the sizes is the operator's work, up to a constant.
    """

    grid: tuple[tuple[int, ...], ...]
    make: Make


def _ones(device: torch.device, *shape: int) -> Tensor:
    return torch.ones(shape, device=device)


def _conv(device: torch.device, pixels: int, inner: int, outer: int, taps: int) -> Any:
    side, kernel = math.isqrt(pixels), math.isqrt(taps)
    x = _ones(device, 1, inner, side, side)
    weight = _ones(device, outer, inner, kernel, kernel)
    return lambda: F.conv2d(x, weight, padding=kernel // 2)


def _depthwise(device: torch.device, pixels: int, channels: int, taps: int) -> Any:
    side, kernel = math.isqrt(pixels), math.isqrt(taps)
    x, weight = (
        _ones(device, 1, channels, side, side),
        _ones(device, channels, 1, kernel, kernel),
    )
    return lambda: F.conv2d(x, weight, padding=kernel // 2, groups=channels)


def _matmul(device: torch.device, rows: int, inner: int, outer: int) -> Any:
    x, weight = _ones(device, rows, inner), _ones(device, outer, inner)
    return lambda: F.linear(x, weight)


def _attention(device: torch.device, heads: int, queries: int, keys: int, width: int) -> Any:
    q = _ones(device, 1, heads, queries, width)
    k, v = (_ones(device, 1, heads, keys, width) for _ in range(2))
    return lambda: F.scaled_dot_product_attention(q, k, v)


def _rows(elements: int) -> tuple[int, int]:
    """A matrix of that many elements with rows of at most 64."""
    width = min(64, elements)
    return elements // width, width


def _elementwise(device: torch.device, elements: int) -> Any:
    x = _ones(device, elements)
    return lambda: x + x


def _batch_norm(device: torch.device, elements: int) -> Any:
    height, channels = _rows(elements)
    x = _ones(device, 1, channels, height, 1)
    mean, variance, scale, shift = (_ones(device, channels) for _ in range(4))
    return lambda: F.batch_norm(x, mean, variance, scale, shift)


def _layer_norm(device: torch.device, elements: int) -> Any:
    x = _ones(device, *_rows(elements))
    scale, shift = (_ones(device, x.shape[1]) for _ in range(2))
    return lambda: F.layer_norm(x, x.shape[1:], scale, shift)


def _softmax(device: torch.device, elements: int) -> Any:
    x = _ones(device, *_rows(elements))
    return lambda: x.softmax(-1)


def _reduce(device: torch.device, elements: int) -> Any:
    x = _ones(device, *_rows(elements))
    return lambda: x.mean(-1)


def _copy(device: torch.device, elements: int) -> Any:
    x = _ones(device, *_rows(elements)).t()
    return lambda: x.contiguous()


_PIXELS = (4, 16, 64, 256, 1024, 4096, 16384)
_CHANNELS = (8, 16, 32, 64, 128, 256, 512)
_ELEMENTS = (tuple(4**power for power in range(3, 12)),)
_MATRIX = (*_CHANNELS, 1024, 4096)
_OPERATORS = {
    "conv": _Operator((_PIXELS, _CHANNELS, _CHANNELS, (1, 9, 25)), _conv),
    "depthwise": _Operator((_PIXELS, (*_CHANNELS, 1024), (9, 25)), _depthwise),
    "matmul": _Operator(((1, 4, 16, 64, 256, 1024), _MATRIX, _MATRIX), _matmul),
    "attention": _Operator(
        ((1, 4, 16, 64), (1, 16, 64, 256), (16, 64, 256, 1024), (8, 16, 32, 64, 128)),
        _attention,
    ),
    "elementwise": _Operator(_ELEMENTS, _elementwise),
    "batch norm": _Operator(_ELEMENTS, _batch_norm),
    "layer norm": _Operator(_ELEMENTS, _layer_norm),
    "softmax": _Operator(_ELEMENTS, _softmax),
    "reduce": _Operator(_ELEMENTS, _reduce),
    "copy": _Operator(_ELEMENTS, _copy),
}


def _coarse(grid: tuple[int, ...]) -> tuple[int, ...]:
    """Every other size, the first and the last always."""
    return tuple(sorted({*grid[::2], grid[-1]})) if len(grid) > 3 else grid


def _measure_operators(
    device: torch.device, fast: bool, progress: Progress
) -> dict[str, OperatorTable]:
    """Times every operator at every size of its grid that isn't too much work."""
    grids = {
        kind: tuple(map(_coarse, op.grid)) if fast else op.grid
        for kind, op in _OPERATORS.items()
    }
    most, rounds = (3e7, 1) if fast else (4e8, 2)
    points = [
        (kind, index)
        for kind, grid in grids.items()
        for index in np.ndindex(*map(len, grid))
        if _work(grid, index) <= most
    ]

    def prepare(number: int) -> Callable[[], object]:
        kind, index = points[number]
        sizes = (axis[place] for axis, place in zip(grids[kind], index, strict=True))
        return _OPERATORS[kind].make(device, *sizes)

    count = _Counter(progress, "operators", rounds * len(points))
    times = interleaved(
        len(points), prepare, rounds=rounds, device=device, seconds=0.003, tell=count.next
    )
    seconds = {kind: np.full(tuple(map(len, grid)), np.nan) for kind, grid in grids.items()}
    for (kind, index), time in zip(points, without_drift(times), strict=True):
        seconds[kind][index] = time
    return {
        kind: OperatorTable(KINDS[kind], grid, _filled(seconds[kind], grid))
        for kind, grid in grids.items()
    }


def _work(grid: Sequence[Sequence[int]], index: Iterable[int]) -> int:
    return math.prod(axis[place] for axis, place in zip(grid, index, strict=True))


def _filled(seconds: FloatArray, grid: Sequence[Sequence[int]]) -> FloatArray:
    """Where nothing was measured, the time grows with the work from the next smaller sizes."""
    for index in np.ndindex(*seconds.shape):
        if not np.isnan(seconds[index]):
            continue
        smaller = []
        for axis, place in enumerate(index):
            if place:
                before = (*index[:axis], place - 1, *index[axis + 1 :])
                smaller.append(seconds[before] * grid[axis][place] / grid[axis][place - 1])
        seconds[index] = math.exp(np.mean(np.log(smaller)))
    return seconds


class _Counter:
    """Counts what is done of one part of the work."""

    def __init__(self, progress: Progress, what: str, total: int) -> None:
        self._progress, self._what, self._total, self._done = progress, what, total, 0
        progress(what, 0, total)

    def next(self) -> None:
        self._done += 1
        self._progress(self._what, self._done, self._total)


# --- channel divisors -------------------------------------------------------------------------

_TRIED = (2, 4, 8, 16, 32, 64)
_POSITIONS = 6
_SMALLEST, _WIDEST = 64, 256


def _conv_between(device: torch.device, channels: int) -> Callable[[], object]:
    """What a width site is: the layer that makes the channels, and the one that reads them."""
    into, out = _conv(device, 256, 64, channels, 9), _conv(device, 256, channels, 64, 1)
    return lambda: (into(), out())


def _linear_between(device: torch.device, channels: int) -> Callable[[], object]:
    into, out = _matmul(device, 128, 256, channels), _matmul(device, 128, channels, 256)
    return lambda: (into(), out())


_BETWEEN = {"conv": _conv_between, "linear": _linear_between}


def _measure_divisor(
    kind: str, device: torch.device, fast: bool, progress: Progress
) -> Divisor:
    pairs = {step: _pairs(step) for step in _TRIED}
    channels = sorted({c for found in pairs.values() for pair in found for c in pair})
    rounds = 5 if fast else 15
    count = _Counter(progress, f"channel divisors, {kind}", rounds * len(channels))
    times = interleaved(
        len(channels),
        lambda number: _BETWEEN[kind](device, channels[number]),
        rounds=rounds,
        device=device,
        seconds=0.003,
        tell=count.next,
    )
    return judge_divisor(kind, channels, times)


def _pairs(step: int) -> list[tuple[int, int]]:
    """Multiples of the step, each with the count half a step below."""
    multiples = np.arange(-(-_SMALLEST // step) * step, _WIDEST + 1, step)
    chosen = multiples[np.linspace(0, len(multiples) - 1, _POSITIONS).round().astype(int)]
    return [(int(high) - step // 2, int(high)) for high in dict.fromkeys(chosen.tolist())]


def judge_divisor(kind: str, channels: Sequence[int], times: FloatArray) -> Divisor:
    """Decides which multiple pays, from timings of many channel counts.

    A multiple `d` pays if going from one of its multiples half a step down, to `c - d / 2`
    channels, saves less than half of the time that this share of the channels should save (by
    the slope over all counts): the time then falls in steps of `d`. That must hold with 95 %
    confidence, by resampling positions and rounds; what noise leaves open doesn't pay. The
    largest multiple that pays is taken. Where the time hardly depends on the number of channels
    at all (less than by half from the fewest to four times as many) none does.

    Args:
        kind: `"conv"` or `"linear"`.
        channels: The counts that were timed, ascending, with those that `d` needs.
        times: Seconds, shape (rounds, counts).

    Returns:
        The verdict, with the savings seen for each multiple.
    """
    level = without_drift(times)
    if level[-1] < 1.5 * level[0]:
        return Divisor(kind, 1)
    drift = np.median(times / level, axis=1, keepdims=True)
    steady = times / drift
    pairs_of = np.triu_indices(len(channels), 1)
    rises = np.subtract.outer(level, level) / (
        np.subtract.outer(channels, channels) + np.eye(len(channels))
    )
    slope = float(np.median(rises[pairs_of]))
    column = {count: place for place, count in enumerate(channels)}
    savings = {}
    for step in _TRIED:
        pairs = [(column[low], column[high]) for low, high in _pairs(step)]
        saved = np.stack([steady[:, high] - steady[:, low] for low, high in pairs])
        savings[step] = _share(saved / (slope * step / 2))
    paying = [step for step, (_, _, high) in savings.items() if high < 0.5]
    return Divisor(kind, max(paying, default=1), savings)


def _share(shares: FloatArray, samples: int = 500) -> tuple[float, float, float]:
    """The mean over positions of the median over rounds, with 95 % bounds by resampling."""
    random = np.random.default_rng(0)
    positions, rounds = shares.shape
    drawn = [
        np.median(shares[p][:, r], axis=1).mean()
        for p, r in zip(
            random.integers(positions, size=(samples, positions)),
            random.integers(rounds, size=(samples, rounds)),
            strict=True,
        )
    ]
    low, high = np.quantile(drawn, (0.025, 0.975))
    return float(np.median(shares, axis=1).mean()), float(low), float(high)


# --- threads ----------------------------------------------------------------------------------

_BATCHES = (1, 16)


def usable_cpus() -> int:
    """How many CPUs this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _thread_counts() -> list[int]:
    """1, 2, 4 and so on up to the number of CPUs, that one too."""
    cpus = usable_cpus()
    return sorted({2**power for power in range(cpus.bit_length()) if 2**power <= cpus} | {cpus})


def _measure_threads(
    work: Callable[[int], Callable[[], object]],
    name: str,
    device: torch.device,
    fast: bool,
    progress: Progress,
) -> tuple[ThreadTimes, ...]:
    """Times one work, given by batch size, with every number of threads."""
    numbers, rounds = _thread_counts(), 3 if fast else 9
    count = _Counter(progress, "threads", rounds * len(numbers) * len(_BATCHES))
    found = []
    for batch in _BATCHES:
        run = work(batch)

        def prepare(place: int, run: Callable[[], object] = run) -> Callable[[], object]:
            torch.set_num_threads(numbers[place])
            return run

        times = interleaved(
            len(numbers), prepare, rounds=rounds, device=device, seconds=0.03, tell=count.next
        )
        seconds = without_drift(times).tolist()
        found.append(ThreadTimes(name, batch, dict(zip(numbers, seconds, strict=True))))
    return tuple(found)


def _reference(device: torch.device) -> Callable[[int], Callable[[], object]]:
    """Four convolutions of 64 channels on 32 x 32 pixels: a small network's work."""
    weights = [_ones(device, 64, 64, 3, 3) / 576 for _ in range(4)]

    def work(batch: int) -> Callable[[], object]:
        x = _ones(device, batch, 64, 32, 32)

        def run() -> Tensor:
            y = x
            for weight in weights:
                y = F.conv2d(y, weight, padding=1)
            return y

        return run

    return work


# --- all of it --------------------------------------------------------------------------------


def profile_device(
    *,
    threads: int = 1,
    fast: bool = False,
    device: torch.device | str = "cpu",
    model: nn.Module | None = None,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> DeviceProfile:
    """Measures this device: operators, channel counts that pay, numbers of threads.

    It takes about a minute on a CPU, with `fast` some ten seconds. Other programs that run
    meanwhile disturb it; work is visited in turn over and over, so that they disturb all alike.

    Args:
        threads: Number of CPU threads that operators and channel counts are measured with.
        fast: Coarser grids and fewer rounds.
        device: What to measure.
        model: The network that numbers of threads are compared with, at batch 1 and 16; four
            convolutions by default.
        args: Its example inputs by position.
        kwargs: Its example inputs by name.
        progress: Called as `progress(what, done, total)` after each step.

    Returns:
        The profile; nothing is written.

    Raises:
        SettingError: A setting can't be used.
        UnsupportedModelError: The network fails on its inputs.

    Example:
        ```python
        profile = profile_device()
        profile.save("device.json")
        net = supple.elastic(model, x, profile=profile)
        ```

    Source:
        Operator tables as in Cai et al. 2019, "ProxylessNAS", arXiv:1812.00332, which looks up
        measured operators and adds them; here they are one feature of a fitted model.
    """
    if not isinstance(threads, int) or threads < 1:
        raise SettingError(f"threads must be a whole number of at least 1, got {threads!r}")
    tell = progress or (lambda what, done, total: None)
    place = torch.device(device)
    if place.type == "cuda" and not torch.cuda.is_available():
        raise SettingError(f"there is no GPU that torch {torch.__version__} can use here")
    with quiet_threads(threads), torch.no_grad():
        operators = _measure_operators(place, fast, tell)
        divisors = {kind: _measure_divisor(kind, place, fast, tell) for kind in _BETWEEN}
    with quiet_threads(threads), torch.no_grad():
        times = _thread_times(place, model, args, kwargs, fast, tell)
    return DeviceProfile(
        device=device_name(place, threads),
        torch_version=torch.__version__,
        threads=threads,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        fast=fast,
        operators=operators,
        divisors=divisors,
        thread_times=times,
    )


def _thread_times(
    device: torch.device,
    model: nn.Module | None,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    fast: bool,
    progress: Progress,
) -> tuple[ThreadTimes, ...]:
    if device.type != "cpu":
        return ()
    if model is None:
        name = "four convolutions of 64 channels, 32 x 32 pixels"
        return _measure_threads(_reference(device), name, device, fast, progress)

    def work(batch: int) -> Callable[[], object]:
        inputs, named = with_batch(batch, args, kwargs)
        return lambda: run_forward(model, inputs, named)

    with inference(model, fused=True):
        return _measure_threads(work, type(model).__name__, device, fast, progress)
