"""A network that gives sizes for costs, kept with the elastic network that it serves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from supple.axes.base import Sharing, Transform
from supple.space import Config

__all__ = ["SizeGenerator"]

_PREFIX = "supple_generator_"
_HIDDEN = 64
_SHARPNESS = 4.0  # of the choices: what logits are multiplied by


@dataclass(frozen=True)
class SizeGenerator(Sharing):
    """An LSTM from costs to sizes; its weights are parameters of the network.

    All sizes share all other weights.

    Args:
        counts: The number of choices of each site.
    """

    counts: tuple[int, ...]
    name: ClassVar[str] = "size_generator"

    def __post_init__(self) -> None:
        object.__setattr__(self, "counts", tuple(self.counts))

    def own(self, model: nn.Module) -> Mapping[str, Tensor]:
        source = torch.Generator().manual_seed(0)
        shapes = {
            "lstm_input": (4 * _HIDDEN, 2 + max(self.counts)),
            "lstm_hidden": (4 * _HIDDEN, _HIDDEN),
            "lstm_bias": (4 * _HIDDEN,),
            "head_weight": (sum(self.counts), _HIDDEN),
            "head_bias": (sum(self.counts),),
        }
        bound = _HIDDEN**-0.5
        made = {
            f"{_PREFIX}{name}": torch.empty(shape).uniform_(-bound, bound, generator=source)
            for name, shape in shapes.items()
        }
        return made | {f"{_PREFIX}ends": torch.zeros(2)}

    def chosen(self, config: Config) -> None:
        return None

    def weights(self, config: Config, model: nn.Module) -> Mapping[str, Transform]:
        return {}

    def weights_in(self, model: nn.Module) -> dict[str, Tensor]:
        """Gives the generator's weights, by short name."""
        return {
            name.removeprefix(_PREFIX): value
            for name, value in model.named_parameters()
            if name.startswith(_PREFIX)
        }

    def choices(
        self, weights: Mapping[str, Tensor], features: Tensor, random: np.random.Generator
    ) -> tuple[list[Tensor], Tensor]:
        """Draws sizes.

        Args:
            weights: Those of the generator.
            features: What is asked for, shape (n, 2).
            random: Source of the Gumbel noise.

        Returns:
            For each site one-hots of shape (n, choices), with the gradient of the softmax, and
            the mean entropy of the choices.
        """
        like = weights["lstm_input"]
        features = features.to(like)
        hidden = cell = features.new_zeros(len(features), _HIDDEN)
        last = features.new_zeros(len(features), max(self.counts))
        drawn, entropies, begin = [], [], 0
        for count in self.counts:
            gates = F.linear(
                torch.cat([features, last], 1), weights["lstm_input"], weights["lstm_bias"]
            ) + F.linear(hidden, weights["lstm_hidden"])
            enter, forget, new, out = gates.chunk(4, 1)
            cell = forget.sigmoid() * cell + enter.sigmoid() * new.tanh()
            hidden = out.sigmoid() * cell.tanh()
            rows = slice(begin, begin + count)
            weight, bias = weights["head_weight"][rows], weights["head_bias"][rows]
            logits = _SHARPNESS * F.linear(hidden, weight, bias)
            noise = torch.from_numpy(random.gumbel(size=tuple(logits.shape))).to(logits)
            soft = (logits + noise).softmax(1)
            hard = F.one_hot(soft.argmax(1), count).to(soft)
            drawn.append(hard - soft.detach() + soft)
            entropies.append(torch.special.entr(logits.softmax(1)).sum(1).mean())
            last = F.pad(drawn[-1], (0, max(self.counts) - count))
            begin += count
        return drawn, torch.stack(entropies).mean()
