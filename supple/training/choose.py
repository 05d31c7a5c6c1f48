"""`method="auto"`: a way of training picked by the task, the weights and the budget.

The picks are those of `docs/how-to-choose.md`, which says what they rest on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from supple.errors import SettingError
from supple.technique import Rule, from_settings
from supple.training.batches import Forward, Loss, moved, run_model
from supple.training.losses import logits_of
from supple.training.seeds import kept
from supple.training.session import modes_kept
from supple.training.step import Network

__all__ = ["Choice", "choose"]

#: A loss below this share of a guesser's is taken as a sign of trained weights.
_KNOWS = 0.9
#: Steps from which on training the full network first pays: measured were 500 and 1,500.
_ENOUGH = 1000


@dataclass(frozen=True)
class Choice:
    """A method, and why.

    Args:
        method: The training rule.
        why: The reason, as a clause for a message.
    """

    method: Rule
    why: str

    def __str__(self) -> str:
        return f"method: {self.method.key} ({self.why})"


def choose(
    net: Network, data: Iterable[Any], loss: Loss, steps: int, forward: Forward | None = None
) -> Choice:
    """Picks a documented method for a network and a task.

    The full network runs once on the first batch: whether it gives logits, and whether its
    loss is already well below that of guessing, decides together with the number of steps.
    Weights and random state stay as they are.

    Args:
        net: An elastic network.
        data: The training data; its first batch is read.
        loss: `loss(output, batch) -> scalar`.
        steps: Steps of the run.
        forward: `forward(model, batch) -> output`; by default by the batch's type.

    Returns:
        The method with default settings, and the reason.

    Raises:
        SettingError: The data is empty.
    """
    with kept(0):  # a loader may shuffle
        batch = next(iter(data), None)
    if batch is None:
        raise SettingError(f"data of type {type(data).__name__} has no batches")
    module = net.module
    batch = moved(batch, next(module.parameters()).device)
    with kept(0), modes_kept(module), torch.no_grad(), net.at(net.space.largest()):
        output = (forward or run_model)(module.eval(), batch)
        first = float(loss(output, batch))
    try:
        logits = logits_of(output)
    except SettingError:
        why = "the output has no logits, so sizes learn from the loss alone"
        return _choice("supernet/sortednet", why)
    guess = math.log(max(2, logits.shape[-1]))
    if first < _KNOWS * guess:
        why = f"trained weights: a loss of {first:.2f}, where guessing has {guess:.2f}"
        return _choice("supernet/instatune", why)
    if steps >= _ENOUGH:
        return _choice("supernet/deps", f"from scratch, {steps:,} steps")
    why = f"from scratch, and {steps:,} steps are few"
    return _choice("supernet/pa-da", why, data=False)


def _choice(key: str, why: str, **settings: Any) -> Choice:
    return Choice(from_settings(key, settings), why)
