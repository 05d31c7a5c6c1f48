"""Once-for-all: sizes are enabled one axis after another, from the full network down."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from supple.errors import SettingError
from supple.space import Space
from supple.supernet._shrinking import Shrink, Shrinking
from supple.technique import register
from supple.training.batches import Loss
from supple.training.losses import Criterion, Distillation, Labels
from supple.training.schedule import Cosine
from supple.training.step import Sampler

__all__ = ["PAPER", "OnceForAll", "Shrink"]

_TEACHER = "teacher"


#: Epochs, learning rates (by that of the full network) and sizes of the authors' training.
PAPER = (
    Shrink(180),
    Shrink(120, ("kernel",), 0.37),
    Shrink(25, ("depth:2",), 0.031, 2),
    Shrink(120, ("depth",), 0.092, 2),
    Shrink(25, ("width:2", "heads:2"), 0.031, 4),
    Shrink(120, ("all",), 0.092, 4),
)


@register(title="Once-for-All", paper="arXiv:1908.09791")
@dataclass(frozen=True, kw_only=True)
class OnceForAll(Shrinking):
    r"""Trains the full network first, then ever smaller sizes beside it: progressive shrinking.

    Large sizes are trained before small ones start to share their weights. Each phase enables
    more choices: first none (the full network learns from labels), then kernels, depths and
    widths, the next smaller ones first. From then on a step draws random sizes among the
    enabled ones and sums their gradients; they minimise the user's loss plus `soft` times the
    soft cross-entropy to a frozen copy of the full network, taken when the first sizes are
    enabled. Before widths are enabled, channels are sorted by the absolute weights that the
    following layers read them with, within the widths that are on already, so that the most
    important ones stay longest. Each phase has its own cosine of the learning rate, and starts
    with new optimizer moments.

    Args:
        soft: Weight of distillation beside the user's loss, at least 0.
        temperature: Softens both distributions, above 0.

    Example:
        ```python
        axes = [Kernel((3, 5, 7), transform=True), Depth((2, 3, 4)), Width((0.5, 0.67, 1.0))]
        net = supple.elastic(model, (x,), axes=axes)
        supple.train(net, loader, loss, method=OnceForAll(), optimizer="sgd", lr=0.1, epochs=60)
        ```

    Source:
        Cai et al. 2020, "Once-for-All: Train One Network and Specialize it for Efficient
        Deployment", arXiv:1908.09791; defaults as in the authors' mit-han-lab/once-for-all.
    Differs:
        The teacher runs with its running statistics, and at the full resolution (the authors'
        takes the batch's statistics). Each size of a step draws its own resolution. All
        following layers count for the order of channels, gates of squeeze-and-excitation
        included (the authors' only the projection). With an average of the weights, that
        starts anew with each phase, too.
    Checked:
        The enabled choices, rates and number of sizes of each phase; one step against
        gradients summed by hand; sorting within the enabled widths; resuming in each phase.
    """

    distinguishing: ClassVar[str] = "sampler"

    phases: tuple[Shrink, ...] = PAPER
    soft: float = 1.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.soft >= 0 or not self.temperature > 0:
            raise SettingError(
                "soft must be at least 0 and temperature above 0, got "
                f"{self.soft} and {self.temperature}"
            )

    @classmethod
    def examples(cls) -> list[OnceForAll]:
        short = (Shrink(1), Shrink(1, ("width:2",), 0.5), Shrink(1, ("all",), 0.5, 2))
        return [cls(), cls(phases=short, soft=0.5, temperature=2.0), cls(phases=short[1:])]

    def sampler(self, space: Space, generator: torch.Generator) -> Sampler:
        teacher = _TEACHER if self.soft else ""
        return self.shrinking(space, generator, Cosine(), teacher=teacher, sort=True)

    def criterion(self, loss: Loss) -> Criterion:
        if not self.soft:
            return Labels(loss)
        return Distillation(
            loss,
            teacher=_TEACHER,
            temperature=self.temperature,
            labels=1.0,
            soft=self.soft,
            taught=frozenset({"random"}),
        )
