"""EfficientTDNN: one random path at a time, with ever more of the space enabled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from supple.space import Space
from supple.supernet._shrinking import Shrink, Shrinking
from supple.technique import register
from supple.training.schedule import Cyclic
from supple.training.step import Sampler

__all__ = ["PAPER", "EfficientTDNN"]

#: The authors' stages are equally long, and of one learning rate.
PAPER = (
    Shrink(1),
    Shrink(1, ("kernel",)),
    Shrink(1, ("depth",)),
    Shrink(1, ("width:3", "heads:3")),
    Shrink(1, ("all",)),
)


@register(title="EfficientTDNN", paper="arXiv:2103.13581")
@dataclass(frozen=True, kw_only=True)
class EfficientTDNN(Shrinking):
    r"""Trains the largest network, then random sizes among ever more choices, one each step.

    The phases enable nothing, kernels, depths, the three largest widths and all widths. A step
    draws one size uniformly among what is enabled, and it learns from labels alone: a batch
    costs less than in ordinary training. In each phase the learning rate goes up and down
    linearly `cycles` times, each time half as high: with $h_c = 2^{-c}$ in cycle $c$ and the
    place $x \in [0, 1)$ in it, the factor is $h_c (1 - |2 x - 1|)$, and never 0. Each phase
    begins with new optimizer moments.

    Made for time-delay networks of speech (`supple.models.tdnn`); any elastic network will do.

    Args:
        cycles: Cycles of the learning rate in each phase, at least 1.
        sort: Whether units are sorted by importance before their widths are enabled; for
            pretrained networks, whose units have no order.

    Example:
        ```python
        model = supple.models.base.build("tdnn", channels=64, joint=192, classes=100)
        axes = [Kernel((1, 3, 5), transform=True), Depth((2, 3, 4), joined=True)]
        net = supple.elastic(model, x, axes=[*axes, Width((0.25, 0.35, 0.5, 0.75, 1.0))])
        supple.train(net, loader, loss, method=EfficientTDNN(), optimizer="adam", epochs=320)
        ```

    Source:
        Wang et al. 2022, "EfficientTDNN: Efficient Architecture Search for Speaker
        Recognition", arXiv:2103.13581; phases as in the authors' mechanicalsea/sugar.
    Differs:
        Every filter of a block's groups has a kernel site of its own, and the last one's
        output a width of its own (the authors' have one of each per block); widths of gates and
        of the attention are sites, too. All phases see recordings of one length (the authors'
        first is given shorter ones): what is cut from a recording is the data's affair.
        Heads are enabled with widths where there are any.
    Checked:
        The enabled choices and the learning rate of each phase; one step against the label
        gradient of the one size that was drawn.
    """

    distinguishing: ClassVar[str] = "sampler"

    phases: tuple[Shrink, ...] = PAPER
    cycles: int = 4
    sort: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        Cyclic(self.cycles)

    @classmethod
    def examples(cls) -> list[EfficientTDNN]:
        short = (Shrink(1), Shrink(1, ("width:2",)), Shrink(2, ("all",), 0.5))
        return [cls(cycles=1), cls(phases=short, cycles=2), cls(phases=short[1:], sort=True)]

    def sampler(self, space: Space, generator: torch.Generator) -> Sampler:
        return self.shrinking(space, generator, Cyclic(self.cycles), sort=self.sort)
