"""Controllable multi-task: encoder and decoders of any width, by budget and preference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import floor
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from supple.axes.base import below
from supple.errors import SettingError
from supple.network import Elastic
from supple.space import Config, Site, Space
from supple.supernet.base import SandwichSampler, SupernetRule
from supple.technique import register
from supple.training.batches import Forward, Loss, run_model
from supple.training.features import Features, WithFeatures
from supple.training.losses import Criterion, Earlier
from supple.training.step import Network, Pass, Sampler, SizesRun, StepOptions

__all__ = ["ControllableMultitask", "Invariance", "PreferenceAllocator"]


@register(title="Controllable multi-task architectures", paper="arXiv:2308.11744")
@dataclass(frozen=True, kw_only=True)
class ControllableMultitask(SupernetRule):
    r"""Trains an encoder and a decoder for each task at all joint widths.

    Each step trains the largest size, the smallest and `random` random ones on the same batch
    and sums their gradients. All learn from the labels of all tasks; the smaller ones are also
    drawn to give the decoders what the largest gives them, whatever the encoder's width:
    `invariance` times the squared distance of the representations, each scaled to length 1
    and averaged over `features`, is added to their loss,

    $$\frac{1}{N} \sum_n \lVert \hat s_n - \hat t_n \rVert^2, \quad
    \hat s_n = s_n / \lVert s_n \rVert, \quad \hat t_n = t_n / \lVert t_n \rVert .$$

    Where a representation is narrower than the largest size's, the linear map that explains
    the latter best on the batch is applied first. Afterwards `PreferenceAllocator` turns a
    budget and preferences of tasks into a size: who is preferred has the wider decoder.

    Args:
        features: Paths of the modules that give the representation, at least one.
        invariance: Weight of its distance beside the labels, at least 0.
        random: Random sizes per step, at least 0.

    Example:
        ```python
        net = supple.elastic(model, (x,), axes=[Width((0.25, 0.5, 0.75, 1.0))])
        method = ControllableMultitask(features=("encoder",))
        supple.train(net, loader, loss, method=method, epochs=30)
        decoders = {"depth": "decoders.depth", "labels": "decoders.labels"}
        choose = PreferenceAllocator(net, decoders)
        config = choose(2e9, {"depth": 0.8, "labels": 0.2})
        ```

    Source:
        Aich et al. 2023, "Efficient Controllable Multi-Task Architectures", arXiv:2308.11744.
    Differs:
        The authors' code is not public. The paper's statistics of batch norm for each pair of
        widths are re-estimated for the sizes in use (`supple.recalibrate`). Widths are drawn
        layer by layer, which includes the paper's one ratio for each part, and
        `PreferenceAllocator` tries one ratio for the whole encoder only. The distance, its
        weight, and what is done about features of unequal width are ours.
    Checked:
        One step against gradients summed by hand; the distance against a hand-computed one and
        a least-squares solution; sizes against enumeration.
    """

    distinguishing: ClassVar[str] = "criterion"

    features: tuple[str, ...] = ("encoder",)
    invariance: float = 1.0
    random: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "features", tuple(self.features))
        if not self.features:
            raise SettingError("features must name at least one module, got none")
        if not self.invariance >= 0:
            raise SettingError(f"invariance must be at least 0, got {self.invariance}")
        if self.random < 0:
            raise SettingError(f"random must be at least 0, got {self.random}")

    @classmethod
    def examples(cls) -> list[ControllableMultitask]:
        wide = cls(features=("0", "2"), invariance=0.5, random=0)
        return [cls(features=("0",)), wide, cls(features=("4",), invariance=0.0, random=2)]

    def sampler(self, space: Space, generator: torch.Generator) -> Sampler:
        return SandwichSampler(space, generator, self.random, regularise_all=True)

    def criterion(self, loss: Loss) -> Criterion:
        return Invariance(loss, self.invariance, self.features)

    def start(
        self,
        net: Network,
        optimizer: Optimizer,
        *rest: Any,
        loss: Loss,
        forward: Forward | None = None,
        generator: torch.Generator | None = None,
        options: StepOptions | None = None,
    ) -> SizesRun:
        return super().start(
            net,
            optimizer,
            *rest,
            loss=loss,
            forward=WithFeatures(self.features, forward or run_model),
            generator=generator,
            options=options,
        )


@dataclass(frozen=True)
class Invariance:
    """Labels, and for all roles but the teacher the distance to its representation.

    Outputs are `Features`; the user's loss gets the model's own output.

    Args:
        loss: `loss(output, batch) -> scalar`.
        weight: Of the distance, at least 0.
        features: Paths of the modules that give the representation.
        teacher: The role whose representation the others are drawn to; it must come first.
    """

    loss: Loss
    weight: float
    features: tuple[str, ...]
    teacher: str = "largest"
    teachers: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        seen = {self.teacher} if self.weight else set()
        object.__setattr__(self, "teachers", frozenset(seen))

    def __call__(self, entry: Pass, output: Features, batch: Any, earlier: Earlier) -> Tensor:
        """Gives the scalar to minimise."""
        total = self.loss(output.output, batch)
        if entry.role == self.teacher:
            self._check(output)
        if entry.role == self.teacher or not self.weight:
            return total
        if not earlier.get(self.teacher):
            raise SettingError(
                f"the pass in role '{entry.role}' is drawn to role '{self.teacher}', which has "
                "not run in this step; the sampler must give it first"
            )
        target: Features = earlier[self.teacher][-1]
        each = [distance(own, target.features[path]) for path, own in output.features.items()]
        # A size may leave out all the blocks that give a representation.
        return total + self.weight * torch.stack(each).mean() if each else total

    def _check(self, output: Features) -> None:
        missing = [path for path in self.features if path not in output.features]
        if missing:
            raise SettingError(
                f"features names '{missing[0]}', which gave nothing in the largest size's "
                "forward: a list of modules is not called itself; name a module in it"
            )


def distance(own: Tensor, target: Tensor) -> Tensor:
    r"""Squared distance of representations, each example's scaled to length 1, in [0, 4].

    Where the second dimension is narrower than the target's, the linear map that explains the
    target best on these examples is applied first. It is held fixed: at the best map, the
    gradient of the distance that it minimises does not depend on how it would change.

    Args:
        own: Shape (N, C, ...).
        target: Shape (N, C', ...) with the same other sizes; no gradient flows to it.

    Returns:
        A scalar, averaged over N.

    Raises:
        SettingError: The shapes differ in more than the second dimension.

    Example:
        >>> float(distance(torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 2.0]])))
        2.0
    """
    target = target.detach()
    if own.shape[:1] + own.shape[2:] != target.shape[:1] + target.shape[2:]:
        raise SettingError(
            "representations may differ in their second dimension only, got "
            f"{tuple(own.shape)} and {tuple(target.shape)}"
        )
    if own.shape != target.shape:
        own = _aligned(own, target)
    own, target = own.flatten(1), target.flatten(1)
    unit = own / own.norm(dim=1, keepdim=True).clamp(min=1e-6)
    toward = target / target.norm(dim=1, keepdim=True).clamp(min=1e-6)
    return (unit - toward).square().sum(1).mean()


def _aligned(own: Tensor, target: Tensor) -> Tensor:
    rows, aim = own.movedim(1, -1), target.movedim(1, -1)
    flat, goal = rows.detach().flatten(0, -2), aim.flatten(0, -2)
    square = flat.T @ flat
    # A little of the identity keeps the equations solvable where units are dead.
    ridge = 1e-4 * square.diagonal().mean().clamp(min=1e-6)
    eye = torch.eye(len(square), dtype=square.dtype, device=square.device)
    return (rows @ torch.linalg.solve(square + ridge * eye, flat.T @ goal)).movedim(-1, 1)


Score = Callable[[Config], float]


class PreferenceAllocator:
    """Turns a budget and preferences of tasks into a size, without learning.

    The most preferred task's decoder gets the full width and every other one a width in
    proportion to its preference. The encoder gets what is left of the budget: of the widths
    with which the size still fits, the one that scores best. Where even the narrowest encoder
    does not fit, all decoders become narrower together.

    Answers are kept by a grid of budgets and preferences. Budgets are rounded down to it, so
    that a size never costs more than was asked for.

    Args:
        net: The elastic network.
        decoders: Path of each task's decoder, by task; all other sites are the encoder's.
        score: `score(config) -> quality` on validation data, higher is better; None prefers
            the encoder that costs most.
        cost: One of the costs that `net.costs` gives.
        levels: Widths, as shares of the full one, that parts may have; ascending, up to 1.
        grid: Steps from the cheapest size's cost to the dearest's, and from a preference of 0
            to that of the most preferred task; at least 1.

    Raises:
        SettingError: A decoder has no sites, or a value can't be used.

    Example:
        >>> import supple
        >>> class Two(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.encoder = torch.nn.Linear(3, 8)
        ...         self.a = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 1))
        ...         self.b = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 1))
        ...
        ...     def forward(self, x):
        ...         x = self.encoder(x).relu()
        ...         return self.a(x), self.b(x)
        >>> net = supple.elastic(Two(), torch.ones(2, 3), axes=[supple.Width((0.25, 0.5, 1.0))])
        >>> choose = PreferenceAllocator(net, {"a": "a", "b": "b"}, levels=(0.25, 0.5, 1.0))
        >>> choose(10_000, {"a": 0.8, "b": 0.4})
        Config({'a.0': 8, 'b.0': 4, 'encoder': 8})
    """

    def __init__(
        self,
        net: Elastic,
        decoders: Mapping[str, str],
        *,
        score: Score | None = None,
        cost: str = "macs",
        levels: Sequence[float] = (0.25, 0.5, 0.75, 1.0),
        grid: int = 20,
    ) -> None:
        if grid < 1 or not levels or list(levels) != sorted(levels) or levels[-1] != 1:
            raise SettingError(
                f"grid must be at least 1 and levels ascend to 1, got {grid} and {levels}"
            )
        self.net, self.decoders, self.score, self.cost = net, dict(decoders), score, cost
        self.levels, self.grid = tuple(levels), grid
        self._sites = {task: self._below(path) for task, path in self.decoders.items()}
        taken = {site.name for sites in self._sites.values() for site in sites}
        self._encoder = [site for site in net.space.sites if site.name not in taken]
        ends = [self._price(net.space.smallest()), self._price(net.space.largest())]
        self._cheapest, self._step = ends[0], (ends[1] - ends[0]) / grid
        self._kept: dict[tuple[int, tuple[int, ...]], Config] = {}

    def __call__(self, budget: float, preferences: Mapping[str, float]) -> Config:
        """Gives the size for a budget and preferences.

        Args:
            budget: Most that it may cost.
            preferences: By task, at least 0 and not all 0; only their proportions count.

        Returns:
            A config of the network's space.

        Raises:
            SettingError: The budget is below the smallest size's cost, or the preferences are
                not of the tasks.
        """
        place = min(self.grid, floor((budget - self._cheapest) / self._step + 1e-9))
        if place < 0:
            raise SettingError(
                f"budget must be at least {self._cheapest:g}, what the smallest size costs in "
                f"{self.cost}, got {budget:g}"
            )
        shares = self._shares(preferences)
        if (place, shares) not in self._kept:
            allowed = self._cheapest + place * self._step
            self._kept[place, shares] = self._found(allowed, shares)
        return self._kept[place, shares]

    def _shares(self, preferences: Mapping[str, float]) -> tuple[int, ...]:
        """The preferences relative to the largest, in steps of the grid, by task."""
        values = [preferences.get(task, -1.0) for task in self.decoders]
        if set(preferences) != set(self.decoders) or min(values) < 0 or max(values) <= 0:
            raise SettingError(
                "preferences must be at least 0, not all 0, and name the tasks "
                f"{', '.join(self._sites)}; got {dict(preferences)}"
            )
        return tuple(round(value / max(values) * self.grid) for value in values)

    def _found(self, allowed: float, shares: tuple[int, ...]) -> Config:
        for most in reversed(self.levels):
            choices: dict[str, int] = {}
            for sites, share in zip(self._sites.values(), shares, strict=True):
                level = self._level(most * share / self.grid)
                choices |= {site.name: _nearest(site, level) for site in sites}
            fitting = [c for c in self._with_encoders(choices) if self._price(c) <= allowed]
            if fitting:
                return max(fitting, key=self.score or self._price)
        return self.net.space.smallest()

    def _level(self, share: float) -> float:
        return min(self.levels, key=lambda level: abs(level - share))

    def _with_encoders(self, choices: Mapping[str, int]) -> Iterator[Config]:
        for level in self.levels:
            encoder = {site.name: _nearest(site, level) for site in self._encoder}
            yield self.net.space.config({**choices, **encoder})

    def _price(self, config: Config) -> float:
        return float(self.net.costs(config)[self.cost][0])

    def _below(self, path: str) -> list[Site]:
        found = [site for site in self.net.space.sites if below(site.name, path)]
        if not found:
            raise SettingError(
                f"decoder '{path}' has no sites; sites are {self.net.space.names}"
            )
        return found


def _nearest(site: Site, level: float) -> int:
    return min(site.choices, key=lambda choice: abs(choice - level * site.full))
