"""Evaluating one size of a network: recalibrate, the user's function, the costs."""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from supple.errors import SettingError, nearest
from supple.space import Config
from supple.study.growing import Batchwise, Estimate, Race, Tally, name_of, numbers, size_of
from supple.study.store import Evaluation, Stopped
from supple.training.recalibrate import recalibrate
from supple.training.step import Network as Trained

__all__ = ["Costs", "Evaluator", "NamedCost", "Network", "fingerprint"]

CostFunction = Callable[[list[Config]], Any]
RowFunction = Callable[[NDArray[Any]], Any]


class NamedCost(Protocol):
    """A cost that knows its name: a latency model, say.

    Where it predicts, it may also have an attribute `error`: its median relative error.
    """

    @property
    def name(self) -> str:
        """What it is called."""

    def __call__(self, configs: list[Config]) -> Any:
        """Gives one value per config."""


CostNames = str | Sequence[str | NamedCost] | Mapping[str, CostFunction]

_MEASURED = ("latency", "memory", "energy")
_SAMPLED = 4096


class Network(Trained, Protocol):
    """What a search needs of an elastic network."""

    @property
    def args(self) -> Any:
        """Example inputs by position."""

    @property
    def kwargs(self) -> Any:
        """Example inputs by name."""

    @property
    def statistics(self) -> MutableMapping[Config, dict[str, Tensor]]:
        """Running statistics by size."""

    def extract(self, config: Config) -> nn.Module:
        """Gives a size as a module of its own."""

    def costs(self, configs: list[Config] | NDArray[Any]) -> Mapping[str, Any]:
        """Gives closed-form costs by name, an array of one value per size each.

        Sizes may be given as encoded configs, shape (sizes, sites).
        """

    def has_running_statistics(self) -> bool:
        """Says whether any batch normalization keeps running statistics."""


class Costs:
    """The costs of a network's sizes, by name.

    Args:
        net: An elastic network.
        costs: Names of closed-form costs (`"params"`, `"macs"`, ...) and of measured ones
            (`"latency[batch=1]"`, `"memory"`, `"energy"`), costs that know their name (a
            latency model), or name to function of a list of configs.

    Raises:
        SettingError: A name is unknown or comes twice.
    """

    def __init__(self, net: Network, costs: CostNames) -> None:
        self._net = net
        self._own: dict[str, CostFunction] = {}
        if isinstance(costs, Mapping):
            self._own = dict(costs)
        listed = (costs,) if isinstance(costs, str) else tuple(costs)
        for cost in listed:
            if not isinstance(cost, str):
                self._own[cost.name] = cost
        self.names = tuple(cost if isinstance(cost, str) else cost.name for cost in listed)
        if len(set(self.names)) < len(self.names):
            raise SettingError(f"each cost may be named once, got {list(self.names)}")
        rest = [name for name in self.names if name not in self._own]
        self._measured = [name for name in rest if name.partition("[")[0] in _MEASURED]
        self._closed = [name for name in rest if name not in self._measured]
        if self._closed:
            self._check(net.costs([net.space.largest()]))

    @property
    def measured(self) -> bool:
        """Whether any cost is measured on the extracted network."""
        return bool(self._measured)

    @property
    def free(self) -> bool:
        """Whether no cost needs a measurement, as the user's own functions may."""
        return not self._measured and set(self._own) <= set(self.errors)

    @property
    def errors(self) -> dict[str, float]:
        """Of costs that are predicted the median relative error, by name."""
        found = {name: getattr(cost, "error", None) for name, cost in self._own.items()}
        return {name: float(error) for name, error in found.items() if error is not None}

    def exact(self) -> dict[str, RowFunction]:
        """Gives the costs that need no measurement, by name, as functions of encoded configs.

        Where a closed-form cost is asked for, all of them are there. Functions of the user's
        own are not: they may measure.
        """
        models = [name for name in self.errors if name in self.names]
        exact: dict[str, RowFunction] = {
            name: functools.partial(self._predicted, name) for name in models
        }
        if self._closed:
            known = self._net.costs([self._net.space.largest()])
            exact |= {name: functools.partial(self._priced, name) for name in known}
        return exact

    def _priced(self, name: str, rows: NDArray[Any]) -> Any:
        return self._net.costs(rows)[name]

    def _predicted(self, name: str, rows: NDArray[Any]) -> Any:
        return self._own[name](self._net.space.decode_many(rows))

    def check_predicted(self, config: Config, values: Mapping[str, float]) -> None:
        """Refuses to go on with costs that were predicted by another model.

        Args:
            config: An evaluated size.
            values: Its values.

        Raises:
            SettingError: A model predicts something else for it.
        """
        for name in self.errors:
            predicted = float(np.asarray(self._own[name]([config])).reshape(-1)[0])
            known = values.get(name, predicted)
            if not np.isclose(predicted, known, rtol=1e-9):
                raise SettingError(
                    f"the study holds {name!r} by another model ({known:.6g} where this one "
                    f"predicts {predicted:.6g}); load that one from its file, or begin another "
                    "study"
                )

    def _check(self, known: Mapping[str, Any]) -> None:
        for name in self._closed:
            if name not in known:
                options = [*known, *_MEASURED]
                raise SettingError(
                    f"there is no cost {name!r}{nearest(name, options)} "
                    f"(there are: {', '.join(options)})"
                )

    def of(self, config: Config) -> dict[str, float]:
        """Returns the costs of one size in base units.

        Where one closed-form cost is asked for, all of them are given: they come for free.
        """
        costs: dict[str, float] = {}
        if self._measured:
            costs |= self._measure(self._net.extract(config))
        if self._closed:
            priced = self._net.costs([config])
            costs |= {name: float(np.asarray(values)[0]) for name, values in priced.items()}
        for name, function in self._own.items():
            costs[name] = float(np.asarray(function([config])).reshape(-1)[0])
        first = {name: costs[name] for name in self.names}
        return first | costs

    def _measure(self, module: nn.Module) -> dict[str, float]:
        from supple.cost.measure import measure_named

        args, kwargs = self._net.args, self._net.kwargs
        return {name: measure_named(module, name, args, kwargs) for name in self._measured}


class Evaluator:
    """Evaluates sizes of a network.

    Args:
        net: An elastic network.
        function: `evaluate(module) -> dict | float`, or one that yields an `Estimate` for each
            of several growing parts of the data, the last for all of it.
        costs: The costs.
        data: Batches to recalibrate running statistics with.

    Raises:
        SettingError: The network has running statistics and there is no data.
    """

    def __init__(
        self, net: Network, function: Callable[[nn.Module], Any], costs: Costs, data: Any = None
    ) -> None:
        if data is None and net.has_running_statistics():
            raise SettingError(
                "this network has batch normalization, whose running statistics must be "
                "measured anew for each size; pass data= (batches like those of training)"
            )
        self._net = net
        self._function = function
        self._costs = costs
        self._data = data
        self._earlier: Mapping[Config, Mapping[str, float]] = {}
        self._source = ""

    def remember(self, metrics: Mapping[Config, Mapping[str, float]], source: str) -> None:
        """Takes metrics that are known, so that these sizes only need their costs.

        Args:
            metrics: What an evaluation would give, by config.
            source: The study that they come from.
        """
        self._earlier, self._source = metrics, source

    def __call__(self, config: Config, *, race: Race | None = None) -> Evaluation | Stopped:
        """Evaluates a canonical config.

        Args:
            config: Which.
            race: What tells that a growing evaluation may stop.

        Raises:
            SettingError: The function gave something else than numbers or estimates.
        """
        if isinstance(self._function, Batchwise):
            return self.together([config], race)[0]
        if config in self._earlier:
            return self._remembered(config)
        self._recalibrate(config)
        module = self._net.module
        with self._evaluating(), self._net.at(config):
            given = self._function(module)
            if isinstance(given, Iterator):
                return self._raced(config, given, race)
        metrics = numbers(given, name_of(self._function), "evaluate")
        return Evaluation(config, metrics, self._costs.of(config))

    def together(
        self, configs: Sequence[Config], race: Race | None = None
    ) -> list[Evaluation | Stopped]:
        """Evaluates several canonical configs: batch by batch, where the function allows it.

        Args:
            configs: Which.
            race: What tells that a growing evaluation may stop.

        Returns:
            What came out of each, in their order.

        Raises:
            SettingError: The function gave something else than numbers or estimates.
        """
        growing = self._function
        if not isinstance(growing, Batchwise):
            return [self(config, race=race) for config in configs]
        done: dict[Config, Evaluation | Stopped]
        done = {
            config: self._remembered(config) for config in configs if config in self._earlier
        }
        unknown = [config for config in configs if config not in done]
        if unknown:
            done |= self._together(growing, unknown, race)
        return [done[config] for config in configs]

    def _together(
        self, growing: Batchwise, configs: Sequence[Config], race: Race | None
    ) -> dict[Config, Evaluation | Stopped]:
        for config in configs:
            self._recalibrate(config)
        runners = [_Runner(config, self._costs.of(config), race) for config in configs]
        tallies = {config: Tally(len(growing)) for config in configs}
        done: dict[Config, Evaluation | Stopped] = {}
        looks = growing.looks()
        for count, batch in enumerate(growing.batches(), 1):
            size = size_of(batch)
            for runner in [runner for runner in runners if runner.config not in done]:
                tally = tallies[runner.config]
                with self._evaluating(), self._net.at(runner.config):
                    tally.add(growing.means(self._net.module, batch), size)
                outcome = runner.outcome(tally.estimate()) if count in looks else None
                if outcome is not None:
                    done[runner.config] = outcome
            if race is not None and count in looks:
                done |= _halved(race, [one for one in runners if one.config not in done])
            if len(done) == len(configs):
                break
        if len(done) < len(configs):
            seen = max(len(tally) for tally in tallies.values())
            raise SettingError(
                f"the data of evaluate gave {seen} batches, its length says {len(growing)}"
            )
        return done

    def _remembered(self, config: Config) -> Evaluation:
        if self._costs.measured:  # on the extracted network, which needs its statistics
            self._recalibrate(config)
        costs = self._costs.of(config)
        return Evaluation(config, dict(self._earlier[config]), costs, self._source)

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        with _in_eval_mode(self._net.module), torch.no_grad():
            yield

    def _recalibrate(self, config: Config) -> None:
        # The statistics of the full network are the module's own.
        if not self._net.has_running_statistics() or config == self._net.space.largest():
            return
        if config not in self._net.statistics:
            recalibrate(self._net, config, self._data)

    def _raced(
        self, config: Config, estimates: Iterator[Any], race: Race | None
    ) -> Evaluation | Stopped:
        """Follows the estimates of one size until the last, or until it is beaten."""
        runner = _Runner(config, self._costs.of(config), race)
        for estimate in estimates:
            if not isinstance(estimate, Estimate):
                raise SettingError(
                    f"evaluate must yield supple.Estimate, got {type(estimate).__name__}"
                )
            outcome = runner.outcome(estimate)
            if outcome is not None:
                return outcome
        raise SettingError(
            "the last estimate that evaluate yields must be of all the data (share=1)"
        )


class _Runner:
    """One size in a race.

    Args:
        config: Which.
        costs: Its costs.
        race: What tells that it is beaten; None lets it come to its end.
    """

    def __init__(self, config: Config, costs: Mapping[str, float], race: Race | None) -> None:
        self.config = config
        self._costs = costs
        self._race = race
        self._looks = 0
        self._estimate = Estimate({}, 1)

    def outcome(self, estimate: Estimate) -> Evaluation | Stopped | None:
        """Returns what came out, if that is clear by now."""
        if estimate.share == 1:
            return Evaluation(self.config, dict(estimate.values), self._costs)
        self._looks += 1
        self._estimate = estimate
        race = self._race
        winner = None if race is None else race.winner(estimate, self._costs, self._looks)
        return None if winner is None else self.stopped(winner)

    @property
    def values(self) -> dict[str, float]:
        """What is known by now: the last estimate, and the costs."""
        return {**self._estimate.values, **self._costs}

    def stopped(self, winner: Config) -> Stopped:
        """Returns what came out, as another config goes on in this one's place."""
        estimate = self._estimate
        return Stopped(
            self.config,
            dict(estimate.values),
            self._costs,
            dict(estimate.errors),
            estimate.share,
            winner,
        )


def _halved(race: Race, left: Sequence[_Runner]) -> dict[Config, Stopped]:
    """What becomes of the sizes that don't go on."""
    gone = race.halved({runner.config: runner.values for runner in left})
    return {
        runner.config: runner.stopped(gone[runner.config])
        for runner in left
        if runner.config in gone
    }


@contextlib.contextmanager
def _in_eval_mode(module: nn.Module) -> Iterator[None]:
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def fingerprint(module: nn.Module) -> str:
    """Returns 12 digits that change with the weights, from a sample of each parameter.

    Args:
        module: Any module; a step of any optimizer changes almost every element.
    """
    total = hashlib.sha256()
    for name, parameter in sorted(module.named_parameters()):
        total.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        total.update(_sample(parameter.detach()).numpy().tobytes())
    return total.hexdigest()[:12]


def _sample(tensor: Tensor) -> Tensor:
    flat = tensor.reshape(-1)
    few = flat[:: max(1, flat.numel() // _SAMPLED)].contiguous()
    return few.cpu().view(torch.uint8)
