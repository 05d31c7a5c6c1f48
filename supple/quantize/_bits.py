"""Which layers get how many bits: how sensitive the loss is, and a search that asks little.

`hessian_traces` tells how the loss is curved in each weight, `Trial` what the network loses
with any choice of bits, `interactions` what layers lose together beyond what each loses alone,
and `lowered` brings as many layers as it can to fewer bits, the least sensitive ones first.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from supple.allocate import fewest
from supple.calibrate import taking_gradients
from supple.errors import SettingError
from supple.training.batches import run_model
from supple.transforms import Given, evaluating

__all__ = ["Trial", "hessian_traces", "interactions", "lowered"]


def hessian_traces(
    model: nn.Module, given: Given, names: Sequence[str], samples: int
) -> dict[str, float]:
    r"""Estimates the trace of the loss' Hessian in each of some parameters.

    It is the mean of $v^T H v$ over random signs $v$ (Hutchinson's estimator). All parameters
    are looked at together; what their signs have in common averages out.

    Args:
        model: The network; it is run in evaluation mode.
        given: Batches, taken in turn, loss and generator.
        names: Names of the parameters.
        samples: Random signs that are drawn, each for one batch.

    Returns:
        Name to the trace of the mean loss of a batch.

    Raises:
        SettingError: The loss depends on none of the parameters.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> given = Given(
        ...     (torch.tensor([[1.0, 3.0]]),),
        ...     lambda output, batch: output.square().sum(),
        ...     torch.Generator().manual_seed(0),
        ... )
        >>> 0 < hessian_traces(model, given, ["weight"], 64)["weight"] < 40  # 2 (1 + 9)
        True
    """
    parameters = [model.get_parameter(name) for name in names]
    sums = [0.0] * len(names)
    # Fused attention has no second derivative.
    with (
        torch.enable_grad(),
        evaluating(model),
        sdpa_kernel(SDPBackend.MATH),
        taking_gradients(parameters),
    ):
        for sample in range(samples):
            batch = given.batches[sample % len(given.batches)]
            value = given.criterion(run_model(model, batch), batch)
            signs = [_signs(one, given.random) for one in parameters]
            products = _products(value, parameters, signs)
            for place, (sign, product) in enumerate(zip(signs, products, strict=True)):
                sums[place] += float((sign * product).sum())
    return {name: total / samples for name, total in zip(names, sums, strict=True)}


def _signs(like: Tensor, source: torch.Generator) -> Tensor:
    drawn = torch.randint(2, like.shape, generator=source, device=source.device)
    return (2 * drawn - 1).to(like)


def _products(
    value: Tensor, parameters: Sequence[Tensor], signs: Sequence[Tensor]
) -> list[Tensor]:
    """Gives the Hessian times the signs."""
    if not value.requires_grad:
        raise SettingError(
            "the loss depends on none of the weights; compute it from the output that it gets"
        )
    first = torch.autograd.grad(value, parameters, create_graph=True, allow_unused=True)
    dots = [
        (gradient * sign).sum()
        for gradient, sign in zip(first, signs, strict=True)
        if gradient is not None and gradient.requires_grad
    ]
    if not dots:  # a linear loss is not curved
        return [torch.zeros_like(one) for one in parameters]
    second = torch.autograd.grad(torch.stack(dots).sum(), parameters, allow_unused=True)
    return [
        torch.zeros_like(one) if product is None else product
        for one, product in zip(parameters, second, strict=True)
    ]


class Trial:
    """A network with some weights rounded, for as long as a loss is measured.

    Args:
        model: The network; its weights are back in place after each measurement.
        rounded: For each number of bits, the rounded weights by name, of the weights' shape;
            what is not there stays as it is.
        cost: What is measured, of the network.

    Attributes:
        evaluations: How many measurements there were; the same choice is measured once.
    """

    def __init__(
        self,
        model: nn.Module,
        rounded: Mapping[int, Mapping[str, Tensor]],
        cost: Callable[[nn.Module], float],
    ) -> None:
        self.model, self.rounded, self.cost = model, rounded, cost
        self.evaluations = 0
        self._known: dict[tuple[tuple[str, int], ...], float] = {}

    def __call__(self, bits: Mapping[str, int]) -> float:
        """Measures with some weights of so many bits each.

        Args:
            bits: Name of a weight to its bits.

        Returns:
            The cost.
        """
        placed = {
            n: self.rounded[b][n] for n, b in bits.items() if n in self.rounded.get(b, ())
        }
        key = tuple(sorted((name, bits[name]) for name in placed))
        if key not in self._known:
            self._known[key] = self._measured(placed)
            self.evaluations += 1
        return self._known[key]

    @torch.no_grad()
    def _measured(self, placed: Mapping[str, Tensor]) -> float:
        weights = {name: self.model.get_parameter(name) for name in placed}
        before = {name: weight.clone() for name, weight in weights.items()}
        try:
            for name, weight in weights.items():
                weight.copy_(placed[name])
            with evaluating(self.model):
                return self.cost(self.model)
        finally:
            for name, weight in weights.items():
                weight.copy_(before[name])


def interactions(
    cost: Callable[[Mapping[str, int]], float],
    names: Sequence[str],
    bits: int,
    *,
    pairs: bool = False,
) -> dict[str, float]:
    r"""Gives what layers of few bits cost together beyond what each costs alone.

    With $L_S$ the cost where the layers $S$ of all layers $A$ have few bits, and
    $D_{ij} = L_{ij} - L_i - L_j + L_\emptyset$, it is $\sum_{j \ne i} D_{ij}$. As long as the
    cost is quadratic in the errors, that is $(L_A - L_{A \setminus i}) - (L_i - L_\emptyset)$,
    which takes as many measurements as there are layers, twice, in place of half its square.

    Args:
        cost: The cost where some layers have so many bits, by name; others have all theirs.
        names: Names of all layers.
        bits: Few bits.
        pairs: Whether all pairs are measured.

    Returns:
        Name to what it costs in company.

    Example:
        >>> def cost(bits):
        ...     return (3.0 * ("a" in bits) - 2.0 * ("b" in bits)) ** 2
        >>> interactions(cost, ["a", "b"], 4), interactions(cost, ["a", "b"], 4, pairs=True)
        ({'a': -12.0, 'b': -12.0}, {'a': -12.0, 'b': -12.0})
    """
    none = cost({})
    alone = {name: cost({name: bits}) for name in names}
    if not pairs:
        every = dict.fromkeys(names, bits)
        without = {
            name: cost({other: bits for other in names if other != name}) for name in names
        }
        return {name: cost(every) - without[name] - alone[name] + none for name in names}
    found = dict.fromkeys(names, 0.0)
    for place, one in enumerate(names):
        for other in names[:place]:
            both = cost({one: bits, other: bits}) - alone[one] - alone[other] + none
            found[one] += both
            found[other] += both
    return found


def lowered(
    cost: Callable[[Mapping[str, int]], float],
    sensitivities: Mapping[int, Mapping[str, float]],
    levels: Sequence[int],
    budget: float,
) -> dict[str, int]:
    """Brings layers to fewer bits, the least sensitive first, as far as a cost allows.

    At first all have the bits of the first level. Then bisection finds how few of them have to
    stay there, the most sensitive ones, and so on with those that moved, from level to level.

    Args:
        cost: The cost where layers have so many bits, by name.
        sensitivities: For each level but the first: name of a layer to how much it minds.
        levels: Bits, from many to few.
        budget: The most that it may cost.

    Returns:
        Name of a layer to its bits; the cost of this choice was measured.

    Raises:
        BudgetError: With the bits of the first level it costs more.

    Example:
        >>> minds = {4: {"a": 3.0, "b": 1.0, "c": 2.0}}
        >>> lowered(lambda bits: sum(8 - b for b in bits.values()), minds, (8, 4), budget=9)
        {'a': 8, 'b': 4, 'c': 4}
    """
    names = list(next(iter(sensitivities.values()))) if sensitivities else []
    bits = dict.fromkeys(names, levels[0])
    for above, level in itertools.pairwise(levels):
        minding = sensitivities[level]
        moving = sorted((n for n in names if bits[n] == above), key=lambda n: -minding[n])
        fewer = partial(_moved, bits, moving, level)
        bits = fewer(fewest(_composed(cost, fewer), budget, len(moving)))
    return bits


def _moved(
    bits: dict[str, int], moving: Sequence[str], level: int, stay: int
) -> dict[str, int]:
    """Gives all but the first of some layers other bits."""
    return bits | dict.fromkeys(moving[stay:], level)


def _composed(
    cost: Callable[[Mapping[str, int]], float], choice: Callable[[int], dict[str, int]]
) -> Callable[[int], float]:
    return lambda stay: cost(choice(stay))
