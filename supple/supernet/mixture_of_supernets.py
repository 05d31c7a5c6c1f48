"""Mixture of supernets: a router mixes each size's weights from several experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from supple.axes.routed import Routed
from supple.errors import SettingError
from supple.network import Elastic
from supple.space import Space
from supple.supernet.base import RandomSampler, SandwichSampler, SupernetRule
from supple.technique import register
from supple.training.step import Network, Sampler

__all__ = ["MixtureOfSupernets"]


@register(title="Mixture-of-supernets", paper="arXiv:2306.04845")
@dataclass(frozen=True, kw_only=True)
class MixtureOfSupernets(SupernetRule):
    r"""Trains weights that a router mixes for each size, instead of the same for all.

    Each linear and convolution layer has $m$ expert tensors $E_j$ and a router, a perceptron
    with one hidden layer that reads the normalised size $a$. The layer's weights at that size
    are $W(a) = \sum_j r_j(a) E_j$ with $r = \text{softmax}(\text{router}(a))$, and are then
    sliced as usual. With `by="neuron"` each output of a layer has a mixture of its own.
    Routing does not depend on the data, so that a size which is cut out holds plain tensors
    and computes exactly what it did inside the supernet. Experts and routers are trained
    together, by the user's loss.

    Args:
        experts: $m$, at least 2.
        hidden: Width of the routers' hidden layers, at least 1.
        by: One mixture per `layer` or per `neuron`.
        where: Only layers whose path matches this shell-style pattern; None for all linear and
            convolution layers.
        noise: How far the experts are apart at the start, relative to the standard deviation
            of the weights, above 0.
        sampling: `random` sizes only, or the `sandwich` of largest, smallest and random ones.
        random: Random sizes per step, at least 1 without the sandwich.

    Example:
        ```python
        net = supple.elastic(model, (x,))
        method = MixtureOfSupernets(by="neuron")
        supple.train(net, loader, loss, method=method, epochs=30)
        net.sharing.routing(net.space.smallest(), net.module)   # who makes the smallest size
        ```

    Source:
        Jawahar et al. 2024, "Mixture-of-Supernets: Improving Weight-Sharing Supernet Training
        with Architecture-Routed Mixture-of-Experts", arXiv:2306.04845; UBC-NLP/MoS.
    Differs:
        The module holds the full network's mixture, and beside it the differences of the other
        experts to the first (`supple.axes.routed.Routed`): the same set of networks in other
        coordinates, so that the gradient of the part that all sizes share is not divided among
        the experts. Each layer has a router of its own (the authors' layer-wise form has one
        for the two layers of a feed-forward block), which reads all sites of the space, not
        only the sizes of the feed-forward blocks. Experts start as the module's weights and
        noise.
    Checked:
        Mixtures and gradients by hand in both forms; sizes that are cut out give equal
        outputs; routers vary across sizes and learn.
    """

    distinguishing: ClassVar[str] = "adapt"

    experts: int = 2
    hidden: int = 64
    by: Literal["layer", "neuron"] = "layer"
    where: str | None = None
    noise: float = 0.1
    sampling: Literal["random", "sandwich"] = "random"
    random: int = 1

    def __post_init__(self) -> None:
        if self.sampling not in ("random", "sandwich"):
            raise SettingError(
                f"sampling must be 'random' or 'sandwich', got {self.sampling!r}"
            )
        least = 0 if self.sampling == "sandwich" else 1
        if self.random < least:
            raise SettingError(f"random must be at least {least}, got {self.random}")
        self._sharing(Space([]))

    @classmethod
    def examples(cls) -> list[MixtureOfSupernets]:
        by_neuron = cls(experts=3, hidden=8, by="neuron", noise=0.5, sampling="sandwich")
        return [cls(random=4), by_neuron]

    def sampler(self, space: Space, generator: torch.Generator) -> Sampler:
        if self.sampling == "random":
            return RandomSampler(space, generator, self.random)
        return SandwichSampler(space, generator, self.random, regularise_all=True)

    def adapt(self, net: Network) -> None:
        """Adds experts and routers.

        Args:
            net: The network that is going to be trained.

        Raises:
            SettingError: Its sizes have weights of their own already, by another sharing.
        """
        assert isinstance(net, Elastic)
        wanted = self._sharing(net.space)
        if net.sharing is None:
            net.share(wanted)
        elif net.sharing != wanted:
            raise SettingError(
                f"this network's sizes have weights of their own ({net.sharing!r}), which the "
                "mixture would replace; begin with a network whose sizes share all weights"
            )

    def _sharing(self, space: Space) -> Routed:
        return Routed.of(
            space,
            experts=self.experts,
            hidden=self.hidden,
            by=self.by,
            where=self.where,
            noise=self.noise,
        )
