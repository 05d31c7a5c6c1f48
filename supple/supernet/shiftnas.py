"""ShiftNAS: costs whose sizes still improve are drawn more often; a network gives the sizes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from supple.axes.base import Patch, added, merge
from supple.axes.size_generator import SizeGenerator
from supple.errors import SettingError
from supple.graph.couple import Graph, Group
from supple.graph.dims import positions
from supple.graph.order import expand_order
from supple.plan import Layout, Plan
from supple.space import Config, FloatArray, Randomness, Site, Space, numpy_generator
from supple.supernet.base import BandSampler, Price, SupernetRule, random_in_band
from supple.technique import register
from supple.training import processes
from supple.training.batches import Forward, Loss, run_model
from supple.training.losses import Criterion, Earlier
from supple.training.step import Network, Pass, Sampler, Seen, SizesRun, StepOptions

__all__ = ["ShiftNas", "SizeGenerator"]

_MEMORY = 0.9  # of the running averages of losses and of how they fall
_TARGETS = 64  # costs that the generator is asked for in a step
_ROLE = "generator"
_ENDS = "supple_generator_ends"  # the lowest and the highest cost


@register(title="ShiftNAS", paper="arXiv:2307.09300")
@dataclass(frozen=True, kw_only=True)
class ShiftNas(SupernetRule):
    r"""Draws costs where sizes still improve, and trains a network that gives sizes for costs.

    A step draws a band of costs, a cost in it, and asks the generator for a size of that cost;
    the shared weights take one step on it. Two things are learned beside the weights.

    *Probability shift.* For each band, $v_k$ is the running average of by how much of itself
    the loss fell from one visit to the next. Bands are drawn with

    $$p_k = (1 - f)\,\operatorname{softmax}(v / T)_k + f / K,$$

    so that bands that are under-trained get more steps. Bands in which no size is found have
    probability 0.

    *Architecture generator.* An LSTM reads the cost and, site by site, its own last choice, and
    gives a distribution over the choices; straight-through Gumbel one-hots make the choice. It
    minimises

    $$\text{loss}(\text{masked}) + \lambda\,\left|\frac{\text{cost}}{\text{target}} - 1\right|
      - \beta\,H.$$

    The first term comes from a pass of its own over the full tensors, each multiplied by a
    prefix mask of ones and zeros: the one-hot times a lower-triangular matrix. It gives
    gradients to the generator only, and the masked network computes what the size does (not
    where a normalization reduces over the masked units). The second is exact: the cost is that
    of the choices, and its derivative in a one-hot the cost with that choice in place. $H$ is
    the mean entropy of the choices.

    Widths, heads and whatever else is a prefix of coupled dimensions are masked. At other sites
    (depth, kernel, operator, resolution) the masked network runs the choice that was made, and
    the generator learns from the cost alone.

    After training `ShiftNas.propose(net, cost, count)` gives sizes for a cost without search.
    The generator's weights are parameters of the network (`supple_generator_...`): optimizers
    train them, checkpoints and files hold them, extracted networks do not.

    Args:
        bands: How many bands of equal width the costs fall into ($K$), at least 1.
        cost: One of the costs that `net.costs` gives.
        temperature: $T$, above 0; small values shift more.
        floor: $f$, in [0, 1]: share of the uniform distribution over bands.
        penalty: $\lambda$, at least 0.
        entropy: $\beta$, at least 0; keeps the generator from always giving one size.

    Example:
        ```python
        net = supple.elastic(model, (x,))
        supple.train(net, loader, loss, method=ShiftNas(bands=5), epochs=30)
        sizes = ShiftNas.propose(net, cost=2e6, count=8)
        ```

    Source:
        Zhang et al. 2023, "ShiftNAS: Improving One-shot NAS via Probability Shift",
        arXiv:2307.09300. The authors published no code (github.com/bestfleer/ShiftNAS).
    Differs:
        The exact rule of the shift is our reading. The weights train on the sliced size rather
        than on the masked network, which is cheaper and the same; where the generator misses
        the band, they train on a random size of it, since the generator knows nothing yet at
        the beginning. The generator learns costs from 64 targets a step. Its order of sites is
        the space's.
    Checked:
        Masked against sliced outputs, widths and depths mixed; slopes of the cost against the
        cost with each other choice; probabilities against the formula; the generator's weights
        resume bitwise, are saved, and learn to tell cheap from dear.
    """

    distinguishing: ClassVar[str] = "sampler"

    bands: int = 5
    cost: str = "macs"
    temperature: float = 0.05
    floor: float = 0.1
    penalty: float = 1.0
    entropy: float = 0.01

    def __post_init__(self) -> None:
        if self.bands < 1:
            raise SettingError(f"bands must be at least 1, got {self.bands}")
        if not self.temperature > 0:
            raise SettingError(f"temperature must be above 0, got {self.temperature}")
        if not 0 <= self.floor <= 1:
            raise SettingError(f"floor must be from 0 to 1, got {self.floor}")
        for name in ("penalty", "entropy"):
            if not getattr(self, name) >= 0:
                raise SettingError(f"{name} must be at least 0, got {getattr(self, name)}")

    @classmethod
    def examples(cls) -> list[ShiftNas]:
        return [cls(), cls(bands=2, floor=0.5, temperature=1.0, penalty=2.0, entropy=0.0)]

    def sampler(self, space: Space, generator: torch.Generator) -> Sampler:
        return _ShiftSampler(self, space, generator)

    def adapt(self, net: Network) -> None:
        """Adds the generator's weights to the network.

        Args:
            net: The network that is going to be trained.

        Raises:
            SettingError: Sizes of the network have weights of their own.
        """
        counts = tuple(len(site.choices) for site in net.space.sites)
        _share(net, SizeGenerator(counts))
        net.module.get_parameter(_ENDS).requires_grad_(False)

    def start(
        self,
        net: Network,
        optimizer: Optimizer,
        *_: Any,
        loss: Loss,
        forward: Forward | None = None,
        generator: torch.Generator | None = None,
        options: StepOptions | None = None,
    ) -> SizesRun:
        masked = _MaskedForward(forward or run_model)
        run = super().start(
            net,
            optimizer,
            loss=loss,
            forward=masked,
            generator=generator,
            options=options,
        )
        if isinstance(run.sampler, _ShiftSampler):
            masked.sampler = run.sampler
            run.criterion = _Joint(run.criterion, run.sampler)
        return run

    @staticmethod
    def propose(
        net: Network, cost: float, count: int = 1, generator: Randomness = 0
    ) -> list[Config]:
        """Gives sizes for a cost from what the generator learned, without search.

        Args:
            net: A network that was trained so.
            cost: What the sizes should cost, in the unit of the cost trained with.
            count: How many are drawn, at least 1; some may coincide.
            generator: Source of randomness.

        Returns:
            Sizes, as drawn: their costs are near the one asked for, on either side.

        Raises:
            SettingError: The network has no generator.
        """
        sharing = getattr(net, "sharing", None)
        if not isinstance(sharing, SizeGenerator):
            raise SettingError("this network has no size generator; train it with ShiftNas")
        weights = sharing.weights_in(net.module)
        low, high = weights["ends"].tolist()
        noise = numpy_generator(generator)
        with torch.no_grad():
            drawn, _ = sharing.choices(
                weights, _features(np.full(count, float(cost)), low, high), noise
            )
        rows = np.stack([each.argmax(1).cpu().numpy() for each in drawn], 1)
        return net.space.decode_many(net.space.canonical_many(rows))


def _share(net: Any, wanted: SizeGenerator) -> None:
    present = net.sharing
    if isinstance(present, SizeGenerator) and present == wanted:
        return
    if present is not None:
        raise SettingError(
            f"ShiftNAS keeps its generator with the network, whose sizes have weights of their "
            f"own ({type(present).__name__}); it trains networks whose sizes share all weights"
        )
    net.share(wanted)


def _features(costs: FloatArray, low: float, high: float) -> Tensor:
    """How far costs are from the lowest to the highest, plainly and in the logarithm."""
    plain = (costs - low) / max(high - low, 1e-12)
    logs = (np.log(costs) - np.log(low)) / max(np.log(high) - np.log(low), 1e-12)
    return torch.from_numpy(np.stack([plain, logs], 1))


# --------------------------------------------------------------------------- the sampler


@dataclass(frozen=True)
class _Asked:
    """What the generator was asked for in a step, and gave.

    Args:
        drawn: One-hots by site, shape (targets, choices).
        entropy: Mean entropy of the choices.
        penalty: Mean relative distance of the costs to the targets.
        config: The size for the first target.
    """

    drawn: list[Tensor]
    entropy: Tensor
    penalty: Tensor
    config: Config


class _ShiftSampler(BandSampler):
    """Draws bands that still improve; the generator gives a size in the band."""

    def __init__(self, method: ShiftNas, space: Space, generator: torch.Generator) -> None:
        super().__init__(space, generator, method.bands, 1, method.cost)
        self.method = method
        self.asked: _Asked | None = None
        self._net: Any = None
        self._known: list[Config | None] = [None] * method.bands
        self._losses: list[float | None] = [None] * method.bands
        self._falls = [0.0] * method.bands
        self.masks: _Masks | None = None

    def begin(self, run: SizesRun) -> None:
        super().begin(run)
        if self._net is None:
            self._net = run.net
            self.masks = _Masks(self._net)
            self._known = [self._found(band, 0, tries=5) for band in range(self.bands)]
            with torch.no_grad():
                ends = self._net.module.get_parameter(_ENDS)
                ends.copy_(torch.from_numpy(self._edges[[0, -1]]))

    def _found(self, band: int, random: Randomness, tries: int = 50) -> Config | None:
        """A random size of a band; None where none is found."""
        assert self._price is not None, "a run begins each step before it samples"
        low, high = self._edges[band : band + 2].tolist()
        with contextlib.suppress(SettingError):
            return random_in_band(self.space, self._price, low, high, random, tries)
        return None

    def probabilities(self, step: int, steps: int | None) -> np.ndarray:
        method = self.method
        there = np.array([config is not None for config in self._known])
        powers = np.exp((np.array(self._falls) - max(self._falls)) / method.temperature) * there
        return (1 - method.floor) * powers / powers.sum() + method.floor * there / there.sum()

    def sample(self, step: int, steps: int | None) -> Sequence[Pass]:
        assert self._price is not None, "a run begins each step before it samples"
        random = numpy_generator(self.generator)
        bands = random.choice(self.bands, _TARGETS, p=self.probabilities(step, steps))
        targets = random.uniform(self._edges[bands], self._edges[bands + 1])
        self.asked = self._ask(targets, self._price, random)
        band = int(bands[0])
        config: Config | None = self.asked.config
        [cost] = self._price(self.space.encode_many([self.asked.config]))
        if not self._edges[band] <= cost <= self._edges[band + 1]:
            config = self._found(band, random) or self._known[band]
        return [Pass(None, _ROLE), Pass(config, f"band-{band}")]

    def _ask(self, targets: FloatArray, price: Price, random: np.random.Generator) -> _Asked:
        sharing = self._net.sharing
        low, high = float(self._edges[0]), float(self._edges[-1])
        drawn, entropy = sharing.choices(
            sharing.weights_in(self._net.module), _features(targets, low, high), random
        )
        rows = np.stack([each.detach().argmax(1).cpu().numpy() for each in drawn], 1)
        costs = cost_of(drawn, rows, self.space, price)
        away = (costs / torch.from_numpy(targets).to(costs) - 1).abs().mean()
        config = self.space.decode(self.space.canonical_many(rows[:1])[0])
        return _Asked(drawn, entropy, away, config)

    def observe(self, seen: Seen) -> None:
        if seen.entry.role == _ROLE:
            self.asked = None
            return
        loss = seen.loss.detach().float().clone()
        processes.average([loss])
        value, band = float(loss), int(seen.entry.role.rpartition("-")[2])
        before = self._losses[band]
        if before is None:
            self._losses[band] = value
            return
        fall = (before - value) / max(abs(before), 1e-12)
        self._falls[band] = _MEMORY * self._falls[band] + (1 - _MEMORY) * fall
        self._losses[band] = _MEMORY * before + (1 - _MEMORY) * value

    def state_dict(self) -> dict[str, Any]:
        return {"losses": list(self._losses), "falls": list(self._falls)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._losses, self._falls = list(state["losses"]), list(state["falls"])


def cost_of(drawn: Sequence[Tensor], rows: np.ndarray, space: Space, price: Price) -> Tensor:
    """Gives the costs of sizes, differentiable in the one-hots of their choices.

    Args:
        drawn: For each site one-hots of shape (n, choices).
        rows: The choices as indices, shape (n, sites).
        space: Whose sites they are.
        price: Costs of encoded configs, (n, sites) -> (n,).

    Returns:
        The exact costs, shape (n,). The derivative with respect to an entry of a one-hot is
        the exact cost with that choice in the place of the one made.
    """
    counts = [len(site.choices) for site in space.sites]
    swapped = np.repeat(rows, sum(counts), 0).reshape(len(rows), sum(counts), -1)
    column = np.repeat(np.arange(len(counts)), counts)
    choice = np.concatenate([np.arange(count) for count in counts])
    swapped[:, np.arange(sum(counts)), column] = choice
    flat = space.canonical_many(swapped.reshape(-1, len(counts)))
    table = np.asarray(price(flat), dtype=np.float64).reshape(len(rows), -1)
    own = np.asarray(price(space.canonical_many(rows)), dtype=np.float64)
    hots = torch.cat(list(drawn), 1)
    slopes = torch.from_numpy(table).to(hots)
    # Zero, with the right derivative: what stands in the brackets cancels.
    change = ((hots - hots.detach()) * slopes).sum(1)
    return torch.from_numpy(own).to(hots) + change


# ------------------------------------------------------------------------ the masked pass


class _MaskedForward:
    """The user's forward; on the full tensors with masks where the generator has a pass."""

    def __init__(self, forward: Forward) -> None:
        self.forward = forward
        self.sampler: _ShiftSampler | None = None

    def __call__(self, model: nn.Module, batch: Any) -> Any:
        asked = None if self.sampler is None else self.sampler.asked
        if asked is None:
            return self.forward(model, batch)
        assert self.sampler is not None
        assert self.sampler.masks is not None
        with self.sampler.masks.on(asked.config, [each[0] for each in asked.drawn]):
            return self.forward(model, batch)


@dataclass(frozen=True)
class _Joint:
    """The criterion of the sizes, and for the generator's pass its terms beside."""

    sizes: Criterion
    sampler: _ShiftSampler

    @property
    def teachers(self) -> frozenset[str]:
        return self.sizes.teachers

    def __call__(self, entry: Pass, output: Any, batch: Any, earlier: Earlier) -> Tensor:
        loss = self.sizes(entry, output, batch, earlier)
        asked, method = self.sampler.asked, self.sampler.method
        if entry.role != _ROLE or asked is None:
            return loss
        return loss + method.penalty * asked.penalty - method.entropy * asked.entropy


class _Masks:
    """Runs a network at full width with parameters multiplied by prefix masks."""

    def __init__(self, net: Any) -> None:
        self._net = net
        self._layout = Layout(net.graph)
        self._site_of = {site.name: i for i, site in enumerate(net.space.sites)}
        self._units = {
            site.name: _units(net.graph, site.group)
            for site in net.space.sites
            if getattr(site, "group", None) is not None
        }

    @contextlib.contextmanager
    def on(self, config: Config, drawn: Sequence[Tensor]) -> Iterator[None]:
        """Masks the network for the duration of the block.

        Args:
            config: The size; its sites without masks are set to their choices.
            drawn: For each site the one-hot of its choice, shape (choices,).
        """
        net = self._net
        others = {name: each for name, each in config.items() if name not in self._units}
        masks: dict[str, list[tuple[int, Tensor]]] = {}
        for name, members in self._units.items():
            kept = _prefix(net.space.site(name), drawn[self._site_of[name]])
            for member, dim, units in members:
                masks.setdefault(member, []).append((dim, kept[units]))
        tensors = {
            name: _Masked(tuple(masks.get(name, ())))
            for name, _ in net.module.named_parameters()
            if not added(name)
        }
        patch = merge([net.patch(net.space.config(others)), Patch(tensors=tensors)])
        with Plan(net.graph, patch, self._layout).applied(None):
            yield


@dataclass(frozen=True)
class _Masked:
    """A tensor that is not trained, multiplied by masks along some dimensions."""

    masks: tuple[tuple[int, Tensor], ...]

    def __call__(self, tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        for dim, mask in self.masks:
            shape = [1] * tensor.dim()
            shape[dim] = -1
            tensor = tensor * mask.to(tensor).reshape(shape)
        return tensor


def _prefix(site: Site, hot: Tensor) -> Tensor:
    """The mask of a site's units, then a one for what is none of them."""
    units = torch.arange(site.full, device=hot.device)
    sizes = torch.tensor(site.choices, device=hot.device)
    below = (units[:, None] < sizes[None, :]).to(hot)  # the lower-triangular matrix
    return torch.cat([below @ hot, hot.new_ones(1)])


def _units(graph: Graph, group: Group) -> list[tuple[str, int, Tensor]]:
    """For each parameter and dimension of a group, the unit of every position.

    Positions of no unit (another part of a concatenation) have the number of units.
    """
    found = []
    parameters = dict(graph.model.named_parameters())
    for name, dim in group.members:
        if name not in parameters:
            continue
        own = graph.tensors[name][dim]
        kept = [
            positions(own, expand_order(group, np.array([unit]))) for unit in range(group.full)
        ]
        size = parameters[name].shape[dim]
        times = np.bincount(np.concatenate(kept), minlength=size)
        units = np.full(size, group.full)
        for unit, index in enumerate(kept):
            units[index[times[index] == 1]] = unit
        found.append((name, dim, torch.from_numpy(units)))
    return found
