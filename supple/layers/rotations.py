r"""Invertible linear maps of a layer's inputs: what a matrix can be quantized behind.

With a map $P$ a layer $y = x W^T$ is $y = (x P)\,(W P^{-T})^T$: the same function, but inputs
and weights have other values, and rounding loses other things. Rotations spread what a few
channels hold over many.

Hadamard matrices are put together anew in each call, of a few small operators, so they take no
room in files and run on any device and in exported programs. A size that is no power of two is
a product of one and of a small factor: for that there is a Hadamard matrix of Paley's, or else
a cosine transform.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from supple.errors import SettingError

__all__ = [
    "BlockHadamard",
    "KroneckerAffine",
    "RandomHadamard",
    "Rotation",
    "hadamard",
]

_MOST_AT_ONCE = 128
"""Size up to which a Walsh matrix is multiplied by whole; a larger one is a product of two."""


class Rotation(nn.Module):
    """An invertible linear map of the last dimension.

    A subclass gives `forward`, `inverse` and `settings`; `inverse_t` where the map is not
    orthogonal.
    """

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Gives `x @ P`."""

    @abstractmethod
    def inverse(self, x: Tensor) -> Tensor:
        """Gives `x @ inv(P)`."""

    def inverse_t(self, weight: Tensor) -> Tensor:
        """Gives `weight @ inv(P).T`: the matrix of a layer whose inputs are mapped.

        Args:
            weight: (out, size), a layer's matrix.

        Returns:
            The same shape and type.
        """
        return self.forward(weight)

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Gives the constructor's arguments."""

    def extra_repr(self) -> str:
        """Tells what it was made with."""
        return ", ".join(f"{name}={value}" for name, value in self.settings().items())


class BlockHadamard(Rotation):
    """Rotates blocks of neighbouring channels by the Walsh-Hadamard matrix.

    The matrix is symmetric and orthogonal, so it is its own inverse.

    Args:
        size: Channels of a block, a power of two that divides their number.

    Shape:
        (..., channels) to the same.

    Raises:
        SettingError: `size` is no power of two.

    Example:
        >>> BlockHadamard(4)(torch.tensor([8.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0])).tolist()
        [4.0, 4.0, 4.0, 4.0, 2.0, 0.0, 0.0, 0.0]
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        if size < 1 or size & (size - 1):
            raise SettingError(f"size must be a power of two, got {size}")
        self.size = size

    @staticmethod
    def fitting(width: int, most: int = 128) -> BlockHadamard:
        """Gives the one with the largest blocks that fit.

        Args:
            width: Number of channels.
            most: Largest size of a block.

        Example:
            >>> BlockHadamard.fitting(704).size, BlockHadamard.fitting(7).size
            (64, 1)
        """
        size = 1
        while 2 * size <= most and width % (2 * size) == 0:
            size *= 2
        return BlockHadamard(size)

    def settings(self) -> dict[str, Any]:
        """Gives the constructor's arguments."""
        return {"size": self.size}

    def forward(self, x: Tensor) -> Tensor:
        """Rotates."""
        if self.size == 1:
            return x
        return _walsh(torch.unflatten(x, -1, (-1, self.size))).flatten(-2)

    def inverse(self, x: Tensor) -> Tensor:
        """Rotates back, which is the same."""
        return self.forward(x)


class RandomHadamard(Rotation):
    r"""Gives channels random signs, then rotates all of them together.

    With $D$ the signs the map is $P = D\,(H_{2^k} \otimes Q_m) $, which spreads each channel
    equally over all where $Q_m$ is a Hadamard matrix.

    Args:
        size: Number of channels.

    Attributes:
        signs: 1 or -1 for each channel, int8; all 1 at first, see `drawn`.

    Shape:
        (..., size) to the same.

    Raises:
        SettingError: `size` is below 1.

    Example:
        >>> rotation = RandomHadamard.drawn(12, torch.Generator().manual_seed(0))
        >>> x = torch.zeros(12)
        >>> x[3] = 12.0
        >>> turned = rotation(x)
        >>> turned.abs()[:3].square().round().tolist(), rotation.inverse(turned).argmax().item()
        ([12.0, 12.0, 12.0], 3)

    Source:
        Ashkboos et al. 2024, "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs",
        arXiv:2404.00456.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        if size < 1:
            raise SettingError(f"size must be at least 1, got {size}")
        self.size = size
        self.register_buffer("signs", torch.ones(size, dtype=torch.int8))
        self.signs: Tensor
        self._power, self._small = _split(size)

    @staticmethod
    def drawn(size: int, generator: torch.Generator) -> RandomHadamard:
        """Gives one with random signs.

        Args:
            size: Number of channels.
            generator: What draws them.
        """
        made = RandomHadamard(size)
        drawn = torch.randint(2, (size,), generator=generator, device=generator.device)
        made.signs = (2 * drawn - 1).to(made.signs)
        return made

    def settings(self) -> dict[str, Any]:
        """Gives the constructor's arguments."""
        return {"size": self.size}

    def forward(self, x: Tensor) -> Tensor:
        """Rotates."""
        parts = torch.unflatten(x * self.signs.to(x.dtype), -1, (self._power, self._small))
        if self._small > 1:
            parts = parts @ _small_factor(self._small, parts)
        return _walsh(parts.mT).mT.flatten(-2)

    def inverse(self, x: Tensor) -> Tensor:
        """Rotates back."""
        parts = _walsh(torch.unflatten(x, -1, (self._power, self._small)).mT).mT
        if self._small > 1:
            parts = parts @ _small_factor(self._small, parts).T
        return parts.flatten(-2) * self.signs.to(x.dtype)


class KroneckerAffine(Rotation):
    r"""Multiplies channels, laid out as a matrix, by a small matrix from either side.

    The map is $P = P_1 \otimes P_2$, so with $n = n_1 n_2$ channels as the rows and columns of
    $X$ it gives $P_1^T X P_2$, at $n (n_1 + n_2)$ multiply-accumulates instead of $n^2$.

    Args:
        left: $n_1$.
        right: $n_2$.

    Attributes:
        left_matrix: $P_1$, invertible; the identity at first, see `of`.
        right_matrix: $P_2$.

    Shape:
        (..., left * right) to the same.

    Raises:
        SettingError: A size is below 1.

    Example:
        >>> right = torch.tensor([[1.0, 1.0], [0.0, 1.0]])
        >>> affine = KroneckerAffine.of(torch.tensor([[2.0]]), right)
        >>> affine(torch.tensor([3.0, 1.0])).tolist()
        [6.0, 8.0]
        >>> affine.inverse(torch.tensor([6.0, 8.0])).tolist()
        [3.0, 1.0]
    """

    def __init__(self, left: int, right: int) -> None:
        super().__init__()
        if left < 1 or right < 1:
            raise SettingError(f"sizes must be at least 1, got {left} and {right}")
        self.left, self.right = left, right
        self.register_buffer("left_matrix", torch.eye(left))
        self.register_buffer("right_matrix", torch.eye(right))
        self.left_matrix: Tensor
        self.right_matrix: Tensor

    @staticmethod
    def of(left: Tensor, right: Tensor) -> KroneckerAffine:
        """Gives the one with these matrices, which are copied.

        Args:
            left: $P_1$, square.
            right: $P_2$, square.
        """
        made = KroneckerAffine(len(left), len(right))
        made.left_matrix = left.detach().clone()
        made.right_matrix = right.detach().clone()
        return made

    @staticmethod
    def sizes(width: int) -> tuple[int, int]:
        """Gives the two sizes that are closest to each other, the smaller one first.

        Args:
            width: Their product.

        Example:
            >>> KroneckerAffine.sizes(704), KroneckerAffine.sizes(7)
            ((22, 32), (1, 7))
        """
        left = next(one for one in range(math.isqrt(width), 0, -1) if width % one == 0)
        return left, width // left

    def settings(self) -> dict[str, Any]:
        """Gives the constructor's arguments."""
        return {"left": self.left, "right": self.right}

    def forward(self, x: Tensor) -> Tensor:
        """Multiplies."""
        return _both(x, self.left_matrix.to(x.dtype), self.right_matrix.to(x.dtype))

    def inverse(self, x: Tensor) -> Tensor:
        """Multiplies by the inverses, which are found in float64."""
        left, right = (torch.linalg.inv(one.double()) for one in self._matrices)
        return _both(x.double(), left, right).to(x.dtype)

    def inverse_t(self, weight: Tensor) -> Tensor:
        """Gives `weight @ inv(P).T`, found in float64."""
        left, right = (torch.linalg.inv(one.double()).T for one in self._matrices)
        return _both(weight.double(), left, right).to(weight.dtype)

    @property
    def _matrices(self) -> tuple[Tensor, Tensor]:
        return self.left_matrix, self.right_matrix


def _both(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    parts = torch.unflatten(x, -1, (len(left), len(right)))
    multiplied: Tensor = (left.T @ (parts @ right)).flatten(-2)
    return multiplied


# ------------------------------------------------------------------------------- matrices


def hadamard(size: int) -> Tensor | None:
    """Gives a Hadamard matrix: of 1 and -1, with orthogonal rows.

    Args:
        size: Of the matrix: a power of two, or such a power times an order of Paley's, that
            is q + 1 or 2 (q + 1) with a prime q.

    Returns:
        (size, size), float32, or None where none of these kinds is that large.

    Example:
        >>> found = hadamard(12)
        >>> bool((found @ found.T == 12 * torch.eye(12)).all()), hadamard(6)
        (True, None)
    """
    power, small = _split(size)
    if small == 1:
        return _sylvester(power, torch.empty(0))
    order = _paley_order(small)
    found = None if order is None else _paley(*order, torch.empty(0))
    return None if found is None else torch.kron(_sylvester(power, found), found)


def _split(size: int) -> tuple[int, int]:
    """Gives a power of two and a factor, of Paley's where that is possible."""
    odd = size
    while odd % 2 == 0:
        odd //= 2
    small = odd
    while odd > 1 and size % small == 0:
        if _paley_order(small) is not None:
            return size // small, small
        small *= 2
    return size // odd, odd


def _paley_order(size: int) -> tuple[int, bool] | None:
    """Gives the prime of Paley's construction of a size, and whether it is the second."""
    if size % 4 == 0 and _prime(size - 1):
        return size - 1, False
    prime = size // 2 - 1
    if size % 4 == 0 and prime % 4 == 1 and _prime(prime):
        return prime, True
    return None


def _prime(number: int) -> bool:
    return number > 1 and all(number % one for one in range(2, math.isqrt(number) + 1))


def _walsh(x: Tensor) -> Tensor:
    """Multiplies the last dimension, a power of two, by the orthonormal Walsh matrix."""
    size = x.shape[-1]
    if size <= _MOST_AT_ONCE:
        return x @ _sylvester(size, x) / math.sqrt(size)
    left = 1 << (size.bit_length() - 1) // 2
    parts = torch.unflatten(x, -1, (left, -1))
    return _walsh(_walsh(parts).mT).mT.flatten(-2)


def _sylvester(size: int, like: Tensor) -> Tensor:
    """The Walsh matrix of a power of two, of 1 and -1."""
    found = like.new_ones(1, 1)
    while len(found) < size:
        above, below = torch.cat((found, found), 1), torch.cat((found, -found), 1)
        found = torch.cat((above, below))
    return found


def _small_factor(size: int, like: Tensor) -> Tensor:
    """An orthogonal matrix of a size without a power of two that could be taken out."""
    order = _paley_order(size)
    if order is not None:
        return _paley(*order, like) / math.sqrt(size)
    places = torch.arange(size, device=like.device, dtype=torch.float64)
    waves = torch.cos(math.pi / size * places * (places[:, None] + 0.5)) * math.sqrt(2 / size)
    first = torch.where(places == 0, math.sqrt(0.5), 1.0)
    mixed: Tensor = waves * first
    return mixed.to(like.dtype)


def _paley(prime: int, second: bool, like: Tensor) -> Tensor:
    """A Hadamard matrix by the squares modulo a prime."""
    numbers = torch.arange(prime, device=like.device)
    square = (numbers[1:].square() % prime == numbers[:, None]).any(1)
    sign = torch.where(square, 1, -1) * (numbers > 0)
    inner = sign[(numbers[:, None] - numbers) % prime].to(like.dtype)
    ones = like.new_ones(prime, 1)
    top = torch.cat((like.new_zeros(1, 1), ones.T), 1)
    framed = torch.cat((top, torch.cat((ones if second else -ones, inner), 1)))
    unit = torch.eye(prime + 1, dtype=like.dtype, device=like.device)
    if not second:
        return framed + unit
    return torch.kron(framed, _two_by_two(1, like)) + torch.kron(unit, _two_by_two(-1, like))


def _two_by_two(sign: int, like: Tensor) -> Tensor:
    rows: Sequence[Sequence[int]] = ((1, sign), (sign, -1))
    return torch.tensor(rows, dtype=like.dtype, device=like.device)
