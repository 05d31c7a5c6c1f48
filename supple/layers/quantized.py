"""Convolutions that compute with a few bits, and are trained so."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from supple.errors import SettingError
from supple.layers.choice import Choice

__all__ = ["FakeQuantizer", "Precision", "QuantizedConv2d", "bits_of"]

_MOST_BITS = 16


class FakeQuantizer(nn.Module):
    r"""Rounds to levels that lie a trained step apart, and stays in floating point.

    $y = s\,\text{round}(\text{clip}(x / s, -n, p))$ with $n = 2^{b-1}$, $p = 2^{b-1} - 1$, or
    $n = 0$, $p = 2^b - 1$ for values that are not negative. The gradient passes the rounding
    unchanged. That of the step is divided by $\sqrt{p N}$, where $N$ values share a step, so
    that steps and weights move at one pace. Of a step below 0 the magnitude counts.

    Args:
        bits: $b$, from 2 to 16.
        step: First value of the step, or steps that broadcast to the input, above 0.
        signed: Whether values may be negative.

    Shape:
        Any, to the same.

    Raises:
        SettingError: `bits` is out of range.

    Example:
        >>> FakeQuantizer(2, torch.tensor(1.0))(torch.tensor([-9.0, -0.6, 0.4, 9.0])).tolist()
        [-2.0, -1.0, 0.0, 1.0]

    Source:
        Esser et al. 2020, "Learned Step Size Quantization", arXiv:1902.08153.
    """

    def __init__(self, bits: int, step: Tensor, *, signed: bool = True) -> None:
        super().__init__()
        if not 2 <= bits <= _MOST_BITS:
            raise SettingError(f"bits must be from 2 to {_MOST_BITS}, got {bits}")
        self.bits = bits
        self.least = -(2 ** (bits - 1)) if signed else 0
        self.most = self.least + 2**bits - 1
        self.step = nn.Parameter(step.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """Rounds each value to the nearest level."""
        shared = self.most * x.numel() / self.step.numel()
        size = self.step.abs()
        slow = size * shared**-0.5
        step = slow + (size - slow).detach()
        inside = (x / step).clamp(self.least, self.most)
        rounded: Tensor = (inside + (inside.round() - inside).detach()) * step
        return rounded


class Precision(nn.Module):
    """Rounds what a convolution sees and its weight to so many bits.

    The weight has a step for each output channel, the input one for all; inputs must not be
    negative, as after a ReLU.

    Args:
        bits: Of both, from 2 to 16.
        weight: The weight at the start, which the first steps follow: twice the mean magnitude
            over the root of the largest level. The input's suits half a normal distribution of
            variance 1, as normalised inputs have it after a ReLU.

    Example:
        >>> Precision(4, torch.ones(8, 3, 3, 3)).weight.step.shape
        torch.Size([8, 1, 1, 1])
    """

    def __init__(self, bits: int, weight: Tensor) -> None:
        super().__init__()
        size = weight.detach().abs().mean(tuple(range(1, weight.dim())), keepdim=True)
        # A channel of zeros needs a step above 0, too.
        first = (2 * size / (2 ** (bits - 1) - 1) ** 0.5).clamp_min(1e-8)
        self.weight = FakeQuantizer(bits, first)
        self.input = FakeQuantizer(bits, torch.tensor(_first_step(bits)), signed=False)

    @property
    def bits(self) -> int:
        """Bits per number."""
        return self.weight.bits

    def forward(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Gives both rounded."""
        return self.input(x), self.weight(weight)


class QuantizedConv2d(nn.Conv2d):
    """A ReLU and a convolution that computes with so many bits.

    Where there are several to choose from, they are the options of a `supple.layers.Choice`,
    `precision`, so that the axis `supple.Operator` makes the number of bits elastic and
    `extract` keeps one. The weight is the same for all of them.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Height and width of the kernel.
        bits: Numbers of bits to choose from, ascending.
        **settings: Of `torch.nn.Conv2d`; `padding` keeps the size by default.

    Shape:
        As `torch.nn.Conv2d`.

    Raises:
        SettingError: There is no number of bits, they do not ascend, or one is not from 2
            to 16.

    Example:
        >>> layer = QuantizedConv2d(4, 8, 3, bits=(4, 8))
        >>> layer(torch.randn(1, 4, 5, 5)).shape, layer.precision.active
        (torch.Size([1, 8, 5, 5]), 1)
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        *,
        bits: Sequence[int] = (4, 8),
        **settings: object,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            **{"padding": "same", **settings},  # type: ignore[arg-type]
        )
        if not bits or list(bits) != sorted(set(bits)):
            raise SettingError(f"bits must be one or more ascending numbers, got {bits}")
        options = [Precision(each, self.weight) for each in bits]
        self.precision = options[0] if len(options) == 1 else Choice(*options)

    def forward(self, input: Tensor) -> Tensor:
        """Maps (N, in_channels, H, W) to (N, out_channels, H', W')."""
        x, weight = self.precision(input.relu(), self.weight)
        result: Tensor = self._conv_forward(x, weight, self.bias)
        return result

    @property
    def bits(self) -> tuple[int, ...]:
        """Numbers of bits to choose from."""
        return bits_of(self.precision)


def bits_of(module: nn.Module) -> tuple[int, ...]:
    """Gives the bits of a precision, or of each option of a choice among some.

    Args:
        module: Any module.

    Returns:
        Bits per number; nothing for any other module.

    Example:
        >>> weight = torch.ones(8, 3)
        >>> bits_of(Choice(Precision(4, weight), Precision(8, weight))), bits_of(nn.Identity())
        ((4, 8), ())
    """
    options = list(module.options) if isinstance(module, Choice) else [module]
    found = tuple(option.bits for option in options if isinstance(option, Precision))
    return found if len(found) == len(options) else ()


def _first_step(bits: int) -> float:
    """Gives a step with which 2^bits levels suit half a normal distribution of variance 1.

    The range that loses least grows nearly evenly with the bits, by 0.4 deviations each.
    """
    return (1.2 + 0.4 * bits) / (2.0**bits - 1)
