"""A running average of the weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from supple.errors import CheckpointError, SettingError
from supple.training.norms import running_statistics

__all__ = ["Average"]


class Average:
    r"""Exponential moving average of a module's parameters and running statistics.

    After update number $n$ the decay is $\min(d, (1 + n) / (10 + n))$, so that a short run's
    average does not hold on to the initial weights.

    Args:
        module: Whose weights are averaged.
        decay: $d$, in [0, 1); 0 keeps the last weights.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise SettingError(f"ema must lie in [0, 1), got {decay}")
        self._module = module
        self.decay = decay
        self.updates = 0
        self._average = {name: tensor.clone() for name, tensor in self._tensors()}

    @torch.no_grad()
    def update(self) -> None:
        """Takes the module's present weights into the average."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        for name, tensor in self._tensors():
            self._average[name].lerp_(tensor, 1 - decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Lets the module hold the averaged weights for a while."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def copy_to_module(self) -> None:
        """Gives the module the averaged weights for good."""
        for name, tensor in self._tensors():
            tensor.copy_(self._average[name])

    def state_dict(self) -> dict[str, Any]:
        """Gives the average and the number of updates."""
        return {"updates": self.updates, "average": dict(self._average)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what `state_dict` gave.

        Raises:
            CheckpointError: It belongs to another module.
        """
        if set(state["average"]) != set(self._average):
            raise CheckpointError("the averaged weights belong to a network of other tensors")
        self.updates = state["updates"]
        for name, tensor in self._average.items():
            tensor.copy_(state["average"][name])

    @torch.no_grad()
    def _swap(self) -> None:
        for name, tensor in self._tensors():
            held = tensor.clone()
            tensor.copy_(self._average[name])
            self._average[name].copy_(held)

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self._module.named_parameters():
            yield name, parameter.detach()
        # Other buffers are constants or counters, of which an average means nothing.
        yield from running_statistics(self._module).items()
