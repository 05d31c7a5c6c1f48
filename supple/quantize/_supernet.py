"""What rules that train a network at many numbers of bits have in common."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from supple.axes.bits import Bits, BitsSite, Weight
from supple.calibrate import statistics
from supple.errors import SettingError
from supple.network import Elastic
from supple.observers import RANGES, RangeObserver
from supple.space import Config, Randomness, Space, numpy_generator
from supple.technique import Rule
from supple.training.batches import Forward, Loss, run_model
from supple.training.losses import Criterion, Labels
from supple.training.step import Aggregation, Network, Pass, Sampler, SizesRun, StepOptions

__all__ = ["BitsRule", "BitsSampler", "RandomBits", "bits_axis", "fit_steps"]


def bits_axis(net: Any) -> Bits:
    """Gives the axis of bits that a network has.

    Args:
        net: What `supple.elastic` gave.

    Raises:
        SettingError: It has none, or is no elastic network.
    """
    found = [axis for axis in getattr(net, "axes", ()) if isinstance(axis, Bits)]
    if not found:
        raise SettingError(
            f"a {type(net).__name__} has no bits that vary: make it elastic with "
            "supple.elastic(model, x, axes=[supple.axes.bits.Bits(...)])"
        )
    return found[0]


@dataclass(frozen=True, kw_only=True)
class BitsRule(Rule):
    """Trains the shared weights of a network whose bits are elastic at several sizes.

    Args:
        aggregate: How the gradients of a step's passes meet on the shared weights: `sum`,
            `mean` over the passes, or `masked_mean` over the passes that used the element.
    """

    aggregate: Aggregation = "sum"

    def sampler(self, net: Elastic, generator: torch.Generator) -> Sampler:
        """Says which sizes each step trains: by default one at random.

        Args:
            net: The network.
            generator: The only source of randomness.
        """
        return RandomBits(net, generator)

    def criterion(self, net: Elastic, loss: Loss) -> Criterion:
        """Says what each role minimises: by default all of them the user's loss.

        Args:
            net: The network.
            loss: `loss(output, batch) -> scalar`.
        """
        return Labels(loss)

    def adapt(self, net: Elastic) -> None:
        """Is called when a run begins, also one that resumes.

        Args:
            net: The network.
        """

    def prepare(self, net: Elastic) -> None:
        """Is called by `supple.train` before a run that does not resume.

        Args:
            net: The network.
        """

    def start(
        self,
        net: Network | nn.Module,
        optimizer: Optimizer,
        *_: Any,
        loss: Loss,
        forward: Forward | None = None,
        generator: torch.Generator | None = None,
        options: StepOptions | None = None,
    ) -> SizesRun:
        """Begins training.

        Args:
            net: An elastic network with an axis of bits.
            optimizer: Over the parameters of `net.module`.
            loss: `loss(output, batch) -> scalar`.
            forward: `forward(model, batch) -> output`; by default by the batch's type.
            generator: For sampling sizes; by default seeded with 0.
            options: Clipping, precision, schedule, average.

        Returns:
            A run with `step(batch) -> losses by role`, `state_dict` and `load_state_dict`.

        Raises:
            SettingError: The network has no axis of bits.
        """
        bits_axis(net)
        assert isinstance(net, Elastic)
        self.adapt(net)
        source = torch.Generator().manual_seed(0) if generator is None else generator
        return SizesRun(
            net,
            optimizer,
            self.sampler(net, source),
            self.criterion(net, loss),
            forward=forward or run_model,
            aggregate=self.aggregate,
            generator=source,
            options=options,
        )


class BitsSampler(Sampler):
    """Draws sizes of a network whose bits vary, of which none leaves numbers as they are.

    Args:
        net: The network.
        generator: Source of randomness.
    """

    def __init__(self, net: Elastic, generator: torch.Generator) -> None:
        self.space, self.generator = net.space, generator
        self.rounded = rounded_space(net)

    def random(self) -> Config:
        """Gives a size at random."""
        return self.rounded.random(self.generator)


class RandomBits(BitsSampler):
    """Trains one random size a step."""

    def sample(self, step: int, steps: int | None) -> Sequence[Pass]:
        """Gives the one pass."""
        return (Pass(self.random(), "random"),)


def rounded_space(net: Elastic) -> Space:
    """Gives the sizes of a network at which everything that can be rounded is.

    Args:
        net: The network.
    """
    offered = {s.name: s.choices[:-1] for s in net.space.sites if isinstance(s, BitsSite)}
    return net.space.subspace(offered)


def of_bits(
    net: Elastic, generator: Randomness, *, most: bool, kept: Collection[str] = ()
) -> Config:
    """Gives the size with the most, or the fewest, bits everywhere, in random modes.

    Args:
        net: The network.
        generator: For modes.
        most: Whether bits are to be the most; sites of other axes are then full, else smallest.
        kept: Names of sites that have the most bits in any case.
    """
    axis, source = bits_axis(net), numpy_generator(generator)
    chosen: dict[str, int] = {}
    for site in net.space.sites:
        if not isinstance(site, BitsSite):
            chosen[site.name] = site.full if most else site.choices[0]
            continue
        rounded = site.choices[:-1]
        end = rounded[-1] if most or site.name in kept else rounded[0]
        bits = axis.told(end, site.input)[0]
        alike = [c for c in rounded if axis.told(c, site.input)[0] == bits]
        chosen[site.name] = int(source.choice(alike))
    return net.space.config(chosen)


@torch.no_grad()
def fit_steps(net: Elastic, data: Iterable[Any] | None = None) -> None:
    """Sets learned steps, and zero points, to those that round what they see best.

    Each choice's range is searched over 80 ranges for the least error to the power of 2.4.

    Args:
        net: A network with `Bits(learned=True)`.
        data: Batches that layers' inputs are looked at on; by default the network's example
            inputs.
    """
    axis = bits_axis(net)
    parameters = dict(net.module.named_parameters())
    sites = [site for site in net.space.sites if isinstance(site, BitsSite)]
    seen = _ranges(net, [site for site in sites if site.input], data)
    for site in sites:
        for choice in site.choices[:-1]:
            patch = axis.patch(site, choice)
            if site.input:
                way: Any = patch.rounded_inputs[site.path]
                values = seen[site.path, choice]
            else:
                (name, way), *_ = patch.rounded.items()
                values = _best(way, parameters[name])
            for parameter, value in zip(way.parameters, values, strict=True):
                parameters[parameter].copy_(value.flatten())


def _best(way: Weight, weight: Tensor) -> tuple[Tensor, ...]:
    scale, zero = way.spec.scales(way.matrix(weight), RANGES["mse"])
    return (scale,) if zero is None else (scale, zero)


def _ranges(
    net: Elastic, sites: Sequence[BitsSite], data: Iterable[Any] | None
) -> Mapping[tuple[str, int], tuple[Tensor, ...]]:
    """Gives scale and zero point by the path of a layer and choice."""
    if not sites:
        return {}
    axis = bits_axis(net)
    specs = {
        str(choice): axis.patch(site, choice).rounded_inputs[site.path].spec  # type: ignore[attr-defined]
        for site in sites
        for choice in site.choices[:-1]
    }
    watch = {name: partial(RangeObserver, spec, "mse") for name, spec in specs.items()}
    forward = run_model if data is not None else lambda m, _: m(*net.args, **net.kwargs)
    batches = [None] if data is None else data
    found = statistics(net.module, batches, list(watch), forward=forward, observers=watch)
    return {
        (path, int(name)): tuple(value for value in one[name] if value is not None)
        for path, one in ((n.rpartition(".")[0], one) for n, one in found.items())
        for name in watch
    }
