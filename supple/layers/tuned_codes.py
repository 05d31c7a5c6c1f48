"""Matrices of codes that are tuned: codes that change few at a time, and what they stand for.

Such a module takes the place of a rounding in `supple.layers.fake_quantize.FakeQuantized`. It
is given the layer's weight, and gives the matrix that its codes stand for; the gradient of that
matrix goes to the weight as well as to scales or codebooks, which are parameters. So the weight
tells where codes are to go, and never what the layer computes.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from supple.formats import Quantized, QuantSpec
from supple.layers.vector_linear import VectorCodes, VectorPart

__all__ = ["TunedCodes", "TunedScalars", "TunedVectors"]


class TunedCodes(nn.Module):
    """A matrix of codes that change few at a time.

    Args:
        shape: Of the matrix.
    """

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.matrix_shape = (int(shape[0]), int(shape[1]))

    @abstractmethod
    def decoded(self) -> Tensor:
        """Gives the matrix that the codes stand for, with a gradient to what is held beside."""

    @abstractmethod
    def solved(self) -> Quantized | VectorCodes:
        """Gives codes, and what is held beside, as packed layers take them."""

    @abstractmethod
    def follow(self, aim: Tensor, share: float) -> float:
        """Chooses those codes anew whose numbers are farthest from where they are to go.

        Args:
            aim: A matrix.
            share: How many of the codes may change, above 0 and up to 1; at least one.

        Returns:
            The share of all codes that did.
        """

    def forward(self, x: Tensor) -> Tensor:
        """Gives the matrix of the codes, with its gradient to `x`, too."""
        return self.decoded().to(x.dtype) + (x - x.detach())

    def _farthest(self, away: Tensor, share: float) -> Tensor:
        """Gives the places of the largest of some distances, (n,)."""
        count = max(1, math.ceil(share * away.numel()))
        if count >= away.numel():
            return torch.arange(away.numel(), device=away.device)
        return away.flatten().topk(count).indices


class TunedScalars(TunedCodes):
    """Codes of single numbers, with scales that can be learned and zero points that stay.

    Args:
        shape: Of the matrix.
        spec: How it is quantized, or what `QuantSpec.settings` gave.

    Example:
        >>> from supple.formats import quantize
        >>> matrix = torch.tensor([[3.5, 1.2, 0.0]])
        >>> tuned = TunedScalars.from_quantized(quantize(matrix, QuantSpec("int3")))
        >>> tuned.follow(torch.tensor([[3.0, 2.2, 0.6]]), 0.3), tuned.decoded().tolist()
        (0.3333333333333333, [[3.0, 2.0, 0.0]])
    """

    codes: Tensor
    zero: Tensor | None

    def __init__(self, shape: tuple[int, int], spec: QuantSpec | Mapping[str, Any]) -> None:
        super().__init__(shape)
        self.spec = spec if isinstance(spec, QuantSpec) else QuantSpec(**spec)
        scales = self.spec.scale_shape(shape)
        self.register_buffer("codes", torch.zeros(self.matrix_shape, dtype=torch.int32))
        self.scale = nn.Parameter(torch.ones(scales))
        self.register_buffer("zero", None if self.spec.symmetric else torch.zeros(scales))

    @classmethod
    def from_quantized(cls, quantized: Quantized) -> TunedScalars:
        """Begins with the codes of a quantized matrix."""
        made = cls((quantized.shape[0], quantized.shape[1]), quantized.spec)
        made.codes.copy_(quantized.codes)
        made.scale.data.copy_(quantized.scale)
        if made.zero is not None and quantized.zero is not None:
            made.zero.copy_(quantized.zero)
        return made

    def settings(self) -> dict[str, Any]:
        """Gives the constructor's arguments."""
        return {"shape": self.matrix_shape, "spec": self.spec.settings()}

    def decoded(self) -> Tensor:
        """Gives the matrix that the codes stand for."""
        values = self.spec.format.decode(self.codes)
        if self.zero is not None:
            values = values - self.spec.spread(self.zero, self.matrix_shape)
        return values * self.spec.spread(self._held(), self.matrix_shape)

    def _held(self) -> Tensor:
        """The scales, rounded to what they are held as."""
        scale = self.scale
        return scale + (self.spec.stored_scale(scale.detach().abs()) - scale).detach()

    @torch.no_grad()
    def solved(self) -> Quantized:
        """Gives codes, scales and zero points."""
        held, shape = self._held(), torch.Size(self.matrix_shape)
        codes = self.codes.to(torch.uint8 if self.spec.bits <= 8 else torch.int32)
        return Quantized(codes, held, self.zero, self.spec, shape)

    @torch.no_grad()
    def follow(self, aim: Tensor, share: float) -> float:
        """Gives the farthest numbers the codes nearest to where they are to go."""
        away = (aim - self.decoded()).abs()
        places = self._farthest(away, share)
        ready = aim / self.spec.spread(self._held(), self.matrix_shape)
        if self.zero is not None:
            ready = ready + self.spec.spread(self.zero, self.matrix_shape)
        codes = self.codes.view(-1)
        before = codes[places]
        codes[places] = self.spec.format.encode(ready.flatten()[places]).int()
        return int((codes[places] != before).sum()) / codes.numel()


class TunedVectors(TunedCodes):
    """Codes of vectors that run along the outputs, with a codebook that can be learned.

    Args:
        shape: Of the matrix.
        vector: Length of a vector.
        entries: Of the codebook, which is held in float16.

    Example:
        >>> tuned = TunedVectors((2, 2), vector=2, entries=2)
        >>> _ = tuned.book.data.copy_(torch.tensor([[0.0, 1.0], [5.0, 5.0]]))
        >>> tuned.follow(torch.tensor([[4.0, 0.0], [4.0, 1.2]]), 1.0), tuned.decoded().tolist()
        (0.5, [[5.0, 0.0], [5.0, 1.0]])
    """

    codes: Tensor

    def __init__(self, shape: tuple[int, int], vector: int, entries: int) -> None:
        super().__init__(shape)
        rows, columns = self.matrix_shape
        self.vector = vector
        codes = torch.zeros(-(-rows // vector), columns, dtype=torch.int32)
        self.register_buffer("codes", codes)
        self.book = nn.Parameter(torch.zeros(entries, vector))

    @classmethod
    def from_codes(cls, codes: Tensor, book: Tensor, shape: tuple[int, int]) -> TunedVectors:
        """Begins with codes, (vectors in a column, columns), and a book, (entries, length)."""
        made = cls(shape, book.shape[1], len(book))
        made.codes.copy_(codes)
        made.book.data.copy_(book)
        return made

    def settings(self) -> dict[str, Any]:
        """Gives the constructor's arguments."""
        entries = len(self.book)
        return {"shape": self.matrix_shape, "vector": self.vector, "entries": entries}

    def _held(self) -> Tensor:
        """The book, rounded to what it is held as."""
        book = self.book
        most = torch.finfo(torch.float16).max
        return book + (book.detach().clamp(-most, most).half().float() - book).detach()

    def decoded(self) -> Tensor:
        """Gives the matrix that the codes stand for."""
        vectors = F.embedding(self.codes, self._held())
        return vectors.transpose(1, 2).flatten(0, 1)[: self.matrix_shape[0]]

    @torch.no_grad()
    def solved(self) -> VectorCodes:
        """Gives codes and the codebook."""
        columns = torch.arange(self.matrix_shape[1])
        part = VectorPart(columns, (self.codes,), (self._held(),))
        return VectorCodes((part,), torch.Size(self.matrix_shape))

    @torch.no_grad()
    def follow(self, aim: Tensor, share: float) -> float:
        """Gives the farthest vectors the entries nearest to where they are to go."""
        rows, columns = self.matrix_shape
        book, short = self._held(), -rows % self.vector
        padded = F.pad(aim, (0, 0, 0, short)).reshape(-1, self.vector, columns)
        vectors = padded.transpose(1, 2).reshape(-1, self.vector)
        codes = self.codes.view(-1)
        apart = vectors - book[codes]
        if short:  # what lies beyond the last row counts nothing
            apart[-columns:, self.vector - short :] = 0
        places = self._farthest(apart.square().sum(1), share)
        before = codes[places]
        codes[places] = _nearest(vectors[places], book)
        if short:
            last, real = places >= len(vectors) - columns, self.vector - short
            codes[places[last]] = _nearest(vectors[places[last], :real], book[:, :real])
        return int((codes[places] != before).sum()) / codes.numel()


def _nearest(vectors: Tensor, book: Tensor) -> Tensor:
    """Gives the place of the nearest entry of a book for each vector."""
    away = torch.addmm(book.square().sum(1), vectors, book.T, alpha=-2)
    return away.argmin(1).int()
