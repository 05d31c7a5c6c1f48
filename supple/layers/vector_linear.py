"""Linear layers whose matrix is made of vectors from codebooks.

The columns of the matrix are cut into vectors that run along the outputs. A vector is the sum
of one entry of each codebook of its column's part: a first one, and perhaps one for what the
first leaves over. A matrix can have several parts, each with codebooks of its own, so that a
few columns that matter more can have shorter vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from supple.errors import SettingError
from supple.layers.factorized import FactorizedLinear
from supple.layers.packed import linear_shape, pack_codes, unpack_codes

__all__ = ["VectorCodes", "VectorLinear", "VectorPart"]

_MOST_ENTRIES = 1 << 16
_ENTRY_BITS = 16  # codebooks are held in float16
Structure = Sequence[tuple[int, int, Sequence[int]]]
"""Of each part its columns, the length of its vectors, and the entries of its codebooks."""


@dataclass(frozen=True, eq=False)
class VectorPart:
    """Columns of a matrix that share codebooks.

    Args:
        columns: Their numbers in the matrix, ascending, (n,).
        codes: For each codebook the entries that are taken, (vectors in a column, n).
        books: The codebooks, each (entries, length of a vector).
    """

    columns: Tensor
    codes: tuple[Tensor, ...]
    books: tuple[Tensor, ...]

    @property
    def structure(self) -> tuple[int, int, tuple[int, ...]]:
        """Columns, length of a vector, entries of each codebook."""
        return len(self.columns), self.books[0].shape[1], tuple(map(len, self.books))

    def decode(self, rows: int) -> Tensor:
        """Gives the columns, (rows, n), in the type of the codebooks but at least float32.

        Args:
            rows: Rows of the matrix; what the last vectors have beyond is left out.
        """
        return _decoded(self.codes, self.books, rows)


@dataclass(frozen=True, eq=False)
class VectorCodes:
    """A matrix as vectors from codebooks.

    Args:
        parts: Its columns; each is in one part.
        shape: Shape of the matrix.

    Example:
        >>> book, codes = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[0, 1, 0]])
        >>> found = VectorCodes(
        ...     (VectorPart(torch.arange(3), (codes,), (book,)),), torch.Size((2, 3))
        ... )
        >>> found.dequantize().tolist(), found.total_bits
        ([[1.0, 3.0, 1.0], [2.0, 4.0, 2.0]], 67)
    """

    parts: tuple[VectorPart, ...]
    shape: torch.Size

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Gives the matrix that the codes stand for."""
        columns = torch.cat([part.columns for part in self.parts])
        values = torch.cat([part.decode(self.shape[0]) for part in self.parts], 1)
        return values[:, columns.argsort()].to(dtype)

    @property
    def structure(self) -> tuple[tuple[int, int, tuple[int, ...]], ...]:
        """What a `VectorLinear` of such a matrix is made with."""
        return tuple(part.structure for part in self.parts)

    @property
    def total_bits(self) -> int:
        """Bits of codes, codebooks (float16) and of which part each column is in."""
        bits = _part_bits(len(self.parts)) * self.shape[1]
        for part in self.parts:
            for codes, book in zip(part.codes, part.books, strict=True):
                bits += codes.numel() * _code_bits(len(book)) + book.numel() * _ENTRY_BITS
        return bits


class VectorLinear(FactorizedLinear):
    """A linear layer whose matrix is made of vectors from codebooks.

    Codes lie packed, bit after bit. Codebooks are parameters: gradients flow to them through
    the matrix. They are held in float16; convert the layer to float32 to train it.

    Args:
        in_features: Width of the input.
        out_features: Width of the output.
        parts: For each part its columns, the length of its vectors, and the entries of each of
            its codebooks, at most 65536.
        bias: Whether to add a bias.
        dtype: Type of the matrix that the codes stand for, and of the bias.

    Shape:
        (..., in_features) to (..., out_features).

    Raises:
        SettingError: The parts don't make up the columns, or a size is out of range.

    Example:
        >>> layer = VectorLinear(64, 96, [(64, 4, [256])], bias=False)
        >>> layer(torch.ones(3, 64)).shape, layer.nbytes  # 2 bits a weight and the codebook
        (torch.Size([3, 96]), 3584)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        parts: Structure,
        *,
        bias: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        _check_parts(parts, in_features)
        self.in_features, self.out_features, self.dtype = in_features, out_features, dtype
        self.parts = tuple(
            (columns, length, tuple(entries)) for columns, length, entries in parts
        )
        for name, (count, entries, length) in self._books.items():
            packed = torch.zeros(_bytes(count * _code_bits(entries)), dtype=torch.uint8)
            self.register_buffer(f"codes_{name}", packed)
            book = torch.zeros(entries, length, dtype=torch.float16)
            self.register_parameter(f"book_{name}", nn.Parameter(book))
        if len(parts) > 1:
            packed = torch.zeros(_bytes(in_features * _part_bits(len(parts))))
            self.register_buffer("part", packed.byte())
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype)) if bias else None

    @property
    def _books(self) -> dict[str, tuple[int, int, int]]:
        """Name of a codebook: `part_stage`, to its codes, entries and length."""
        return {
            f"{number}_{stage}": (-(-self.out_features // length) * columns, entries, length)
            for number, (columns, length, books) in enumerate(self.parts)
            for stage, entries in enumerate(books)
        }

    @classmethod
    @torch.no_grad()
    def from_codes(cls, linear: nn.Module, codes: VectorCodes) -> VectorLinear:
        """Takes the place of a linear layer.

        Args:
            linear: An `nn.Linear`, or `transformers`' `Conv1D`; gives the bias.
            codes: Its matrix (`supple.weights.as_matrix`) as vectors.

        Returns:
            The layer.

        Raises:
            SettingError: The matrix has another shape.
        """
        weight = linear.weight
        assert isinstance(weight, Tensor)
        shape = linear_shape(linear, codes.shape)
        bias = linear.bias
        made = cls(
            shape[1], shape[0], codes.structure, bias=bias is not None, dtype=weight.dtype
        ).to(weight.device)
        for number, part in enumerate(codes.parts):
            for stage, (places, book) in enumerate(zip(part.codes, part.books, strict=True)):
                held = pack_codes(places, _code_bits(len(book)))
                made.get_buffer(f"codes_{number}_{stage}").copy_(held)
                made.get_parameter(f"book_{number}_{stage}").copy_(book)
        if len(codes.parts) > 1:
            owner = torch.empty(shape[1], dtype=torch.uint8, device=weight.device)
            for number, part in enumerate(codes.parts):
                owner[part.columns] = number
            made.get_buffer("part").copy_(pack_codes(owner, _part_bits(len(codes.parts))))
        if isinstance(bias, Tensor) and made.bias is not None:
            made.bias.copy_(bias)
        for name, parameter in made.named_parameters():
            given = bias if name == "bias" else weight
            parameter.requires_grad_(isinstance(given, Tensor) and given.requires_grad)
        return made.train(linear.training)

    @property
    def nbytes(self) -> int:
        """Bytes that the layer takes in a file: codes, codebooks, bias."""
        return sum(tensor.nbytes for tensor in self.state_dict().values())

    def settings(self) -> dict[str, Any]:
        """Gives the arguments with which the class makes a layer of this structure."""
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "parts": self.parts,
            "bias": self.bias is not None,
            "dtype": self.dtype,
        }

    def codes(self) -> VectorCodes:
        """Gives codes and codebooks, unpacked."""
        owner = torch.zeros(self.in_features, dtype=torch.uint8, device=self._device)
        if len(self.parts) > 1:
            bits = _part_bits(len(self.parts))
            owner = unpack_codes(self.get_buffer("part"), bits, self.in_features)
        order = owner.argsort(stable=True)
        columns = torch.split(order, [part[0] for part in self.parts])
        parts = [VectorPart(own, *self._part(number)) for number, own in enumerate(columns)]
        return VectorCodes(tuple(parts), torch.Size((self.out_features, self.in_features)))

    def _part(self, number: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        columns, length, entries = self.parts[number]
        vectors = -(-self.out_features // length)
        names = [f"{number}_{stage}" for stage in range(len(entries))]
        codes = tuple(
            unpack_codes(
                self.get_buffer(f"codes_{name}"), _code_bits(size), vectors * columns
            ).reshape(vectors, columns)
            for name, size in zip(names, entries, strict=True)
        )
        return codes, tuple(self.get_parameter(f"book_{name}") for name in names)

    @property
    def _device(self) -> torch.device:
        return self.get_parameter("book_0_0").device

    def dense_weight(self) -> Tensor:
        """Gives the matrix that the codes stand for, (out_features, in_features)."""
        if len(self.parts) == 1:  # its columns lie in order
            return _decoded(*self._part(0), self.out_features).to(self.dtype)
        return self.codes().dequantize(self.dtype)

    def macs(self, tokens: int) -> int:
        """Gives the multiply-accumulates of a forward with so many tokens."""
        return tokens * self.in_features * self.out_features

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., in_features) to (..., out_features)."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.dense_weight().to(x.dtype), bias)


def _decoded(codes: Sequence[Tensor], books: Sequence[Tensor], rows: int) -> Tensor:
    """Gives columns, (rows, n), from the entries of each codebook, (vectors, n)."""
    found: Tensor | None = None
    for places, book in zip(codes, books, strict=True):
        book = book.float() if book.dtype.itemsize < 4 else book
        vectors = F.embedding(places.int(), book)
        found = vectors if found is None else found + vectors
    assert found is not None
    return found.transpose(1, 2).flatten(0, 1)[:rows]


def _code_bits(entries: int) -> int:
    """Bits of a place among so many entries."""
    return max(1, (entries - 1).bit_length())


def _part_bits(parts: int) -> int:
    """Bits of the number of a column's part; none where there is only one."""
    return (parts - 1).bit_length()


def _bytes(bits: int) -> int:
    return -(-bits // 8)


def _check_parts(parts: Structure, columns: int) -> None:
    if not parts or sum(part[0] for part in parts) != columns:
        raise SettingError(
            f"the parts must have {columns} columns together, got {[part[0] for part in parts]}"
        )
    for count, length, entries in parts:
        fits = entries and all(1 <= size <= _MOST_ENTRIES for size in entries)
        if min(count, length) < 1 or not fits:
            raise SettingError(
                "a part has columns, vectors of at least 1 number, and codebooks of 1 to "
                f"{_MOST_ENTRIES} entries, got {count}, {length} and {list(entries)}"
            )
    if len(parts) > 256:
        raise SettingError(f"at most 256 parts can be held, got {len(parts)}")
