"""Codebooks of vectors: how they are learned from a matrix, and fitted to what a layer sees."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional as F

from supple.layers.vector_linear import VectorCodes

__all__ = ["as_vectors", "codebook", "nearest_entries", "refitted"]

_RIDGE = 1e-6


def as_vectors(columns: Tensor, length: int) -> Tensor:
    """Cuts columns into vectors that run down.

    Args:
        columns: (rows, n).
        length: Of a vector; the last ones are filled up with zeros.

    Returns:
        (vectors in a column, n, length).

    Example:
        >>> as_vectors(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), 2).tolist()
        [[[1.0, 3.0], [2.0, 4.0]], [[5.0, 0.0], [6.0, 0.0]]]
    """
    padded = F.pad(columns, (0, 0, 0, -len(columns) % length))
    return padded.reshape(-1, length, columns.shape[1]).transpose(1, 2)


def nearest_entries(vectors: Tensor, book: Tensor) -> Tensor:
    """Gives the place of the nearest entry of a codebook for each vector.

    Args:
        vectors: (..., length).
        book: (entries, length).

    Returns:
        Whole numbers, (...).

    Example:
        >>> nearest_entries(torch.tensor([[0.9, 0.2]]), torch.eye(2)).tolist()
        [0]
    """
    return (book.square().sum(1) - 2 * vectors @ book.T).argmin(-1)


def codebook(vectors: Tensor, weights: Tensor, entries: int, iterations: int) -> Tensor:
    """Finds a codebook by k-means.

    Args:
        vectors: (n, length).
        weights: How much the squared distance of each counts, (n,), 0 or more.
        entries: How many vectors the book has at most: it has no more than there are different
            ones.
        iterations: At most so many of Lloyd's.

    Returns:
        The book, (entries, length), float32 of values that float16 has.

    Example:
        >>> vectors = torch.tensor([[0.0, 0.0], [0.0, 2.0], [8.0, 8.0]])
        >>> codebook(vectors, torch.tensor([3.0, 1.0, 1.0]), 2, 10).sort(0).values.tolist()
        [[0.0, 0.5], [8.0, 8.0]]
    """
    from sklearn.cluster import KMeans  # takes a second, which only those who use it wait for

    different = vectors.unique(dim=0)
    if len(different) <= entries:
        return _held(different)
    total = weights.sum()
    # Where nothing counts, all count alike.
    weights = weights / total if total > 0 else torch.ones_like(weights)
    means = KMeans(entries, init="random", n_init=1, max_iter=iterations, tol=0, random_state=0)
    means.fit(vectors.cpu().numpy(), sample_weight=weights.cpu().numpy())
    return _held(torch.from_numpy(means.cluster_centers_).to(vectors))


@torch.no_grad()
def refitted(
    codes: VectorCodes, matrix: Tensor, hessian: Tensor, steps: int = 40
) -> VectorCodes:
    r"""Fits all codebooks anew such that a layer's outputs change least; codes stay.

    The matrix is linear in the codebooks, so $\operatorname{tr}\,(W - Q)\,H\,(W - Q)^T$ is a
    quadratic function of them; conjugate gradients, scaled by its diagonal, go down from the
    codebooks that there are.

    Args:
        codes: Codes and codebooks.
        matrix: $W$, (out, columns).
        hessian: $H$, (columns, columns), or with the groups of a convolution first.
        steps: How many.

    Returns:
        The same codes with other codebooks.
    """
    columns = matrix.shape[1]
    hessian = hessian.double().reshape(-1, columns, columns)
    scale = hessian.diagonal(dim1=1, dim2=2).mean().clamp_min(1e-300)
    hessian = hessian / scale + _RIDGE * torch.eye(columns).to(hessian)
    books = [[book.double() for book in part.books] for part in codes.parts]

    def product(change: Tensor) -> Tensor:
        return (change.reshape(len(hessian), -1, columns) @ hessian).reshape(change.shape)

    def spread(given: list[list[Tensor]]) -> Tensor:
        return _with_books(codes, given).dequantize(torch.float64)

    counts = hessian.diagonal(dim1=1, dim2=2).repeat_interleave(len(matrix) // len(hessian), 0)
    diagonal = _joined(_gathered(codes, counts)).clamp_min(_RIDGE)
    left = _joined(_gathered(codes, product(matrix.double() - spread(books))))
    point, ready = _joined(books), left / diagonal
    direction, size = ready, left @ ready
    for _ in range(steps):
        if size <= 1e-24:
            break
        along = _joined(_gathered(codes, product(spread(_apart(direction, books)))))
        step = size / (direction @ along)
        point, left = point + step * direction, left - step * along
        ready = left / diagonal
        before, size = size, left @ ready
        direction = ready + size / before * direction
    found = [[_held(book.float()) for book in part] for part in _apart(point, books)]
    return _with_books(codes, found)


def _gathered(codes: VectorCodes, matrix: Tensor) -> list[list[Tensor]]:
    """Sums a matrix' vectors by the entries that they have: the transpose of decoding."""
    found = []
    for part in codes.parts:
        vectors = as_vectors(matrix[:, part.columns], part.books[0].shape[1]).flatten(0, 1)
        found.append(
            [
                vectors.new_zeros(book.shape).index_add_(0, places.flatten().long(), vectors)
                for places, book in zip(part.codes, part.books, strict=True)
            ]
        )
    return found


def _joined(books: list[list[Tensor]]) -> Tensor:
    return torch.cat([book.flatten() for part in books for book in part])


def _apart(joined: Tensor, books: list[list[Tensor]]) -> list[list[Tensor]]:
    pieces = iter(joined.split([book.numel() for part in books for book in part]))
    return [[next(pieces).view_as(book) for book in part] for part in books]


def _with_books(codes: VectorCodes, books: list[list[Tensor]]) -> VectorCodes:
    parts = [
        dataclasses.replace(part, books=tuple(own))
        for part, own in zip(codes.parts, books, strict=True)
    ]
    return VectorCodes(tuple(parts), codes.shape)


def _held(book: Tensor) -> Tensor:
    """Rounds to what float16 has."""
    info = torch.finfo(torch.float16)
    return book.clamp(info.min, info.max).half().float()
