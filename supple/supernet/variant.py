"""VARiant: the full network and its sub-networks, mixed by a ratio that changes in stages."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from supple.errors import SettingError
from supple.space import Config, Space
from supple.supernet.base import SupernetRule, nested_chain
from supple.technique import register
from supple.training.step import Pass, Sampler

__all__ = ["Mix", "MixSampler", "Variant"]


@dataclass(frozen=True)
class Mix:
    """A stretch of a run: how often a step trains a sub-network rather than the full network.

    Args:
        share: How long it is, relative to the others, above 0.
        first: The probability of a sub-network at its start, in [0, 1].
        last: The probability at its end; between, it goes in a straight line. None for `first`.
    """

    share: float
    first: float
    last: float | None = None

    def __post_init__(self) -> None:
        ends = (self.first, self.end)
        if not self.share > 0 or not all(0 <= p <= 1 for p in ends):
            raise SettingError(
                f"a mix needs a share above 0 and probabilities in [0, 1], got {self}"
            )

    @property
    def end(self) -> float:
        """The probability at its end."""
        return self.first if self.last is None else self.last


#: Joint training first, then ever more sub-networks, then nothing else.
PROGRESSIVE = (Mix(1, 0.2), Mix(1, 0.2, 1.0), Mix(1, 1.0))


@register(title="VARiant", paper="arXiv:2511.16546")
@dataclass(frozen=True, kw_only=True)
class Variant(SupernetRule):
    r"""Trains the full network or a sub-network in each step, with ever more sub-networks.

    A fixed ratio of the two trades one's quality for the other's. Here the probability of a
    sub-network changes in three stages: joint training in which 2 of 10 steps are a
    sub-network's, a straight way from there to 10 of 10, and sub-networks alone. Every pass
    learns from labels. A step costs one pass.

    The paper's networks generate images coarse to fine, and its sub-networks leave blocks out
    for late scales only (`supple.ScaleDepth`; `supple.models` has one as `var`), from
    pretrained weights. The rule itself takes any elastic network: the sub-networks are the
    nested sizes from the smallest to the one below the largest, equally often.

    Args:
        phases: The stages, in order.
        levels: Sizes in the nested chain, the largest included, at least 2; None for as many as
            the site with most choices has.

    Example:
        ```python
        axes = [supple.ScaleDepth(early=5, choices=(4,))]  # 5 positions go through all blocks
        net = supple.elastic(model, (tokens, classes), axes=axes)
        forward = lambda model, batch: model(*batch)
        supple.train(net, data, loss, method=Variant(), forward=forward, epochs=10)
        with net.at({"blocks.scale_depth": 4}):
            images = net.module.generate(classes).images
        ```

    Source:
        Chen et al. 2025, "Progressive Supernet Training for Efficient Visual Autoregressive
        Modeling", arXiv:2511.16546. The authors' code was not to be had.
    Differs:
        The paper gives the first and last ratio as 2:8 and 10:0 and calls the last one training
        of sub-networks; read so, the first component counts sub-networks. How long the stages
        are, how the second one leads from the first to the third, and whether several
        sub-networks are trained together is our choice: thirds, a straight line, all of them.
        Any elastic network and loss.
    Checked:
        Probabilities step by step, and the sizes drawn; one step against gradients by hand.
    """

    distinguishing: ClassVar[str] = "sampler"

    phases: tuple[Mix, ...] = PROGRESSIVE
    levels: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "phases", tuple(self.phases))
        if not self.phases:
            raise SettingError("phases must be at least one, got none")
        if self.levels is not None and self.levels < 2:
            raise SettingError(f"levels must be at least 2, got {self.levels}")

    @classmethod
    def examples(cls) -> list[Variant]:
        return [cls(), cls(phases=(Mix(1, 0.5),), levels=2), cls(phases=(Mix(2, 1.0, 0.0),))]

    def sampler(self, space: Space, generator: torch.Generator) -> Sampler:
        return MixSampler(nested_chain(space, self.levels), generator, self.phases)


@dataclass(frozen=True)
class MixSampler(Sampler):
    """Trains the largest of some sizes or one of the others, with changing probabilities.

    Args:
        chain: The sizes, the largest last, at least two.
        generator: Source of randomness.
        phases: How probable the others are.
    """

    chain: Sequence[Config]
    generator: torch.Generator
    phases: Sequence[Mix]

    def sample(self, step: int, steps: int | None) -> Sequence[Pass]:
        """Gives the one pass of a step, in role `largest` or `smaller`."""
        smaller = len(self.chain) - 1
        drawn = torch.rand((), generator=self.generator).item()
        which = int(torch.randint(smaller, (), generator=self.generator))
        if drawn < self.probability(step, steps):
            return (Pass(self.chain[which], "smaller"),)
        return (Pass(self.chain[-1], "largest"),)

    def probability(self, step: int, steps: int | None) -> float:
        """Gives the probability of a size that is not the largest.

        Args:
            step: Counted from 0.
            steps: How many there will be.

        Raises:
            SettingError: The number of steps is not known.
        """
        if steps is None:
            raise SettingError("phases need to know the number of steps; pass steps=")
        ends = [0.0, *itertools.accumulate(phase.share for phase in self.phases)]
        place = (step + 0.5) / steps * ends[-1]  # the middle of the step
        index = next((i for i, end in enumerate(ends[1:]) if place < end), len(ends) - 2)
        phase = self.phases[index]
        way = (place - ends[index]) / phase.share
        return phase.first + way * (phase.end - phase.first)
