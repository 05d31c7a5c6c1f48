"""Adapters for every number of bits, all fine-tuned in one run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch
from scipy.optimize import brentq
from torch import nn

from supple.axes.adapted_bits import AdaptedBits, AdaptedWeight
from supple.axes.bits import BitsSite
from supple.calibrate import statistics
from supple.errors import SettingError
from supple.network import Elastic, elastic
from supple.quantize._solvers import gptq
from supple.quantize._supernet import BitsRule, BitsSampler, bits_axis
from supple.space import Config, numpy_generator
from supple.technique import register
from supple.training.step import Pass, Sampler

__all__ = ["OneQuantLLM", "leaning"]

_STEEPEST = 700.0  # beyond, an exponential is no number
_TRAINED = ("supple_weight_up", "supple_weight_down")


@register(title="One QuantLLM for all", paper="arXiv:2405.20202")
@dataclass(frozen=True, kw_only=True)
class OneQuantLLM(BitsRule):
    r"""Fine-tunes a quantized network once for all mixtures of bits.

    The network is elastic along `AdaptedBits`: each layer has frozen codes for each number of
    bits, and a low-rank adapter for each, so that no size disturbs another. Only adapters are
    trained: everything else is frozen when a run begins. Each step trains one size.

    Layers that draw their bits uniformly have nearly always the same number on average, so
    the smallest and the largest sizes would starve. Here the mean moves: it stays `every`
    steps at a level, goes up from the fewest bits to the most over `levels` levels, evenly
    spaced, and down again. At a mean $m$, layers draw bits independently with
    $p(b) \propto e^{\lambda b}$, where $\lambda$ gives the mean $m$: nothing is learned, and of
    all distributions with that mean it prefers least.

    Codes are the nearest ones unless `quantize` finds better ones by GPTQ first. What is
    extracted holds codes alone: adapters are in the zero points.

    Args:
        aggregate: How the gradients of a step's passes meet: `sum`, `mean` or `masked_mean`.
        every: Steps after which the mean moves on, at least 1.
        levels: How many means there are, at least 2.
        balanced: Whether the mean moves; else bits are drawn uniformly.

    Example:
        ```python
        net = supple.elastic(model, x, axes=[AdaptedBits((2, 3, 4), group_size=32)])
        method = OneQuantLLM()
        method.quantize(net, calibration)
        supple.train(net, loader, loss, method=method, lr=1e-3, steps=1000)
        front = supple.pareto(net, evaluate, objectives={"loss": "min"}, costs="weight_bytes")
        ```

    Source:
        Yi et al. 2024, "One QuantLLM for ALL: Fine-tuning Quantized LLMs Once for Efficient
        Deployments" (LLM-QFA), arXiv:2405.20202; no code was published.
    Differs:
        The paper draws bits from mixtures whose mean follows a schedule and says neither
        their form nor all settings: an exponential family and a triangle are ours. Codes of
        GPTQ come from statistics of the network before, for all layers at once.
    Checked:
        The distribution's mean; means that a run visits; codes against GPTQ by itself; that
        nothing but the adapters of the sizes in a step changes.
    """

    distinguishing: ClassVar[str] = "sampler"
    skips: ClassVar[dict[str, str]] = {
        "check_rule_learns": "the full network's weights are frozen: it stays as it is"
    }

    every: int = 8
    levels: int = 9
    balanced: bool = True

    def __post_init__(self) -> None:
        for name, least in (("every", 1), ("levels", 2)):
            if getattr(self, name) < least:
                raise SettingError(
                    f"{name} must be at least {least}, got {getattr(self, name)}"
                )

    @classmethod
    def examples(cls) -> list[OneQuantLLM]:
        """Gives one whose mean moves fast."""
        return [cls(every=1, levels=3)]

    @classmethod
    def toy(cls) -> Elastic:
        """Gives a small network with adapters."""
        source = torch.Generator().manual_seed(1)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))
            for parameter in model.parameters():
                parameter.uniform_(-0.5, 0.5, generator=source)
        axis = AdaptedBits((2, 4), group_size=3, rank=2)
        return elastic(model.train(), (torch.ones(2, 5),), axes=[axis], verify=False)

    def sampler(self, net: Elastic, generator: torch.Generator) -> Sampler:
        if not self.balanced:
            return super().sampler(net, generator)
        return _Moving(net, generator, self)

    def adapt(self, net: Elastic) -> None:
        """Freezes everything but the adapters.

        Args:
            net: The network.

        Raises:
            SettingError: It has no adapters.
        """
        self._axis(net)
        for name, parameter in net.module.named_parameters():
            leaf = name.rpartition(".")[2]
            parameter.requires_grad_(
                leaf.startswith(("supple_weight_up", "supple_weight_down"))
            )

    @torch.no_grad()
    def quantize(self, net: Elastic, calibration: Iterable[Any], *, damp: float = 0.01) -> None:
        """Finds the codes of all numbers of bits by GPTQ.

        Args:
            net: The network, before it is trained.
            calibration: Batches to gather statistics of layers' inputs from.
            damp: Share of the mean of the Hessian's diagonal that is added to it.
        """
        axis = self._axis(net)
        parameters = dict(net.module.named_parameters())
        seen = statistics(net.module, calibration, ["gram"])
        for site in net.space.sites:
            if not isinstance(site, BitsSite) or site.input:
                continue
            for choice in site.choices[:-1]:
                (name, way), *_ = axis.patch(site, choice).rounded.items()
                assert isinstance(way, AdaptedWeight)
                matrix = way.matrix(parameters[name])
                found = gptq(matrix, seen[name].gram, way.spec, damp=damp)
                assert found.zero is not None
                for held, value in zip(
                    way.parameters, (found.codes, found.scale, found.zero), strict=False
                ):
                    parameters[held].copy_(value)

    @staticmethod
    def _axis(net: Elastic) -> AdaptedBits:
        axis = bits_axis(net)
        if not isinstance(axis, AdaptedBits):
            raise SettingError(
                "OneQuantLLM trains adapters, of which this network has none: make it elastic "
                "with axes=[supple.axes.adapted_bits.AdaptedBits(...)]"
            )
        return axis


class _Moving(BitsSampler):
    """Random sizes whose mean number of bits goes up and down."""

    def __init__(self, net: Elastic, generator: torch.Generator, method: OneQuantLLM) -> None:
        super().__init__(net, generator)
        self.net, self.method = net, method

    def sample(self, step: int, steps: int | None) -> Sequence[Pass]:
        """Gives the one pass, in role `moving`."""
        return (Pass(self.around(self.place(step)), "moving"),)

    def place(self, step: int) -> float:
        """Gives where between the fewest bits, 0, and the most, 1, the mean is."""
        top = self.method.levels - 1
        turn = step // self.method.every % (2 * top)
        return min(turn, 2 * top - turn) / top

    def around(self, place: float) -> Config:
        """Draws a size whose bits have such a mean."""
        source = numpy_generator(self.generator)
        drawn = dict(self.rounded.random(self.generator))
        for site in self.net.space.sites:
            if isinstance(site, BitsSite) and site.name in drawn:
                bits = site.choices[:-1]
                drawn[site.name] = int(source.choice(bits, p=_leaning(bits, place)))
        return self.net.space.config(drawn)


@lru_cache
def _leaning(bits: tuple[int, ...], place: float) -> np.ndarray:
    return leaning(np.array(bits, dtype=np.float64), bits[0] + place * (bits[-1] - bits[0]))


def leaning(values: np.ndarray, mean: float) -> np.ndarray:
    r"""Gives probabilities $p(v) \propto e^{\lambda v}$ with a given mean.

    Args:
        values: Ascending.
        mean: From the least value to the most.

    Returns:
        Shape of `values`, with the sum 1.

    Example:
        >>> leaning(np.array([2.0, 3.0, 4.0]), 3.0).round(3).tolist()
        [0.333, 0.333, 0.333]
        >>> leaning(np.array([2.0, 3.0, 4.0]), 4.0).round(3).tolist()
        [0.0, 0.0, 1.0]
    """
    span = float(values[-1] - values[0])
    if not span:
        return np.ones(1)
    scaled = (values - values[0]) / span
    wanted = (mean - float(values[0])) / span

    def weights_of(lean: float) -> np.ndarray:
        return np.exp(lean * scaled - max(lean, 0.0))

    def missed(lean: float) -> float:
        weights = weights_of(lean)
        return float(weights @ scaled / weights.sum()) - wanted

    if missed(-_STEEPEST) < 0 < missed(_STEEPEST):
        weights = weights_of(brentq(missed, -_STEEPEST, _STEEPEST, xtol=1e-12))
    else:  # the least value, or the most
        weights = (scaled == round(wanted)).astype(np.float64)
    found: np.ndarray = weights / math.fsum(weights)
    return found
