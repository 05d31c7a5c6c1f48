"""Single-Path NAS: thresholds on parts of one kernel, trained with the weights."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from supple.axes.base import GroupSite
from supple.axes.kernel import KernelSite
from supple.errors import SettingError, UnsupportedModelError
from supple.layers.super_kernel import Decision, SuperKernelConv2d, deciding
from supple.network import Elastic
from supple.recompute import recomputing
from supple.space import Config, IntArray, Site
from supple.technique import Rule, register
from supple.training.batches import Forward, Loss, run_model
from supple.training.losses import Earlier
from supple.training.seeds import kept
from supple.training.step import Pass, Sampler, SizesRun, StepOptions

__all__ = ["SinglePathNAS", "runtime"]

Price = Callable[[IntArray], np.ndarray]


@register(title="Single-Path NAS", paper="arXiv:1904.02877")
@dataclass(frozen=True, kw_only=True)
class SinglePathNAS(Rule):
    r"""Chooses kernel, width and presence of layers while it trains them, in one run.

    The layers are `supple.layers.super_kernel.SuperKernelConv2d`: one kernel each, of which
    the outer ring, the further channels, and the layer itself count where their norms reach
    thresholds. Weights and thresholds learn together, on the same data, from

    $$\ell + \lambda \log \Big(R_\text{rest} + \sum_l R_l\Big).$$

    The cost $R_l$ of a layer with indicators $d$ (widths) and $e$ (kernels) is composed of
    costs of the whole layer: with $R_w$ that of width $w$ at the largest kernel, and $r_k$
    that of kernel $k$ at full width relative to the largest,

    $$R_l = d_0\,\big(R_1 + d_1\,(R_2 - R_1 + \dots)\big)
      \cdot \big(r_1 + e_1\,(r_2 - r_1 + \dots)\big).$$

    In the first `delay` of the steps $\lambda$ is 0, and indicators are dropped with
    probability `dropout`, so that all parts are trained.

    Afterwards `SinglePathNAS.derive(net)` reads the sizes off: recalibrate and extract them as
    any other, or train them again. Sites that no such layer has stay at full size.

    Args:
        penalty: $\lambda$, at least 0. The authors' 0.02 is 20 here: they multiply by 1000.
        cost: One of the costs that `net.costs` gives; `start` also takes costs of your own.
        delay: Share of the steps before costs count, in [0, 1).
        dropout: Probability of dropping an indicator in these steps, in [0, 1).

    Example:
        ```python
        model = nn.Sequential(..., Block(SuperKernelConv2d(96, 96, groups=96)), ...)
        net = supple.elastic(model, (x,), axes=[Kernel((3, 5)), Width((0.5, 1.0)),
                                                Depth(pattern="any")])
        supple.train(net, loader, loss, method=SinglePathNAS(), epochs=8, optimizer="rmsprop")
        config = SinglePathNAS.derive(net)
        small = net.extract(config)
        ```

    Source:
        Stamoulis et al. 2019, "Single-Path NAS: Designing Hardware-Efficient ConvNets in less
        than 4 Hours", arXiv:1904.02877; dstamoulis/single-path-nas, `nas-search`.
    Differs:
        Costs of layers are worked out from the network's, by changing one layer at a time; the
        authors measured them on a Pixel 1. Where a layer can't be skipped its cost at zero
        channels is extrapolated from the two smallest widths. The logarithm is of the cost
        relative to the full network's, which changes no gradient. Weight decay is the
        optimizer's, and `supple.train` leaves thresholds out of it.
    Checked:
        Indicators, kernels and costs by hand; the first against finite gradients of the
        sigmoid; the decided against the extracted network.
    """

    distinguishing: ClassVar[str] = "start"

    penalty: float = 20.0
    cost: str = "macs"
    delay: float = 0.625
    dropout: float = 0.4

    def __post_init__(self) -> None:
        if not self.penalty >= 0:
            raise SettingError(f"penalty must be at least 0, got {self.penalty}")
        for name in ("delay", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise SettingError(f"{name} must lie in [0, 1), got {getattr(self, name)}")

    @classmethod
    def examples(cls) -> list[SinglePathNAS]:
        return [cls(), cls(penalty=1.0, delay=0.25, dropout=0.0)]

    @classmethod
    def toy(cls) -> nn.Module:
        with kept(0):
            return nn.Sequential(
                *(nn.Unflatten(1, (1, 1, 5)), nn.Conv2d(1, 8, 1), nn.ReLU()),
                *(SuperKernelConv2d(8, 8, (3,), groups=8, skip=False), nn.ReLU()),
                *(nn.Flatten(), nn.Linear(40, 3)),
            )

    def start(
        self,
        net: Any,
        optimizer: Optimizer,
        *_: Any,
        loss: Loss,
        forward: Forward | None = None,
        generator: torch.Generator | None = None,
        options: StepOptions | None = None,
        price: Price | None = None,
    ) -> SizesRun:
        """Begins training.

        Args:
            net: What `supple.elastic` gives; its sites are to have the sizes that the layers
                decide about.
            optimizer: Over the parameters of `net.module`, thresholds among them.
            loss: `loss(output, batch) -> scalar`.
            forward: `forward(model, batch) -> output`; by default by the batch's type.
            generator: For dropping indicators, equal on all ranks; by default seeded with 0.
            options: Clipping, precision, schedule, average.
            price: Costs of encoded configs, (n, sites) -> (n,), all above 0; by default those
                of `net.costs`.

        Returns:
            A run with `step(batch) -> losses by role`, `state_dict` and `load_state_dict`.

        Raises:
            SettingError: `net` is a plain module, the number of steps is not known, or a layer
                decides about what is no site of the network.
            UnsupportedModelError: There is no such layer.
        """
        if not isinstance(net, Elastic):
            raise SettingError(
                f"{type(self).__name__} trains an elastic network, got {type(net).__name__}; "
                "make one with supple.elastic(model, example_inputs)"
            )
        if self.delay and not (options and options.steps):
            raise SettingError(
                f"delay={self.delay} is a share of the steps, so their number must be known; "
                "pass options=StepOptions(steps=...), or delay=0"
            )
        source = torch.Generator().manual_seed(0) if generator is None else generator
        layers = decided_layers(net)
        costs = _costs_of(net, layers, price or (lambda rows: net.costs(rows)[self.cost]))
        search = _Search(self, layers, costs, source, loss, forward or run_model)
        return SizesRun(
            net,
            optimizer,
            search,
            search,
            forward=search.forward,
            generator=source,
            options=options,
        )

    @staticmethod
    def derive(net: Elastic) -> Config:
        """Gives the size that the thresholds have decided on.

        Args:
            net: A network that was trained so.

        Returns:
            A size; sites that no layer decides about are full.

        Raises:
            SettingError: A layer decides about what is no site of the network.
            UnsupportedModelError: There is no such layer.
        """
        chosen: dict[str, int] = {}
        with torch.no_grad():
            for layer in decided_layers(net):
                chosen.update(layer.choices(*layer.module.decide().counts()))
        return net.space.config(chosen)


def runtime(decision: Decision, table: Tensor) -> Tensor:
    """Composes the cost of a layer from what it decided.

    Args:
        decision: Its indicators.
        table: Its cost by kernel size and width, ascending, shape (kernel sizes, widths).

    Returns:
        A scalar, differentiable in the indicators.

    Example:
        >>> table = torch.tensor([[2.0, 4.0], [4.0, 8.0]])
        >>> runtime(Decision(torch.zeros(1), torch.ones(2)), table).item()
        4.0
    """
    at_largest = torch.cat([table.new_zeros(1), table[-1]]).diff()
    full = table[-1, -1]
    relative = table[:, -1] / (full if full else 1.0)  # what costs nothing, costs nothing
    channels = (decision.widths.cumprod(0) * at_largest).sum()
    return channels * (relative[0] + (decision.kernels.cumprod(0) * relative.diff()).sum())


# ------------------------------------------------------------------- layers and their sites


@dataclass(frozen=True)
class DecidedLayer:
    """A layer, and the sites that it decides about.

    Args:
        path: Where it is.
        module: The layer.
        kernel: The site of its kernel size; None where there is one size only.
        width: The site of its channels; None where there is one width only.
        keep: The site that leaves it out; None where it always stays.
    """

    path: str
    module: SuperKernelConv2d
    kernel: Site | None
    width: Site | None
    keep: Site | None

    @property
    def sites(self) -> list[Site]:
        """The sites that it decides about."""
        return [site for site in (self.kernel, self.width, self.keep) if site is not None]

    def choices(self, kernels: int, widths: int) -> dict[str, int]:
        """Gives choices by site, from how many rings and widths count."""
        chosen: dict[str, int] = {}
        if self.keep is not None:
            chosen[self.keep.name] = self.keep.choices[int(widths > 0)]
        if widths and self.kernel is not None:
            chosen[self.kernel.name] = self.module.kernel_sizes[kernels]
        if widths and self.width is not None:
            chosen[self.width.name] = self._units(widths)
        return chosen

    def check(self) -> None:
        """Raises `SettingError` where a site lacks a size that the layer may decide on."""
        wanted: list[tuple[Site | None, set[int]]] = [
            (self.kernel, set(self.module.kernel_sizes)),
            (self.width, {self._units(n + 1) for n in range(len(self.module.channels))}),
        ]
        for site, sizes in wanted:
            if site is not None and (missing := sizes - set(site.choices)):
                raise SettingError(
                    f"layer {self.path} may decide on {sorted(missing)}, and site "
                    f"{site.name!r} offers {list(site.choices)}; offer these sizes, too"
                )

    def _units(self, widths: int) -> int:
        """The choice of the width's site with so many widths."""
        full = 0 if self.width is None else self.width.full
        channels = self.module.channels
        return round(full * channels[widths - 1] / channels[-1])


def decided_layers(net: Elastic) -> list[DecidedLayer]:
    """Gives the super-kernel layers of a network with their sites.

    Args:
        net: The elastic network.

    Raises:
        SettingError: A layer decides about what is no site, or two about the same.
        UnsupportedModelError: There is no such layer.
    """
    found = [
        (path, module)
        for path, module in net.module.named_modules()
        if isinstance(module, SuperKernelConv2d)
    ]
    if not found:
        raise UnsupportedModelError(
            f"{type(net.module).__name__} has no layer with thresholds; put "
            "supple.layers.super_kernel.SuperKernelConv2d where sizes are to be decided"
        )
    layers = [_sited(net, path, module) for path, module in found]
    owners: dict[str, str] = {}
    for layer in layers:
        layer.check()
        for site in layer.sites:
            other = owners.setdefault(site.name, layer.path)
            if other != layer.path:
                raise SettingError(
                    f"layers {other} and {layer.path} both decide about site {site.name!r}; "
                    "give one of them a single width, or skip=False"
                )
    return layers


def _sited(net: Elastic, path: str, module: SuperKernelConv2d) -> DecidedLayer:
    weight = f"{path}.weight" if path else "weight"
    sites = net.space.sites
    kernel = _first(s for s in sites if isinstance(s, KernelSite) and s.cropped.name == weight)
    width = _first(
        s for s in sites if isinstance(s, GroupSite) and (weight, 0) in s.coupled.members
    )
    keep = _first(s for s in sites if _leaves_out(net, s, path))
    needed = (
        (len(module.kernel_sizes) > 1, kernel, "kernel sizes", "the axis supple.Kernel"),
        (len(module.channels) > 1, width, "widths", "the axis supple.Width"),
        (module.skip, keep, "being left out", "the axis supple.Depth(pattern='any')"),
    )
    for decides, site, what, remedy in needed:
        if decides and site is None:
            raise SettingError(
                f"layer {path} decides about {what}, and the network has no such site; make "
                f"it elastic with {remedy}, or build the layer without"
            )
    kept_sites = [site if decides else None for decides, site, *_ in needed]
    return DecidedLayer(path, module, *kept_sites)


def _first(sites: Iterator[Site]) -> Site | None:
    return next(sites, None)


def _leaves_out(net: Elastic, site: Site, path: str) -> bool:
    """Whether a site has two choices, and the lower one leaves a module out."""
    if len(site.choices) != 2:
        return False
    lower, upper = (net.patch_of(site.name, choice).runs(path) for choice in site.choices)
    return upper and not lower


# ------------------------------------------------------------------------------------ costs


@dataclass(frozen=True)
class _Costs:
    """Costs of layers, of the rest, and of the whole network.

    Args:
        tables: For each layer its cost by kernel size and width.
        rest: Cost of what no layer decides about.
        full: Cost of the full network.
    """

    tables: Sequence[Tensor]
    rest: float
    full: float

    def relative(self, decisions: Sequence[Decision]) -> Tensor:
        """The cost of the whole network relative to the full one's."""
        parts = zip(decisions, self.tables, strict=True)
        total = self.rest + sum(runtime(d, table.to(d.widths)) for d, table in parts)
        return torch.as_tensor(total) / self.full


def _costs_of(net: Elastic, layers: Sequence[DecidedLayer], price: Price) -> _Costs:
    full = _priced(net, price, [{}])[0]
    tables = [_table(net, layer, price) for layer in layers]
    rest = float(full) - sum(float(table[-1, -1]) for table in tables)
    return _Costs(tables, rest, float(full))


def _table(net: Elastic, layer: DecidedLayer, price: Price) -> Tensor:
    """The cost of a layer by kernel size and width, all others at full size."""
    module = layer.module
    kernels, widths = range(len(module.kernel_sizes)), range(1, len(module.channels) + 1)
    configs = [layer.choices(k, w) for k, w in itertools.product(kernels, widths)]
    costs = _priced(net, price, configs).reshape(len(kernels), len(widths))
    return torch.from_numpy(costs - _cost_without(net, layer, price, costs[-1]))


def _cost_without(
    net: Elastic, layer: DecidedLayer, price: Price, by_width: np.ndarray
) -> float:
    """What the network costs without a layer; extrapolated where it can't be left out."""
    if layer.keep is not None:
        return float(_priced(net, price, [layer.choices(0, 0)])[0])
    if len(by_width) == 1:
        return 0.0
    first, second = layer.module.channels[:2]
    slope = (by_width[1] - by_width[0]) / (second - first)
    return float(by_width[0] - first * slope)


def _priced(net: Elastic, price: Price, configs: Sequence[Mapping[str, int]]) -> np.ndarray:
    rows = net.space.encode_many([net.space.config(config) for config in configs])
    return np.asarray(price(rows), dtype=np.float64)


# -------------------------------------------------------------------------------------- run


class _Search(Sampler):
    """Runs the network as its layers decide, and adds what that costs to the loss."""

    teachers: frozenset[str] = frozenset()

    def __init__(
        self,
        method: SinglePathNAS,
        layers: Sequence[DecidedLayer],
        costs: _Costs,
        generator: torch.Generator,
        loss: Loss,
        forward: Forward,
    ) -> None:
        self.method = method
        self.costs = costs
        self.warming = False
        self._layers = [layer.module for layer in layers]
        self._decisions: list[Decision] = []
        self._generator = generator
        self._loss = loss
        self._forward = forward

    def sample(self, step: int, steps: int | None) -> Sequence[Pass]:
        self.warming = step < self.method.delay * (steps or 0)
        return [Pass(None, "superkernel")]

    def forward(self, model: nn.Module, batch: Any) -> Any:
        """Runs the user's forward as the layers decide now."""
        keep = 1 - self.method.dropout if self.warming else 1.0
        self._decisions = [layer.decide(keep, self._generator) for layer in self._layers]
        decisions = list(self._decisions)
        with self._deciding(decisions), recomputing(lambda: self._deciding(decisions)):
            return self._forward(model, batch)

    def _deciding(self, decisions: Sequence[Decision]) -> Any:
        return deciding(self._layers, decisions)

    def __call__(self, entry: Pass, output: Any, batch: Any, earlier: Earlier) -> Tensor:
        """Gives the user's loss, and after the delay the logarithm of the cost beside."""
        loss = self._loss(output, batch)
        if self.warming or not self.method.penalty:
            return loss
        return loss + self.method.penalty * self.costs.relative(self._decisions).log()
