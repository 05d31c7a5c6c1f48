"""FlexRound: weights are rounded after division by learned numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from supple.errors import SettingError
from supple.formats import QuantSpec
from supple.observers import RANGES
from supple.quantize._learned import LearnedRounding, Rounding, Scaled, straight
from supple.quantize.base import MOST_BITS
from supple.technique import register

__all__ = ["DivisiveRounding", "FlexRound"]


@register(title="FlexRound", paper="arXiv:2306.00317")
@dataclass(frozen=True, kw_only=True)
class FlexRound(LearnedRounding):
    r"""Learns by what each weight is divided before it is rounded.

    A weight $w_{oi}$ of output $o$ becomes

    $$\hat w_{oi} = s_o \left(\text{clip}\left(\text{round}
    \frac{w_{oi}}{s_o\,S_{oi}\,r_o\,c_i} + z_o\right) - z_o\right)$$

    with the step $s_o$ of the grid, and divisors by weight, by output and, in a convolution, by
    input channel. All of $s, S, r, c$ are learned, as logarithms; the divisors begin at 1 and
    only $s$ is kept. As the gradient of a divisor is in proportion to the weight, a large
    weight may travel several steps while small ones stay: rounding is not only up or down.
    What is learned makes each block of the network, on what the blocks before it give with
    their weights rounded, give what it gave before: the squared error is minimised by Adam.

    Args:
        bits: Of a weight's code, from 2; at 16 weights stay as they are.
        steps: Updates for each block, 0 for none; each sees one calibration batch.
        lr: Learning rate of Adam, above 0; it falls with a cosine.
        observer: How the range that a step begins with is chosen: a name of
            `supple.observers.RANGES`.
        symmetric: Whether there are no zero points, which stay what they are at first.
        group_size: Inputs of an output that share a scale; None for all.
        format: Name of a number format of so many bits in place of whole numbers.
        scale_format: How scales are held; see `supple.formats.QuantSpec`.
        activations: Bits of the layers' inputs, or None to leave them as they are. They are not
            rounded while weights are learned.
        layers: Shell-style pattern of the layers' paths; several are parted by commas, and `!`
            before one leaves out.
        packed: Whether layers hold codes in place of weights.

    Raises:
        SettingError: A setting can't be used.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> layer, x = nn.Linear(24, 4), torch.randn(32, 3) @ torch.randn(3, 24)
        >>> lost = []
        >>> for steps in (0, 15):
        ...     method = FlexRound(bits=3, steps=steps, lr=0.05, observer="minmax")
        ...     lost.append((method.apply(layer, calibration=[(x,)])(x) - layer(x)).norm())
        >>> bool(lost[1] < 0.8 * lost[0])
        True

    Source:
        Lee et al. 2023, "FlexRound: Learnable Rounding based on Element-wise Division for
        Post-Training Quantization", arXiv:2306.00317; robotseye/FlexRound_LRQ,
        `quant/UniformAffineQuantizer.py` and `scripts/FlexRound`.
    Differs:
        The first range is drawn in by a factor from both ends (there: ends searched apart,
        which the scripts for language models switch off). Steps have the values that their
        format holds, also while they are learned. Layers outside of blocks learn one by one,
        from what they give to the same input. Errors are relative to the block's output.
    Checked:
        Values and gradients by hand; the network before any step against rounding to nearest.
    """

    distinguishing: ClassVar[str] = "rounding"

    symmetric: bool = False

    @classmethod
    def examples(cls) -> list[FlexRound]:
        """Gives a short run."""
        return [cls(bits=3, steps=1, lr=0.03, observer="minmax")]

    @classmethod
    def neutral(cls) -> FlexRound:
        """Gives the setting that rounds nothing."""
        return cls(bits=MOST_BITS)

    @classmethod
    def toy(cls) -> tuple[nn.Module, tuple[Tensor, ...]]:
        """Gives a network of one layer."""
        source = torch.Generator().manual_seed(5)
        layer = nn.utils.skip_init(nn.Linear, 7, 3)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.uniform_(-0.5, 0.5, generator=source)
        return nn.Sequential(layer, nn.ReLU()), (torch.randn(13, 7, generator=source),)

    def __post_init__(self) -> None:
        if self.format is not None and not self.symmetric:
            raise SettingError(f"format '{self.format}' has no zero points: set symmetric=True")
        super().__post_init__()

    def rounding(self, name: str, layer: nn.Module, matrix: Tensor) -> Rounding:
        """Gives the rounding by division."""
        spec = self.spec_of(name, matrix)
        places = math.prod(layer.kernel_size) if isinstance(layer, _ConvNd) else None
        scales = spec.scales(matrix, RANGES[self.observer])
        return DivisiveRounding(matrix, spec, *scales, places=places)


class DivisiveRounding(Scaled):
    """Rounds weights after division by learned numbers.

    Args:
        places: Places of a convolution's kernel, whose input channels have divisors of their
            own; None for other layers.
    """

    def __init__(
        self,
        matrix: Tensor,
        spec: QuantSpec,
        scale: Tensor,
        zero: Tensor | None,
        places: int | None = None,
    ) -> None:
        super().__init__(matrix, spec, scale, zero)
        rows, columns = matrix.shape
        self.places = places
        self.step = nn.Parameter(scale.log())
        self.by_weight = nn.Parameter(torch.zeros_like(matrix))
        self.by_output = nn.Parameter(matrix.new_zeros(rows, 1))
        if places is not None:
            self.by_input = nn.Parameter(matrix.new_zeros(columns // places))

    def codes(self) -> tuple[Tensor, Tensor]:
        """Gives weights over step and divisors, and the step."""
        step = self.step.exp()
        step = straight(step, self.spec.stored_scale(step.detach()))
        divisor = self.by_weight + self.by_output
        if self.places is not None:
            divisor = divisor + self.by_input.repeat_interleave(self.places)
        return self._shifted(self.matrix / (self._spread(step) * divisor.exp())), step
