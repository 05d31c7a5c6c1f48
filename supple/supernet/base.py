"""The room of supernet training: what a method is made of, and the parts several share.

A method says which sizes each step trains (`sampler`), what each of them minimises
(`criterion`), how their gradients meet (`aggregate`), and what it suggests beside. It holds no
training code: `supple.training.step` runs what these values say.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from supple.axes.base import added
from supple.errors import SettingError
from supple.space import Config, IntArray, Randomness, Space, numpy_generator
from supple.technique import Rule
from supple.training.batches import Forward, Loss, run_model
from supple.training.losses import Criterion, Labels
from supple.training.schedule import Schedule
from supple.training.step import (
    Aggregation,
    Network,
    Pass,
    Sampler,
    Seen,
    SizesRun,
    StepOptions,
)

__all__ = [
    "BandSampler",
    "NestedSampler",
    "Phase",
    "PhasedSampler",
    "RandomSampler",
    "SandwichSampler",
    "SupernetRule",
    "nested_chain",
    "random_in_band",
]

Price = Callable[[IntArray], np.ndarray]
_DRAWN = 256  # configs priced at once: pricing costs about the same for one


@dataclass(frozen=True, kw_only=True)
class SupernetRule(Rule):
    """Trains the shared weights of an elastic network at several sizes.

    Args:
        aggregate: How the gradients of a step's passes meet on the shared weights: `sum`,
            `mean` over the passes, or `masked_mean` over the passes that used the element.
    """

    aggregate: Aggregation = "sum"

    def sampler(self, space: Space, generator: torch.Generator) -> Sampler:
        """Says which sizes each step trains; by default one at random.

        Args:
            space: The sizes there are.
            generator: The only source of randomness; equal on all ranks.

        Returns:
            The sampler of one run.
        """
        return RandomSampler(space, generator)

    def criterion(self, loss: Loss) -> Criterion:
        """Says what each role minimises; by default all of them the user's loss.

        Args:
            loss: `loss(output, batch) -> scalar`.

        Returns:
            The criterion of one run.
        """
        return Labels(loss)

    def forward(self, net: Network, forward: Forward) -> Forward:
        """Says how the network runs on a batch; by default as the user says.

        Args:
            net: The network that is going to be trained.
            forward: The user's `forward(model, batch) -> output`, or the default.

        Returns:
            What runs in each pass; losses and criteria get what it returns.
        """
        return forward

    def teachers(self, net: Network) -> Mapping[str, nn.Module]:
        """Gives frozen networks whose outputs criteria look at, by role; by default none.

        Args:
            net: The network that is going to be trained.

        Returns:
            Role -> module.
        """
        return {}

    def schedule(self) -> Schedule | None:
        """Suggests how the learning rate goes, for users who don't say; by default constant."""
        return None

    def adapt(self, net: Network) -> None:
        """Gives the network what the method needs beside its weights (`Elastic.share`).

        `start` calls it, also before a run that resumes: doing it twice changes nothing more.
        Parameters that it adds join the optimizer.

        Args:
            net: The network that is going to be trained.
        """

    def prepare(self, net: Network) -> None:
        """Changes the weights before training from scratch, where the method asks for it.

        `supple.train` calls it before a run that does not resume.

        Args:
            net: The network that is going to be trained.
        """

    def start(
        self,
        net: Network,
        optimizer: Optimizer,
        *_: Any,
        loss: Loss,
        forward: Forward | None = None,
        generator: torch.Generator | None = None,
        options: StepOptions | None = None,
    ) -> SizesRun:
        """Begins training.

        Args:
            net: What `supple.elastic` gives.
            optimizer: Over the parameters of `net.module`.
            loss: `loss(output, batch) -> scalar`.
            forward: `forward(model, batch) -> output`; by default by the batch's type.
            generator: For sampling sizes, equal on all ranks; by default seeded with 0.
            options: Clipping, precision, schedule, average.

        Returns:
            A run with `step(batch) -> losses by role`, `state_dict` and `load_state_dict`.

        Raises:
            SettingError: `net` is a plain module, or a value can't be used.
        """
        if isinstance(net, nn.Module):
            raise SettingError(
                f"{type(self).__name__} trains an elastic network, got a plain "
                f"{type(net).__name__}; make one with supple.elastic(model, example_inputs)"
            )
        source = torch.Generator().manual_seed(0) if generator is None else generator
        self.adapt(net)
        _join(net.module, optimizer)
        return SizesRun(
            net,
            optimizer,
            self.sampler(net.space, source),
            self.criterion(loss),
            forward=self.forward(net, forward or run_model),
            aggregate=self.aggregate,
            generator=source,
            teachers=self.teachers(net),
            options=options,
        )


def _join(module: nn.Module, optimizer: Optimizer) -> None:
    """Puts parameters that were added after the optimizer was made into one of its groups."""
    groups = optimizer.param_groups
    held = {id(p) for group in groups for p in group["params"]}
    for name, parameter in module.named_parameters():
        if added(name) and parameter.requires_grad and id(parameter) not in held:
            decayed = parameter.dim() > 1
            alike = [g for g in groups if any((p.dim() > 1) == decayed for p in g["params"])]
            (alike or groups)[0]["params"].append(parameter)


@dataclass(frozen=True)
class RandomSampler(Sampler):
    """Trains uniformly random sizes, independent of one another.

    Args:
        space: The sizes there are.
        generator: Source of randomness.
        count: How many a step trains, at least 1.
        shared: Whether each sees its own part of the batch, or all of them the whole of it.
    """

    space: Space
    generator: torch.Generator
    count: int = 1
    shared: bool = False

    def sample(self, step: int, steps: int | None) -> Sequence[Pass]:
        """Gives the passes of a step, all in role `random`."""
        parts = self.count if self.shared else 1
        return [
            Pass(self.space.random(self.generator), "random", part=i % parts, parts=parts)
            for i in range(self.count)
        ]


@dataclass(frozen=True)
class SandwichSampler(Sampler):
    """Trains the largest size, the smallest, and random ones between: the sandwich rule.

    The largest comes first, so that others can learn from its output.

    Args:
        space: The sizes there are.
        generator: Source of randomness.
        count: How many random sizes, at least 0.
        regularise_all: Whether dropout is on in all passes, or in the largest's only.
        weight: Of the gradients of all but the largest.
    """

    space: Space
    generator: torch.Generator
    count: int = 2
    regularise_all: bool = False
    weight: float = 1.0

    def sample(self, step: int, steps: int | None) -> Sequence[Pass]:
        """Gives the passes of a step in roles `largest`, `smallest` and `random`."""
        others = [("smallest", self.space.smallest())]
        others += [("random", self.space.random(self.generator)) for _ in range(self.count)]
        return [
            Pass(self.space.largest(), "largest"),
            *(
                Pass(config, role, weight=self.weight, regularise=self.regularise_all)
                for role, config in others
            ),
        ]


@dataclass(frozen=True)
class NestedSampler(Sampler):
    """Trains sizes of a nested chain, drawn uniformly, each on its own part of the batch.

    Args:
        chain: The sizes, smallest first.
        generator: Source of randomness.
        count: How many are drawn in a step, at least 1.
    """

    chain: Sequence[Config]
    generator: torch.Generator
    count: int = 1

    def sample(self, step: int, steps: int | None) -> Sequence[Pass]:
        """Gives the passes of a step; the role `nested-3` is the fourth size of the chain."""
        drawn: list[int] = torch.randint(
            len(self.chain), (self.count,), generator=self.generator
        ).tolist()
        return [
            Pass(self.chain[index], f"nested-{index}", part=part, parts=self.count)
            for part, index in enumerate(drawn)
        ]


class BandSampler(Sampler):
    """Trains random sizes of chosen costs: first a band of costs is drawn, then a size in it.

    Uniform sampling of sizes piles up at middling costs; uniform sampling of bands does not.
    A method that prefers some bands overrides `probabilities`.

    Args:
        space: The sizes there are.
        generator: Source of randomness.
        bands: How many bands of equal width the costs from the smallest size to the largest
            fall into, at least 1.
        count: How many sizes a step trains, at least 1, each of a band of its own.
        cost: One of the costs that `net.costs` gives.
    """

    def __init__(
        self,
        space: Space,
        generator: torch.Generator,
        bands: int = 5,
        count: int = 1,
        cost: str = "macs",
    ) -> None:
        if bands < 1 or count < 1:
            raise SettingError(f"bands and count must be at least 1, got {bands} and {count}")
        self.space, self.generator, self.bands, self.count = space, generator, bands, count
        self.cost = cost
        self._price: Price | None = None
        self._edges = np.zeros(bands + 1)

    def begin(self, run: SizesRun) -> None:
        """Learns the costs from the run's network."""
        if self._price is not None:
            return
        net: Any = run.net
        own = self.space is net.space  # else encoded otherwise
        decode = (lambda rows: rows) if own else self.space.decode_many
        self._price = lambda rows: net.costs(decode(rows))[self.cost]
        ends = self._price(
            self.space.encode_many([self.space.smallest(), self.space.largest()])
        )
        self._edges = np.linspace(float(min(ends)), float(max(ends)), self.bands + 1)

    def probabilities(self, step: int, steps: int | None) -> np.ndarray:
        """Gives the probability of each band; by default all have the same.

        Args:
            step: Counted from 0.
            steps: How many there will be, None where that is open.

        Returns:
            Shape (bands,), with the sum 1.
        """
        return np.full(self.bands, 1 / self.bands)

    def sample(self, step: int, steps: int | None) -> Sequence[Pass]:
        """Gives the passes of a step; the role `band-0` is the cheapest band's."""
        assert self._price is not None, "a run begins each step before it samples"
        random = numpy_generator(self.generator)
        drawn = random.choice(self.bands, self.count, p=self.probabilities(step, steps))
        edges: list[float] = self._edges.tolist()
        return [
            Pass(
                random_in_band(self.space, self._price, edges[band], edges[band + 1], random),
                f"band-{band}",
            )
            for band in drawn.tolist()
        ]


def random_in_band(
    space: Space,
    price: Price,
    low: float,
    high: float,
    generator: Randomness,
    tries: int = 50,
) -> Config:
    """Draws a random config whose cost lies between two values.

    Uniform draws come first. Where none of them lies in the band (it may be thin), the
    nearest is moved step by step: of its random mutations, the one nearest to the band is next.

    Args:
        space: The sizes there are.
        price: Costs of encoded configs of this space, (n, sites) -> (n,).
        low: The lowest cost.
        high: The highest.
        generator: Source of randomness.
        tries: Rounds of moves, at least 0.

    Returns:
        A config.

    Raises:
        SettingError: None was found; the message tells the nearest cost.

    Example:
        >>> from supple.space import Site
        >>> space = Space([Site("a", "width", (1, 2, 3, 4), 4), Site("b", "width", (1, 2), 2)])
        >>> cost = lambda rows: space.choices_of(rows).sum(1)
        >>> config = random_in_band(space, cost, 6, 6, 0)
        >>> sum(config.values())
        6
    """
    random = numpy_generator(generator)
    rows = space.random_many(_DRAWN, random)
    for _ in range(tries + 1):
        costs = np.asarray(price(rows), dtype=np.float64)
        away = np.maximum(np.maximum(low - costs, costs - high), 0.0)
        nearest = int(away.argmin())
        if not away[nearest]:
            return space.decode(rows[random.choice(np.flatnonzero(away == 0))])
        best = space.decode(rows[nearest])
        moved = [space.mutate(best, random, 2 / len(space)) for _ in range(_DRAWN // 4)]
        rows = space.encode_many([best, *moved])
    raise SettingError(
        f"no size with a cost from {low:g} to {high:g} was found in {tries} rounds; the "
        f"nearest costs {costs[nearest]:g}: widen the band, or offer more choices"
    )


def nested_chain(space: Space, levels: int | None = None) -> list[Config]:
    """Gives sizes from the smallest to the largest, each containing the one before.

    Level $i$ of $n$ takes at every site the choice at the same fraction $i / (n - 1)$ of the
    way, up to the site's full choice.

    Args:
        space: The sizes there are.
        levels: $n$, at least 2; None for as many as the site with most choices has.

    Returns:
        Distinct configs, smallest first; fewer than `levels` where some coincide.

    Raises:
        SettingError: `levels` is below 2.

    Example:
        >>> from supple.space import Site
        >>> space = Space([Site("a", "width", (2, 4, 8), 8), Site("b", "depth", (0, 1), 1)])
        >>> [dict(config) for config in nested_chain(space)]
        [{'a': 2, 'b': 0}, {'a': 4, 'b': 1}, {'a': 8, 'b': 1}]
    """
    offered = [site.choices[: site.choices.index(site.full) + 1] for site in space.sites]
    if levels is None:
        levels = max([2, *map(len, offered)])
    if levels < 2:
        raise SettingError(f"levels must be at least 2, got {levels}")
    chain: dict[Config, None] = {}
    for level in range(levels):
        picked = {
            # Rounded to the nearest choice, halves up.
            site.name: choices[(2 * (len(choices) - 1) * level // (levels - 1) + 1) // 2]
            for site, choices in zip(space.sites, offered, strict=True)
        }
        chain[space.config(picked)] = None
    return list(chain)


@dataclass(frozen=True)
class Phase:
    """A stretch of a run with its own sampler.

    Args:
        share: How long it is, relative to the other phases, above 0.
        sampler: Who samples then.
        schedule: Learning rate relative to the run's, by `(step, steps)` of the phase; None
            leaves it to the run's schedule.
        enter: Called once as `enter(run)` before the phase's first step, also where the phase
            is too short for a step. What it does must depend on nothing but the run and what
            the phase is made of, as a resumed run does not call it again.
    """

    share: float
    sampler: Sampler
    schedule: Schedule | None = None
    enter: Callable[[SizesRun], None] | None = None


class PhasedSampler(Sampler):
    """Hands over from one sampler to the next as the run goes on, as in progressive shrinking.

    Args:
        phases: In order, at least one.

    Raises:
        SettingError: There is no phase, or a share is not above 0.
    """

    def __init__(self, phases: Sequence[Phase]) -> None:
        if not phases or min(phase.share for phase in phases) <= 0:
            raise SettingError(
                f"phases must be at least one, with shares above 0, got {list(phases)}"
            )
        self.phases = tuple(phases)
        self._now = phases[0].sampler
        self._entered = 0  # how many phases were

    def begin(self, run: SizesRun) -> None:
        """Enters the phase that the step lies in, and all before it."""
        index, *_ = self._at(run.steps, run.options.steps)
        while self._entered <= index:
            phase = self.phases[self._entered]
            self._entered += 1
            if phase.enter is not None:
                phase.enter(run)
        self.phases[index].sampler.begin(run)

    def rate(self, step: int, steps: int | None) -> float | None:
        """Gives the rate of the phase, on top of the phase's sampler's."""
        index, first, length = self._at(step, steps)
        phase = self.phases[index]
        rate = phase.sampler.rate(step, steps)
        if all(phase.schedule is None for phase in self.phases):
            return rate
        own = 1.0 if phase.schedule is None else phase.schedule(step - first, length)
        return own if rate is None else own * rate

    def sample(self, step: int, steps: int | None) -> Sequence[Pass]:
        """Gives the passes of the phase that the step lies in."""
        self._now = self.phases[self._at(step, steps)[0]].sampler
        return self._now.sample(step, steps)

    def observe(self, seen: Seen) -> None:
        """Tells the present phase's sampler."""
        self._now.observe(seen)

    def state_dict(self) -> dict[str, Any]:
        """Gives what the samplers have learned, and which phases were entered."""
        samplers = [phase.sampler.state_dict() for phase in self.phases]
        return {"phases": samplers, "entered": self._entered}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what `state_dict` gave."""
        self._entered = state["entered"]
        for phase, one in zip(self.phases, state["phases"], strict=True):
            phase.sampler.load_state_dict(one)

    def _at(self, step: int, steps: int | None) -> tuple[int, int, int]:
        """The phase in which a step lies, its first step and how many it has."""
        if steps is None:
            raise SettingError("phases need to know the number of steps; pass steps=")
        shares = list(itertools.accumulate(phase.share for phase in self.phases))
        ends = [round(share / shares[-1] * steps) for share in shares]
        last = len(ends) - 1
        index = next((i for i, end in enumerate(ends) if step < end), last)
        first = ends[index - 1] if index else 0
        return index, first, max(1, ends[index] - first)
