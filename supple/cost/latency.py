"""Predicts the latency of any size of a network, and knows how wrong it is.

A model is fitted to a few dozen sizes that are measured on the device. What it sees of a size
are sums over the operators that run: how many of each kind, their multiply-accumulates, the
bytes that they read and write, and the seconds that a device profile gives for them, all of
them exact functions of the sizes as in `supple.cost.closed`; and beside them which choice each
site has, for what these sums miss. The fit is linear, so that the whole model becomes a sum of
small tables and prices a million sizes in a second or so.
"""

from __future__ import annotations

import os
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property, lru_cache
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from supple import files
from supple.cost.closed import Run, Term, runs
from supple.cost.measure import (
    device_name,
    interleaved,
    quiet_threads,
    with_batch,
    without_drift,
)
from supple.cost.operators import kind_of
from supple.cost.products import macs_of
from supple.cost.profile import DeviceProfile, Progress
from supple.errors import CheckpointError, SettingError, SuppleWarning
from supple.graph.record import Call
from supple.quantity import show
from supple.space import Config, Space

if TYPE_CHECKING:
    from supple.network import Elastic

__all__ = [
    "LEAST_SAMPLES",
    "Comparison",
    "LatencyModel",
    "at_batch",
    "fit",
    "fit_measured",
    "measure_sizes",
]

FloatArray = NDArray[np.float64]
Columns = tuple[int, ...]
Tables = dict[Columns, FloatArray]

_SCHEMA = 1
_KIND = "latency model"
_LARGEST_TABLE = 4096
_CHUNK = 16384
_HELD_BYTES = 1e9
_FOLDS = 10
LEAST_SAMPLES = 12
"""Sizes that a latency model has to be fitted to."""
_RIDGES = tuple((a, b) for a in (1e-8, 1e-6, 1e-4) for b in (1e-5, 1e-4, 1e-3, 1e-2, 1e-1))


@dataclass(frozen=True, eq=False)
class LatencyModel:
    """Latency of a network's sizes on one device, by `fit` or from a file.

    It is a function of configs, so `supple.pareto(net, evaluate, costs=["params", model])`
    searches by it.

    Args:
        space: The sizes it knows.
        tables: Seconds by the choices of a few sites each; their sum is the latency.
        error: Median absolute error on sizes it was not fitted on, relative: 0.03 is 3 %.
        error_high: The error that nine of ten such sizes stay below.
        samples: How many sizes were measured.
        anchors: Two of them, encoded, with the seconds that were measured: what tells whether
            the machine is as fast at another time.
        device: The device's name.
        threads: Number of CPU threads.
        batch: Batch size; None for that of the example inputs.
        torch_version: Version of PyTorch.
        date: When it was fitted, in ISO format.
    """

    space: Space
    tables: Mapping[Columns, FloatArray]
    error: float
    error_high: float
    samples: int
    anchors: Mapping[tuple[int, ...], float]
    device: str
    threads: int
    batch: int | None
    torch_version: str
    date: str

    @property
    def name(self) -> str:
        """What it is called as a cost: `"latency[predicted]"`, with its batch size if given."""
        batch = "" if self.batch is None else f",batch={self.batch}"
        threads = "" if self.threads == 1 else f",threads={self.threads}"
        return f"latency[predicted{batch}{threads}]"

    def predict(self, configs: Config | Sequence[Config] | NDArray[Any]) -> FloatArray:
        """Predicts latencies.

        Args:
            configs: One config, several, or encoded ones of shape (n, sites).

        Returns:
            Seconds, shape (n,).

        Raises:
            SettingError: A config is not of this space.
        """
        if isinstance(configs, Config):
            configs = [configs]
        if isinstance(configs, np.ndarray):
            rows = self.space.canonical_many(configs)
        else:
            rows = self.space.encode_many(configs)
        return self._pricer(rows)

    __call__ = predict

    def text(self, config: Config) -> str:
        """Words a predicted latency with the model's error, such as `"2.13 ms ±1.4 %"`."""
        return (
            f"{show(float(self.predict(config)[0]), 's')} ±{show(100 * self.error, digits=2)} %"
        )

    def __str__(self) -> str:
        batch = "" if self.batch is None else f", batch {self.batch}"
        return (
            f"latency on {self.device}{batch}: fitted to {self.samples} measured sizes, median "
            f"error {100 * self.error:.2g} % on sizes it was not fitted on, nine of ten within "
            f"{100 * self.error_high:.2g} %"
        )

    def compare(
        self,
        net: Elastic,
        configs: Sequence[Config],
        *,
        rounds: int = 9,
        seconds: float = 0.01,
        progress: Progress | None = None,
    ) -> Comparison:
        """Measures sizes for real, and two of those it was fitted to beside them.

        Args:
            net: The network.
            configs: Sizes.
            rounds: How often each is visited.
            seconds: How long a visit lasts.
            progress: Called as `progress(what, done, total)`.

        Returns:
            What was predicted and what was measured.

        Raises:
            SettingError: The network has other sites, or this is another machine.
        """
        here = device_name(net.device, self.threads)
        if net.space.digest != self.space.digest or here != self.device:
            raise SettingError(
                f"this latency model is of {len(self.space)} sites on {self.device}; it can't "
                f"be compared with a network of {len(net.space)} sites on {here}"
            )
        anchors = self.space.decode_many(np.array(list(self.anchors)))
        measured = measure_sizes(
            net,
            [*configs, *anchors],
            batch=self.batch,
            threads=self.threads,
            rounds=rounds,
            seconds=seconds,
            progress=progress,
        )
        then = np.array(list(self.anchors.values()))
        drift = float(np.exp(np.mean(np.log(measured[len(configs) :] / then))))
        return Comparison(self.predict(configs), measured[: len(configs)], drift)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the model as JSON, atomically.

        Raises:
            CheckpointError: The file can't be written.
        """
        tables = [
            {"sites": list(columns), "seconds": table.reshape(-1).tolist()}
            for columns, table in self.tables.items()
        ]
        content = {
            "kind": _KIND,
            "space": self.space.to_json(),
            "tables": tables,
            "anchors": [[list(row), seconds] for row, seconds in self.anchors.items()],
            **{name: getattr(self, name) for name in _PLAIN},
        }
        files.write_json(path, content, schema=_SCHEMA)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LatencyModel:
        """Reads a model.

        Raises:
            CheckpointError: The file is missing, damaged, or no latency model.
        """
        read = files.read_json(path, schema=_SCHEMA)
        if read.get("kind") != _KIND:
            raise CheckpointError(f"{path} is no latency model; `supple profile` writes one")
        try:
            space = Space.from_json(read["space"])
            tables = {
                tuple(entry["sites"]): np.array(entry["seconds"], dtype=np.float64).reshape(
                    [len(space.sites[column].choices) for column in entry["sites"]]
                )
                for entry in read["tables"]
            }
            anchors = {tuple(row): float(seconds) for row, seconds in read["anchors"]}
            plain = {name: read[name] for name in _PLAIN}
            return cls(space=space, tables=tables, anchors=anchors, **plain)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise CheckpointError(f"{path} is a damaged latency model ({error!r})") from error

    @cached_property
    def _pricer(self) -> _Pricer:
        return _Pricer(self.tables, [len(site.choices) for site in self.space.sites])


_PLAIN = (
    *("error", "error_high", "samples", "device", "threads", "batch"),
    *("torch_version", "date"),
)


@dataclass(frozen=True, eq=False)
class Comparison:
    """Predicted and measured latencies of some sizes.

    Args:
        predicted: Seconds, shape (n,).
        measured: Seconds, shape (n,).
        drift: How much slower the machine is than when the model was fitted, by the same two
            sizes measured then and now: 1.02 is 2 % slower.
    """

    predicted: FloatArray
    measured: FloatArray
    drift: float

    @property
    def errors(self) -> FloatArray:
        """Relative error of each prediction, the machine's drift included."""
        found: FloatArray = self.predicted / self.measured - 1
        return found

    @property
    def errors_without_drift(self) -> FloatArray:
        """Relative error of each prediction, had the machine been as fast as at the fit."""
        found: FloatArray = self.predicted * self.drift / self.measured - 1
        return found

    def __str__(self) -> str:
        raw, clean = (
            100 * float(np.median(np.abs(errors)))
            for errors in (self.errors, self.errors_without_drift)
        )
        return (
            f"{len(self.measured)} sizes measured: median error {raw:.2g} %; without the "
            f"machine's drift since the fit ({100 * (self.drift - 1):+.2g} %) {clean:.2g} %"
        )


def fit(
    net: Elastic,
    profile: DeviceProfile | None = None,
    *,
    samples: int = 40,
    batch: int | None = None,
    threads: int = 1,
    rounds: int = 7,
    seconds: float = 0.01,
    seed: int = 0,
    progress: Progress | None = None,
) -> LatencyModel:
    """Measures some sizes of a network on this device and fits a model to them.

    The largest and the smallest size are measured, and random ones: half of them uniform, half
    of them small, middling or large all over. Each is extracted and timed in turn with the
    others, several times over, so that a drift of the machine cancels out. A ridge regression
    on relative errors follows; leave-one-out decides how strong the ridge is. The error is that
    of ten-fold cross-validation: each size is predicted by a model fitted without it.

    Args:
        net: An elastic network; its weights may be any.
        profile: A profile of this device, measured with the same number of threads. With it
            the model also sees the measured seconds of each operator.
        samples: How many sizes to measure, at least 12.
        batch: Batch size; that of the example inputs by default.
        threads: Number of CPU threads.
        rounds: How often each size is visited.
        seconds: How long a visit lasts.
        seed: Of the random sizes.
        progress: Called as `progress(what, done, total)` after each step.

    Returns:
        The model, with its error.

    Raises:
        SettingError: A setting can't be used, or the profile is of another machine or number of
            threads.
        OperatorError: An operator may multiply and has no rule.

    Example:
        ```python
        model = fit(net, DeviceProfile.load("device.json"), batch=1)
        print(model)                      # ... median error 0.7 % on sizes it was not fitted on
        front = supple.pareto(net, accuracy, costs=["params", model])
        ```

    Source:
        Cai et al. 2019, "ProxylessNAS", arXiv:1812.00332 (latency as a sum over operators);
        Dudziak et al. 2020, "BRP-NAS", arXiv:2007.08668 (a regressor fitted to measured
        networks is needed on top: sums alone are off).
    Differs:
        A linear model, so that it becomes a sum of tables and the error can be cross-validated
        exactly; the sums are features among others.
    Checked:
        Against sizes measured afresh (`benchmarks/latency.py`).
    """
    _check(net, profile, samples, threads)
    rows = _sampled(net.space, samples, seed)
    measured = measure_sizes(
        net,
        net.space.decode_many(rows),
        batch=batch,
        threads=threads,
        rounds=rounds,
        seconds=seconds,
        seed=seed,
        progress=progress,
    )
    return fit_measured(net, rows, measured, profile, batch=batch, threads=threads, seed=seed)


def fit_measured(
    net: Elastic,
    rows: NDArray[Any],
    seconds: FloatArray,
    profile: DeviceProfile | None = None,
    *,
    batch: int | None = None,
    threads: int = 1,
    seed: int = 0,
) -> LatencyModel:
    """Fits a model to sizes that were measured on this device.

    Args:
        net: An elastic network.
        rows: Encoded sizes, shape (n, sites), each once.
        seconds: Their latencies, shape (n,).
        profile: As for `fit`.
        batch: Batch size that they were measured at.
        threads: Number of threads that they were measured with.
        seed: Of the folds.

    Returns:
        The model, with its error.

    Raises:
        SettingError: A setting can't be used, or the profile doesn't fit.
    """
    _check(net, profile, LEAST_SAMPLES, threads)
    features = _Features(at_batch(net, batch), profile)
    matrix, physical = features(rows)
    errors = np.abs(_cross_validated(matrix, seconds, physical, seed) / seconds - 1)
    extremes = (int(np.argmin(seconds)), int(np.argmax(seconds)))
    return LatencyModel(
        space=net.space,
        tables=features.tables(_regress(matrix, seconds, physical)),
        error=float(np.median(errors)),
        error_high=float(np.quantile(errors, 0.9)),
        samples=len(rows),
        anchors={tuple(rows[place].tolist()): float(seconds[place]) for place in extremes},
        device=device_name(net.device, threads),
        threads=threads,
        batch=batch,
        torch_version=torch.__version__,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _check(net: Elastic, profile: DeviceProfile | None, samples: int, threads: int) -> None:
    for name, value, least in (("samples", samples, LEAST_SAMPLES), ("threads", threads, 1)):
        if not isinstance(value, int) or value < least:
            raise SettingError(
                f"{name} must be a whole number of at least {least}, got {value!r}"
            )
    if net.device.type == "meta":
        raise SettingError("a network on the meta device can't be run, so it has no latency")
    if profile is None:
        return
    differs = profile.differences(net.device, threads)
    serious = [text for what, text in differs.items() if what != "torch"]
    if serious:
        raise SettingError(
            f"this device profile doesn't fit: {'; '.join(serious)}. Measure one here with "
            f"`supple profile --threads {threads}`"
        )
    for text in differs.values():
        warnings.warn(f"the device profile: {text}", SuppleWarning, stacklevel=3)


# --- measuring sizes --------------------------------------------------------------------------


def _sampled(space: Space, count: int, seed: int) -> NDArray[Any]:
    """Encoded sizes to measure: the extremes, uniform ones, and such that lean to one side."""
    if space.size() <= count:
        return space.every()
    random = np.random.default_rng(seed)
    wanted = [space.encode(space.smallest()), space.encode(space.largest())]
    found: dict[tuple[int, ...], None] = dict.fromkeys(tuple(row.tolist()) for row in wanted)
    while len(found) < count:
        uniform = space.random_many(1, random)
        for row in (*uniform, *space.leaning_many(1, random)):
            if len(found) < count:
                found[tuple(row.tolist())] = None
    return np.array(list(found))


def measure_sizes(
    net: Elastic,
    configs: Sequence[Config],
    *,
    batch: int | None = None,
    threads: int = 1,
    rounds: int = 7,
    seconds: float = 0.01,
    seed: int = 0,
    progress: Progress | None = None,
) -> FloatArray:
    """Measures the latency of many sizes, extracted, in turn with each other.

    Args:
        net: An elastic network.
        configs: Sizes.
        batch: Batch size; that of the example inputs by default.
        threads: Number of CPU threads.
        rounds: How often each size is visited.
        seconds: How long a visit lasts.
        seed: Of the order of visits.
        progress: Called as `progress(what, done, total)` after each visit.

    Returns:
        Seconds, shape (n,).
    """
    args, kwargs = net.args, net.kwargs
    if batch is not None:
        args, kwargs = with_batch(batch, args, kwargs)
    weights = float(np.mean(net.costs(list(configs))["weight_bytes"])) + 1

    @lru_cache(maxsize=max(1, int(_HELD_BYTES / weights)))
    def module(index: int) -> nn.Module:
        with warnings.catch_warnings():
            # Statistics that were not recalibrated change the outputs, not the latency.
            warnings.simplefilter("ignore", SuppleWarning)
            return net.extract(configs[index]).eval()

    def prepare(index: int) -> Callable[[], object]:
        run = module(index)
        return lambda: run(*args, **kwargs)

    done = 0

    def tell() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress("sizes", done, rounds * len(configs))

    with quiet_threads(threads), torch.no_grad():
        times = interleaved(
            len(configs),
            prepare,
            rounds=rounds,
            device=net.device,
            seconds=seconds,
            seed=seed,
            tell=tell,
        )
    return without_drift(times)


# --- what the model sees of a size ------------------------------------------------------------


def at_batch(net: Elastic, batch: int | None) -> Elastic:
    """Gives the network as analysed at another batch size.

    Args:
        net: An elastic network.
        batch: Batch size; that of the example inputs by default.

    Raises:
        SettingError: Its sites differ at that batch size.
    """
    if batch is None:
        return net
    from supple.graph.couple import analyse
    from supple.network import Elastic

    args, kwargs = with_batch(batch, net.args, net.kwargs)
    twin = Elastic(analyse(net.module, args, kwargs), args, kwargs, net.axes)
    known = set(net.space.names)
    twin.remove_sites({name: "not a site" for name in twin.space.names if name not in known})
    if twin.space.digest != net.space.digest:
        raise SettingError(
            f"the network's sites differ at batch size {batch}; give supple.elastic example "
            "inputs of that batch size"
        )
    return twin


class _Features:
    """Sums over the operators that run, by config: tables whose weighted sum is a prediction.

    Args:
        net: The network.
        profile: For the seconds of operators, or None.
    """

    def __init__(self, net: Elastic, profile: DeviceProfile | None) -> None:
        self._space = net.space
        self._counts = [len(site.choices) for site in net.space.sites]
        self._operators = profile.operators if profile is not None else {}
        self._sums: dict[str, Tables] = defaultdict(dict)
        self._put("calls", (), np.ones(()))
        for run in runs(net):
            for call in run.recording.calls:
                gates = run.gate(call.module)
                if gates is not None:
                    self._add(run, call, gates)
        self._physical = list(self._sums)
        self._add_choices()

    def __call__(self, rows: NDArray[Any]) -> tuple[FloatArray, int]:
        """Features of encoded configs, shape (n, features), and how many of them are sums."""
        total = np.zeros((len(rows), len(self._sums)))
        for place, tables in enumerate(self._sums.values()):
            for columns, table in tables.items():
                total[:, place] += table[tuple(rows[:, column] for column in columns)]
        return total, len(self._physical)

    def tables(self, weights: FloatArray) -> Tables:
        """The features' weighted sum."""
        found: Tables = {}
        for weight, tables in zip(weights.tolist(), self._sums.values(), strict=True):
            for columns, table in tables.items():
                found[columns] = found.get(columns, 0) + weight * table
        return found

    def _add(self, run: Run, call: Call, gates: Mapping[int, NDArray[Any]]) -> None:
        found = kind_of(call, run.of)
        kind, sizes = found or ("view", [])
        self._add_terms(f"calls {kind}", run.terms([], 1, gates))
        products = macs_of(call, run.of)
        if products is not None:
            self._add_terms(f"macs {kind}", run.terms(*products, gates))
        if found is None:
            return
        for ref in (*call.inputs, *call.outputs):
            terms = run.terms(run.of(ref), ref.dtype.itemsize, gates)
            self._add_terms(f"bytes {kind}", terms)
        if kind in self._operators:
            self._add_seconds(kind, [run.terms(*size, {}) for size in sizes], gates)

    def _add_seconds(
        self, kind: str, sizes: list[list[Term]], gates: Mapping[int, NDArray[Any]]
    ) -> None:
        """Measured seconds. Sizes that hang on too many sites count by MACs and bytes only."""
        of_sizes = {column for terms in sizes for term in terms for column in term.factors}
        columns = tuple(sorted(of_sizes | set(gates)))
        if prod(self._counts[column] for column in columns) > _LARGEST_TABLE:
            return
        values = [sum(self._spread(term, columns) for term in terms) for terms in sizes]
        seconds = self._operators[kind].at(*(np.maximum(value, 1.0) for value in values))
        seconds = seconds * self._spread(Term(1, dict(gates)), columns)
        self._put(f"seconds {kind}", columns, seconds)
        self._put("seconds", columns, seconds)

    def _add_terms(self, name: str, terms: Sequence[Term]) -> None:
        for term in terms:
            columns = tuple(sorted(term.factors))
            self._put(name, columns, self._spread(term, columns))

    def _spread(self, term: Term, columns: Columns) -> FloatArray:
        """A term by the choices of these sites."""
        value = np.full([self._counts[column] for column in columns], float(term.coefficient))
        for column, factor in term.factors.items():
            shape = [-1 if other == column else 1 for other in columns]
            value = value * factor.reshape(shape)
        return value

    def _put(self, name: str, columns: Columns, values: FloatArray) -> None:
        tables = self._sums[name]
        tables[columns] = tables[columns] + values if columns in tables else values

    def _add_choices(self) -> None:
        """For every choice of every site whether a config has it."""
        for column, site in enumerate(self._space.sites):
            columns = tuple(sorted(self._ancestors(column)))
            shape = [self._counts[other] for other in columns]
            if prod(shape) > _LARGEST_TABLE:
                continue
            grid = np.indices(shape).reshape(len(columns), -1).T
            rows = np.tile(self._space.encode(self._space.largest()), (len(grid), 1))
            rows[:, columns] = grid
            there = self._space.present(rows)[:, column]
            for choice in range(len(site.choices)):
                chosen = there & (rows[:, column] == choice)
                self._put(f"{site.name}={choice}", columns, chosen.astype(float).reshape(shape))

    def _ancestors(self, column: int) -> set[int]:
        """A site's column, and those of the sites whose choice decides whether it exists."""
        found = {column}
        for name, _ in self._space.sites[column].inside:
            found |= self._ancestors(self._space.column(name))
        return found


# --- regression -------------------------------------------------------------------------------


def _regress(matrix: FloatArray, seconds: FloatArray, physical: int) -> FloatArray:
    """Weights of the features for the least relative error, the ridges by leave-one-out."""
    fits = (_ridge(matrix, seconds, physical, *ridges) for ridges in _RIDGES)
    weights, _ = min(fits, key=lambda found: found[1])
    return weights


def _ridge(
    matrix: FloatArray, seconds: FloatArray, physical: int, sums: float, choices: float
) -> tuple[FloatArray, float]:
    """Weights, and the mean absolute relative error of leaving each one out.

    Features are scaled to equal size first. Dividing each row by its latency makes errors
    relative: the target is then 1 for all.
    """
    rows = matrix / seconds[:, None]
    scale = np.sqrt((rows**2).mean(axis=0))
    scale[scale == 0] = 1.0
    rows = rows / scale
    penalty = np.where(np.arange(rows.shape[1]) < physical, sums, choices)
    # With more features than sizes, the smaller system is that of the sizes.
    kernel = (rows / penalty) @ rows.T / len(rows)
    dual = np.linalg.inv(kernel + np.eye(len(rows)))
    alpha = dual.sum(axis=1)
    left_out = alpha / np.diag(dual)
    weights: FloatArray = (rows / penalty).T @ alpha / len(rows) / scale
    return weights, float(np.mean(np.abs(left_out)))


def _cross_validated(
    matrix: FloatArray, seconds: FloatArray, physical: int, seed: int
) -> FloatArray:
    """Each size as predicted by a model that was fitted without it, ridges and all."""
    order = np.random.default_rng(seed).permutation(len(seconds))
    predicted = np.empty(len(seconds))
    for fold in np.array_split(order, min(_FOLDS, len(order))):
        rest = np.setdiff1d(order, fold)
        weights = _regress(matrix[rest], seconds[rest], physical)
        predicted[fold] = matrix[fold] @ weights
    return predicted


# --- pricing ----------------------------------------------------------------------------------


class _Pricer:
    """Adds up tables for many configs at once; small tables are merged into larger ones first.

    Args:
        tables: Seconds by the choices of a few sites each.
        counts: Number of choices of each site.
    """

    def __init__(self, tables: Mapping[Columns, FloatArray], counts: Sequence[int]) -> None:
        self._counts = counts
        self._tables: Tables = {}
        for columns in sorted(tables, key=len, reverse=True):
            home = next((known for known in self._tables if self._fits(known, columns)), ())
            merged = tuple(sorted({*home, *columns}))
            total = self._spread(tables[columns], columns, merged)
            if home in self._tables:
                total = total + self._spread(self._tables.pop(home), home, merged)
            self._tables[merged] = total

    def __call__(self, rows: NDArray[Any]) -> FloatArray:
        """Seconds of encoded configs, shape (n,)."""
        total = np.zeros(len(rows))
        for start in range(0, len(rows), _CHUNK):
            part = np.ascontiguousarray(rows[start : start + _CHUNK].T)
            for columns, table in self._tables.items():
                index = np.zeros(part.shape[1], dtype=np.int64)
                for column in columns:
                    index = index * self._counts[column] + part[column]
                total[start : start + _CHUNK] += table.reshape(-1).take(index)
        return total

    def _fits(self, known: Columns, columns: Columns) -> bool:
        return prod(self._counts[column] for column in {*known, *columns}) <= _LARGEST_TABLE

    def _spread(self, table: FloatArray, columns: Columns, wider: Columns) -> FloatArray:
        shape = [self._counts[column] if column in columns else 1 for column in wider]
        full = [self._counts[column] for column in wider]
        spread: FloatArray = np.broadcast_to(table.reshape(shape), full)
        return spread
