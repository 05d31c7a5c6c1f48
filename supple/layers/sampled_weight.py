"""Weights that are sampled near what they are, as far as their bits allow."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from supple.errors import SettingError
from supple.formats import Float, Quantized, QuantSpec, fake_quantize, quantize
from supple.layers.fake_quantize import FakeQuantize

__all__ = ["SampledWeight"]

_EXPONENT = 3
_MOST = 6  # three bits of exponent leave four for the mantissa of a float of 8 bits


class SampledWeight(FakeQuantize):
    r"""Adds noise to a matrix in training, and rounds it to floats of few bits otherwise.

    The matrix is cut into square blocks. In training a number $w$ of a block whose largest
    magnitude is $m$ becomes $w + R\,m\,2^{1 - b}$, rounded to bfloat16. $R$ is a normally
    distributed number over 2, rounded: 0 in 68 % of all cases, 1 or -1 in nearly all others.
    The bits $b = b_1 + t\,(b_0 - b_1)$ follow from a share $t$ that each block learns, and the
    gradient of $w$ is the identity's.

    In evaluation mode, and in `quantized`, numbers are floats with 3 bits of exponent and
    $b - 2$ of mantissa, with $b$ the mean of all blocks, rounded: what noise of that size
    stands for. Neighbours in a row of a block share a scale, a power of two.

    Args:
        shape: Of the matrix.
        bits: $b_1$, where the bits are to end; from 2.
        initial_bits: $b_0$, where they begin; from `bits` to 6.
        group_size: Side of a block.

    Attributes:
        shares: $t$ of each block, row by row, shape (blocks,).
        seed: Of the noise.

    Shape:
        `shape`, and the same.

    Raises:
        SettingError: A setting can't be used.

    Example:
        >>> noisy = SampledWeight((2, 3), group_size=2)
        >>> noisy.widths().tolist(), noisy.final().name, noisy.final().bits
        ([6.0, 6.0], 'e3m4', 8)
        >>> x = torch.ones(2, 3)
        >>> moved = ((noisy(x) - x) * 2**5).unique()
        >>> sorted(set(moved.tolist()) | {-2.0, -1.0, 0.0, 1.0, 2.0})
        [-2.0, -1.0, 0.0, 1.0, 2.0]
    """

    def __init__(
        self,
        shape: tuple[int, int],
        *,
        bits: int = 4,
        initial_bits: int = 6,
        group_size: int = 32,
    ) -> None:
        if not 2 <= bits <= initial_bits <= _MOST:
            raise SettingError(
                f"bits must be from 2, initial_bits from bits to {_MOST}, got {bits} and "
                f"{initial_bits}"
            )
        if group_size < 1:
            raise SettingError(f"group_size must be at least 1, got {group_size}")
        super().__init__(_spec(initial_bits, group_size), estimator="noise")
        self.matrix_shape, self.group_size = tuple(shape), group_size
        self.bits, self.initial_bits = bits, initial_bits
        self._blocks = [-(-size // group_size) for size in shape]
        # One dimension, since optimizers leave such parameters out of weight decay.
        self.shares = nn.Parameter(torch.ones(self._blocks[0] * self._blocks[1]))

    def settings(self) -> dict[str, Any]:
        """Gives the constructor's arguments."""
        return {
            "shape": self.matrix_shape,
            "bits": self.bits,
            "initial_bits": self.initial_bits,
            "group_size": self.group_size,
        }

    def widths(self) -> Tensor:
        """Gives the bits of each block, shape (blocks,)."""
        return self.bits + self.shares.clamp(0, 1) * (self.initial_bits - self.bits)

    def final(self) -> Float:
        """Gives the floats that the matrix is rounded to in the end."""
        return _float(int(self._width()))

    def _width(self) -> Tensor:
        return self.widths().detach().mean().round()

    def forward(self, x: Tensor) -> Tensor:
        """Adds noise, or rounds."""
        if not self.training:
            return self._cast(x)
        noise = self._drawn(x) * self._spread(self._largest(x.detach()), x.shape)
        found = x + noise * self._spread(torch.exp2(1 - self.widths()), x.shape)
        # To the last bit that of bfloat16, with the gradient of what was rounded.
        return found.detach().bfloat16().to(x.dtype) + (found - found.detach())

    def _cast(self, x: Tensor) -> Tensor:
        width = self._width()
        # A sum of which one summand counts: numbers that follow from others choose nothing.
        found = torch.zeros_like(x)
        for bits in range(self.bits, self.initial_bits + 1):
            found = found + fake_quantize(x, _spec(bits, self.group_size)) * (width == bits)
        return found + (x - x.detach())

    def _drawn(self, x: Tensor) -> Tensor:
        source = torch.Generator().manual_seed(self.seed)
        drawn = torch.randn(x.shape, generator=source)
        return (drawn / 2).round().to(x.device)

    def _largest(self, x: Tensor) -> Tensor:
        side = self.group_size
        over = [-size % side for size in x.shape]
        padded = nn.functional.pad(x, (0, over[1], 0, over[0]))
        rows, columns = self._blocks
        return padded.reshape(rows, side, columns, side).abs().amax((1, 3)).flatten()

    def _spread(self, of_blocks: Tensor, shape: torch.Size) -> Tensor:
        """Gives each number what its block has."""
        grid = of_blocks.reshape(self._blocks)
        for dim in (0, 1):
            grid = grid.repeat_interleave(self.group_size, dim).narrow(dim, 0, shape[dim])
        return grid

    @torch.no_grad()
    def quantized(self, x: Tensor) -> Quantized:
        """Gives the codes that a matrix is rounded to in the end."""
        return quantize(x, _spec(self.final().mantissa + 2, self.group_size))

    def extra_repr(self) -> str:
        """Tells bits and blocks."""
        return f"{self.initial_bits} to {self.bits} bits, group_size={self.group_size}"


def _float(bits: int) -> Float:
    return Float(_EXPONENT, bits - 2)


def _spec(bits: int, group_size: int) -> QuantSpec:
    return QuantSpec(_float(bits), "group", group_size, scale_format="e8m0-up")
