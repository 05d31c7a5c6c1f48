"""AutoDistil: sub-spaces with weights of their own learn a teacher's attention relations."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from supple.axes.base import selected
from supple.axes.copies import Copies, Part
from supple.errors import SettingError, nearest
from supple.network import Elastic
from supple.space import Config, Randomness, Site, Space, numpy_generator
from supple.supernet.base import SupernetRule
from supple.technique import register
from supple.training.batches import Forward, Loss
from supple.training.features import Features
from supple.training.losses import Criterion, Earlier
from supple.training.relations import KINDS, WithAttended, attended, relation_loss
from supple.training.seeds import kept
from supple.training.step import Network, Pass, Sampler, SizesRun

__all__ = ["AutoDistil", "RelationDistillation", "Students", "parts_of", "students"]

Choices = Mapping[str, tuple[int, ...]]
_TEACHER = "teacher"


@register(title="AutoDistil", paper="arXiv:2201.12507")
@dataclass(frozen=True, kw_only=True)
class AutoDistil(SupernetRule):
    r"""Trains $K$ compact sub-spaces of transformers, each with weights of its own.

    Wide and narrow sizes disturb one another less if they share no weights. Each sub-space is
    a part of the space that has a copy of all weights (`supple.axes.copies.Copies`), which
    begins as what the network holds. Students are uniform: all layers have the same choice.
    Each step trains the students of one sub-space, in turn: the largest, the smallest and
    random ones.

    No labels are needed. Students learn the self-attention relations of the last layer of a
    frozen teacher, the full network as it was when training began:
    $\frac 1 3 \sum_{x \in \{Q, K, V\}} \text{KL}(R_x^t \| R_x^s)$ with
    $R_x = \text{softmax}(x x^\top / \sqrt d)$, where queries, keys and values are split anew
    into `heads` parts, so that width and number of heads may differ. This loss on held-out
    text also ranks the students.

    Args:
        subspaces: Which sizes share weights: for each sub-space, shell-style patterns of names
            of sites, and the choices that they have in it. Sites that no pattern matches keep
            all choices. A size belongs to the first sub-space that admits it; sizes that none
            admits have the weights of the first. The first is the module itself.
        heads: Into how many parts queries, keys and values are split, at least 1.
        modules: Patterns of the paths of the modules that give queries, keys and values; None
            finds them by their names (`supple.training.relations.attended`).
        random: Random students per step, at least 0.
        labels: Weight of the user's loss beside the relations', at least 0.

    Example:
        ```python
        wide = {"*depth": (5, 6), "*intermediate*": (1152, 1536)}
        narrow = {"*depth": (3, 4), "*intermediate*": (384, 768)}
        net = supple.elastic(encoder, (), example_batch)
        method = AutoDistil(subspaces=(wide, narrow))
        supple.train(net, texts, loss, method=method, optimizer="adamw", lr=4e-5, epochs=8)
        ```

    Source:
        Xu et al. 2022, "AutoDistil: Few-shot Task-agnostic Neural Architecture Search for
        Distilling Large Language Models", arXiv:2201.12507; microsoft/autodistil.
    Differs:
        The sub-spaces are trained side by side, a step each in turn (the authors train them
        one after another, in runs of their own). The loss is the paper's KL divergence of the
        relations, where the public code takes squared differences of unnormalised ones. Random
        students may be the largest, the smallest or twice the same; the authors' are not. Which
        layers a shallow student has is up to `Depth`; the authors' are evenly spaced. The
        teacher is the full network at the start of the run. Sizes that are no uniform students
        can be run, too, and are not trained as such.
    Checked:
        Relations and their loss by hand; one step's gradients in each sub-space's weights;
        students against enumeration.
    """

    distinguishing: ClassVar[str] = "criterion"

    subspaces: tuple[Choices, ...] = ({},)
    heads: int = 12
    modules: tuple[str, str, str] | None = None
    random: int = 2
    labels: float = 0.0

    def __post_init__(self) -> None:
        spaces = tuple({k: tuple(c) for k, c in each.items()} for each in self.subspaces)
        object.__setattr__(self, "subspaces", spaces)
        if not spaces:
            raise SettingError("subspaces must be at least one, got none")
        if self.modules is not None:
            object.__setattr__(self, "modules", tuple(self.modules))
        if self.heads < 1:
            raise SettingError(f"heads must be at least 1, got {self.heads}")
        if self.random < 0:
            raise SettingError(f"random must be at least 0, got {self.random}")
        if not self.labels >= 0:
            raise SettingError(f"labels must be at least 0, got {self.labels}")

    def __hash__(self) -> int:
        return hash((len(self.subspaces), self.heads, self.modules, self.random, self.labels))

    @classmethod
    def examples(cls) -> list[AutoDistil]:
        apart = ({"query": (6, 8)}, {"query": (2, 4)})
        return [
            cls(heads=2, random=1, labels=1.0),
            # the relations alone would not lower a user's loss, which conformance looks at
            cls(
                subspaces=apart,
                heads=1,
                modules=("query", "key", "value"),
                random=1,
                labels=1.0,
            ),
        ]

    @classmethod
    def toy(cls) -> nn.Module:
        with kept(0):
            return _Toy()

    def sampler(self, space: Space, generator: torch.Generator) -> Sampler:
        return Students(space, generator, parts_of(space, self.subspaces), self.random)

    def criterion(self, loss: Loss) -> Criterion:
        return RelationDistillation(loss, self.heads, self.labels)

    def forward(self, net: Network, forward: Forward) -> Forward:
        return WithAttended(attended(net.module, self.modules), forward)

    def adapt(self, net: Network) -> None:
        """Gives each sub-space weights of its own.

        Args:
            net: The network that is going to be trained.
        """
        assert isinstance(net, Elastic)
        if len(self.subspaces) < 2:
            return
        sharing = Copies(tuple(parts_of(net.space, self.subspaces)))
        if net.sharing != sharing:
            net.share(sharing)


# --------------------------------------------------------------------------- students


class Students(Sampler):
    """Trains uniform students of the sub-spaces in turn: largest, smallest and random ones.

    Args:
        space: The sizes there are.
        generator: Source of randomness.
        parts: The sub-spaces, as `parts_of` gives them.
        count: Random students per step, at least 0.
    """

    def __init__(
        self, space: Space, generator: torch.Generator, parts: Sequence[Part], count: int
    ) -> None:
        self.space, self.generator, self.count = space, generator, count
        self.parts = tuple(parts)

    def begin(self, run: SizesRun) -> None:
        """Keeps the network as it is at the start, to teach."""
        if not run.steps:
            run.keep_teacher(_TEACHER)

    def sample(self, step: int, steps: int | None) -> Sequence[Pass]:
        """Gives the passes of a step in roles `largest`, `smallest` and `random`."""
        part = self.parts[step % len(self.parts)]
        ends = [
            ("largest", _student(self.space, part, 1)),
            ("smallest", _student(self.space, part, 0)),
        ]
        drawn = [
            ("random", _drawn(self.space, part, self.generator)) for _ in range(self.count)
        ]
        return [Pass(config, role) for role, config in (*ends, *drawn)]


def parts_of(space: Space, subspaces: Sequence[Choices]) -> list[Part]:
    """Gives sub-spaces by the names of sites.

    Args:
        space: The sizes there are.
        subspaces: For each, patterns of names of sites and the choices they have.

    Returns:
        For each, the choices of the sites that a pattern matches.

    Raises:
        SettingError: A pattern matches nothing, or a choice is not on offer.

    Example:
        >>> space = Space([Site("a.0", "width", (2, 4), 4), Site("a.1", "width", (2, 4), 4)])
        >>> parts_of(space, [{"a.*": (4,)}, {"*.1": (2,)}])
        [{'a.0': (4,), 'a.1': (4,)}, {'a.1': (2,)}]
    """
    return [
        {
            site.name: choices
            for pattern, choices in each.items()
            for site in _sites(space, pattern, choices)
        }
        for each in subspaces
    ]


def _sites(space: Space, pattern: str, choices: Sequence[int]) -> list[Site]:
    found = [site for site in space.sites if selected(site.name, pattern)]
    if not found:
        raise SettingError(
            f"no site's name matches {pattern!r} of subspaces{nearest(pattern, space.names)}"
        )
    for site in found:
        if not choices or not set(choices) <= set(site.choices):
            raise SettingError(
                f"subspaces ask for {tuple(choices)} at site {site.name!r}, which offers "
                f"{site.choices}"
            )
    return found


def students(space: Space, part: Part) -> list[Config]:
    """Lists the uniform students of a sub-space, smallest choices first.

    Args:
        space: The sizes there are.
        part: The sub-space, as `parts_of` gives it.

    Returns:
        Distinct sizes in which sites of one kind, whose names differ in numbers only, have the
        same choice.
    """
    groups = _tied(space, part)
    found: dict[Config, None] = {}
    for picked in itertools.product(*groups.values()):
        found[_config(space, groups, picked)] = None
    return list(found)


Tied = dict[tuple[str, ...], tuple[int, ...]]


def _tied(space: Space, part: Part) -> Tied:
    """Choices by the names of the sites that have them together."""
    groups: dict[tuple[str, str, tuple[int, ...]], list[str]] = {}
    for site in space.sites:
        # single blocks that may be left out are no layers' sizes
        kind = site.name if site.axis == "depth" else re.sub(r"\d+", "#", site.name)
        choices = tuple(sorted(part.get(site.name, site.choices)))
        groups.setdefault((site.axis, kind, choices), []).append(site.name)
    return {tuple(names): choices for (_, _, choices), names in groups.items()}


def _config(space: Space, groups: Tied, picked: Sequence[int]) -> Config:
    pairs = zip(groups, picked, strict=True)
    return space.canonical({name: choice for names, choice in pairs for name in names})


def _student(space: Space, part: Part, end: int) -> Config:
    """The smallest student (0) or the largest (1)."""
    groups = _tied(space, part)
    return _config(space, groups, [choices[-end] for choices in groups.values()])


def _drawn(space: Space, part: Part, generator: Randomness) -> Config:
    random = numpy_generator(generator)
    groups = _tied(space, part)
    picked = [choices[random.integers(len(choices))] for choices in groups.values()]
    return _config(space, groups, picked)


# --------------------------------------------------------------------------- the loss


@dataclass(frozen=True)
class RelationDistillation:
    """Every student learns the teacher's relations, and from labels if asked.

    Args:
        loss: `loss(output, batch) -> scalar`, of the model's output.
        heads: Into how many parts queries, keys and values are split.
        labels: Weight of `loss`.
    """

    loss: Loss
    heads: int = 12
    labels: float = 0.0
    teachers: frozenset[str] = frozenset({_TEACHER})

    def __call__(self, entry: Pass, output: Features, batch: Any, earlier: Earlier) -> Tensor:
        """Gives the relations' loss, averaged over queries, keys and values."""
        (taught,) = earlier[_TEACHER]
        total = self.relations(output, taught, batch)
        if self.labels:
            total = total + self.labels * self.loss(output.output, batch)
        return total

    def relations(self, student: Features, teacher: Features, batch: Any) -> Tensor:
        """Gives the relations' loss alone, which also ranks students on held-out data.

        Args:
            student: What `supple.training.relations.WithAttended` gave.
            teacher: The same of the teacher, on the same batch.
            batch: A mapping with `attention_mask` (N, tokens) where there is padding.
        """
        where = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        each = [
            relation_loss(student.features[kind], teacher.features[kind], self.heads, where)
            for kind in KINDS
        ]
        return torch.stack(each).mean()


class _Toy(nn.Module):
    """Attention over five tokens of one number each, (N, 5) to (N, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.randn(5, 8))
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))
        self.read = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x[..., None] * self.place
        scores = self.query(tokens) @ self.key(tokens).transpose(1, 2)
        mixed = (scores / 8**0.5).softmax(2) @ self.value(tokens)
        logits: Tensor = self.read((tokens + mixed).mean(1))
        return logits
