"""SuperTickets: the architecture and the connections of a sparse network, in one run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from supple.errors import SettingError, UnsupportedModelError
from supple.network import Elastic
from supple.space import Config
from supple.supernet.base import SupernetRule
from supple.technique import register
from supple.training.batches import Forward, Loss, run_model
from supple.training.losses import Earlier
from supple.training.seeds import kept
from supple.training.step import Network, Pass, Sampler, Seen, SizesRun, StepOptions

__all__ = ["Search", "SuperTickets", "Ticket", "surviving"]


@register(title="SuperTickets", paper="arXiv:2207.03677")
@dataclass(frozen=True, kw_only=True)
class SuperTickets(SupernetRule):
    r"""Searches widths and prunes weights in the same run: the result needs no retraining.

    The full network trains on $\ell + \rho_t \sum_u c_u |\gamma_u|$, where $\gamma_u$ are the
    gains of the batch norms of unit $u$ of a width's site and $c_u$ is what a unit of the site
    costs in multiply-accumulates, relative to the mean unit. $\rho_t$ grows to `penalty` in the
    first `ramp` of the steps.

    At each of `events` times, evenly spread over the first `until` of the steps, units whose
    gains are all below `threshold` are removed, the weakest first and none that would take the
    network below `least_macs`; then, of the weights of all other units, those of least
    magnitude are: at event $k$ of $K$, the share `sparsity` $\cdot\, k / K$ over all layers
    together. Biases and norms are kept. What was removed is exactly zero from then on, in the
    weights, in the optimizer's moments and in the running average.

    Afterwards `surviving(net)` puts the units that are left first and gives the size that
    holds them; recalibrate and extract it as any other.

    Args:
        sparsity: Share of the weights that is zero in the end, in [0, 1).
        penalty: Largest $\rho_t$, at least 0.
        threshold: Gains below it are of dead units, above 0.
        least_macs: Share of the full network's multiply-accumulates below which no units are
            removed, in [0, 1].
        events: How many times the network is pruned, at least 1.
        until: Share of the steps after which nothing is removed, in (0, 1].
        ramp: Share of the steps in which the penalty grows, in [0, 1].
        regrow: Whether what an event removed may grow again until the next; the last one is
            final.

    Example:
        ```python
        net = supple.elastic(model, (x,), axes=[Width()])
        supple.train(net, loader, loss, method=SuperTickets(sparsity=0.8), epochs=60)
        config = surviving(net)
        supple.recalibrate(net, config, loader, batches=10)
        ticket = net.extract(config)
        ```

    Source:
        You et al. 2022, "SuperTickets: Drawing Task-Agnostic Lottery Tickets from Supernets",
        arXiv:2207.03677; RICE-EIC/SuperTickets.
    Differs:
        Removed units stay in place as zeros until `surviving` cuts them off, where the authors
        rebuild the network. Gains are looked at themselves, and not their average beside.
        Both kinds of removal share their events, and `least_macs` is ours: the authors
        choose the penalty for a cost.
    Checked:
        One step against gradients by hand; masks, moments and average after every step; the
        extracted ticket against the full network.
    """

    distinguishing: ClassVar[str] = "sampler"

    sparsity: float = 0.9
    penalty: float = 1.4e-4
    threshold: float = 1e-3
    least_macs: float = 0.0
    events: int = 9
    until: float = 0.5
    ramp: float = 0.1
    regrow: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise SettingError(f"sparsity must lie in [0, 1), got {self.sparsity}")
        if not self.penalty >= 0 or not self.threshold > 0:
            raise SettingError(
                "penalty must be at least 0 and threshold above 0, got "
                f"{self.penalty} and {self.threshold}"
            )
        if not 0 <= self.least_macs <= 1 or not 0 <= self.ramp <= 1:
            raise SettingError(
                f"least_macs and ramp must lie in [0, 1], got {self.least_macs} and {self.ramp}"
            )
        if self.events < 1 or not 0 < self.until <= 1:
            raise SettingError(
                "events must be at least 1 and until lie in (0, 1], got "
                f"{self.events} and {self.until}"
            )

    @classmethod
    def examples(cls) -> list[SuperTickets]:
        return [
            cls(sparsity=0.3, events=2),
            cls(sparsity=0.2, penalty=0.01, regrow=True, events=1),
        ]

    @classmethod
    def toy(cls) -> nn.Module:
        # running statistics would need more steps than a check has
        norms = [nn.BatchNorm1d(n, track_running_stats=False) for n in (16, 12)]
        with kept(0):
            return nn.Sequential(
                *(nn.Linear(5, 16), norms[0], nn.ReLU()),
                *(nn.Linear(16, 12), norms[1], nn.ReLU(), nn.Linear(12, 3)),
            )

    def sampler(self, space: Any, generator: torch.Generator) -> Sampler:
        return Ticket(self)

    def start(
        self,
        net: Network,
        optimizer: Optimizer,
        *rest: Any,
        loss: Loss,
        forward: Forward | None = None,
        generator: torch.Generator | None = None,
        options: StepOptions | None = None,
    ) -> SizesRun:
        """Begins training; see `SupernetRule.start`.

        Raises:
            UnsupportedModelError: No site's units have batch norms.
        """
        if not isinstance(net, Elastic):
            raise SettingError(
                f"{type(self).__name__} trains an elastic network, got {type(net).__name__}; "
                "make one with supple.elastic(model, example_inputs)"
            )
        source = torch.Generator().manual_seed(0) if generator is None else generator
        sampler = self.sampler(net.space, source)
        return SizesRun(
            net,
            optimizer,
            sampler,
            Search(loss, _penalties(net), sampler),
            forward=self.forward(net, forward or run_model),
            aggregate=self.aggregate,
            generator=source,
            options=options,
        )


@dataclass(frozen=True)
class Search:
    """The user's loss and a penalty on gains, so that units die where they earn little.

    Args:
        loss: `loss(output, batch) -> scalar`.
        penalties: Gains, each with the relative cost of one of its units.
        ticket: Whoever knows the present strength.
    """

    loss: Loss
    penalties: Sequence[tuple[Tensor, float]]
    ticket: Any
    teachers: frozenset[str] = frozenset()

    def __call__(self, entry: Pass, output: Any, batch: Any, earlier: Earlier) -> Tensor:
        """Gives the scalar to minimise."""
        total = self.loss(output, batch)
        for gain, cost in self.penalties:
            total = total + self.ticket.rho * cost * gain.abs().sum()
        return total


class Ticket(Sampler):
    """Trains the full network, and removes units and weights as the run goes on.

    Args:
        method: The settings.

    Attributes:
        rho: Strength of the penalty at the present step.
        masks: By parameter, 1 where it is kept; parameters that are whole are not in it.
    """

    def __init__(self, method: SuperTickets) -> None:
        self.method = method
        self.rho = 0.0
        self.masks: dict[str, Tensor] = {}

    def begin(self, run: SizesRun) -> None:
        """Prunes where it is time."""
        steps = run.options.steps
        if steps is None:
            raise SettingError("pruning by events needs the number of steps; pass steps=")
        method = self.method
        length = method.ramp * steps
        self.rho = method.penalty * (min(1.0, run.steps / length) if length else 1.0)
        times = [
            round(method.until * steps * k / method.events) for k in range(1, method.events + 1)
        ]
        # an event at the very end would come after the last step
        done = [k for k, time in enumerate(times, 1) if min(time, steps - 1) == run.steps]
        if done:
            self._prune(run, done[-1])

    def sample(self, step: int, steps: int | None) -> Sequence[Pass]:
        """Gives the one pass, of the full network."""
        return [Pass(None, "largest")]

    def observe(self, seen: Seen) -> None:
        """Keeps what was removed where it is: without gradients it does not move."""
        for name, parameter in _module(seen.net).named_parameters():
            if name in self.masks and parameter.grad is not None:
                parameter.grad.mul_(self.masks[name])

    def state_dict(self) -> dict[str, Any]:
        """Gives the masks."""
        return {"masks": dict(self.masks)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what `state_dict` gave."""
        self.masks = dict(state["masks"])

    @torch.no_grad()
    def _prune(self, run: SizesRun, event: int) -> None:
        net, method = run.net, self.method
        assert isinstance(net, Elastic)
        dead = _dead(net, method.threshold, method.least_macs)
        masks = _magnitude_masks(net, dead, method.sparsity * event / method.events)
        averages = {} if run.average is None else run.average.state_dict()["average"]
        for name, parameter in net.module.named_parameters():
            if name not in masks:
                continue
            parameter.mul_(masks[name])
            for moment in run.optimizer.state.get(parameter, {}).values():
                if isinstance(moment, Tensor) and moment.shape == parameter.shape:
                    moment.mul_(masks[name])
            if name in averages:
                averages[name].mul_(masks[name])
        self.masks = {} if method.regrow and event < method.events else masks


def surviving(net: Elastic) -> Config:
    """Puts units that are left first, and gives the smallest size that holds all of them.

    The full network computes the same as before.

    Args:
        net: An elastic network after training with `SuperTickets`.

    Returns:
        The size; its widths are the choices nearest above what is left.
    """
    alive = {
        name: torch.stack([gain != 0 for gain in gains]).any(0)
        for name, gains in _gains(net).items()
    }
    net.sort({name: left.to(torch.get_default_dtype()) for name, left in alive.items()})
    counts = {name: int(left.sum()) for name, left in alive.items()}
    chosen = {
        name: min(c for c in net.space.site(name).choices if c >= count)
        for name, count in counts.items()
    }
    return net.space.config(chosen)


def _gains(net: Elastic) -> dict[str, list[Tensor]]:
    """For each site whose units have batch norms, the gains of these."""
    modules = dict(net.module.named_modules())
    found: dict[str, list[Tensor]] = {}
    for site in net.space.sites:
        group = getattr(site, "group", None)
        for name, _ in () if group is None else group.members:
            path, _, leaf = name.rpartition(".")
            gain = net.module.get_parameter(name) if leaf == "weight" else None
            norm = isinstance(modules.get(path), nn.modules.batchnorm._NormBase)
            if gain is not None and norm and len(gain) == site.full:
                found.setdefault(site.name, []).append(gain)
    return found


def _unit_costs(net: Elastic) -> dict[str, float]:
    """Multiply-accumulates that one unit of a site costs, by site."""
    largest = net.space.largest()
    whole = float(net.costs(largest)["macs"][0])
    costs = {}
    for name in _gains(net):
        site = net.space.site(name)
        less = net.space.config({**largest, name: site.choices[0]})
        saved = whole - float(net.costs(less)["macs"][0])
        costs[name] = saved / (site.full - site.choices[0])
    return costs


def _penalties(net: Elastic) -> list[tuple[Tensor, float]]:
    costs, gains = _unit_costs(net), _gains(net)
    if not gains:
        raise UnsupportedModelError(
            f"no width of {type(net.module).__name__} has batch norms, whose gains say which "
            "units matter; make it elastic in widths that batch norms scale"
        )
    units = sum(len(each[0]) for each in gains.values())
    mean = sum(costs[name] * len(each[0]) for name, each in gains.items()) / units
    return [(gain, costs[name] / mean) for name, each in gains.items() for gain in each]


def _dead(net: Elastic, threshold: float, least: float) -> dict[str, Tensor]:
    """Units to be removed by site, down to a share of the full network's cost."""
    costs, gains = _unit_costs(net), _gains(net)
    strength = {name: torch.stack(each).abs().amax(0) for name, each in gains.items()}
    dead = {name: torch.zeros_like(s, dtype=torch.bool) for name, s in strength.items()}
    left = float(net.costs(net.space.largest())["macs"][0]) * (1 - least)
    weak = sorted(
        (value, name, unit)
        for name, values in strength.items()
        for unit, value in enumerate(values.tolist())
        if value < threshold
    )
    for _, name, unit in weak:
        keeps = len(dead[name]) - int(dead[name].sum()) - 1
        if costs[name] <= left and keeps >= net.space.site(name).choices[0]:
            dead[name][unit] = True
            left -= costs[name]
    return dead


def _magnitude_masks(
    net: Elastic, dead: dict[str, Tensor], sparsity: float
) -> dict[str, Tensor]:
    """What is kept: nothing of dead units, and of other weights those of largest magnitude."""
    parameters = dict(net.module.named_parameters())
    masks: dict[str, Tensor] = {}
    for name, units in dead.items():
        group: Any = getattr(net.space.site(name), "group", None)
        for member, dim in group.members:
            parameter = parameters.get(member)
            if parameter is None or not units.any() or parameter.shape[dim] != len(units):
                continue
            keep = masks.setdefault(member, torch.ones_like(parameter, dtype=torch.bool))
            keep.index_fill_(dim, units.nonzero().flatten(), False)
    weights = dict(_prunable(net.module))
    for name, weight in weights.items():
        masks.setdefault(name, torch.ones_like(weight, dtype=torch.bool))
    rest = torch.cat([weight.abs()[masks[name]] for name, weight in weights.items()])
    stays = torch.ones_like(rest, dtype=torch.bool)
    stays[rest.argsort(stable=True)[: round(len(rest) * sparsity)]] = False
    counts = [int(masks[name].sum()) for name in weights]
    for name, part in zip(weights, stays.split(counts), strict=True):
        masks[name].masked_scatter_(masks[name].clone(), part)
    return masks


def _prunable(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Weights that are pruned one by one: matrices and kernels, not biases and norms."""
    return ((name, p) for name, p in module.named_parameters() if p.dim() > 1)


def _module(net: Network | nn.Module) -> nn.Module:
    return net if isinstance(net, nn.Module) else net.module
