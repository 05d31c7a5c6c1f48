r"""Linear layers whose matrix is made of points on pyramids: directions without a codebook.

A group of $D$ neighbours in a row is a gain times a direction, and the direction is that of a
point of whole numbers whose magnitudes add up to $K$. There are $N(D, K) = N(D - 1, K) +
N(D, K - 1) + N(D - 1, K - 1)$ such points; a code is a point's place in an order in which the
first number's magnitude counts most, then its sign, and then the numbers behind it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from supple.errors import SettingError
from supple.layers.factorized import FactorizedLinear
from supple.layers.packed import linear_shape, pack_codes, unpack_codes

__all__ = ["Pyramid", "PyramidCodes", "PyramidLinear"]

_MOST_BITS = 62  # codes are int64
_PIECE = 16  # bits of a code that are packed together
_AT_ONCE = 1 << 16
"""Points that are taken apart at a time."""


@dataclass(frozen=True)
class Pyramid:
    r"""All points of $D$ whole numbers whose magnitudes add up to $K$.

    Args:
        dimensions: $D$, at least 1.
        pulses: $K$, at least 1.

    Raises:
        SettingError: A number is below 1, or there are more than $2^{62}$ points.

    Example:
        >>> pyramid = Pyramid(2, 2)
        >>> pyramid.count, pyramid.bits, pyramid.decode(torch.arange(8)).tolist()[:4]
        (8, 3, [[0, 2], [0, -2], [1, 1], [1, -1]])

    Source:
        Fischer 1986, "A Pyramid Vector Quantizer", IEEE Transactions on Information Theory.
    """

    dimensions: int
    pulses: int

    def __post_init__(self) -> None:
        if min(self.dimensions, self.pulses) < 1:
            raise SettingError(
                "dimensions and pulses must be at least 1, got "
                f"{self.dimensions} and {self.pulses}"
            )
        if self.bits > _MOST_BITS:
            raise SettingError(
                f"a point of {self.dimensions} numbers with {self.pulses} pulses takes "
                f"{self.bits} bits, at most {_MOST_BITS} can be held; choose fewer of either"
            )

    @property
    def count(self) -> int:
        """How many points there are."""
        return _counts(self.dimensions, self.pulses)[self.dimensions][self.pulses]

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return (self.count - 1).bit_length()

    @staticmethod
    def fitting(dimensions: int, bits: int) -> Pyramid:
        """Gives the one with most points whose codes have at most so many bits.

        Args:
            dimensions: Numbers of a point.
            bits: At least what a single pulse takes.

        Raises:
            SettingError: Not even one pulse fits.

        Example:
            >>> Pyramid.fitting(16, 44)
            Pyramid(dimensions=16, pulses=22)
        """
        if bits < (2 * dimensions - 1).bit_length() or bits > _MOST_BITS:
            raise SettingError(
                f"a direction of {dimensions} numbers takes from "
                f"{(2 * dimensions - 1).bit_length()} to {_MOST_BITS} bits, got {bits}"
            )
        pulses = 1
        # One number has two points with any number of pulses.
        while dimensions > 1 and _count(dimensions, pulses + 1) <= 1 << bits:
            pulses += 1
        return Pyramid(dimensions, pulses)

    # -- points and codes

    def nearest(self, x: Tensor) -> Tensor:
        r"""Gives the points in whose directions vectors point best.

        Pulses are laid out in proportion to the magnitudes, rounded down; each that is left
        goes where $(x \cdot y)^2 / \lVert y \rVert^2$ grows most.

        Args:
            x: Vectors, (n, D).

        Returns:
            Points, (n, D), of the vectors' type; for a vector of zeros any.

        Example:
            >>> Pyramid(3, 4).nearest(torch.tensor([[0.5, -0.1, 0.3]])).tolist()
            [[2.0, -1.0, 1.0]]
        """
        size = x.abs()
        total = size.sum(1, keepdim=True)
        first = F.one_hot(torch.zeros(len(x)).long(), x.shape[1]).to(x)
        shares = torch.where(total > 0, size / total.clamp_min(1e-30), first)
        # What rounding of the shares may add up to beyond the pulses is taken off.
        points = (shares * self.pulses * (1 - 1e-6)).floor()
        left = self.pulses - points.sum(1)
        along, square = (size * points).sum(1), points.square().sum(1)
        while bool((left > 0).any()):
            gain = (along[:, None] + size).square() / (square[:, None] + 2 * points + 1)
            place = gain.argmax(1, keepdim=True)
            added = (left > 0).to(x)
            held = points.gather(1, place)[:, 0]
            along = along + added * size.gather(1, place)[:, 0]
            square = square + added * (2 * held + 1)
            points.scatter_add_(1, place, added[:, None])
            left = left - added
        return torch.where(x < 0, -points, points)

    def encode(self, points: Tensor) -> Tensor:
        """Gives the codes of points.

        Args:
            points: Whole numbers of any type, (n, D).

        Returns:
            From 0 to `count` - 1, int64, (n,).
        """
        starts, counts = self._tables(points.device)
        left = torch.full(points.shape[:1], self.pulses, device=points.device)
        codes = torch.zeros_like(left)
        for place, number in enumerate(points.long().unbind(1)):
            behind, size = self.dimensions - place - 1, number.abs()
            codes = codes + starts[behind][left, size]
            left = left - size
            codes = codes + (number < 0) * counts[behind][left]
        return codes

    def decode(self, codes: Tensor) -> Tensor:
        """Gives the points of codes.

        Args:
            codes: From 0 to `count` - 1, (n,).

        Returns:
            Whole numbers, int64, (n, D).
        """
        return torch.cat([self._decoded(part) for part in torch.split(codes.long(), _AT_ONCE)])

    def _decoded(self, codes: Tensor) -> Tensor:
        starts, counts = self._tables(codes.device)
        left = torch.full_like(codes, self.pulses)
        numbers = []
        for behind in range(self.dimensions - 1, -1, -1):
            size = (codes[:, None] >= starts[behind][left][:, 1:]).sum(1)
            codes = codes - starts[behind][left, size]
            left = left - size
            half = counts[behind][left]
            negative = (codes >= half) & (size > 0)
            codes = codes - half * negative
            numbers.append(torch.where(negative, -size, size))
        return torch.stack(numbers, 1)

    def _tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Where codes begin by (numbers behind, pulses left, magnitude); how many points."""
        starts, counts = _starts(self.dimensions, self.pulses)
        return torch.tensor(starts, device=device), torch.tensor(counts, device=device)


def _count(dimensions: int, pulses: int) -> int:
    return _counts(dimensions, pulses)[dimensions][pulses]


@functools.lru_cache(256)
def _counts(dimensions: int, pulses: int) -> list[list[int]]:
    """Points by numbers and pulses."""
    rows = [[1] + [0] * pulses]
    for _ in range(dimensions):
        row = [1]
        for k in range(1, pulses + 1):
            row.append(rows[-1][k] + row[k - 1] + rows[-1][k - 1])
        rows.append(row)
    return rows


@functools.lru_cache(64)
def _starts(dimensions: int, pulses: int) -> tuple[list[list[list[int]]], list[list[int]]]:
    """For each number of numbers behind and pulses: the first code of each magnitude."""
    counts, most = _counts(dimensions, pulses), 1 << 62
    lefts = range(pulses + 1)
    starts = [
        [[*_first_codes(counts[behind], left), *[most] * (pulses - left)] for left in lefts]
        for behind in range(dimensions)
    ]
    return starts, counts[:dimensions]


def _first_codes(behind: list[int], left: int) -> Iterator[int]:
    """Points with magnitudes below 0, 1, ... up to `left`."""
    start = 0
    for size in range(left + 1):
        yield start
        start += behind[left - size] * (2 if size else 1)


# ------------------------------------------------------------------------------------- layers


@dataclass(frozen=True, eq=False)
class PyramidCodes:
    """A matrix as gains times directions.

    Args:
        codes: Codes of the directions, int64, (rows, groups).
        gains: Places among the levels, (rows, groups).
        levels: Gains relative to a row's scale, float32.
        scale: Of each row, (rows,), float32 of values that float16 has.
        pyramid: What the directions are points of.
        shape: Shape of the matrix; the last group may reach beyond it.
    """

    codes: Tensor
    gains: Tensor
    levels: Tensor
    scale: Tensor
    pyramid: Pyramid
    shape: torch.Size

    @property
    def total_bits(self) -> int:
        """Bits of codes, gains, levels (float32) and scales (float16)."""
        each = self.pyramid.bits + _gain_bits(len(self.levels))
        return self.codes.numel() * each + 32 * len(self.levels) + 16 * len(self.scale)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Gives the matrix that the codes stand for."""
        points = self.pyramid.decode(self.codes.flatten()).float()
        points = points / points.square().sum(1, keepdim=True).sqrt()
        gains = F.embedding(self.gains.int(), self.levels[:, None]) * self.scale[:, None, None]
        values = (points.reshape(*self.codes.shape, -1) * gains).flatten(1)
        return values[:, : self.shape[1]].to(dtype)


class PyramidLinear(FactorizedLinear):
    """A linear layer whose matrix is made of points on pyramids.

    Args:
        in_features: Width of the input.
        out_features: Width of the output.
        vector: Neighbours in a row that make a point.
        pulses: What their magnitudes add up to.
        levels: Gains that there are, 1 to 256.
        bias: Whether to add a bias.
        dtype: Type of the matrix that the codes stand for, and of the bias.

    Shape:
        (..., in_features) to (..., out_features).

    Raises:
        SettingError: A number is out of range.

    Example:
        >>> layer = PyramidLinear(64, 96, vector=16, pulses=22, levels=8, bias=False)
        >>> layer(torch.ones(3, 64)).shape, layer.nbytes  # 44 + 3 bits for 16 weights
        (torch.Size([3, 96]), 2480)
    """

    codes: Tensor
    gains: Tensor
    values: Tensor
    scale: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        vector: int,
        pulses: int,
        levels: int,
        *,
        bias: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if not 1 <= levels <= 256:
            raise SettingError(f"there are 1 to 256 levels of gains, got {levels}")
        self.in_features, self.out_features, self.dtype = in_features, out_features, dtype
        self.pyramid, self.levels = Pyramid(vector, pulses), levels
        groups = out_features * -(-in_features // vector)
        for name, bits in (("codes", self.pyramid.bits), ("gains", _gain_bits(levels))):
            held = torch.zeros(groups, dtype=torch.int64)
            self.register_buffer(name, _packed(held, bits))
        self.register_buffer("values", torch.ones(levels))
        self.register_buffer("scale", torch.zeros(out_features, dtype=torch.float16))
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype)) if bias else None

    @classmethod
    @torch.no_grad()
    def from_codes(cls, linear: nn.Module, codes: PyramidCodes) -> PyramidLinear:
        """Takes the place of a linear layer.

        Args:
            linear: An `nn.Linear`, or `transformers`' `Conv1D`; gives the bias.
            codes: Its matrix (`supple.weights.as_matrix`).

        Returns:
            The layer.

        Raises:
            SettingError: The matrix has another shape.
        """
        weight, bias = linear.weight, linear.bias
        assert isinstance(weight, Tensor)
        shape = linear_shape(linear, codes.shape)
        pyramid, levels = codes.pyramid, len(codes.levels)
        made = cls(
            shape[1],
            shape[0],
            pyramid.dimensions,
            pyramid.pulses,
            levels,
            bias=bias is not None,
            dtype=weight.dtype,
        ).to(weight.device)
        made.codes.copy_(_packed(codes.codes, pyramid.bits))
        made.gains.copy_(_packed(codes.gains, _gain_bits(levels)))
        made.values.copy_(codes.levels)
        made.scale.copy_(codes.scale)
        if isinstance(bias, Tensor) and made.bias is not None:
            made.bias.copy_(bias)
            made.bias.requires_grad_(bias.requires_grad)
        return made.train(linear.training)

    @property
    def nbytes(self) -> int:
        """Bytes that the layer takes in a file: codes, gains, levels, scales, bias."""
        return sum(tensor.nbytes for tensor in self.state_dict().values())

    def settings(self) -> dict[str, Any]:
        """Gives the arguments with which the class makes a layer of this structure."""
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "vector": self.pyramid.dimensions,
            "pulses": self.pyramid.pulses,
            "levels": self.levels,
            "bias": self.bias is not None,
            "dtype": self.dtype,
        }

    def quantized(self) -> PyramidCodes:
        """Gives codes, gains and scales, unpacked."""
        rows, groups = self.out_features, -(-self.in_features // self.pyramid.dimensions)
        codes = _unpacked(self.codes, self.pyramid.bits, rows * groups)
        gains = _unpacked(self.gains, _gain_bits(self.levels), rows * groups)
        return PyramidCodes(
            codes.reshape(rows, groups),
            gains.reshape(rows, groups),
            self.values.float(),
            self.scale.float(),
            self.pyramid,
            torch.Size((rows, self.in_features)),
        )

    def dense_weight(self) -> Tensor:
        """Gives the matrix that the codes stand for, (out_features, in_features)."""
        return self.quantized().dequantize(self.dtype)

    def macs(self, tokens: int) -> int:
        """Gives the multiply-accumulates of a forward with so many tokens."""
        return tokens * self.in_features * self.out_features

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., in_features) to (..., out_features)."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.dense_weight().to(x.dtype), bias)


def _gain_bits(levels: int) -> int:
    """Bits of a place among so many levels; none where there is only one."""
    return (levels - 1).bit_length()


def _pieces(bits: int) -> list[int]:
    """Cuts the bits of a code into pieces that can be packed."""
    whole, rest = divmod(bits, _PIECE)
    return [_PIECE] * whole + [rest] * (rest > 0)


def _packed(codes: Tensor, bits: int) -> Tensor:
    """Packs whole numbers of any number of bits, the lowest bits of all of them first."""
    flat, parts = codes.flatten(), [torch.empty(0, dtype=torch.uint8, device=codes.device)]
    for place, piece in enumerate(_pieces(bits)):
        own = (flat >> place * _PIECE).bitwise_and(2**piece - 1)
        parts.append(pack_codes(own, piece))
    return torch.cat(parts)


def _unpacked(packed: Tensor, bits: int, count: int) -> Tensor:
    """Gives the numbers that `_packed` packed, int64."""
    found = torch.zeros(count, dtype=torch.int64, device=packed.device)
    for place, piece in enumerate(_pieces(bits)):
        size = -(-count * piece // 8)
        own, packed = packed[:size], packed[size:]
        found = found + unpack_codes(own, piece, count).long() * 2 ** (place * _PIECE)
    return found
