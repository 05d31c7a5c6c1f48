"""PA&DA: sizes and examples are drawn in proportion to their gradients."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from supple.data.base import Batch, Dataset, Source
from supple.errors import SettingError
from supple.graph.dims import atoms
from supple.space import FloatArray, Site, Space, numpy_generator
from supple.supernet.base import SupernetRule
from supple.technique import register
from supple.training import processes
from supple.training.batches import Loss
from supple.training.losses import Criterion, Earlier, Labels, logits_of
from supple.training.seeds import derive
from supple.training.step import Pass, Sampler, Seen, SizesRun

__all__ = ["PaDa"]


@register(title="PA&DA", paper="arXiv:2302.14772")
@dataclass(frozen=True, kw_only=True)
class PaDa(SupernetRule):
    r"""Draws choices and examples with large gradients more often than others.

    A step trains one size on labels. At each site, choice $c$ is drawn with probability

    $$p_c = \tau\,\frac{s_c}{\sum_i s_i} + \frac{1 - \tau}{n},$$

    where $s_c$ is the sum of the gradient norms of the parameters that run because of the
    choice, averaged with its old value (half and half) each time it was trained, and $n$ the
    number of choices. Each epoch draws as many examples as there are, with replacement, by
    the same formula; an example's score is the norm of the gradient with respect to its
    output, which for cross-entropy is
    $\lVert\operatorname{softmax}(z) - \text{onehot}(y)\rVert_2$: a bound of its gradient's
    norm that the backward pass gives for nothing. $\tau$ grows linearly over the run, from
    uniform draws to draws by gradient.

    The loss stays the plain mean, so that what is drawn more often counts more: the gradient
    is a biased estimate of the uniform one, on purpose.

    Args:
        paths: Whether choices are drawn by their gradients, or uniformly.
        data: Whether examples are drawn by theirs, or each is read once an epoch. It needs a
            `supple.data` set as training data, and one process.
        floor: Least share of the uniform distribution, in [0, 1]: $\tau \le 1 - \text{floor}$.
            Choices without parameters (a block that is skipped) have no other.
        strength: $\tau$ throughout, in [0, 1]; None lets it grow from 0 to 1 over the run.

    Example:
        ```python
        net = supple.elastic(model, (x,), axes=[supple.Operator()])
        supple.train(net, data.train, loss, method=PaDa(), optimizer="sgd", lr=0.05, epochs=50)
        ```

    Source:
        Lu et al. 2023, "PA&DA: Jointly Sampling PAth and DAta for Consistent NAS",
        arXiv:2302.14772. Authors' code: github.com/ShunLu91/PA-DA.
    Differs:
        The authors have operators only, one score for each kind of operator over all edges;
        here each choice of each site has a score, whatever the axis: of a width, the
        parameters that it slices; of a block, all of it. Scores last over the whole run (there
        they start anew each epoch, and an example that was not drawn then has only the uniform
        part), probabilities of choices follow each step (there each epoch), and `floor` is 0
        there. Gradients are clipped by `supple.train(clip=5)` where wanted.
    Checked:
        Scores against norms by hand for width, depth and operators; probabilities and drawn
        orders against the formula; example scores against softmax less one-hot; resuming in
        the middle of an epoch, bitwise.
    """

    distinguishing: ClassVar[str] = "sampler"

    paths: bool = True
    data: bool = True
    floor: float = 0.1
    strength: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.floor <= 1:
            raise SettingError(f"floor must be from 0 to 1, got {self.floor}")
        if self.strength is not None and not 0 <= self.strength <= 1:
            raise SettingError(f"strength must be from 0 to 1, or None, got {self.strength}")

    @classmethod
    def examples(cls) -> list[PaDa]:
        return [cls(), cls(data=False, floor=0.0), cls(paths=False, strength=0.5)]

    def sampler(self, space: Space, generator: torch.Generator) -> Sampler:
        return _GradientSampler(self, space, generator)

    def criterion(self, loss: Loss) -> Criterion:
        return _Noting(loss) if self.data else Labels(loss)


@dataclass(frozen=True)
class _Noting(Labels):
    """The user's loss; the gradient with respect to the output is kept."""

    def __call__(self, entry: Pass, output: Any, batch: Any, earlier: Earlier) -> Tensor:
        logits = logits_of(output)
        if logits.requires_grad:
            logits.retain_grad()
        return self.loss(output, batch)


class _GradientSampler(Sampler):
    """Draws one size, choice by choice, and the order of each epoch."""

    def __init__(self, method: PaDa, space: Space, generator: torch.Generator) -> None:
        self.method, self.space, self.generator = method, space, generator
        self._scores = {site.name: [0.0] * len(site.choices) for site in space.sites}
        self._concerned: dict[str, list[str]] | None = None
        self._strength = 0.0
        self._data: _Weighted | None = None

    def begin(self, run: SizesRun) -> None:
        if self._concerned is None and self.method.paths:
            self._concerned = {
                site.name: _concerned(run.net, site) for site in self.space.sites
            }

    def sample(self, step: int, steps: int | None) -> list[Pass]:
        self._strength = self._strength_at(step, steps)
        random = numpy_generator(self.generator)
        row = [
            random.choice(len(site.choices), p=self.probabilities(site.name))
            for site in self.space.sites
        ]
        drawn = self.space.canonical_many(np.array([row], dtype=np.int64))
        return [Pass(self.space.decode(drawn[0]), "random")]

    def probabilities(self, site: str) -> FloatArray:
        """Gives the probability of each choice of a site, as of the last step."""
        return mixed(np.array(self._scores[site]), self._strength)

    def data(self, data: Any) -> Any:
        if not self.method.data:
            return data
        if not isinstance(data, Dataset):
            raise SettingError(
                "PA&DA draws single examples, so the training data must be a set of "
                "supple.data, such as Dataset(source=TensorSource((x, y)), batch_size=64); "
                f"got {type(data).__name__}. PaDa(data=False) takes any data"
            )
        if processes.world_size() > 1:
            raise SettingError(
                "PA&DA scores the examples in one process only; set PaDa(data=False) to train "
                f"in {processes.world_size()}"
            )
        self._data = _Weighted(data, self)
        return self._data

    @property
    def strength(self) -> float:
        """How far draws follow gradients, as of the last step."""
        return self._strength

    def observe(self, seen: Seen) -> None:
        if self.method.paths:
            self._observe_choices(seen)
        if self._data is not None:
            self._data.observe(seen)

    def _observe_choices(self, seen: Seen) -> None:
        assert self._concerned is not None, "a run begins each step before it samples"
        assert seen.entry.config is not None, "every pass of this sampler has a size"
        norms = _norms(seen)
        for name, choice in seen.entry.config.items():
            index = self.space.site(name).choices.index(choice)
            new = sum(norms.get(each, 0.0) for each in self._concerned[name])
            self._scores[name][index] = averaged(self._scores[name][index], new)

    def _strength_at(self, step: int, steps: int | None) -> float:
        wanted = self.method.strength
        if wanted is None:
            if not steps:
                raise SettingError(
                    "PA&DA goes from uniform draws to draws by gradient over the run; say how "
                    "many steps there are, or set strength="
                )
            wanted = step / steps
        return min(wanted, 1 - self.method.floor)

    def state_dict(self) -> dict[str, Any]:
        scores = {name: list(values) for name, values in self._scores.items()}
        data = None if self._data is None else self._data.state_dict()
        return {"scores": scores, "strength": self._strength, "data": data}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._scores = {name: list(values) for name, values in state["scores"].items()}
        self._strength = state["strength"]
        if self._data is not None and state["data"] is not None:
            self._data.load_state_dict(state["data"])


class _Weighted:
    """A data set whose epochs draw examples by their scores."""

    def __init__(self, data: Dataset, sampler: _GradientSampler) -> None:
        self._data, self._sampler = data, sampler
        self._scores = [0.0] * data.examples
        self._epoch = -1
        self._order = torch.arange(data.examples)
        self._taken: list[int] = []

    def __len__(self) -> int:
        return len(self._data)

    def epoch(self, n: int, *, seed: int | None = None, start: int = 0) -> Iterator[Batch]:
        """Gives the batches of an epoch; all of its draws are made when it begins.

        Args:
            n: Number of the epoch.
            seed: Replaces the set's own.
            start: Number of batches to leave out at the beginning.
        """
        if n != self._epoch:  # else it goes on, here or after a resume
            self._epoch, self._order = n, self._drawn(n, seed)
        source = _Noted(self._data.source, self._order, self._taken)
        return dataclasses.replace(self._data, source=source).epoch(n, seed=seed, start=start)

    def observe(self, seen: Seen) -> None:
        """Averages the scores of the examples of the last batch with what they are now."""
        gradient = logits_of(seen.output).grad
        taken, self._taken[:] = list(self._taken), []
        if gradient is None or len(gradient) != len(taken):
            raise SettingError(
                f"PA&DA scores examples by the gradient of the model's output, which must have "
                f"one row for each of the {len(taken)} examples of the batch, got "
                f"{'none' if gradient is None else tuple(gradient.shape)}"
            )
        # The loss is a mean over the batch.
        new = (gradient.float().flatten(1).norm(dim=1) * len(gradient)).tolist()
        for position, value in zip(taken, new, strict=True):
            self._scores[position] = averaged(self._scores[position], value)

    def state_dict(self) -> dict[str, Any]:
        return {
            "scores": torch.tensor(self._scores, dtype=torch.float64),
            "epoch": self._epoch,
            "order": self._order,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._scores = state["scores"].tolist()
        self._epoch, self._order = state["epoch"], state["order"]

    def _drawn(self, n: int, seed: int | None) -> Tensor:
        if not any(self._scores):
            return torch.arange(self._data.examples)  # nothing is known: each example once
        own = self._data.seed if seed is None else seed
        source = torch.Generator().manual_seed(derive(own, "importance", n))
        weights = mixed(np.array(self._scores), self._sampler.strength)
        return torch.multinomial(
            torch.from_numpy(weights), len(weights), replacement=True, generator=source
        )


@dataclass(frozen=True)
class _Noted:
    """Examples in an order; which ones were taken last is noted."""

    source: Source
    order: Tensor
    taken: list[int]

    def __len__(self) -> int:
        return len(self.order)

    def take(self, positions: Tensor) -> Batch:
        drawn = self.order[positions]
        self.taken[:] = drawn.tolist()
        return self.source.take(drawn)


def mixed(scores: FloatArray, strength: float) -> FloatArray:
    """Gives probabilities in proportion to scores, mixed with uniform ones.

    Args:
        scores: At least 0.
        strength: Share of the former, in [0, 1].

    Example:
        >>> mixed(np.array([1.0, 3.0]), 0.5).tolist()
        [0.375, 0.625]
    """
    uniform = np.full(len(scores), 1 / len(scores))
    total = scores.sum()
    return strength * scores / total + (1 - strength) * uniform if total > 0 else uniform


def averaged(old: float, new: float) -> float:
    """Gives a score after one more visit: halfway to what was seen; the first counts fully."""
    return (old + new) / 2 if old else new


def _norms(seen: Seen) -> dict[str, float]:
    """Norms of the gradients of a pass, by parameter."""
    module: Any = getattr(seen.net, "module", seen.net)
    graded = [(name, p.grad) for name, p in module.named_parameters() if p.grad is not None]
    norms = torch._foreach_norm([gradient for _, gradient in graded])
    return dict(zip((name for name, _ in graded), torch.stack(norms).tolist(), strict=True))


def _concerned(net: Any, site: Site) -> list[str]:
    """The parameters that some choice of a site slices, transforms, drops or replaces.

    Those among them that do not run with a choice have no gradient then.
    """
    names = [name for name, _ in net.module.named_parameters()]
    concerned = set()
    for choice in site.choices:
        patch = net.patch_of(site.name, choice)
        sized = {*patch.sizes, *patch.resized}
        concerned |= {
            name
            for name, dims in net.graph.tensors.items()
            if any(atom in sized for dim in dims for atom in atoms(dim))
        }
        concerned |= {*patch.tensors, *patch.weights}
        blocks = [*patch.dropped, *patch.modules]
        concerned |= {
            name for name in names if any(name.startswith(f"{block}.") for block in blocks)
        }
    return [name for name in names if name in concerned]
