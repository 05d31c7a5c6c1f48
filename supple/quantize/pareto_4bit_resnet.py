"""What a MAC of fewer bits buys: networks of several sizes, each trained at several bits."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import numpy as np
from torch import Tensor, nn

from supple.calibrate import statistics
from supple.cost.count import params
from supple.errors import SettingError, nearest
from supple.layers.delayed_rounding import DelayedRounding
from supple.quantize._aqt import AQT
from supple.quantize._qat import wrapped
from supple.quantize.base import MOST_BITS
from supple.study.indicators import hypervolume, non_dominated
from supple.technique import Study, register
from supple.weights import matrices

__all__ = ["Frontier", "Pareto4bitResNet", "Point", "compute_cost"]

BitCost = Literal["linear", "quadratic"]


@dataclass(frozen=True)
class Point:
    """A network of some size at some number of bits.

    Args:
        size: What was given to `build`.
        bits: Of weights and inputs of all layers but the first and the last.
        quality: What `evaluate` gave.
        cost: Multiply-accumulates for the example, each as a share of one with 16 bits.
        bytes: Of weights at their bits, and of all other parameters at 16 bits.
    """

    size: Any
    bits: int
    quality: float
    cost: float
    bytes: float


@dataclass(frozen=True)
class Frontier:
    """All networks of a study.

    Args:
        points: By size, then by bits.

    Example:
        >>> points = (Point(8, 16, 0.9, 4.0, 2.0), Point(16, 4, 0.95, 4.0, 2.0))
        >>> table = Frontier((*points, Point(8, 4, 0.8, 1.0, 0.5)))
        >>> [(one.size, one.bits) for one in table.front()], round(table.margins(16, 4)[8], 2)
        ([(16, 4), (8, 4)], 0.05)
    """

    points: tuple[Point, ...]

    def of(self, *bits: int) -> list[Point]:
        """Gives the networks of some numbers of bits."""
        return [point for point in self.points if point.bits in bits]

    def front(self) -> list[Point]:
        """Gives the networks that none of at most their cost is better than."""
        values = np.array([[point.cost, -point.quality] for point in self.points])
        return [self.points[place] for place in non_dominated(values)]

    def margins(self, bits: int, *others: int) -> dict[Any, float]:
        """Tells how much better others are at no more cost.

        Args:
            bits: Of the networks that are compared.
            *others: Bits of those that they are compared with.

        Returns:
            Size to the best quality among the others that cost no more, less its own; minus
            infinity where there are none.
        """
        return {
            point.size: max(
                (one.quality for one in self.of(*others) if one.cost <= point.cost),
                default=float("-inf"),
            )
            - point.quality
            for point in self.of(bits)
        }

    def hypervolume(self, bits: int, floor: float) -> float:
        """Gives what the networks of some bits dominate, by the logarithm of the cost.

        Args:
            bits: Of the networks.
            floor: Quality from which on it counts.

        Returns:
            The volume below twice the highest cost of all and above the floor.
        """
        values = np.array([[np.log2(one.cost), -one.quality] for one in self.of(bits)])
        highest = np.log2(max(point.cost for point in self.points)) + 1
        return hypervolume(values, [highest, -floor])


@register(title="Pareto-optimal bits of a residual network", paper="arXiv:2105.03536")
@dataclass(frozen=True, kw_only=True)
class Pareto4bitResNet(Study):
    r"""Trains networks of several sizes at several numbers of bits, and prices them alike.

    A MAC of whole numbers of few bits is cheaper, so the question is not what a network loses
    at 4 bits, but whether a larger one at 4 bits is better than a smaller one at 16 that costs
    as much. Each size is trained at each number of bits in the same way: weights are rounded
    from the start by the largest magnitude of each output, inputs after a share of the steps,
    by a bound that then stays; the first and the last layer have more bits.

    The cost is $\sum_l \text{MACs}_l\,c(b_l) / c(16)$ over linear layers and convolutions. With
    `"linear"`, $c(b)$ is $b$ rounded up to 4, 8 or 16, as on hardware that has such units; with
    `"quadratic"`, $b^2$, the area of a multiplier.

    Args:
        bits: Numbers of bits, of weights and inputs alike; 16 stands for no rounding.
        edges: Least bits of the first and the last layer.
        delay: Share of the steps before inputs are rounded, in [0, 1).
        cost: What a MAC costs: `"linear"` or `"quadratic"`.
        qat: Whether networks are trained with rounding; else they are rounded afterwards.

    Example:
        >>> import torch
        >>> def build(width):
        ...     layers = nn.Linear(2, width), nn.Linear(width, width), nn.Linear(width, 2)
        ...     return nn.Sequential(*layers)
        >>> table = Pareto4bitResNet(bits=(16, 4)).run(
        ...     build, [4, 8], lambda net, method: None, lambda net: 0.5, (torch.ones(1, 2),)
        ... )
        >>> [(one.size, one.bits, one.cost) for one in table.points]
        [(4, 16, 32.0), (4, 4, 12.0), (8, 16, 96.0), (8, 4, 32.0)]

    Source:
        Abdolrashidi et al. 2021, "Pareto-Optimal Quantized ResNet Is Mostly 4-bit",
        arXiv:2105.03536; google-research/aqt, `compute_cost_utils.py` for the costs.
    Differs:
        Networks of 16 bits are trained in the precision that they are built in, not bfloat16.
        Adding residuals, norms and activation functions cost nothing, as in the authors' table.
        The bound of inputs is the average of the batches' largest magnitudes, their setting for
        these networks; their mixtures with mean and deviation are left out.
    Checked:
        Costs by hand; when inputs begin to be rounded, and that bounds stay; margins, front and
        volume by hand.
    """

    distinguishing: ClassVar[str] = "run"

    bits: tuple[int, ...] = (16, 8, 4, 2)
    edges: int = 8
    delay: float = 0.2
    cost: BitCost = "linear"
    qat: bool = True

    def __post_init__(self) -> None:
        if not self.bits or len(set(self.bits)) < len(self.bits):
            raise SettingError(f"bits must be different numbers, got {self.bits}")
        if self.cost not in get_args(BitCost):
            raise SettingError(
                f"cost must be one of {', '.join(get_args(BitCost))}, got {self.cost!r}"
                f"{nearest(str(self.cost), get_args(BitCost))}"
            )
        for bits in self.bits:
            self._rule(bits)

    @classmethod
    def examples(cls) -> list[Pareto4bitResNet]:
        """Gives both ways to price and to round."""
        return [cls(), cls(bits=(16, 3), cost="quadratic", qat=False)]

    def _rule(self, bits: int) -> AQT:
        return AQT(bits=bits, activations=bits, edges=self.edges, delay=self.delay)

    def run(
        self,
        build: Callable[[Any], nn.Module],
        sizes: Sequence[Any],
        train: Callable[[nn.Module, AQT | None], Any],
        evaluate: Callable[[nn.Module], float],
        args: Sequence[Any],
        kwargs: Mapping[str, Any] | None = None,
    ) -> Frontier:
        """Trains all networks.

        Args:
            build: Makes a network of a size; the same one whenever it is asked.
            sizes: What it is given.
            train: `train(net, method)` trains a network in place, for instance by
                `supple.train(net, ..., method=method)`; the method is None for 16 bits. It has
                to do the same for all.
            evaluate: Quality of a network in evaluation mode; more is better.
            args: Positional example inputs: ranges begin with theirs, and MACs are for them.
            kwargs: Keyword example inputs.

        Returns:
            All networks' quality, cost and bytes.
        """
        points = []
        for size in sizes:
            plain = None
            for bits in self.bits:
                rule, net = self._rule(bits), build(size)
                price = compute_cost(net, rule.bits_of(net), self.cost, args, kwargs)
                held = _bytes(net, rule.bits_of(net))
                if self.qat and bits < MOST_BITS:
                    net = rule.wrap(net, args, kwargs)
                    train(net, rule)
                else:
                    if plain is None:
                        train(net, None)
                        plain = net
                    net = self._rounded(copy.deepcopy(plain), rule, args, kwargs)
                quality = float(evaluate(rule.finished(net).eval()))
                points.append(Point(size, bits, quality, price, held))
        return Frontier(tuple(points))

    def _rounded(
        self,
        net: nn.Module,
        rule: AQT,
        args: Sequence[Any],
        kwargs: Mapping[str, Any] | None,
    ) -> nn.Module:
        """Rounds a network that was trained without; at 16 bits gives it back."""
        net = rule.wrap(net, args, kwargs)
        for layer in wrapped(net).values():
            if isinstance(layer.of_input, DelayedRounding):
                layer.of_input.rounds = True
        return net


def compute_cost(
    model: nn.Module,
    bits: Mapping[str, int],
    cost: BitCost,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
) -> float:
    """Gives the cost of all multiply-accumulates of linear layers and convolutions.

    Args:
        model: The network.
        bits: Name of a weight to the bits of it and of its layer's input.
        cost: What a MAC costs, `"linear"` or `"quadratic"` in its bits.
        args: Positional example inputs.
        kwargs: Keyword example inputs.

    Returns:
        MACs, each as a share of one with 16 bits.

    Example:
        >>> import torch
        >>> layer, x = nn.Linear(4, 3), torch.ones(5, 4)
        >>> [compute_cost(layer, {"weight": 4}, cost, (x,)) for cost in ("linear", "quadratic")]
        [15.0, 3.75]
    """
    seen = statistics(
        model,
        [()],
        ["input_sq"],
        forward=lambda module, _: module(*args, **(kwargs or {})),
    )
    layers, share = matrices(model), _SHARES[cost]
    return sum(
        one.rows * _weights(layers[name]) * share(bits.get(name, MOST_BITS))
        for name, one in seen.items()
    )


_SHARES: Mapping[str, Callable[[int], float]] = {
    "linear": lambda bits: next(one for one in (4, 8, 16) if bits <= one) / MOST_BITS,
    "quadratic": lambda bits: bits**2 / MOST_BITS**2,
}


def _weights(layer: nn.Module) -> int:
    assert isinstance(layer.weight, Tensor)
    return layer.weight.numel()


def _bytes(model: nn.Module, bits: Mapping[str, int]) -> float:
    """Gives the bytes of weights at their bits, and of all other parameters at 16 bits."""
    held = {name: _weights(layer) for name, layer in matrices(model).items() if name in bits}
    rest = params(model) - sum(held.values())
    return (sum(count * bits[name] for name, count in held.items()) + rest * MOST_BITS) / 8
