"""A layer of few bits, beside which a product of low rank holds what rounding lost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from supple.layers.low_rank import svd_factors

__all__ = ["LowRankBranch", "LowRankCorrected", "low_rank_corrected"]


class _Solved(Protocol):
    @property
    def shape(self) -> torch.Size: ...

    @property
    def total_bits(self) -> int: ...

    def dequantize(self, dtype: torch.dtype = ...) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class LowRankCorrected:
    """A quantized matrix and the product of two thin ones that is added to it.

    Args:
        quantized: The quantized matrix, (out, in).
        up: (out, rank), of a type of few bits.
        down: (rank, in), of the same type.
    """

    quantized: _Solved
    up: Tensor
    down: Tensor

    @property
    def shape(self) -> torch.Size:
        """Shape of the matrix."""
        return self.quantized.shape

    @property
    def total_bits(self) -> int:
        """Bits of the quantized matrix and of both thin ones, not padded to bytes."""
        return self.quantized.total_bits + 8 * (self.up.nbytes + self.down.nbytes)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Gives the matrix that both stand for together."""
        product = self.up.float() @ self.down.float()
        return (self.quantized.dequantize() + product).to(dtype)


def low_rank_corrected(
    matrix: Tensor, quantized: _Solved, rank: int, dtype: torch.dtype = torch.float16
) -> LowRankCorrected:
    """Makes up for what rounding a matrix lost by the best product of low rank.

    Args:
        matrix: (out, in), before it was rounded.
        quantized: What it was rounded to.
        rank: Of the product, at least 1; at most the smaller width.
        dtype: Type in which the thin matrices are held.

    Returns:
        Both together.

    Example:
        >>> from supple.formats import QuantSpec, quantize
        >>> matrix = torch.tensor([[7.5, 3.3], [15.0, 6.6]])
        >>> coarse = quantize(matrix, QuantSpec("int4"))
        >>> fine = low_rank_corrected(matrix, coarse, rank=1)
        >>> [round(float((one.dequantize() - matrix).norm()), 3) for one in (coarse, fine)]
        [1.304, 0.0]
    """
    error = matrix.float() - quantized.dequantize()
    up, down = svd_factors(error, min(rank, *error.shape))
    return LowRankCorrected(quantized, up.to(dtype), down.to(dtype))


class LowRankBranch(nn.Module):
    """Adds a product of low rank to what a layer gives.

    Args:
        layer: A linear layer, or what stands for one; it gives the bias.
        in_features: Width of the input.
        out_features: Width of the output.
        rank: Of the product.
        dtype: Type in which the thin matrices are held.

    Attributes:
        down: (rank, in_features), zero at first.
        up: (out_features, rank).

    Shape:
        (..., in_features) to (..., out_features).

    Example:
        >>> layer = LowRankBranch(nn.Linear(8, 6), 8, 6, rank=2)
        >>> layer(torch.ones(3, 8)).shape, layer.down.dtype
        (torch.Size([3, 6]), torch.float16)
    """

    def __init__(
        self,
        layer: nn.Module,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        dtype: torch.dtype = torch.float16,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.dtype = dtype
        # Buffers, as the codes are: neither is trained.
        self.register_buffer("down", torch.zeros(rank, in_features, dtype=dtype))
        self.register_buffer("up", torch.zeros(out_features, rank, dtype=dtype))

    down: Tensor
    up: Tensor

    @classmethod
    def of(cls, layer: nn.Module, up: Tensor, down: Tensor) -> LowRankBranch:
        """Puts a product beside a layer.

        Args:
            layer: The layer.
            up: (out_features, rank); copied.
            down: (rank, in_features), of the same type; copied.

        Returns:
            The layer with the product, in the mode of `layer`.
        """
        made = cls(layer, down.shape[1], len(up), len(down), dtype=up.dtype)
        made.down, made.up = (
            one.detach().clone(memory_format=torch.contiguous_format) for one in (down, up)
        )
        return made.train(layer.training)

    @property
    def weight(self) -> Tensor:
        """The matrix that both stand for together, (out_features, in_features)."""
        weight = self.layer.weight
        assert isinstance(weight, Tensor)
        return weight + (self.up.float() @ self.down.float()).to(weight.dtype)

    @property
    def bias(self) -> Any:
        """The layer's bias."""
        return self.layer.bias

    def settings(self) -> Mapping[str, Any]:
        """Gives the constructor's arguments."""
        names = ("layer", "in_features", "out_features", "rank", "dtype")
        return {name: getattr(self, name) for name in names}

    def extra_repr(self) -> str:
        """Tells the product's rank."""
        return f"rank={self.rank}"

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., in_features) to (..., out_features)."""
        y: Tensor = self.layer(x)
        return y + F.linear(F.linear(x, self.down.to(x.dtype)), self.up.to(x.dtype))
