"""A linear layer whose groups of columns are held with different numbers of bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from supple.errors import SettingError
from supple.formats import Quantized, QuantSpec
from supple.layers.factorized import FactorizedLinear, unfilled
from supple.layers.packed import Engine, PackedLinear, linear_shape, pack_codes, unpack_codes

__all__ = ["MixedPackedLinear", "MixedQuantized"]


@dataclass(frozen=True, eq=False)
class MixedQuantized:
    """A matrix of which each group of columns is quantized in one of several ways.

    Args:
        parts: For each way, the columns that are quantized so, (out, some), next to one
            another in the matrix' order.
        layout: For each group of columns, which part it is in, (groups,); each part has one.
        group_size: Columns of a group; the last group may be smaller.

    Raises:
        SettingError: The layout does not fit the parts.

    Example:
        >>> from supple.formats import quantize
        >>> wide, narrow = torch.tensor([[7.5, 3.0, 2.0]]), torch.tensor([[1.5, 0.4]])
        >>> parts = (quantize(narrow, QuantSpec("int2")), quantize(wide, QuantSpec("int4")))
        >>> found = MixedQuantized(parts, torch.tensor([1, 0, 1]), 2)
        >>> found.dequantize().tolist(), found.total_bits
        ([[7.0, 3.0, 1.0, 0.0, 2.0]], 83)
    """

    parts: tuple[Quantized, ...]
    layout: Tensor
    group_size: int

    def __post_init__(self) -> None:
        columns = [part.shape[1] for part in self.parts]
        order = column_parts(self.layout, self.group_size, sum(columns))
        if len(order) != sum(columns) or columns != torch.bincount(order.long()).tolist():
            raise SettingError(
                f"parts of {columns} columns don't fit a layout of {len(self.layout)} groups "
                f"of {self.group_size} columns: {self.layout.tolist()}"
            )

    @property
    def shape(self) -> torch.Size:
        """Shape of the matrix."""
        columns = sum(part.shape[1] for part in self.parts)
        return torch.Size((self.parts[0].shape[0], columns))

    @property
    def total_bits(self) -> int:
        """Bits of codes, scales, zero points, and of the layout, not padded to bytes."""
        layout = len(self.layout) * layout_bits(len(self.parts))
        return layout + sum(part.spec.total_bits(part.shape) for part in self.parts)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Gives the matrix that the codes stand for."""
        apart = torch.cat([part.dequantize(dtype) for part in self.parts], 1)
        back = column_order(self.layout, self.group_size, apart.shape[1]).argsort()
        return apart[:, back]


def layout_bits(parts: int) -> int:
    """Gives the bits that tell which of so many parts a group is in, at least 1.

    Args:
        parts: How many there are.
    """
    return max(1, (parts - 1).bit_length())


def column_parts(layout: Tensor, group_size: int, columns: int) -> Tensor:
    """Gives the part that each column is in.

    Args:
        layout: Part of each group, (groups,).
        group_size: Columns of a group.
        columns: How many columns there are.
    """
    return layout.repeat_interleave(group_size)[:columns]


def column_order(layout: Tensor, group_size: int, columns: int) -> Tensor:
    """Gives the columns part after part.

    Args:
        layout: Part of each group, (groups,).
        group_size: Columns of a group.
        columns: How many columns there are.

    Returns:
        Numbers of columns, (columns,).

    Example:
        >>> column_order(torch.tensor([1, 0, 1]), 2, 5).tolist()
        [2, 3, 0, 1, 4]
    """
    return column_parts(layout, group_size, columns).argsort(stable=True)


class MixedPackedLinear(FactorizedLinear):
    """A linear layer whose matrix is a `MixedQuantized`: a packed layer for each part.

    Args:
        in_features: Width of the input.
        out_features: Width of the output.
        specs: How the parts are quantized: specs, or their settings.
        columns: Columns of each part.
        group_size: Columns of a group; a group is in one part.
        bias: Whether to add a bias.
        dtype: Type of the weight that the codes stand for, and of the bias.
        engine: What multiplies, see `supple.layers.packed`.

    Shape:
        (..., in_features) to (..., out_features).

    Raises:
        SettingError: A value can't be used.

    Example:
        >>> layer = MixedPackedLinear(6, 3, [QuantSpec("int2"), QuantSpec("int4")], [4, 2], 2)
        >>> layer(torch.ones(5, 6)).shape
        torch.Size([5, 3])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        specs: Sequence[QuantSpec | Mapping[str, Any]],
        columns: Sequence[int],
        group_size: int,
        *,
        bias: bool = True,
        dtype: torch.dtype = torch.float32,
        engine: Engine = "auto",
    ) -> None:
        super().__init__()
        if sum(columns) != in_features or len(specs) != len(columns) or min(columns) < 1:
            raise SettingError(
                f"columns must give each of {len(specs)} parts some of {in_features} inputs, "
                f"got {list(columns)}"
            )
        self.in_features, self.out_features = in_features, out_features
        self.group_size, self.dtype, self.engine = group_size, dtype, engine
        self.parts = nn.ModuleList(
            PackedLinear(many, out_features, spec, bias=False, dtype=dtype, engine=engine)
            for spec, many in zip(specs, columns, strict=True)
        )
        groups = torch.zeros(-(-in_features // group_size), dtype=torch.uint8)
        self.register_buffer("layout", pack_codes(groups, self._layout_bits))
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype)) if bias else None

    @classmethod
    def from_quantized(
        cls, linear: nn.Module, quantized: MixedQuantized, *, engine: Engine = "auto"
    ) -> MixedPackedLinear:
        """Takes the place of a linear layer.

        Args:
            linear: An `nn.Linear`, or `transformers`' `Conv1D`; gives the bias.
            quantized: Its matrix (`supple.weights.as_matrix`), quantized.
            engine: As in the constructor.

        Returns:
            The layer.

        Raises:
            SettingError: The matrix has another shape.
        """
        weight = linear.weight
        assert isinstance(weight, Tensor)
        shape = linear_shape(linear, quantized.shape)
        made = cls(
            shape[1],
            shape[0],
            [part.spec for part in quantized.parts],
            [part.shape[1] for part in quantized.parts],
            quantized.group_size,
            bias=linear.bias is not None,
            dtype=weight.dtype,
            engine=engine,
        ).to(weight.device)
        for place, part in enumerate(quantized.parts):
            sizes = {"in_features": part.shape[1], "out_features": shape[0]}
            alone = unfilled(nn.Linear, {**sizes, "bias": False}, weight)
            made.parts[place] = PackedLinear.from_quantized(alone, part, engine=engine)
        made.layout.copy_(pack_codes(quantized.layout, made._layout_bits))
        if made.bias is not None:
            assert isinstance(linear.bias, nn.Parameter)
            made.bias = nn.Parameter(linear.bias.detach().clone(), linear.bias.requires_grad)
        return made.train(linear.training)

    layout: Tensor

    @property
    def _layout_bits(self) -> int:
        return layout_bits(len(self.parts))

    @property
    def nbytes(self) -> int:
        """Bytes that the layer takes in a file: codes, scales, zero points, layout, bias."""
        return sum(tensor.nbytes for tensor in self.state_dict().values())

    def quantized(self) -> MixedQuantized:
        """Gives the parts, unpacked, and the layout."""
        parts = tuple(part.quantized() for part in self._parts())
        groups = -(-self.in_features // self.group_size)
        layout = unpack_codes(self.layout, self._layout_bits, groups)
        return MixedQuantized(parts, layout, self.group_size)

    def _parts(self) -> list[PackedLinear]:
        return [part for part in self.parts if isinstance(part, PackedLinear)]

    def settings(self) -> dict[str, Any]:
        """Gives the arguments with which the class makes a layer of this structure."""
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "specs": [part.spec.settings() for part in self._parts()],
            "columns": [part.in_features for part in self._parts()],
            "group_size": self.group_size,
            "bias": self.bias is not None,
            "dtype": self.dtype,
            "engine": self.engine,
        }

    def extra_repr(self) -> str:
        """Tells the shape; the parts tell the rest."""
        return f"{self.in_features}, {self.out_features}, group_size={self.group_size}"

    def dense_weight(self) -> Tensor:
        """Gives the matrix that the codes stand for, (out_features, in_features)."""
        return self.quantized().dequantize(self.dtype)

    def macs(self, tokens: int) -> int:
        """Gives the multiply-accumulates of a forward with so many tokens."""
        return tokens * self.in_features * self.out_features

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., in_features) to (..., out_features)."""
        groups = -(-self.in_features // self.group_size)
        layout = unpack_codes(self.layout, self._layout_bits, groups)
        ordered = x[..., column_order(layout, self.group_size, self.in_features)]
        widths = [part.in_features for part in self._parts()]
        first, *others = zip(self.parts, torch.split(ordered, widths, -1), strict=True)
        y: Tensor = first[0](first[1])
        for part, columns in others:
            y = y + part(columns)
        return y if self.bias is None else y + self.bias.to(y.dtype)
