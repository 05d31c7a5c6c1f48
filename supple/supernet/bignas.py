"""BigNAS: the sandwich rule with in-place distillation, in one stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import nn

from supple.errors import SettingError, UnsupportedModelError
from supple.space import Space
from supple.supernet.base import SandwichSampler, SupernetRule
from supple.technique import register
from supple.training.batches import Loss
from supple.training.losses import Criterion, Distillation
from supple.training.schedule import Exponential, Schedule
from supple.training.step import Network, Sampler

__all__ = ["BigNAS"]


@register(title="BigNAS", paper="arXiv:2003.11142")
@dataclass(frozen=True, kw_only=True)
class BigNAS(SupernetRule):
    r"""Trains all sizes at once, so that each can be cut out and used without retraining.

    Each step trains the largest size, the smallest and `random` random ones on the same batch
    and sums their gradients. The largest learns from labels; the others learn only from its
    detached output of the same step, by soft cross-entropy
    $-T^2 \sum_c \text{softmax}(z_t / T)_c \log \text{softmax}(z_s / T)_c$. Dropout is on in the
    largest's pass only, and weight decay counts once per step. The suggested learning rate
    falls exponentially and stays at `floor` of its peak, so that small sizes, which converge
    late, still learn.

    Args:
        random: Random sizes per step, at least 0.
        temperature: $T$, above 0.
        labels: Weight of the user's loss in the losses of all but the largest, at least 0.
        regularise_all: Whether dropout is on in all passes.
        zero_gains: Whether to start with the last norm gain of each residual branch at zero, so
            that each block is the identity; for training from scratch only, as it destroys
            pretrained weights.
        floor: Where the suggested learning rate ends, relative to its peak, in (0, 1].

    Example:
        ```python
        net = supple.elastic(model, (x,))
        supple.train(net, loader, loss, method=BigNAS(), optimizer="sgd", lr=0.1, epochs=30)
        supple.recalibrate(net, net.space.smallest(), loader, batches=20)
        small = net.extract(net.space.smallest())
        ```

    Source:
        Yu et al. 2020, "BigNAS: Scaling Up Neural Architecture Search with Big Single-Stage
        Models", arXiv:2003.11142.
    Differs:
        Batch-norm statistics are re-estimated by `supple.recalibrate`, and coarse-to-fine
        selection is a search of its own. The point at which the learning rate reaches its floor
        is 3/4 of the run (the paper decays by 0.97 every 2.4 epochs).
    Checked:
        One step against gradients summed by hand; order, roles and dropout of the passes.
    """

    distinguishing: ClassVar[str] = "sampler"

    random: int = 2
    temperature: float = 1.0
    labels: float = 0.0
    regularise_all: bool = False
    zero_gains: bool = False
    floor: float = 0.05

    def __post_init__(self) -> None:
        if self.random < 0:
            raise SettingError(f"random must be at least 0, got {self.random}")
        if not self.temperature > 0:
            raise SettingError(f"temperature must be above 0, got {self.temperature}")
        if not self.labels >= 0:
            raise SettingError(f"labels must be at least 0, got {self.labels}")
        self.schedule()

    @classmethod
    def examples(cls) -> list[BigNAS]:
        return [cls(), cls(random=1, temperature=2.0, labels=0.5, regularise_all=True)]

    def sampler(self, space: Space, generator: torch.Generator) -> Sampler:
        return SandwichSampler(space, generator, self.random, self.regularise_all)

    def criterion(self, loss: Loss) -> Criterion:
        return Distillation(loss, "largest", self.temperature, self.labels)

    def schedule(self) -> Schedule:
        return Exponential(floor=self.floor)

    @torch.no_grad()
    def prepare(self, net: Network) -> None:
        """Sets the last norm gain of each residual branch to zero, if `zero_gains` is on.

        Args:
            net: The network that is going to be trained from scratch.

        Raises:
            UnsupportedModelError: The network's residual branches are not known, or none ends
                in a norm with gains.
        """
        if not self.zero_gains:
            return
        find = getattr(net, "residual_gains", None)
        gains = [] if find is None else list(cast(list[nn.Parameter], find()))
        if not gains:
            raise UnsupportedModelError(
                "zero_gains needs residual branches that end in a norm with gains, and none "
                f"was found in {type(net.module).__name__}; leave zero_gains off"
            )
        for gain in gains:
            gain.zero_()
