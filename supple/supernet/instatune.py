"""InstaTune: a pretrained network becomes elastic while it is fine-tuned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from supple.errors import SettingError
from supple.space import Space
from supple.supernet.base import Phase, PhasedSampler, SandwichSampler, SupernetRule
from supple.technique import register
from supple.training.batches import Loss
from supple.training.losses import Criterion, Distillation
from supple.training.step import Sampler, SizesRun, WholeOnly

__all__ = ["InstaTune"]

_TEACHER = "teacher"


@register(title="InstaTune", paper="arXiv:2308.15609")
@dataclass(frozen=True, kw_only=True)
class InstaTune(SupernetRule):
    r"""Fine-tunes a pretrained network at all sizes at once, taught by its own fine-tuned self.

    The pretraining stays as it is: only the fine-tuning trains sizes. For the share `tune` of
    the steps the full network is fine-tuned as usual; a frozen copy of it is then the teacher,
    and units are sorted by their absolute weights, which changes nothing that the full network
    computes. From then on a step trains the full network on the user's loss, and the smallest
    and `random` random sizes on

    $$\text{labels} \cdot \text{loss} + T^2\, H(\text{softmax}(z_t / T),
    \text{softmax}(z_s / T)),$$

    with the teacher's logits $z_t$ and the size's own $z_s$ on the same batch; the gradients
    are added. Positions that are labelled -100 (padding) don't count.

    Args:
        tune: Share of the steps in which the full network is fine-tuned alone, in [0, 1); 0
            where it has been fine-tuned already, and is the teacher as it is.
        random: Random sizes per step, at least 0.
        labels: Weight of the user's loss beside distillation, at least 0.
        temperature: $T$, above 0.
        reorder: Whether units are sorted before smaller sizes join.

    Example:
        ```python
        net = supple.elastic(bert, kwargs=batch, axes=[supple.Width((0.5, 0.75, 1.0))])
        supple.train(net, batches, loss, method=InstaTune(), epochs=4, lr=3e-5)
        ```

    Source:
        Sarah et al. 2023, "InstaTune: Instantaneous Neural Architecture Search During
        Fine-Tuning", arXiv:2308.15609. The authors' code was not to be had.
    Differs:
        The paper leaves open how many random sizes a step has, $T$ and the weights; here one, 1
        and equal weights. Its teacher is fine-tuned in a run of its own; here in the first
        phase of the same one. Units are sorted, which the paper does not say. Sizes are
        searched for by whichever search is used afterwards.
    Checked:
        The passes of both phases; one step against gradients summed by hand; the teacher is the
        network as it was at the switch, sorting included; resuming in both phases.
    """

    distinguishing: ClassVar[str] = "sampler"

    tune: float = 0.5
    random: int = 1
    labels: float = 1.0
    temperature: float = 1.0
    reorder: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.tune < 1:
            raise SettingError(f"tune must lie in [0, 1), got {self.tune}")
        if self.random < 0:
            raise SettingError(f"random must be at least 0, got {self.random}")
        if not self.labels >= 0 or not self.temperature > 0:
            raise SettingError(
                "labels must be at least 0 and temperature above 0, got "
                f"{self.labels} and {self.temperature}"
            )

    @classmethod
    def examples(cls) -> list[InstaTune]:
        return [cls(), cls(tune=0.0, random=2, labels=0.5, temperature=2.0, reorder=False)]

    def sampler(self, space: Space, generator: torch.Generator) -> Sampler:
        sizes = SandwichSampler(space, generator, self.random, regularise_all=True)
        phases = [Phase(1 - self.tune, sizes, enter=self._switch)]
        if self.tune:
            phases.insert(0, Phase(self.tune, WholeOnly(space.largest())))
        return PhasedSampler(phases)

    def criterion(self, loss: Loss) -> Criterion:
        return Distillation(
            loss,
            teacher=_TEACHER,
            temperature=self.temperature,
            labels=self.labels,
            taught=frozenset({"smallest", "random"}),
        )

    def _switch(self, run: SizesRun) -> None:
        if self.reorder:
            run.sort("l1")
        run.keep_teacher(_TEACHER)
