"""A linear layer as a stack of blocks, of which it uses as many as there is memory for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from supple.errors import SettingError
from supple.layers.factorized import FactorizedLinear
from supple.layers.packed import pack_codes

__all__ = ["SignBlock", "StackedSigns"]

_PLACES = tuple(2**place for place in range(8))


class SignBlock(nn.Module):
    r"""A matrix as signs times a product of low rank, $S \odot U V$.

    Signs take a bit each, $U$ and $V$ are held in float16.

    Args:
        rows: Rows of the matrix.
        columns: Its columns.
        rank: Of the product.
        signs: Whether there are signs; else the block is the product alone.

    Example:
        >>> SignBlock(16, 32, 2).nbytes   # 512 signs, and 2 x 48 numbers
        256
    """

    up: Tensor
    down: Tensor

    def __init__(self, rows: int, columns: int, rank: int, *, signs: bool = True) -> None:
        super().__init__()
        self.register_buffer("up", torch.zeros(rows, rank, dtype=torch.float16))
        self.register_buffer("down", torch.zeros(rank, columns, dtype=torch.float16))
        if signs:
            count = -(-rows * columns // 8)
            self.register_buffer("signs", torch.zeros(count, dtype=torch.uint8))

    @classmethod
    def nearest(cls, matrix: Tensor, rank: int, *, signs: bool = True) -> SignBlock:
        """Gives the block nearest to a matrix: its magnitudes' largest singular values.

        Args:
            matrix: (rows, columns), float32.
            rank: At most the smaller size.
            signs: As in the constructor. Without, the matrix' own singular values count.

        Returns:
            The block; zero counts as positive.
        """
        left, values, right = torch.linalg.svd(
            matrix.abs() if signs else matrix, full_matrices=False
        )
        root = values[:rank].sqrt()
        rows, columns = matrix.shape
        found = cls(rows, columns, rank, signs=signs).to(matrix.device)
        found.up.copy_(left[:, :rank] * root)
        found.down.copy_(root[:, None] * right[:rank])
        if signs:
            found.get_buffer("signs").copy_(pack_codes((matrix >= 0).to(torch.uint8), 1))
        return found

    @property
    def nbytes(self) -> int:
        """Bytes that the block takes."""
        return sum(tensor.nbytes for tensor in self.buffers())

    def matrix(self) -> Tensor:
        """Gives the matrix, (rows, columns), float32."""
        product = self.up.float() @ self.down.float()
        if "signs" not in self._buffers:
            return product
        packed = self.get_buffer("signs")
        places = torch.tensor(_PLACES, dtype=torch.uint8, device=packed.device)
        positive = (packed[:, None] & places).flatten()[: product.numel()].bool()
        return torch.where(positive.reshape(product.shape), product, -product)


class StackedSigns(FactorizedLinear):
    """A linear layer whose matrix is the sum of blocks, each of what those before leave over.

    Blocks can be dropped, the last one first, and put back while the layer is in use.

    Args:
        in_features: Width of the input.
        out_features: Width of the output.
        rank: Of each block's product.
        blocks: Blocks that are held.
        levels: Blocks that there are in all, held or not; None for as many as are held.
        signs: Whether blocks have signs.
        bias: Whether to add a bias.
        dtype: Type of the matrix and of the bias.

    Attributes:
        blocks: The blocks that are held.
        places: For each of all blocks its place among those of all layers of a network, from
            the most useful on, (levels,).

    Shape:
        (..., in_features) to (..., out_features).

    Raises:
        SettingError: A number is out of range.

    Example:
        >>> linear = nn.Linear(32, 16)
        >>> layer = StackedSigns.from_linear(linear, rank=2, levels=3)
        >>> missed = [layer.dense_weight(n) - linear.weight for n in (1, 2, 3)]
        >>> errors = [one.norm().item() for one in missed]
        >>> errors == sorted(errors, reverse=True), layer(torch.ones(1, 32)).shape
        (True, torch.Size([1, 16]))
    """

    places: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        blocks: int,
        *,
        levels: int | None = None,
        signs: bool = True,
        bias: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        levels = blocks if levels is None else levels
        if not 1 <= rank <= min(in_features, out_features):
            raise SettingError(
                f"rank must be from 1 to {min(in_features, out_features)}, got {rank}"
            )
        if not 0 <= blocks <= levels or levels < 1:
            raise SettingError(
                f"blocks must be from 0 to levels, at least 1, got {blocks} of {levels}"
            )
        self.in_features, self.out_features = in_features, out_features
        self.rank, self.signs, self.dtype = rank, signs, dtype
        self.blocks = nn.ModuleList(self.empty_block() for _ in range(blocks))
        self.register_buffer("places", torch.arange(levels, dtype=torch.int32))
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype)) if bias else None
        self._kept: Tensor | None = None

    @classmethod
    @torch.no_grad()
    def from_linear(
        cls, linear: nn.Module, rank: int, levels: int, *, signs: bool = True
    ) -> StackedSigns:
        """Takes a linear layer apart.

        Args:
            linear: An `nn.Linear`, or `transformers`' `Conv1D`.
            rank: Of each block's product; the smaller width where that is less.
            levels: How many blocks, at least 1.
            signs: Whether blocks have signs.

        Returns:
            The layer, with all blocks.
        """
        weight = linear.weight
        assert isinstance(weight, Tensor)
        matrix = (weight if isinstance(linear, nn.Linear) else weight.T).float()
        rows, columns = matrix.shape
        rank = min(rank, rows, columns)
        settings: dict[str, Any] = {"levels": levels, "signs": signs, "dtype": weight.dtype}
        layer = cls(columns, rows, rank, 0, bias=linear.bias is not None, **settings)
        layer = layer.to(weight.device)
        for _ in range(levels):
            block = SignBlock.nearest(matrix, rank, signs=signs)
            matrix = matrix - block.matrix()
            layer.blocks.append(block)
        if layer.bias is not None:
            assert isinstance(linear.bias, Tensor)
            layer.bias.copy_(linear.bias)
            layer.bias.requires_grad_(linear.bias.requires_grad)
        return layer.train(linear.training)

    def empty_block(self) -> SignBlock:
        """Gives a block of this layer's sizes, of zeros."""
        return SignBlock(self.out_features, self.in_features, self.rank, signs=self.signs)

    def set_places(self, places: Sequence[int]) -> None:
        """Sets the places of all blocks.

        Args:
            places: One for each block, ascending.
        """
        self.places.copy_(torch.tensor(places, dtype=torch.int32))

    def dense_weight(self, blocks: int | None = None) -> Tensor:
        """Gives the matrix that the first blocks stand for.

        Args:
            blocks: How many; all that are held by default.

        Returns:
            Shape (out_features, in_features).
        """
        held = tuple(self.blocks)[:blocks]  # others may be put in meanwhile
        device = self.places.device
        total = torch.zeros(self.out_features, self.in_features, device=device)
        for block in held:
            assert isinstance(block, SignBlock)
            total = total + block.matrix()
        return total.to(self.dtype)

    def keep(self, blocks: int | None) -> None:
        """Multiplies by the matrix of the first blocks from now on, which is kept in memory.

        Args:
            blocks: How many; None to forget the matrix again.
        """
        self._kept = None if blocks is None else self.dense_weight(blocks)

    def settings(self) -> dict[str, Any]:
        """Gives the arguments with which the class makes a layer of this structure."""
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "rank": self.rank,
            "blocks": len(self.blocks),
            "levels": len(self.places),
            "signs": self.signs,
            "bias": self.bias is not None,
            "dtype": self.dtype,
        }

    def macs(self, tokens: int) -> int:
        """Gives the multiply-accumulates of a forward with so many tokens."""
        products = len(self.blocks) * self.rank
        return (tokens + products) * self.in_features * self.out_features

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., in_features) to (..., out_features)."""
        weight = self.dense_weight() if self._kept is None else self._kept
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, weight.to(x.dtype), bias)
