"""LLaMA-NAS: a pretrained language model becomes elastic in depth and FFN width."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar

import torch

from supple.errors import SettingError
from supple.space import Config, Space
from supple.supernet.base import Phase, PhasedSampler, RandomSampler
from supple.supernet.instatune import InstaTune
from supple.technique import register
from supple.training.step import Pass, Sampler, WholeOnly

__all__ = ["LlamaNas"]


@register(title="LLaMA-NAS", paper="arXiv:2405.18377")
@dataclass(frozen=True, kw_only=True)
class LlamaNas(InstaTune):
    r"""Fine-tunes a pretrained language model once, for all depths and FFN widths to search.

    It is InstaTune for models that are too large for anything else: what varies is chosen
    sparingly (how many layers stay, how wide each FFN is; heads and embeddings are fixed), and
    a step trains the full network and `random` random sizes of those, without the smallest
    one. The full network learns from the user's loss; sizes from that, too, and from the
    frozen copy of the full network that was made after the share `tune` of the steps:

    $$\text{labels} \cdot \text{loss} + T^2\, H(\text{softmax}(z_t / T),
    \text{softmax}(z_s / T)).$$

    No size is trained further. Search them with `search/hardware-aware-search`, once for each
    task: good sizes differ from task to task.

    Args:
        where: Patterns (shell style) of the names of the sites that vary, such as
            `("*depth", "*mlp*")`; the others stay full. None lets all of the network's vary.
        random: Random sizes per step, at least 1.

    Example:
        ```python
        axes = [supple.Depth((24, 28, 32)), supple.Width((0.5, 1.0), where="*mlp*")]
        net = supple.elastic(llama, kwargs=batch, axes=axes)
        loss = lambda output, batch: output.loss
        supple.train(net, batches, loss, method=LlamaNas(), epochs=1, lr=2e-5)
        front = supple.pareto(net, score, ["params"], algorithm=HardwareAwareSearch())
        ```

    Source:
        Sarah et al. 2024, "LLaMA-NAS: Efficient Neural Architecture Search for Large Language
        Models", arXiv:2405.18377. The authors' code was not to be had.
    Differs:
        The paper refers to InstaTune for the training; what is open there is open here, too
        (see `supernet/instatune`). It leaves open which layers are dropped: that is up to the
        pattern of the depth axis. Its figures are of LLaMA2-7B, fine-tuned on Alpaca.
    Checked:
        The passes of both phases; sites that don't vary stay full; one step against gradients
        summed by hand.
    """

    distinguishing: ClassVar[str] = "sampler"

    where: tuple[str, ...] | None = None
    random: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.random < 1:
            raise SettingError(f"random must be at least 1, got {self.random}")
        if self.where is not None:
            object.__setattr__(self, "where", tuple(self.where))

    @classmethod
    def examples(cls) -> list[LlamaNas]:  # type: ignore[override]
        return [cls(), cls(where=("*",), tune=0.0, random=2, labels=0.5, reorder=False)]

    def sampler(self, space: Space, generator: torch.Generator) -> Sampler:
        varied = _varied(space, self.where)
        sizes = _WithLargest(space.largest(), RandomSampler(varied, generator, self.random))
        phases = [Phase(1 - self.tune, sizes, enter=self._switch)]
        if self.tune:
            phases.insert(0, Phase(self.tune, WholeOnly(space.largest())))
        return PhasedSampler(phases)


@dataclass(frozen=True)
class _WithLargest(Sampler):
    """Trains the largest size, then those of another sampler."""

    largest: Config
    others: Sampler

    def sample(self, step: int, steps: int | None) -> Sequence[Pass]:
        return [Pass(self.largest, "largest"), *self.others.sample(step, steps)]


def _varied(space: Space, where: tuple[str, ...] | None) -> Space:
    """Gives the space in which only sites that match a pattern vary."""
    if where is None:
        return space
    for pattern in where:
        if not any(fnmatchcase(name, pattern) for name in space.names):
            raise SettingError(
                f"where has {pattern!r}, which matches no site "
                f"(sites: {', '.join(space.names[:6])}{', ...' if len(space) > 6 else ''})"
            )
    others = [s for s in space.sites if not any(fnmatchcase(s.name, p) for p in where)]
    return space.subspace({site.name: site.full for site in others})
