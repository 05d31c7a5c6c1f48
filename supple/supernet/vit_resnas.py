"""ViT-ResNAS: every example of a batch trains a sub-network of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor
from typing import Any, ClassVar

import torch
from torch import nn
from torch.optim import Optimizer

from supple.errors import SettingError
from supple.network import Elastic
from supple.space import Config, Site, Space
from supple.supernet._per_example import check_masks, masked
from supple.supernet.base import SupernetRule
from supple.technique import register
from supple.training.batches import Forward, Loss, batch_size, run_model
from supple.training.step import Network, Pass, Sampler, SizesRun, StepOptions

__all__ = ["PerExample", "PerExampleSampler", "ViTResNAS"]


@register(title="ViT-ResNAS", paper="arXiv:2109.00642")
@dataclass(frozen=True, kw_only=True)
class ViTResNAS(SupernetRule):
    r"""Trains many sizes in one forward and backward: each example has its own.

    The whole network runs once, and what an example's size leaves out is masked for that
    example. With $m_i$ the masks of example $i$, the shared weights $\theta$ get
    $\nabla_\theta \frac{1}{N} \sum_i \ell(f(x_i; \theta \odot m_i), y_i)$ in one step, the mean
    over many sizes, where others have the gradient of one size or pay for each in full. Layer
    norms take their statistics over the channels that remain. At each site every choice gets
    equally many examples, shuffled site by site.

    Sizes are let in from the largest down: in the first `ramp` of the steps a site with $n$
    choices draws from the largest $1 + \lfloor (n - 1)\, t / t_w \rfloor$ of them at step $t$
    of $t_w$.

    A masked forward costs what the whole network costs, so it pays where a batch fits the
    device and small kernels would leave it idle. The network must not have batch norm.

    Args:
        per_size: How many examples of a batch have the same size, at least 1.
        ramp: Share of the steps until all choices are let in, in [0, 1].

    Example:
        ```python
        model = supple.models.build("multi-stage-vit")
        net = supple.elastic(model, (x,), axes=[Width((0.5, 0.75, 1.0)), Heads(), Depth()])
        supple.train(net, loader, loss, method=ViTResNAS(), lr=5e-4, epochs=100)
        ```

    Source:
        Liao et al. 2021, "Searching for Efficient Multi-Stage Vision Transformers",
        arXiv:2109.00642; yilunliao/vit-search.
    Differs:
        Masks are derived from the network's sites instead of being written into its layers,
        and the backward of the masked layer norm is autograd's. The width of a later stage is
        that of the one before and an increment, each with choices of its own. Warm-up counts
        steps, not epochs, and takes a tenth of them, where the authors' scripts have a quarter
        (`ramp=0.25`). In the warm-up the authors sort heads and hidden units anew by
        importance after each epoch; here they stay as they are. The authors'
        evolutionary search is not part of it; `supple.search` finds sizes of any trained
        network.
    Checked:
        Outputs and gradients of a mixed batch against sub-networks run one by one, with
        biases, positions and residuals that would leak; the masked layer norm against
        `nn.LayerNorm` on the slice; balance and warm-up of what is drawn.
    """

    distinguishing: ClassVar[str] = "sampler"

    per_size: int = 1
    ramp: float = 0.1

    def __post_init__(self) -> None:
        if self.per_size < 1:
            raise SettingError(f"per_size must be at least 1, got {self.per_size}")
        if not 0 <= self.ramp <= 1:
            raise SettingError(f"ramp must lie in [0, 1], got {self.ramp}")

    @classmethod
    def examples(cls) -> list[ViTResNAS]:
        return [cls(), cls(per_size=4, ramp=0.5)]

    def sampler(self, space: Space, generator: torch.Generator) -> Sampler:
        return PerExampleSampler(space, generator, self.per_size, self.ramp)

    def start(
        self,
        net: Network,
        optimizer: Optimizer,
        *rest: Any,
        loss: Loss,
        forward: Forward | None = None,
        generator: torch.Generator | None = None,
        options: StepOptions | None = None,
    ) -> SizesRun:
        """Begins training; see `SupernetRule.start`.

        Raises:
            UnsupportedModelError: Masked examples would not come out as from their
                sub-networks.
        """
        if not isinstance(net, Elastic):
            raise SettingError(
                f"{type(self).__name__} trains an elastic network, got {type(net).__name__}; "
                "make one with supple.elastic(model, example_inputs)"
            )
        check_masks(net)
        source = torch.Generator().manual_seed(0) if generator is None else generator
        sampler = self.sampler(net.space, source)
        return SizesRun(
            net,
            optimizer,
            sampler,
            self.criterion(loss),
            forward=PerExample(net, sampler, forward or run_model),
            aggregate=self.aggregate,
            generator=source,
            options=options,
        )


class PerExampleSampler(Sampler):
    """Draws a size for each example of a batch, balanced over the choices of each site.

    Args:
        space: The sizes there are.
        generator: Source of randomness.
        per_size: How many examples have the same size.
        ramp: Share of the steps until all choices are let in.

    Attributes:
        drawn: The sizes of the present step.
    """

    def __init__(
        self, space: Space, generator: torch.Generator, per_size: int = 1, ramp: float = 0.0
    ) -> None:
        self.space, self.generator = space, generator
        self.per_size, self.ramp = per_size, ramp
        self.drawn: list[Config] = []
        self._count = 1

    def begin(self, run: SizesRun) -> None:
        """Looks how many examples there are."""
        self._count = ceil(batch_size(run.batch) / self.per_size)

    def sample(self, step: int, steps: int | None) -> Sequence[Pass]:
        """Draws the sizes, and gives the one pass that trains them all."""
        if steps is None and self.ramp:
            raise SettingError("ramp needs to know the number of steps; pass steps=")
        share = self._share(step, steps or 0)
        columns = {site.name: self._column(site, share) for site in self.space.sites}
        self.drawn = [
            self.space.config({name: column[i] for name, column in columns.items()})
            for i in range(self._count)
        ]
        return [Pass(self.space.largest(), "examples")]

    def _share(self, step: int, steps: int) -> float:
        length = self.ramp * steps
        return min(1.0, step / length) if length else 1.0

    def _column(self, site: Site, share: float) -> list[int]:
        """A choice for each size to be drawn: equally many of each, shuffled."""
        offered = site.choices[: site.choices.index(site.full) + 1][::-1]
        allowed = offered[: 1 + floor((len(offered) - 1) * share)]
        order: list[int] = torch.randperm(
            -(-self._count // len(allowed)) * len(allowed), generator=self.generator
        ).tolist()
        return [allowed[place % len(allowed)] for place in order[: self._count]]


@dataclass(frozen=True)
class PerExample:
    """A `forward=` in which example i runs at size i of those that a sampler has drawn.

    Where there are more examples than sizes, the sizes begin again.

    Args:
        net: The elastic network.
        sampler: Whoever draws the sizes.
        forward: `forward(model, batch) -> output`.
    """

    net: Elastic
    sampler: Any
    forward: Forward

    def __call__(self, model: nn.Module, batch: Any) -> Any:
        """Runs a model on a batch."""
        drawn = self.sampler.drawn
        configs = [drawn[i % len(drawn)] for i in range(batch_size(batch))]
        with masked(self.net, configs):
            return self.forward(model, batch)
