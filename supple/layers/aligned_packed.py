"""A linear layer of which each output holds as many groups of inputs with more bits.

Which groups these are differs from output to output; how many they are does not. So the codes
of either kind make a matrix of their own, whose rows all begin at a multiple of the same number
of bytes, and one bit for each group tells where it belongs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from supple.errors import SettingError
from supple.formats import Quantized, QuantSpec, quantize
from supple.layers.factorized import FactorizedLinear
from supple.layers.packed import PackedMatrix, linear_shape, pack_codes, unpack_codes

__all__ = ["AlignedPackedLinear", "AlignedQuantized", "align"]


@dataclass(frozen=True, eq=False)
class AlignedQuantized:
    """A matrix of which the same number of groups of each row has more bits than the others.

    Args:
        few: The groups of few bits of each row, next to one another, and after them the columns
            that fill no group.
        many: The groups of many bits of each row, next to one another.
        taken: Which groups have many bits, (rows, groups).
        outliers: Weights of groups of few bits that are held in float16, (rows, some).
        places: Their columns, of the same shape.
    """

    few: Quantized
    many: Quantized
    taken: Tensor
    outliers: Tensor
    places: Tensor

    @property
    def shape(self) -> torch.Size:
        """Shape of the matrix."""
        rows, columns = self.few.shape
        return torch.Size((rows, columns + self.many.shape[1]))

    @property
    def total_bits(self) -> int:
        """Bits of codes, scales, zero points, choices and outliers, not padded to bytes."""
        outliers = self.outliers.numel() * (16 + 8 * _place_type(self.shape[1]).itemsize)
        return self.few.total_bits + self.many.total_bits + self.taken.numel() + outliers

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Gives the matrix that the codes stand for."""
        size = self.few.spec.group_size
        assert size is not None
        parts = (self.few.dequantize(dtype), self.many.dequantize(dtype))
        return _joined(*parts, self.taken, size, self.outliers, self.places)


@torch.no_grad()
def align(
    matrix: Tensor,
    scores: Tensor,
    few: QuantSpec,
    many: QuantSpec,
    count: int,
    outliers: int = 0,
) -> AlignedQuantized:
    """Quantizes a matrix, a few groups of each row with more bits than the rest.

    Args:
        matrix: (rows, columns).
        scores: What a group is worth, (rows, groups); columns at the end that fill no group
            have no score, and few bits.
        few: How most groups are quantized; of granularity `"group"`.
        many: How those of the largest scores in each row are; with groups of the same size.
        count: How many these are, at least 1, and such that something is left of few bits.
        outliers: How many of a row's other weights, the largest, are held in float16.

    Returns:
        The matrix, quantized.

    Raises:
        SettingError: Settings don't fit the matrix or one another.

    Example:
        >>> matrix = torch.tensor([[0.0, 3.0, 0.0, 15.0]])
        >>> specs = [QuantSpec(form, "group", 2, False) for form in ("uint2", "uint4")]
        >>> found = align(matrix, torch.tensor([[1.0, 2.0]]), *specs, count=1)
        >>> found.taken.tolist(), found.dequantize().tolist()
        ([[False, True]], [[0.0, 3.0, 0.0, 15.0]])
    """
    rows, columns = matrix.shape
    size = few.group_size
    if size is None or many.group_size != size:
        raise SettingError(
            f"both kinds of groups have one size, got {few.group_size} and {many.group_size}"
        )
    groups = columns // size
    left = columns - count * size
    if scores.shape != (rows, groups) or count < 1 or left < 1 or not 0 <= outliers <= left:
        raise SettingError(
            f"of {groups} groups of {size} in {columns} columns {count} can't have many bits "
            f"and {outliers} weights of the others be held apart, with scores of shape "
            f"{tuple(scores.shape)}; some columns must be left, and each group needs a score"
        )
    best = scores.argsort(dim=1, descending=True, stable=True)[:, :count]
    taken = torch.zeros(rows, groups, dtype=torch.bool, device=matrix.device)
    taken.scatter_(1, best, True)
    values, places = _outliers(matrix, taken, size, outliers)
    rest = matrix.scatter(1, places, 0.0)
    whole = rest[:, : groups * size].reshape(rows, groups, size)
    apart = torch.cat((whole[~taken].reshape(rows, -1), rest[:, groups * size :]), 1)
    return AlignedQuantized(
        quantize(apart, few),
        quantize(whole[taken].reshape(rows, -1), many),
        taken,
        values,
        places.to(_place_type(columns)),
    )


def _outliers(matrix: Tensor, taken: Tensor, size: int, count: int) -> tuple[Tensor, Tensor]:
    """Gives the largest weights of each row in groups of few bits, and their columns."""
    covered = taken.repeat_interleave(size, 1)
    covered = F.pad(covered, (0, matrix.shape[1] - covered.shape[1]))
    magnitudes = matrix.abs().masked_fill(covered, -1.0)
    places = magnitudes.argsort(dim=1, descending=True, stable=True)[:, :count]
    return matrix.gather(1, places).half(), places


def _joined(
    few: Tensor, many: Tensor, taken: Tensor, size: int, outliers: Tensor, places: Tensor
) -> Tensor:
    """Puts groups of either kind, and outliers, in their places."""
    rows, groups = taken.shape
    count = many.shape[1] // size
    among = torch.where(
        taken, taken.cumsum(1) - 1, (~taken).cumsum(1) - 1 + count
    )  # the place of each group where those of many bits come first
    split = (groups - count) * size
    apart = torch.cat((many, few[:, :split]), 1).reshape(rows, groups, size)
    whole = apart.gather(1, among[:, :, None].expand(-1, -1, size)).reshape(rows, -1)
    joined = torch.cat((whole, few[:, split:]), 1)
    if not outliers.shape[1]:
        return joined
    return joined.scatter(1, places.long(), outliers.to(joined.dtype))


def _place_type(columns: int) -> torch.dtype:
    return torch.int16 if columns < 2**15 else torch.int32


class AlignedPackedLinear(FactorizedLinear):
    """A linear layer whose matrix is an `AlignedQuantized`.

    Args:
        in_features: Width of the input.
        out_features: Width of the output.
        few: How groups of few bits are quantized: a spec, or its settings.
        many: How groups of many bits are.
        count: Groups of many bits in each row.
        outliers: Weights of each row that are held in float16.
        bias: Whether to add a bias.
        dtype: Type of the weight that the codes stand for, and of the bias.

    Shape:
        (..., in_features) to (..., out_features).

    Raises:
        SettingError: A value can't be used.

    Example:
        >>> few = QuantSpec("int2", "group", 2, scale_format="fp16")
        >>> many = QuantSpec("int4", "group", 2, scale_format="fp16")
        >>> layer = AlignedPackedLinear(8, 3, few, many, count=1, bias=False)
        >>> layer(torch.ones(5, 8)).shape, layer.nbytes
        (torch.Size([5, 3]), 34)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        few: QuantSpec | Mapping[str, Any],
        many: QuantSpec | Mapping[str, Any],
        count: int,
        *,
        outliers: int = 0,
        bias: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.count, self.dtype = count, dtype
        size = few.group_size if isinstance(few, QuantSpec) else few["group_size"]
        if not size or not 1 <= count * size < in_features:
            raise SettingError(
                f"{count} groups of {size} of {in_features} inputs can't have more bits than "
                "the rest: some inputs must be left, and groups have a size"
            )
        self.size = int(size)
        self.few = PackedMatrix(out_features, in_features - count * size, few, dtype=dtype)
        self.many = PackedMatrix(out_features, count * size, many, dtype=dtype)
        taken = torch.arange(self.groups).expand(out_features, -1) < count
        self.register_buffer("taken", pack_codes(taken, 1))
        held = (out_features, outliers)
        self.register_buffer("outliers", torch.zeros(held, dtype=torch.float16))
        self.register_buffer("places", torch.zeros(held, dtype=_place_type(in_features)))
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype)) if bias else None

    taken: Tensor
    outliers: Tensor
    places: Tensor

    @classmethod
    def from_quantized(
        cls, linear: nn.Module, quantized: AlignedQuantized
    ) -> AlignedPackedLinear:
        """Takes the place of a linear layer.

        Args:
            linear: An `nn.Linear`, or `transformers`' `Conv1D`; gives the bias.
            quantized: Its matrix (`supple.weights.as_matrix`), quantized.

        Returns:
            The layer.

        Raises:
            SettingError: The matrix has another shape.
        """
        weight, bias = linear.weight, linear.bias
        assert isinstance(weight, Tensor)
        shape = linear_shape(linear, quantized.shape)
        size = quantized.few.spec.group_size
        assert size is not None
        made = cls(
            shape[1],
            shape[0],
            quantized.few.spec,
            quantized.many.spec,
            quantized.many.shape[1] // size,
            outliers=quantized.outliers.shape[1],
            bias=bias is not None,
            dtype=weight.dtype,
        ).to(weight.device)
        made.few.take(quantized.few)
        made.many.take(quantized.many)
        made.taken.copy_(pack_codes(quantized.taken, 1))
        made.outliers.copy_(quantized.outliers)
        made.places.copy_(quantized.places)
        if made.bias is not None:
            assert isinstance(bias, Tensor)
            made.bias = nn.Parameter(bias.detach().clone(), bias.requires_grad)
        return made.train(linear.training)

    @property
    def groups(self) -> int:
        """Whole groups in each row."""
        return self.in_features // self.size

    @property
    def nbytes(self) -> int:
        """Bytes that the layer takes in a file."""
        return sum(tensor.nbytes for tensor in self.state_dict().values())

    def quantized(self) -> AlignedQuantized:
        """Gives codes, scales and zero points, unpacked, and where they belong."""
        return AlignedQuantized(
            self.few.quantized(),
            self.many.quantized(),
            self._taken(),
            self.outliers,
            self.places,
        )

    def _taken(self) -> Tensor:
        bits = unpack_codes(self.taken, 1, self.out_features * self.groups)
        return bits.bool().reshape(self.out_features, self.groups)

    def settings(self) -> dict[str, Any]:
        """Gives the arguments with which the class makes a layer of this structure."""
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "few": self.few.spec.settings(),
            "many": self.many.spec.settings(),
            "count": self.count,
            "outliers": self.outliers.shape[1],
            "bias": self.bias is not None,
            "dtype": self.dtype,
        }

    def extra_repr(self) -> str:
        """Tells the shape and how many groups have more bits."""
        sizes = f"{self.in_features}, {self.out_features}"
        return f"{sizes}, {self.count} of {self.groups} groups of {self.size}"

    def dense_weight(self) -> Tensor:
        """Gives the matrix that the codes stand for, (out_features, in_features)."""
        parts = self.few.values(), self.many.values()
        return _joined(*parts, self._taken(), self.size, self.outliers, self.places)

    def macs(self, tokens: int) -> int:
        """Gives the multiply-accumulates of a forward with so many tokens."""
        return tokens * self.in_features * self.out_features

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., in_features) to (..., out_features)."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.dense_weight().to(x.dtype), bias)
