"""TangleNAS: gradients find sizes whose weights are shared, by mixing the weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from supple.axes.depth import Depth
from supple.axes.width import Width
from supple.cost.closed import ClosedCosts
from supple.errors import SettingError
from supple.network import Elastic, elastic
from supple.search._alphas import Dirichlet, Gumbel, Softmax, Weighing
from supple.search._entangled import EntangledMixture
from supple.search._relaxed import Relaxation, RelaxedRun, RelaxedSearch, Weights
from supple.space import Site
from supple.technique import register
from supple.training.seeds import kept

__all__ = ["TangleNAS"]

Draws = Literal["softmax", "dirichlet", "gumbel"]
Priced = Literal["params", "macs", "weight_bytes"]


@register(title="TangleNAS (weight entanglement)", paper="arXiv:2312.10440")
@dataclass(frozen=True, kw_only=True)
class TangleNAS(RelaxedSearch):
    r"""Searches widths, heads, kernels and depths by gradients, at the cost of one network.

    Searches such as DARTS add up the outputs of options that have weights of their own, so
    memory and time grow with their number. Sizes of one network share their weights: here the
    *weights* are added up,

    $$W_\text{mix} = \sum_c p_c\, \text{pad}(\text{slice}_c(W)),$$

    and the network runs once. Where several sites slice a tensor, $p_c$ is the product of
    their weights; depths add up what stands after each number of blocks. Architecture
    parameters learn from the validation half and weights from the training half, as in DARTS;
    in the end each site takes its largest parameter.

    With `price` above 0 the architecture parameters also minimise $\lambda\,E[C] / C$, the
    mean cost of sizes drawn with the weights, relative to the full network's: without one the
    largest size is often the best.

    Args:
        sampling: How parameters become weights: drawn from a Dirichlet distribution (as in
            DrNAS, what the authors recommend), the `softmax` (DARTS), or one hard choice
            with `gumbel` noise (GDAS).
        price: $\lambda$, at least 0.
        cost: `params`, `macs` or `weight_bytes`.

    Example:
        ```python
        net = supple.elastic(model, x, axes=[supple.Kernel((3, 5, 7)), supple.Width()])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.025, momentum=0.9)
        config = TangleNAS().search(net, train, validation, loss, optimizer=optimizer)
        supple.recalibrate(net, config, train)
        network = net.extract(config)
        ```

    Source:
        Sukthanker et al. 2023, "Weight-Entanglement Meets Gradient-Based Neural Architecture
        Search", arXiv:2312.10440; automl/TangleNAS, `optimizers` and `toy_search_spaces`.
    Differs:
        Works on the sites of any elastic network, with no operation written for a kind of
        layer. One site that slices both dimensions of a matrix counts once, as in the authors'
        transformer. Kernels are mixed with their centres in place, also in the one layer in
        which the authors' toy slices a corner. GDAS here runs its hard choice by zeroed
        weights at full cost, theirs by slices. The price is ours. Running statistics are not
        those of the mixture: recalibrate what is found.
    Checked:
        The mixture against the sum over all combinations of padded slices, and against
        extracted sizes where one weight is 1; the mean cost against all sizes.
    """

    distinguishing: ClassVar[str] = "relaxation"

    sampling: Draws = "dirichlet"
    price: float = 0.0
    cost: Priced = "macs"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sampling not in get_args(Draws):
            raise SettingError(
                f"sampling must be one of {', '.join(get_args(Draws))}, got {self.sampling!r}"
            )
        if self.cost not in get_args(Priced):
            raise SettingError(
                f"cost must be one of {', '.join(get_args(Priced))}, got {self.cost!r}"
            )
        if not self.price >= 0:
            raise SettingError(f"price must be at least 0, got {self.price}")

    @classmethod
    def examples(cls) -> list[TangleNAS]:
        return [cls(), cls(sampling="softmax", order="second", price=1.0)]

    @classmethod
    def toy(cls) -> Any:
        """Gives a small network whose widths and depth are searched."""
        with kept(0):
            blocks = nn.Sequential(_Residual(5, 7), _Residual(5, 7))
            model = nn.Sequential(blocks, nn.Linear(5, 3))
        axes = [Width((3, 7)), Depth()]
        return elastic(model.train(), (torch.zeros(2, 5),), axes=axes, verify=False)

    def relaxation(self) -> Relaxation:
        return EntangledMixture()

    def weighing(self) -> Weighing:
        if self.sampling == "gumbel":
            return Gumbel(temperature=1.0, hard=True)
        return Dirichlet() if self.sampling == "dirichlet" else Softmax()

    def penalty(self, run: RelaxedRun, weights: Weights) -> Tensor | None:
        return self.price * _mean_cost(run.net, weights, self.cost) if self.price else None


class _Residual(nn.Module):
    """A residual block of a small width, for the checks."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(self.up(x).relu())
        return out


_closed: WeakKeyDictionary[Elastic, ClosedCosts] = WeakKeyDictionary()


def _mean_cost(net: Elastic, weights: Weights, cost: str) -> Tensor:
    """The mean cost of sizes drawn with these weights, relative to the full network's."""
    if net not in _closed:
        _closed[net] = ClosedCosts(net)
    one = next(iter(weights.values())).new_ones(())
    full = [_certain(site, one) for site in net.space.sites]
    sites = zip(net.space.sites, full, strict=True)
    drawn = [weights.get(site.name, certain) for site, certain in sites]
    closed = _closed[net]
    return closed.expected(drawn, cost) / closed.expected(full, cost)


def _certain(site: Site, one: Tensor) -> Tensor:
    """The probabilities of a site's choices where it is full for certain."""
    probabilities = one.new_zeros(len(site.choices))
    probabilities[site.choices.index(site.full)] = one
    return probabilities
