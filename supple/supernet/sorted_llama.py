"""Sorted LLaMA: fine-tuning that makes every depth of a network good on its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from supple.errors import SettingError
from supple.network import Elastic
from supple.space import Space
from supple.supernet.base import SupernetRule
from supple.technique import register
from supple.training.batches import Forward, Loss
from supple.training.depths import Depths, WithDepths, prefix_site
from supple.training.losses import Criterion, Earlier
from supple.training.seeds import kept
from supple.training.step import Network, Pass, Sampler, WholeOnly

__all__ = ["MeanOverDepths", "SortedLlama"]


@register(title="Sorted fine-tuning (SoFT)", paper="arXiv:2309.08968")
@dataclass(frozen=True, kw_only=True)
class SortedLlama(SupernetRule):
    r"""Trains the first blocks of a network, for several counts at once, in one forward.

    The sub-network of depth $n$ is the first $n$ blocks of a stack, followed by what follows
    the whole stack: the same norm and the same head, with no weights of its own. A step runs
    the whole network once, reads the hidden state $h_n$ behind each depth $n$ of $D$ and
    minimises the mean of the user's losses,

    $$\frac{1}{|D|} \sum_{n \in D} \text{loss}(\text{head}(\text{norm}(h_n)), y).$$

    It takes the place of ordinary fine-tuning: same data, steps and learning rate, no
    distillation. A step costs that of ordinary training and, for each further depth, once
    what lies outside the stack (embeddings, norm, head), forward and backward. Sub-networks
    are then ordinary sizes: `net.at({site: n})`, `net.extract({site: n})`.

    Any network with one stack of residual blocks will do, also from scratch.

    Args:
        depths: How many of the stack's blocks the sub-networks have, each one of the choices of
            its site; None for all choices. The whole stack is always among them.
        where: Pattern (shell style) for the name of the stack's site, such as
            `"model.layers.depth"`; None where the network has only one.
        recompute: Whether what a depth gives is computed again in backward, so that the logits
            of one depth are in memory at a time and not those of all.

    Example:
        ```python
        net = supple.elastic(llama, kwargs=batch, axes=[supple.Depth((3, 4, 5, 6))])
        loss = lambda output, batch: output.loss
        supple.train(net, batches, loss, method=SortedLlama(), steps=500, lr=3e-4)
        small = net.extract({"model.layers.depth": 3})
        ```

    Source:
        Kavehzadeh et al. 2023, "Sorted LLaMA: Unlocking the Potential of Intermediate Layers of
        Large Language Models for Dynamic Inference Using Sorted Fine-Tuning (SoFT)",
        arXiv:2309.08968. The authors' code was not to be had.
    Differs:
        Any network with a stack of residual blocks and any loss; the paper's are Llamas that
        learn the next token. Which depths are trained is up to the choices of the depth axis;
        the paper takes every fourth from 12 to 40.
    Checked:
        Outputs and gradients of the one forward against a pass for each depth; one step
        against gradients averaged by hand; its MACs against their sum; logits in memory.
    """

    distinguishing: ClassVar[str] = "criterion"

    depths: tuple[int, ...] | None = None
    where: str | None = None
    recompute: bool = False

    def __post_init__(self) -> None:
        if self.depths is None:
            return
        object.__setattr__(self, "depths", tuple(sorted(set(self.depths))))
        if not self.depths or any(type(n) is not int or n < 0 for n in self.depths or ()):
            raise SettingError(
                f"depths must be numbers of blocks, at least one, got {self.depths}; None "
                "trains all"
            )

    @classmethod
    def examples(cls) -> list[SortedLlama]:
        return [cls(), cls(depths=(1,), where="*depth", recompute=True)]

    @classmethod
    def toy(cls) -> nn.Module:
        with kept(0):
            blocks = [_Block() for _ in range(3)]
            return nn.Sequential(nn.Linear(5, 7), *blocks, nn.Linear(7, 3))

    def sampler(self, space: Space, generator: torch.Generator) -> Sampler:
        return WholeOnly(role="depths")

    def forward(self, net: Network, forward: Forward) -> Forward:
        if not isinstance(net, Elastic):
            raise SettingError(f"SortedLlama needs a network of supple.elastic, got {net!r}")
        site = prefix_site(net, self.where)
        wrong = sorted(set(self.depths or ()) - set(site.choices))
        if wrong:
            raise SettingError(
                f"depths must be choices of '{site.name}', {site.choices}, got {wrong}"
            )
        return WithDepths(net, site, forward)

    def criterion(self, loss: Loss) -> Criterion:
        return MeanOverDepths(loss, self.depths, self.recompute)


@dataclass(frozen=True)
class MeanOverDepths:
    """The mean of the user's losses at several depths of one forward.

    Args:
        loss: `loss(output, batch) -> scalar`.
        depths: Which ones beside the whole stack; None for all.
        recompute: Whether outputs are computed again in backward rather than kept.
    """

    loss: Loss
    depths: tuple[int, ...] | None = None
    recompute: bool = False
    teachers: frozenset[str] = frozenset()

    def __call__(self, entry: Pass, output: Any, batch: Any, earlier: Earlier) -> Tensor:
        """Gives the mean loss of what `WithDepths` ran."""
        read = cast(Depths, output)
        site = read.source.site
        depths = site.choices if self.depths is None else {*self.depths, site.full}
        return torch.stack([self._at(read, n, batch) for n in sorted(depths)]).mean()

    def _at(self, read: Depths, depth: int, batch: Any) -> Tensor:
        if not self.recompute:
            return self.loss(read.at(depth), batch)
        again = checkpoint(lambda: self.loss(read.at(depth), batch), use_reentrant=False)
        return cast(Tensor, again)


class _Block(nn.Module):
    """A residual block, for `toy`."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(7, 7)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x).tanh()
