"""What each size of a step is like: its loss, its gradient, how well it agrees with others."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from supple.training.step import Network, Pass

__all__ = ["Watch"]

_LARGEST = 2**22  # elements of a gradient that are kept


class Watch:
    """Watches the passes of one step, from the gradients that they leave in `.grad`.

    It keeps a copy of the gradient for each pass, so it is for a few steps of a run. Of
    gradients with more than some millions of elements, an even sample is looked at.

    Args:
        net: The network that trains.
        owners: The parameters that gradients reach.
    """

    def __init__(self, net: Network | nn.Module, owners: Sequence[nn.Parameter]) -> None:
        self._net = net
        self._owners = owners
        self._sum = torch.zeros(())
        self._every = 1 + sum(owner.numel() for owner in owners) // _LARGEST
        self._gradients: list[Tensor] = []
        self._entries: list[Pass] = []
        self._losses: list[Tensor] = []

    def saw(self, entry: Pass, loss: Tensor, factor: float) -> None:
        """Takes the gradient that a pass has just added.

        Args:
            entry: The pass.
            loss: Its detached loss.
            factor: What the gradient was multiplied by.
        """
        now = torch.cat([self._sampled(owner) for owner in self._owners])
        self._gradients.append((now - self._sum) / factor if factor else torch.zeros_like(now))
        self._sum = now
        self._entries.append(entry)
        self._losses.append(loss)

    def row(self, step: int) -> dict[str, Any]:
        """Gives what was seen, as plain numbers.

        Args:
            step: Counted from 0.

        Returns:
            `step`; `sizes`, one per pass: `role`, `cost` (its MACs relative to the full
            network's; None in a network without sizes), `loss` and `norm` of its gradient; and
            `cosines` between the gradients of each two passes, as `[first, second, cosine]`.
        """
        scale = self._every**0.5
        norms = [float(gradient.norm()) for gradient in self._gradients]
        passes = zip(self._entries, self._costs(), self._losses, norms, strict=True)
        return {
            "step": step,
            "sizes": [
                {"role": entry.role, "cost": cost, "loss": float(loss), "norm": scale * norm}
                for entry, cost, loss, norm in passes
            ],
            "cosines": [
                [i, j, float(self._gradients[i] @ self._gradients[j]) / (norms[i] * norms[j])]
                for i, j in itertools.combinations(range(len(norms)), 2)
                if norms[i] and norms[j]
            ],
        }

    def _sampled(self, owner: nn.Parameter) -> Tensor:
        every = torch.zeros_like(owner) if owner.grad is None else owner.grad.detach()
        return every.flatten()[:: self._every].float()

    def _costs(self) -> list[float | None]:
        net: Any = self._net
        configs = [entry.config for entry in self._entries]
        if None in configs or not hasattr(net, "costs"):
            return [None] * len(configs)
        costs = net.costs([*configs, net.space.largest()])["macs"]
        return [float(cost) for cost in costs[:-1] / max(costs[-1], 1)]
