"""Architecture parameters, and how they become the weights that a mixture runs with.

Each site has one vector, an entry for each of its choices. A `Weighing` turns it into as many
weights; it is a value of its own, so that the same search can mix by softmax, by draws from a
Dirichlet distribution, or hard choices with a gradient.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from supple.errors import SettingError
from supple.space import Site

__all__ = ["Alphas", "Dirichlet", "Gumbel", "Sigmoid", "Softmax", "Weighing"]

_SPREAD = 1e-3


class Alphas(nn.Module):
    """One vector of architecture parameters for each site, near zero at the start.

    They live in a module of their own, not in the user's network. In `state_dict`, those of
    site `cell.0` are `cell/0/alpha`.

    Args:
        sites: The sites, of at least one choice each.
        generator: Source of the start values, from a normal distribution.
        device: Where they are.
        spread: Standard deviation of the start values, at least 0.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        generator: torch.Generator | None = None,
        device: torch.device | None = None,
        spread: float = _SPREAD,
    ) -> None:
        super().__init__()
        self._keys = {site.name: _key(site.name) for site in sites}
        for site in sites:
            drawn = spread * torch.randn(len(site.choices), generator=generator)
            self.register_parameter(self._keys[site.name], nn.Parameter(drawn.to(device)))

    def __getitem__(self, name: str) -> nn.Parameter:
        return self.get_parameter(self._keys[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def items(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yields site names and vectors, in the order of the sites."""
        return ((name, self[name]) for name in self)


class Weighing(ABC):
    """Turns the architecture parameters of a site into weights of its choices."""

    @abstractmethod
    def expected(self, alpha: Tensor) -> Tensor:
        """Gives the weights without randomness, of the same shape and differentiable."""

    def drawn(self, alpha: Tensor, generator: torch.Generator) -> Tensor:
        """Gives the weights of one step, of the same shape and differentiable.

        Args:
            alpha: Shape (choices,).
            generator: Source of randomness, where there is any.
        """
        return self.expected(alpha)


@dataclass(frozen=True)
class Softmax(Weighing):
    """The softmax, as in DARTS.

    Args:
        temperature: What the parameters are divided by, above 0.
    """

    temperature: float = 1.0

    def __post_init__(self) -> None:
        _check_temperature(self.temperature)

    def expected(self, alpha: Tensor) -> Tensor:
        """Gives positive weights that sum to 1."""
        return torch.softmax(alpha / self.temperature, 0)


@dataclass(frozen=True)
class Gumbel(Weighing):
    """The softmax with Gumbel noise, so that one choice at random dominates.

    Args:
        temperature: What parameters and noise are divided by, above 0.
        hard: Whether the forward takes the dominating choice alone, while the gradient is
            that of the soft weights (straight-through), as in GDAS.
    """

    temperature: float = 1.0
    hard: bool = False

    def __post_init__(self) -> None:
        _check_temperature(self.temperature)

    def expected(self, alpha: Tensor) -> Tensor:
        """Gives how probable it is that each choice dominates."""
        return torch.softmax(alpha, 0)

    def drawn(self, alpha: Tensor, generator: torch.Generator) -> Tensor:
        """Gives soft or hard weights that sum to 1."""
        waits = torch.empty(alpha.shape).exponential_(generator=generator)
        noise = -waits.clamp_min(torch.finfo(waits.dtype).tiny).log()
        logits = torch.log_softmax(alpha, 0) + noise.to(alpha)
        soft = torch.softmax(logits / self.temperature, 0)
        if not self.hard:
            return soft
        return _straight_through(F.one_hot(soft.argmax(), len(soft)).to(soft), soft)


@dataclass(frozen=True)
class Dirichlet(Weighing):
    """A draw from the Dirichlet distribution of concentrations elu(alpha) + 1, as in DrNAS.

    At alpha = 0, which weight decay of the parameters pulls to, all weights are equally likely.
    """

    def expected(self, alpha: Tensor) -> Tensor:
        """Gives the distribution's mean."""
        concentration = F.elu(alpha) + 1
        return concentration / concentration.sum()

    def drawn(self, alpha: Tensor, generator: torch.Generator) -> Tensor:
        """Gives positive weights that sum to 1, with the gradient of `rsample`."""
        # Gamma variables over their sum. `torch.distributions` draws from global generators
        # only; this is what it calls.
        concentration = (F.elu(alpha) + 1).cpu()
        gammas = torch._standard_gamma(concentration, generator=generator)
        gammas = gammas.clamp_min(torch.finfo(gammas.dtype).tiny)
        return (gammas / gammas.sum()).to(alpha.device)


@dataclass(frozen=True)
class Sigmoid(Weighing):
    """Each choice by itself, on or off: 1 where alpha is at least 0, else 0.

    The gradient is that of the sigmoid (straight-through).
    """

    def expected(self, alpha: Tensor) -> Tensor:
        """Gives zeros and ones."""
        return _straight_through((alpha >= 0).to(alpha), torch.sigmoid(alpha))


def _key(name: str) -> str:
    # A parameter's name has no dots, and is no name that a module uses itself.
    return f"{name.replace('.', '/')}/alpha"


def _straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    # Added up in this order, the forward is exactly `hard`.
    return hard + (soft - soft.detach())


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise SettingError(f"temperature must be above 0, got {temperature}")
