"""DARTS-PT: options are chosen by what their removal costs, not by architecture parameters."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from supple.errors import SettingError
from supple.search._relaxed import Measured, RelaxedRun, RelaxedSearch, paired
from supple.space import Config
from supple.technique import register
from supple.training.session import modes_kept

__all__ = ["DARTSPT"]

_SEEDS = 2**31


@register(title="DARTS-PT (perturbation-based selection)", paper="arXiv:2108.04392")
@dataclass(frozen=True, kw_only=True)
class DARTSPT(RelaxedSearch):
    r"""Trains a mixture of options as DARTS does, then keeps those that it can't do without.

    A large architecture parameter doesn't mark a strong option: options without weights, such
    as skips, gain as the supernet converges. When training is over, sites are decided one after
    the other in random order: each option of the site is masked by itself, while the weights of
    the others stay as they are, and the network is measured on the validation half. The option
    whose removal hurts most stays, alone, and the network is tuned before the next site is
    decided. Any run of a differentiable search can be decided so, by `derive`.

    Args:
        by: What hurts: a lower `accuracy`, ties broken by the loss, or a higher `loss`.
        epochs: Passes through the training half after each decision but the last, at least 0.
        rate: Learning rate of the weights while they are tuned, relative to the run's, above 0.

    Example:
        >>> from torch import nn
        >>> import supple
        >>> from supple.layers.choice import Choice
        >>> from supple.training.seeds import kept
        >>> with kept(0):
        ...     x = torch.randn(32, 4)
        ...     model = nn.Sequential(Choice(nn.Identity(), nn.Tanh()), nn.Linear(4, 2))
        >>> batch = (x, (x[:, 0] > 0).long())
        >>> net = supple.elastic(model, x, axes=[supple.Operator()], verify=False)
        >>> config = DARTSPT(epochs=1).search(
        ...     net, [batch], [batch], lambda output, batch: nn.functional.cross_entropy(
        ...     output, batch[1]), optimizer=torch.optim.SGD(model.parameters(), lr=0.5),
        ...     epochs=3)
        >>> config in net.space
        True
        >>> net.extract(config)(x).shape
        torch.Size([32, 2])

    Source:
        Wang et al. 2021, "Rethinking Architecture Selection in Differentiable NAS",
        arXiv:2108.04392; ruocwang/darts-pt.
    Differs:
        Each site has parameters of its own, where the authors' cells of one kind share them,
        and one site is decided at a time, where theirs decide one edge of each kind. Which
        edges a node keeps is no decision here: an edge that may be absent is a site with an
        option that gives zeros. While the weights are tuned the learning rate is constant, as
        it is in the released code, whose cosine schedule is made and never stepped. The number
        of epochs counts from decision to decision.
    Checked:
        One decision against measurements made by hand, with a strong parameter on a useless
        option; each decision is tuned with the rate given; as in the authors' code
        normalization uses the statistics of the batches it is measured on.
    """

    distinguishing: ClassVar[str] = "derive"

    by: Literal["accuracy", "loss"] = "accuracy"
    epochs: int = 10
    rate: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.by not in ("accuracy", "loss"):
            raise SettingError(f"by must be 'accuracy' or 'loss', got {self.by!r}")
        if self.epochs < 0 or not self.rate > 0:
            raise SettingError(
                f"epochs must be at least 0 and rate above 0, got {self.epochs} and {self.rate}"
            )

    @classmethod
    def examples(cls) -> list[DARTSPT]:
        return [cls(), cls(by="loss", order="second"), cls(frozen=True)]

    def derive(
        self, run: RelaxedRun, train: Iterable[Any], validation: Iterable[Any]
    ) -> Config:
        """Decides all sites by what the removal of each option costs.

        The network's weights change, and in the end fit the config best.

        Args:
            run: A run of any differentiable search, trained; it must not go on.
            train: Batches of the training half, to be read again.
            validation: Batches of the validation half, to be read again; 500 examples or more,
                or else noise decides.

        Returns:
            A config of the network's space.

        Raises:
            SettingError: There is no accuracy, since labels are no classes: set `by="loss"`.
        """
        left = [site for site in run.sites if site.name not in run.fixed]
        order = torch.randperm(len(left), generator=run.generator).tolist()
        seed = int(torch.randint(_SEEDS, (), generator=run.generator))
        tuning = run.renewed(rate=self.rate)
        epoch = 0
        with modes_kept(run.net.module):
            run.net.train()
            for place in order:
                site = left[place]
                if epoch or place != order[0]:
                    for _ in range(self.epochs):
                        for batch in paired(train, validation, epoch=epoch, seed=seed):
                            tuning.step(batch)
                        epoch += 1
                costs = [
                    self.removed(tuning, site.name, index, validation)
                    for index in range(len(site.choices))
                ]
                tuning.fix(site.name, site.choices[costs.index(max(costs))])
        return tuning.derive()

    def removed(
        self, run: RelaxedRun, name: str, index: int, validation: Iterable[Any]
    ) -> tuple[float, ...]:
        """Tells how bad the network is without an option.

        Args:
            run: A run in progress.
            name: A site.
            index: Which of its options is masked.
            validation: Batches to measure on.

        Returns:
            What is compared; the larger, the worse.
        """
        weights = {site: each.detach().clone() for site, each in run.mixture().items()}
        weights[name][index] = 0.0
        return self._badness(run.measure(validation, weights))

    def _badness(self, measured: Measured) -> tuple[float, ...]:
        if self.by == "loss":
            return (measured.loss,)
        if measured.accuracy is None:
            raise SettingError(
                "there is no accuracy to decide by: labels of whole numbers, one for each "
                "output, are needed; set by='loss'"
            )
        return (-measured.accuracy, measured.loss)
