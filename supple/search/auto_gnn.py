"""Auto-GNN: small steps from the best config, one class of decisions at a time."""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from supple.errors import SettingError
from supple.search._conservative import ConservativeController
from supple.search.base import AskTell, Exact, Problem, SearchAlgorithm
from supple.space import Randomness, Space, numpy_generator
from supple.technique import register

__all__ = ["AutoGNN", "HomogeneousSharing"]

IntArray = NDArray[np.int64]


@register(title="Auto-GNN", paper="arXiv:1909.03184")
@dataclass(frozen=True, kw_only=True)
class AutoGNN(SearchAlgorithm):
    r"""Improves the best config of your network by deciding one class of its sites anew.

    Sites are grouped into action classes (the attention of all layers, the activations of all
    layers, ...). Each class has a small recurrent encoder, which reads the best config so far
    without this class and decides the class's sites one after the other. A guider draws the
    class to change in proportion to the entropy of its encoder's decisions, so what is settled
    is left alone. A child that is at least as good takes the place of the best.

    The encoder of the changed class learns by REINFORCE,
    the gradient of $(R - b) \log p_\theta(a \mid m)$, where $a$ are the decisions, $m$ is the
    best config without the class, $R$ is the child's value, more being better, and $b$ a
    running average of what was told. Children that are known are not proposed again; where the
    encoders propose nothing new, the class is decided uniformly.

    Args:
        classes: Shell-style patterns of sites, each a class, such as `"*.attention"`. Sites
            that none matches are grouped by their axis.
        first: Random configs told before the best of them is improved, at least 1.
        batch: Configs told between updates, at least 1.
        hidden: Width of the encoders, at least 1.
        lr: Learning rate of the encoders (Adam), above 0.
        decay: Of the running average of values, in [0, 1).

    Example:
        >>> from supple.space import Site, Space
        >>> space = Space(
        ...     [Site(f"{i}.{kind}", kind, (0, 1, 2, 3), 3) for i in range(2)
        ...      for kind in ("attention", "activation", "heads")]
        ... )
        >>> run = AutoGNN(hidden=8).start(space, ["loss"], 0)
        >>> for _ in range(25):
        ...     rows = run.ask_rows(1)
        ...     run.tell(rows, rows.sum(axis=1, keepdims=True))
        >>> int(run.told.values[0, 0]) > 5, int(run.told.values.min()) < 4
        (True, True)

    Source:
        Zhou, Song, Huang and Hu 2019, "Auto-GNN: Neural Architecture Search of Graph Neural
        Networks", arXiv:1909.03184; later in Frontiers in Big Data 5, 2022.
    Differs:
        There is no code of the authors to compare with: learning rate, width and decay are
        ours. One class changes at a time; which one is drawn, so that the others come to their
        turn before the first is settled. The best config without the class is a linear map of
        its one-hot code, in which the encoder begins, not a string that it reads. A config
        teaches by how it differs from the best one, whoever proposed it, so the search can be
        rebuilt from what was told. With several objectives the best is the newest that no other
        dominates, and $R$ minus the rank.
    Checked:
        Children differ from the best in one class; the guider's shares by hand; what is learned
        from what; the same optimum in fewer evaluations than at random.
    """

    distinguishing: ClassVar[str] = "start"

    classes: tuple[str, ...] = ()
    first: int = 1
    batch: int = 1
    hidden: int = 32
    lr: float = 0.01
    decay: float = 0.9

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", tuple(self.classes))
        for name in ("first", "batch", "hidden"):
            if getattr(self, name) < 1:
                raise SettingError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.lr > 0:
            raise SettingError(f"lr must be above 0, got {self.lr}")
        if not 0 <= self.decay < 1:
            raise SettingError(f"decay must be in [0, 1), got {self.decay}")

    @classmethod
    def examples(cls) -> list[AutoGNN]:
        return [cls(hidden=4), cls(hidden=4, first=3, batch=3)]

    @property
    def generation(self) -> int:
        return self.batch

    def start(
        self,
        space: Space,
        objectives: Sequence[str],
        generator: Randomness,
        *,
        exact: Mapping[str, Exact] | None = None,
        violation: Exact | None = None,
    ) -> AskTell:
        """Begins a search; see `SearchAlgorithm.start`.

        Raises:
            SettingError: One of `classes` matches no site, or the objectives can't be used.
        """
        seed = int(numpy_generator(generator).integers(2**62))
        problem = Problem(space, tuple(objectives), dict(exact or {}), violation)
        return _Run(self, problem, seed)


class _Run(AskTell):
    """A search whose controller learns, before it proposes, what was told meanwhile."""

    algorithm: AutoGNN

    def _reset(self) -> None:
        self._controller = ConservativeController(self.algorithm, self.space, self.seed)
        super()._reset()

    def _candidates(self) -> Iterator[IntArray]:
        self._controller.learn(self.told.take(slice(self._generation * self.algorithm.batch)))
        for rounds in itertools.count():
            random = np.random.default_rng([self.seed, self._generation, rounds])
            yield from np.ascontiguousarray(self._controller.propose(random, rounds))


def _anything(layer: nn.Module) -> Hashable:
    return None


@dataclass
class HomogeneousSharing:
    """Lets networks begin with weights of earlier ones, layer by layer, where they are alike.

    Weights are handed on between layers at the same path that are homogeneous: parameters of
    the same shapes, and the same `kind`. Weights and statistics of batch norms are never
    handed on, nor are those named in `own`. A few steps of training follow.

    Args:
        layers: Shell-style pattern of the paths of the layers.
        kind: What must agree beside the shapes, such as a layer's attention and activation;
            by default nothing.
        own: Patterns of the names of parameters within a layer that stay its own, such as
            those of skip connections.
        norms: Whether batch norms are handed on as well, for comparison.

    Example:
        >>> share = HomogeneousSharing("[01]")
        >>> earlier = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
        >>> later = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
        >>> share.keep(earlier)
        >>> share.inherit(later)
        ['0']
        >>> torch.equal(later[0].weight, earlier[0].weight)
        True

    Source:
        Zhou et al. 2019, arXiv:1909.03184, "constrained parameter sharing".
    """

    layers: str
    kind: Callable[[nn.Module], Hashable] = _anything
    own: tuple[str, ...] = ()
    norms: bool = False
    _kept: dict[Hashable, dict[str, Tensor]] = field(default_factory=dict, repr=False)

    def keep(self, model: nn.Module) -> None:
        """Remembers a trained network's weights, in the place of earlier ones alike."""
        for path, layer in self._layers(model):
            shared = self._shared(layer)
            self._kept[self._key(path, layer)] = {n: t.detach().clone() for n, t in shared}

    def inherit(self, model: nn.Module) -> list[str]:
        """Gives a new network the remembered weights of layers that are alike.

        Args:
            model: Its weights change in place.

        Returns:
            The paths of the layers that got weights.
        """
        found = []
        for path, layer in self._layers(model):
            weights = self._kept.get(self._key(path, layer))
            if weights:
                found.append(path)
                with torch.no_grad():
                    for name, tensor in self._shared(layer):
                        tensor.copy_(weights[name])
        return found

    def _layers(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        named = model.named_modules()
        found = [(path, m) for path, m in named if fnmatch.fnmatchcase(path, self.layers)]
        if not found:
            raise SettingError(f"layers={self.layers!r} matches no module of the network")
        return found

    def _key(self, path: str, layer: nn.Module) -> Hashable:
        shapes = tuple((name, tuple(t.shape)) for name, t in self._shared(layer))
        return path, self.kind(layer), shapes

    def _shared(self, layer: nn.Module) -> list[tuple[str, Tensor]]:
        found: list[tuple[str, Tensor]] = []
        for path, part in layer.named_modules():
            norm = isinstance(part, _NormBase)
            if norm and not self.norms:
                continue
            tensors = list(part.named_parameters(recurse=False))
            tensors += list(part.named_buffers(recurse=False)) if norm else []
            found += [(f"{path}.{name}".lstrip("."), t) for name, t in tensors]
        return [p for p in found if not any(fnmatch.fnmatchcase(p[0], one) for one in self.own)]
