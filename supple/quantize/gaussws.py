"""Gaussian weight sampling: noise in the place of rounding, and bits that are learned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from supple.errors import SettingError
from supple.layers.fake_quantize import FakeQuantized
from supple.layers.sampled_weight import SampledWeight
from supple.network import Elastic
from supple.quantize._qat import Rounding, RoundingRule, toy
from supple.quantize.base import MOST_BITS
from supple.technique import register

__all__ = ["GaussWS"]


@register(title="Gaussian weight sampling", paper="arXiv:2505.11170")
@dataclass(frozen=True, kw_only=True)
class GaussWS(RoundingRule):
    r"""Trains with noise of the size that rounding would have, then rounds to floats.

    Rounding has no useful gradient; noise has the identity's. In each step a weight of a square
    block, whose largest magnitude is $m$, becomes

    $$\hat w = \text{bfloat16}\left(w + R\,m\,2^{1 - b}\right), \quad
      R = \text{round}(z / 2), \quad z \sim N(0, 1).$$

    $R$ is 0 in two of three cases and mostly 1 or -1 else, so that sums are exact in few bits
    and small weights are at times left as they are. Each block learns its bits
    $b = b_1 + t\,(b_0 - b_1)$: the loss has a gradient in $t$, which begins at 1 and decays.

    In evaluation, and in the end, weights are floats with a sign, 3 bits of exponent and
    $b - 2$ of mantissa, with a power of two for each group of neighbours in a row.

    Args:
        bits: $b_1$, from 2; at 16 nothing is done.
        initial_bits: $b_0$, from `bits` to 6.
        weight_decay: Of $t$, at least 0: a step takes that share of it, times the learning
            rate.
        group_size: Side of a block.
        activations: None: only weights are concerned.
        layers: Shell-style pattern of the layers' paths; several are parted by commas, and `!`
            before one leaves out.
        packed: Whether linear layers and 2-d convolutions hold codes in place of weights in the
            end.

    Example:
        >>> rule = GaussWS(group_size=2)
        >>> net = rule.wrap(nn.Sequential(nn.Linear(4, 2))).eval()
        >>> rule.finished(net)[0].spec.format.name
        'e3m4'
        >>> _ = net[0].of_weight.shares.data.zero_()
        >>> rule.finished(net)[0].spec.format.name
        'e3m2'

    Source:
        Ahn and Yoo 2025, "Gaussian Weight Sampling for Scalable, Efficient and Stable
        Pseudo-Quantization Training", arXiv:2505.11170; no code was published.
    Differs:
        $R$ is a rounded normal number itself; the paper's kernel draws one much like it from
        bits. The largest magnitude of a block has no gradient. In the end a whole matrix has
        the mean of its blocks' bits, rounded. Which floats stand for $b$ bits of noise is
        ours: those of 6 bits for 4, as the paper has it. `weight_decay` is not told by the
        source that was at hand; short runs need far more than the default.
    Checked:
        Noise against the formula, its distribution, gradients of weights and bits; that the
        noise changes from step to step and comes back with a saved run.
    """

    distinguishing: ClassVar[str] = "of_weight"

    activations: int | None = None
    initial_bits: int = 6
    weight_decay: float = 0.1
    group_size: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rounds_inputs:
            raise SettingError(
                f"GaussWS is about weights: leave activations=None, got {self.activations}"
            )
        if not self.weight_decay >= 0:
            raise SettingError(f"weight_decay must be at least 0, got {self.weight_decay}")
        self._sampled((1, 1))

    @classmethod
    def examples(cls) -> list[Self]:
        """Gives small blocks, whose bits decay fast."""
        return [cls(initial_bits=5, group_size=4, weight_decay=0.5, layers="4")]

    @classmethod
    def neutral(cls) -> Self:
        """Gives the setting that does nothing."""
        return cls(bits=MOST_BITS)

    @classmethod
    def toy(cls) -> Elastic:
        """Gives a network with weights that are sampled."""
        return toy(cls.examples()[0])

    def _sampled(self, shape: tuple[int, int]) -> SampledWeight | None:
        if not self.rounds_weights:
            return None
        return SampledWeight(
            shape,
            bits=self.bits,
            initial_bits=self.initial_bits,
            group_size=self.group_size,
        )

    def of_weight(self, module: nn.Module, matrix: Tensor) -> SampledWeight | None:
        """Gives what adds noise to a weight."""
        rows, columns = matrix.shape
        return self._sampled((rows, columns))

    def of_input(self, module: nn.Module, values: Tensor) -> None:
        """Inputs stay as they are."""

    def companion(
        self,
        layers: Mapping[str, FakeQuantized],
        optimizer: Optimizer,
        steps: int,
        generator: torch.Generator,
    ) -> Rounding:
        """Gives what draws new noise, and lets bits decay."""
        return _Decay(self, layers, optimizer, steps, generator)


class _Decay(Rounding):
    """Lets the bits of blocks decay beside what the loss does to them."""

    def __init__(
        self,
        rule: GaussWS,
        layers: Mapping[str, FakeQuantized],
        optimizer: Optimizer,
        steps: int,
        generator: torch.Generator,
    ) -> None:
        super().__init__(layers, optimizer, steps, generator)
        self._decay = rule.weight_decay
        groups = {id(one): group for group in optimizer.param_groups for one in group["params"]}
        weights = (layer.of_weight for layer in layers.values())
        shares = [one.shares for one in weights if isinstance(one, SampledWeight)]
        self._shares = [(share, groups[id(share)]) for share in shares]

    def after(self) -> None:
        """Gives each layer another seed; bits go down."""
        super().after()
        for share, group in self._shares:
            share.mul_(max(1 - float(group["lr"]) * self._decay, 0.0))
