"""W-PCA: a genetic search for language models, which scores them without training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from supple import proxies
from supple.errors import SettingError
from supple.search._zero_cost import ZeroCostSearch
from supple.technique import register

__all__ = ["WPCA"]


@register(title="W-PCA", paper="arXiv:2504.15983")
@dataclass(frozen=True, kw_only=True)
class WPCA(ZeroCostSearch):
    r"""Searches the sizes of your transformer by a score that needs no training.

    The score of a size is $P \sum_l k_l$: the number of its parameters $P$, times the principal
    components $k_l$ over all tokens that explain more than $\eta$ of the variance of what the
    first linear layer of feed-forward network $l$ gives: one forward, no gradients. A genetic
    algorithm maximises it under a bound: half of the children of the best sizes are mutated,
    half crossed, and what is beyond the bound is thrown away before it is scored.

    Any other search takes the score as well: `evaluate(batches)` is what `supple.pareto` asks
    for. Other proxies are in `supple.proxies`.

    Args:
        layers: The first linear layers of the feed-forward networks, as a shell-style pattern
            of their paths.
        eta: Share of the variance to explain, in (0, 1).
        weighted: Whether the components are multiplied by the number of parameters.
        population: Configs per generation, at least 2. The first ones are random.
        parents: The best of all so far, from which the next generation descends, at least 1.
        mutation_probability: Of each site to be drawn anew in half of the children, in [0, 1].

    Example:
        >>> import supple, torch
        >>> model = torch.nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> net = supple.elastic(model, torch.ones(1, 4), axes=[supple.Width()], verify=False)
        >>> search = WPCA(layers="0", population=2)
        >>> score = search.evaluate([torch.randn(99, 4)])
        >>> run = search.start(net.space, ["w_pca"], 0)
        >>> for config in run.ask(4):
        ...     with net.at(config):
        ...         run.tell([config], [[-score(net.module)["w_pca"]]])  # less is better
        >>> float(-run.told.values.min())  # 58 parameters, 4 components: the inputs'
        232.0

    Source:
        Wang et al. 2025, "W-PCA Based Gradient-Free Proxy for Efficient Search of Lightweight
        Language Models", ICLR, arXiv:2504.15983, and the authors' code, ra225/W-PCA, `spos.py`.
    Differs:
        The authors' code divides by the number of layers, which is constant there. Eigenvalues
        are computed in float64. With several objectives parents are of the first fronts. A site
        that does not exist in a parent is drawn, or taken from the mate.
    Checked:
        The score by hand, at a size as in the extracted network; children against the rules by
        hand; bounds that need no evaluation are kept by every proposal.
    """

    distinguishing: ClassVar[str] = "score"

    layers: str = "*.up"
    eta: float = 0.99
    weighted: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.eta < 1.0:
            raise SettingError(f"eta must be in (0, 1), got {self.eta}")

    @classmethod
    def examples(cls) -> list[WPCA]:
        return [cls(), cls(population=4, parents=2)]

    def score(self, module: nn.Module, batch: Any) -> float:
        return proxies.w_pca(module, batch, self.layers, eta=self.eta, weighted=self.weighted)
