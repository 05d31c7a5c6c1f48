"""DepS: the full network alone first, then smaller sizes with growing step sizes beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from supple.errors import SettingError
from supple.space import Space
from supple.supernet.base import Phase, PhasedSampler, SandwichSampler, SupernetRule
from supple.technique import register
from supple.training.batches import Loss
from supple.training.losses import Criterion, Distillation
from supple.training.schedule import Cosine, Schedule
from supple.training.step import Pass, Sampler, SizesRun, WholeOnly

__all__ = ["DepS", "RampedSandwich"]


@register(title="DepS", paper="arXiv:2407.06167")
@dataclass(frozen=True, kw_only=True)
class DepS(SupernetRule):
    r"""Trains the full network alone for half of the run, then lets smaller sizes join gently.

    The switch lies at the share `delay` of the steps. Before it, a step is one pass of the full
    network. After it, a step trains the largest size from labels, and the smallest and `random`
    random ones from the largest's detached output with `temperature` $T$. The shared weights
    follow $\sum_s \beta_s g_s$, where the gradient $g_s$ of a size is zero outside its slice;
    $\beta$ is 1 for the largest and `rate` for all others. In the last `ramp` of the steps
    before the switch the others are trained already, with $\beta(t)$ such that
    $\beta(t)\,\eta(t)$ grows linearly from 0 to `rate` $\cdot\,\eta(\text{switch})$, where
    $\eta$ is the learning rate: small sizes get a warm-up of their own, while the largest's
    learning rate never changes. When the ramp begins, units are sorted by the absolute weights
    that the following layers read them with, and the optimizer's moments along with them.

    A full network that is trained already needs no first half: with `delay` equal to `ramp`,
    the run begins with the sorting and the ramp.

    Args:
        delay: The switch, as a share of the steps, in [0, 1).
        ramp: How long the others' step size grows, as a share of the steps, in [0, `delay`].
        random: Random sizes per step, at least 0.
        rate: Step size of all but the largest, relative to the run's, above 0.
        temperature: $T$, above 0; their loss is multiplied by $T^2$.
        reorder: Whether units are sorted when smaller sizes join.

    Example:
        ```python
        net = supple.elastic(model, (x,))
        supple.train(net, loader, loss, method=DepS(), optimizer="sgd", lr=0.1, epochs=270)
        supple.train(pretrained, loader, loss, method=DepS(delay=0.02, ramp=0.02), epochs=30)
        ```

    Source:
        Annavajjala, Khare et al. 2024, "DϵpS: Delayed ϵ-Shrinking for Faster Once-For-All
        Training", arXiv:2407.06167; defaults (150 and 5 of 270 epochs) as in the authors'
        gatech-sysml/DepS.
    Differs:
        Units are sorted freely, as only the full network was trained until then (the authors'
        code leaves those outside the second largest width there), and momentum is sorted along
        with them (theirs stays). `masked_mean` divides by the number of passes that used an
        element (their `avg` by the sum of $\beta$ over them).
    Checked:
        The passes and weights of each stretch, under a learning rate that falls; a step against
        gradients summed by hand; weights and momentum after the sorting; resuming.
    """

    distinguishing: ClassVar[str] = "sampler"

    delay: float = 150 / 270
    ramp: float = 5 / 270
    random: int = 2
    rate: float = 1.0
    temperature: float = 1.0
    reorder: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.delay < 1:
            raise SettingError(f"delay must lie in [0, 1), got {self.delay}")
        if not 0 <= self.ramp <= self.delay:
            raise SettingError(
                f"ramp must lie in [0, delay], as it ends at the delay of {self.delay}, got "
                f"{self.ramp}"
            )
        if self.random < 0:
            raise SettingError(f"random must be at least 0, got {self.random}")
        for name in ("rate", "temperature"):
            if not getattr(self, name) > 0:
                raise SettingError(f"{name} must be above 0, got {getattr(self, name)}")

    @classmethod
    def examples(cls) -> list[DepS]:
        return [
            cls(),
            cls(delay=0.5, ramp=0.25, random=1, temperature=2.0, aggregate="masked_mean"),
            cls(delay=0.0, ramp=0.0, rate=0.5, reorder=False),
        ]

    def sampler(self, space: Space, generator: torch.Generator) -> Sampler:
        joined = RampedSandwich(space, generator, self.random, self.delay, self.ramp, self.rate)
        alone = self.delay - self.ramp
        phases = [Phase(1 - alone, joined, enter=_sort if self.reorder else None)]
        if alone:
            phases.insert(0, Phase(alone, WholeOnly(space.largest())))
        return PhasedSampler(phases)

    def criterion(self, loss: Loss) -> Criterion:
        return Distillation(loss, "largest", self.temperature)

    def schedule(self) -> Schedule:
        return Cosine()


def _sort(run: SizesRun) -> None:
    run.sort("read_l1")


class RampedSandwich(Sampler):
    """The sandwich rule, where all but the largest size begin with small steps.

    Args:
        space: The sizes there are.
        generator: Source of randomness.
        count: How many random sizes, at least 0.
        until: The share of the run's steps at which the ramp ends.
        ramp: How long it is, as such a share.
        most: Weight of all but the largest from then on.
    """

    def __init__(
        self,
        space: Space,
        generator: torch.Generator,
        count: int,
        until: float,
        ramp: float,
        most: float,
    ) -> None:
        self.space, self.generator, self.count = space, generator, count
        self.until, self.ramp, self.most = until, ramp, most
        self._schedule: Schedule | None = None

    def begin(self, run: SizesRun) -> None:
        """Learns how the run's learning rate goes."""
        self._schedule = run.options.schedule

    def sample(self, step: int, steps: int | None) -> Sequence[Pass]:
        """Gives the passes of a step in roles `largest`, `smallest` and `random`."""
        weight = self._weight(step, steps)
        sandwich = SandwichSampler(self.space, self.generator, self.count, weight=weight)
        return sandwich.sample(step, steps)

    def _weight(self, step: int, steps: int | None) -> float:
        assert steps is not None, "phases have asked for it"
        switch, first = (round(share * steps) for share in (self.until, self.until - self.ramp))
        if step >= switch:
            return self.most
        grown = (step - first + 1) / (switch - first)
        if self._schedule is None:
            return self.most * grown
        # The product with the step's own learning rate is what grows linearly.
        then, now = self._schedule(switch, steps), self._schedule(step, steps)
        return self.most * grown * then / now if now else 0.0
