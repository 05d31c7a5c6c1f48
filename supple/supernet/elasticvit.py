"""ElasticViT: each step trains sizes of nearly the same cost, and prefers promising ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from supple.errors import SettingError
from supple.space import Config, IntArray, Space, numpy_generator
from supple.supernet.base import SupernetRule, nested_chain
from supple.technique import register
from supple.training import processes
from supple.training.batches import Loss
from supple.training.divergence import AlphaDistillation
from supple.training.losses import Criterion, Distillation, Earlier
from supple.training.schedule import Cosine, Schedule
from supple.training.step import Pass, Sampler, Seen, SizesRun

__all__ = ["AdjacentCostSampler", "Bank", "ElasticViT", "Lessons", "cost_banks", "prefer_width"]

Price = Callable[[IntArray], np.ndarray]
_TEACHER = "teacher"
_WIDTHS, _DEPTHS = ("width", "heads"), ("depth",)
_LEAST, _HELD = 16, 512  # sizes of a bank
_PARENTS, _ROUNDS = 256, 40  # how they are looked for
_SIXTHS = 6  # sampling turns to remembered sizes in so many stages of a run
_KEPT = 0.9  # of the running mean of a bank's losses


@register(title="ElasticViT", paper="arXiv:2303.09730")
@dataclass(frozen=True, kw_only=True)
class ElasticViT(SupernetRule):
    r"""Trains sizes of nearly one cost in each step, so that their gradients agree.

    Costs fall into `banks`, geometrically spaced from the smallest size's to the largest's; the
    bank at $F$ holds sizes of $F$ to $(1 + \text{window}) F$. The bank of a step does a random
    walk: it moves up, down or stays, each with the same probability. A step trains `random`
    sizes of the bank, and after them a small one that belongs to the bank's third of the costs
    (hierarchical smallest sizes), rather than the smallest of all.

    Each bank remembers `memory` sizes with the lowest losses. Once half of it is full, a size
    is drawn from memory with a probability of `exploit`, plus `growth` for each sixth of the
    run that has passed: with the softmax over negative losses. Else `candidates` are drawn, and
    the one that has its cost from width rather than depth is taken: the one with the least
    $F(\text{widths of the anchor}) - F(\text{depths of the anchor})$, where the anchor is the
    best remembered size of the cheapest bank.

    Random sizes learn from the user's loss. Where there is a teacher (the full network as it is
    when the run begins, `pretrained`, or what a subclass gives in `teachers`), the loss has the
    weight `labels`, and soft cross-entropy to the teacher the rest of 1. The small one learns
    from the mean of their outputs, by the adaptive alpha-divergence: example by example, the
    largest of those for `alphas`, with powers of probability ratios bounded by `limit`.

    Args:
        banks: How many, at least 1.
        window: Width of a bank, relative to its lowest cost, above 0.
        random: Random sizes per step, at least 1.
        memory: Sizes that each bank remembers, at least 1.
        exploit: Probability of a remembered size at first, in [0, 1].
        growth: What is added to it after each sixth of the run, at least 0.
        candidates: Sizes to prefer one among, at least 1.
        pretrained: Whether the full network, as it is when the run begins, teaches.
        labels: Weight of the user's loss beside a teacher, in [0, 1].
        alphas: Values of $\alpha$, at least one.
        limit: The largest power of $p / q$, above 0.

    Example:
        ```python
        net = supple.elastic(vit, (x,))
        supple.train(net, loader, loss, method=ElasticViT(), lr=5e-4, weight_decay=0.05)
        ```

    Source:
        Tang et al. 2023, "ElasticViT: Conflict-aware Supernet Training for Deploying Fast
        Vision Transformer on Diverse Mobile Devices", arXiv:2303.09730; defaults as in the
        authors' microsoft/Moonlit, folder ElasticViT. The divergence: Wang et al. 2021,
        "AlphaNet", arXiv:2102.07954.
    Differs:
        Costs of banks follow from the network (the authors' are 100 to 1,200 million), each
        with 16 to 512 sizes that are found beforehand, so that a thin bank is as fast as any;
        the nearest join where the window holds fewer (always at the ends, where few sizes have
        the same cost). Banks with the same sizes are one. Small
        sizes are those of the nested chain that cost no more than their third's cheapest bank
        (the authors' are written by hand). Remembered losses are those of training, less the
        bank's running mean at the time, in place of extra passes that measure all of them
        anew. The gradients are not clipped adaptively, and the teacher's output is not
        sharpened.
    Checked:
        The walk's steps; the banks' costs, also of a network with four sizes; the draw from
        memory and the preference against cases by hand; a step against gradients by hand.
    """

    distinguishing: ClassVar[str] = "sampler"

    banks: int = 8
    window: float = 0.1
    random: int = 3
    memory: int = 150
    exploit: float = 0.2
    growth: float = 0.15
    candidates: int = 5
    pretrained: bool = False
    labels: float = 0.5
    alphas: tuple[float, ...] = (-1.0, 1.0)
    limit: float = 5.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "alphas", tuple(self.alphas))
        for name in ("banks", "random", "memory", "candidates"):
            if getattr(self, name) < 1:
                raise SettingError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.window > 0:
            raise SettingError(f"window must be above 0, got {self.window}")
        for name in ("exploit", "labels"):
            if not 0 <= getattr(self, name) <= 1:
                raise SettingError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        if not self.growth >= 0:
            raise SettingError(f"growth must be at least 0, got {self.growth}")
        AlphaDistillation(_nothing, alphas=self.alphas, limit=self.limit)

    @classmethod
    def examples(cls) -> list[ElasticViT]:
        return [
            cls(),
            cls(banks=3, random=2, memory=4, exploit=0.5, pretrained=True),
            cls(banks=1, candidates=1, alphas=(1.0,)),
        ]

    def sampler(self, space: Space, generator: torch.Generator) -> Sampler:
        return AdjacentCostSampler(space, generator, self)

    def criterion(self, loss: Loss) -> Criterion:
        return Lessons(
            Distillation(loss, _TEACHER, labels=self.labels, soft=1 - self.labels),
            AlphaDistillation(loss, "random", frozenset({"smallest"}), self.alphas, self.limit),
        )

    def schedule(self) -> Schedule:
        return Cosine(floor=0.01)


def _nothing(output: Any, batch: Any) -> Tensor:
    """Stands for a loss where only settings are checked."""
    raise NotImplementedError


@dataclass(frozen=True)
class Lessons:
    """The smallest learns from the random sizes, and these from a teacher or from labels.

    Args:
        random: What random sizes minimise where there is a teacher, else its `loss` alone.
        smallest: What the role `smallest` minimises.
    """

    random: Distillation
    smallest: AlphaDistillation

    @property
    def teachers(self) -> frozenset[str]:
        """The random sizes."""
        return self.smallest.teachers

    def __call__(self, entry: Pass, output: Any, batch: Any, earlier: Earlier) -> Tensor:
        """Gives the loss of a pass by its role."""
        if entry.role == "smallest":
            return self.smallest(entry, output, batch, earlier)
        if earlier.get(self.random.teacher):
            return self.random(entry, output, batch, earlier)
        return self.random.loss(output, batch)


# ------------------------------------------------------------------------------------- banks


@dataclass(frozen=True)
class Bank:
    """Sizes of nearly the same cost.

    Args:
        rows: The sizes, encoded, shape (n, sites), at least one.
        smallest: The small size that is trained beside them.
    """

    rows: IntArray
    smallest: Config


def cost_banks(
    space: Space, price: Price, banks: int = 8, window: float = 0.1, regions: int = 3
) -> list[Bank]:
    """Finds sizes for banks of costs, geometrically spaced from the smallest to the largest.

    What it finds follows from the space and the costs alone. It ends after a fixed number of
    rounds, however thin a bank is: one with fewer than 16 sizes (fewer in small spaces) holds
    the nearest beside them, and one with more than 512 so many of them.

    Args:
        space: The sizes there are.
        price: Costs of encoded sizes, (n, sites) -> (n,).
        banks: How many, at least 1.
        window: Width of a bank, relative to its lowest cost, above 0.
        regions: Into how many parts banks fall that have a small size in common, at least 1.

    Returns:
        Banks by rising cost; fewer than asked for where neighbours hold the same sizes.

    Example:
        >>> from supple.space import Site
        >>> space = Space([Site(name, "width", (1, 2, 4, 8), 8) for name in "ab"])
        >>> price = lambda rows: space.choices_of(rows).prod(1)
        >>> [sorted(set(price(bank.rows).tolist())) for bank in cost_banks(space, price, 4)]
        [[1], [4], [16], [64]]
    """
    random = np.random.default_rng(0)  # so that a resumed run has the same banks
    ends = space.encode_many([space.smallest(), space.largest()])
    low, high = sorted(np.maximum(np.asarray(price(ends), dtype=np.float64), 1.0).tolist())
    floors = np.geomspace(low, max(low, high / (1 + window)), banks)
    rows = np.concatenate([ends, space.random_many(4 * _PARENTS, random)])
    least = max(1, min(_LEAST, space.size() // (2 * banks)))
    found: list[IntArray] = []
    lows: list[float] = []
    for floor in floors.tolist():
        inside = _inside(space, price, rows, floor, floor * (1 + window), least, random)
        if not found or not np.array_equal(inside, found[-1]):
            found.append(inside)
            lows.append(floor)
    regions = min(regions, len(found))
    chain = nested_chain(space, 64)
    prices = np.asarray(price(space.encode_many(chain)), dtype=np.float64)
    smallest = {}
    for region in range(regions):
        first = -(-region * len(found) // regions)  # of its banks, the cheapest
        fitting = np.flatnonzero(prices <= lows[first] * (1 + 1e-9))
        smallest[region] = chain[fitting[prices[fitting].argmax()]] if region else chain[0]
    return [Bank(r, smallest[i * regions // len(found)]) for i, r in enumerate(found)]


def _inside(
    space: Space,
    price: Price,
    rows: IntArray,
    low: float,
    high: float,
    least: int,
    random: np.random.Generator,
) -> IntArray:
    """Finds up to `_HELD` sizes with costs between two values, or the `least` nearest."""
    count = 0
    for _ in range(_ROUNDS):
        rows = np.unique(rows, axis=0)
        logs = np.log(np.maximum(np.asarray(price(rows), dtype=np.float64), 1.0))
        away = np.abs(logs - np.clip(logs, np.log(low), np.log(high)))
        before, count = count, int((away < 1e-9).sum())
        near = rows[away.argsort(kind="stable")[: max(count, _PARENTS)]]
        if count >= _HELD or (before and count == before):
            break
        rows = np.concatenate([near, _moved(space, np.repeat(near, 2, 0), random)])
    if count < least:
        return near[:least]
    return near[np.sort(random.permutation(count)[:_HELD])]


def _moved(space: Space, rows: IntArray, random: np.random.Generator) -> IntArray:
    """Draws some choices of each size anew, and all of those that did not exist."""
    drawn = space.random_many(len(rows), random)
    fresh = (random.random(rows.shape) < 2 / len(space)) | ~space.present(rows)
    return space.canonical_many(np.where(fresh, drawn, rows))


def prefer_width(space: Space, price: Price, rows: IntArray, anchor: Config) -> np.ndarray:
    """Scores sizes of one cost: the lower, the more of the cost comes from width, not depth.

    Args:
        space: The sizes there are.
        price: Costs of encoded sizes, (n, sites) -> (n,).
        rows: Encoded sizes, shape (n, sites).
        anchor: A small size.

    Returns:
        Each one's cost with the anchor's widths, less its cost with the anchor's depths.
    """
    own = space.encode(anchor)
    there = space.present(own[None])[0]

    def given(axes: Sequence[str]) -> np.ndarray:
        alike = np.array([site.axis in axes for site in space.sites]) & there
        # Of blocks that only the anchor has, the choices are the anchor's too.
        taken = alike | (there & ~space.present(rows))
        return np.asarray(price(space.canonical_many(np.where(taken, own, rows))))

    return given(_WIDTHS) - given(_DEPTHS)


# ----------------------------------------------------------------------------------- sampler


class AdjacentCostSampler(Sampler):
    """Samples sizes of one bank of costs in each step, and walks from bank to bank.

    Args:
        space: The sizes there are.
        generator: Source of randomness.
        settings: How.
        cost: One of the costs that `net.costs` gives.
    """

    def __init__(
        self,
        space: Space,
        generator: torch.Generator,
        settings: ElasticViT,
        cost: str = "macs",
    ) -> None:
        self.space, self.generator, self.settings, self.cost = space, generator, settings, cost
        self._banks: list[Bank] = []
        self._price: Price | None = None
        self._bank = 0
        self._memory: dict[int, dict[Config, float]] = {}
        self._level: dict[int, float] = {}  # running mean of a bank's losses
        self._seen: list[tuple[Config, Tensor]] = []  # of the present step

    def begin(self, run: SizesRun) -> None:
        """Finds the banks by the costs of the run's network; lets it teach, where asked."""
        if self._price is None:
            net: Any = run.net
            own = self.space is net.space  # else encoded otherwise
            decode = (lambda rows: rows) if own else self.space.decode_many
            self._price = lambda rows: net.costs(decode(rows))[self.cost]
            chosen = self.settings
            self._banks = cost_banks(self.space, self._price, chosen.banks, chosen.window)
        if self.settings.pretrained and run.steps == 0:
            run.keep_teacher(_TEACHER)

    def sample(self, step: int, steps: int | None) -> Sequence[Pass]:
        """Gives the passes of a step: `random` ones of a bank, then its `smallest`."""
        random = numpy_generator(self.generator)
        self._seen.clear()
        last = len(self._banks) - 1
        ways = [move if 0 <= self._bank + move <= last else 0 for move in (-1, 0, 1)]
        self._bank += ways[random.integers(3)]
        stage = 0 if steps is None else _SIXTHS * step // steps
        chance = self.settings.exploit + self.settings.growth * stage
        drawn = [self._draw(chance, random) for _ in range(self.settings.random)]
        smallest = self._banks[self._bank].smallest
        return [*(Pass(config, "random") for config in drawn), Pass(smallest, "smallest")]

    def _draw(self, chance: float, random: np.random.Generator) -> Config:
        memory = self._memory.get(self._bank, {})
        known = len(memory) > self.settings.memory // 2
        if known and random.random() < chance:
            weights = np.exp(min(memory.values()) - np.array(list(memory.values())))
            return list(memory)[random.choice(len(memory), p=weights / weights.sum())]
        bank = self._banks[self._bank]
        rows = bank.rows[random.integers(len(bank.rows), size=self.settings.candidates)]
        if not known or len(rows) == 1:
            return self.space.decode(rows[0])
        assert self._price is not None, "a run begins each step before it samples"
        scores = prefer_width(self.space, self._price, rows, self._anchor())
        return self.space.decode(rows[scores.argmin()])

    def _anchor(self) -> Config:
        cheap = self._memory.get(0, {})
        if not self._bank or not cheap:
            return self._banks[self._bank].smallest
        return min(cheap, key=cheap.__getitem__)

    def observe(self, seen: Seen) -> None:
        """Remembers the random sizes of the step, by their losses, once the step is over."""
        if seen.entry.role == "random":
            assert seen.entry.config is not None
            self._seen.append((seen.entry.config, seen.loss.double().reshape(1)))
            return
        losses = torch.cat([loss for _, loss in self._seen])
        processes.average([losses])  # all ranks must remember the same
        for (config, _), loss in zip(self._seen, losses.tolist(), strict=True):
            self._remember(config, loss)

    def _remember(self, config: Config, loss: float) -> None:
        level = self._level.get(self._bank, loss)
        self._level[self._bank] = _KEPT * level + (1 - _KEPT) * loss
        memory = self._memory.setdefault(self._bank, {})
        # Losses fall as training goes on: only less the usual they can be compared.
        memory[config] = loss - level
        if len(memory) > self.settings.memory:
            del memory[max(memory, key=memory.__getitem__)]

    def state_dict(self) -> dict[str, Any]:
        """Gives the bank, and what each of them remembers."""
        return {
            "bank": self._bank,
            "levels": {str(bank): level for bank, level in self._level.items()},
            "memory": {str(bank): list(_told(known)) for bank, known in self._memory.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what `state_dict` gave."""
        self._bank = state["bank"]
        self._level = {int(bank): level for bank, level in state["levels"].items()}
        self._memory = {
            int(bank): {Config.from_json(text): value for text, value in known}
            for bank, known in state["memory"].items()
        }


def _told(memory: dict[Config, float]) -> Iterator[list[Any]]:
    for config, value in memory.items():
        yield [config.to_json(), value]
