"""SortedNet: random nested sizes with accumulated gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from supple.errors import SettingError
from supple.space import Space
from supple.supernet.base import NestedSampler, RandomSampler, SupernetRule, nested_chain
from supple.technique import register
from supple.training.step import Aggregation, Sampler

__all__ = ["SortedNet"]


@register(title="SortedNet", paper="arXiv:2309.00255")
@dataclass(frozen=True, kw_only=True)
class SortedNet(SupernetRule):
    r"""Trains nested sizes, one drawn at random for each share of the batch.

    The sizes form a chain in which each contains the one before, so no search is needed
    afterwards: a budget means the largest that fits. A step is `micro_steps` passes; each draws
    a size uniformly, runs it on its own share of the batch and adds its gradient, and the
    optimizer follows the mean. Every pass learns from labels alone. A batch costs as much as in
    ordinary training of sizes drawn at random.

    Args:
        micro_steps: Passes per step, at least 1; the batch is shared out among them.
        levels: Sizes in the chain, at least 2; None for as many as the site with most choices
            has.
        sizes: `chain` draws from the chain, `random` from the whole space (every size is a
            prefix of the full network there too, though not of every other size).

    Example:
        ```python
        net = supple.elastic(model, (x,))
        supple.train(net, loader, loss, method=SortedNet(micro_steps=4), epochs=30)
        half = net.extract(nested_chain(net.space, 8)[3])
        ```

    Source:
        Valipour et al. 2023, "SortedNet: A Scalable and Generalized Framework for Training
        Modular Deep Neural Networks", arXiv:2309.00255.
    Differs:
        Always the uniform distribution over the chain; the paper admits others.
    Checked:
        One step against gradients averaged by hand; the chain is nested and drawn uniformly.
    """

    distinguishing: ClassVar[str] = "sampler"

    aggregate: Aggregation = "mean"
    micro_steps: int = 4
    levels: int | None = None
    sizes: Literal["chain", "random"] = "chain"

    def __post_init__(self) -> None:
        if self.micro_steps < 1:
            raise SettingError(f"micro_steps must be at least 1, got {self.micro_steps}")
        if self.levels is not None and self.levels < 2:
            raise SettingError(f"levels must be at least 2, got {self.levels}")
        if self.sizes not in ("chain", "random"):
            raise SettingError(f"sizes must be 'chain' or 'random', got {self.sizes!r}")

    @classmethod
    def examples(cls) -> list[SortedNet]:
        return [cls(), cls(micro_steps=2, levels=3), cls(micro_steps=1, sizes="random")]

    def sampler(self, space: Space, generator: torch.Generator) -> Sampler:
        if self.sizes == "random":
            return RandomSampler(space, generator, self.micro_steps, shared=True)
        return NestedSampler(nested_chain(space, self.levels), generator, self.micro_steps)
