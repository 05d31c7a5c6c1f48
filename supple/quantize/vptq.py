"""Vectors of weights from codebooks, with the errors made up for by the columns to come."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from supple.calibrate import LayerStatistics
from supple.errors import SettingError
from supple.formats import QuantSpec
from supple.layers.vector_linear import VectorCodes, VectorLinear, VectorPart
from supple.quantize._solvers import sweep
from supple.quantize._vectors import as_vectors, codebook, nearest_entries, refitted
from supple.quantize.base import MOST_BITS, Input, Quantizer, Solved, packable, rounded_input
from supple.technique import register

__all__ = ["VPTQ"]


@register(title="VPTQ: vector post-training quantization", paper="arXiv:2409.17066")
@dataclass(frozen=True, kw_only=True)
class VPTQ(Quantizer):
    r"""Replaces vectors of neighbouring outputs' weights by entries of codebooks.

    Each column of a matrix (what one input is multiplied by) is cut into vectors of length
    $v$. A codebook of $k = 2^{bv - r}$ entries is found by k-means, in which a vector of column
    $j$ counts as $H_{jj}$, with $H = X^T X$ of the layer's inputs. Then columns are rounded in
    turn, the largest $H_{jj}$ first. Within a column $H_{jj}$ is the same for all, so each
    vector takes the nearest entry; with $U$ the upper Cholesky factor of $H^{-1}$, the columns
    to come make up for its error $e_j$ by $-e_j U_{jk} / U_{jj}$.

    With a `residual` of $r$ bits, what rounding left over gets a codebook of $2^r$ entries in
    the same way, and all columns are rounded again, by the first codebook and then the second.
    The share of `outliers`, columns with the largest $H_{jj}$, has codebooks of its own, of as
    many entries for vectors of half the length, which is twice the bits. At last all codebooks
    are fitted to the layer's outputs, for the codes that were found.

    Codebooks are held in float16 and count: $16 k v$ bits a matrix, so small matrices need few
    entries.

    Args:
        bits: $b$, of the codes of a weight, from 2; at 16 weights stay as they are.
        vector: $v$, weights in a vector, at least 1. The paper has 6 to 16.
        residual: $r$, from 0 to below $b v$; neither index may have more than 16 bits.
        outliers: Share of the columns that have twice the bits, in [0, 1).
        iterations: Of k-means, at most.
        refit: Whether codebooks are fitted to the layer's outputs.
        activations: Bits of the layers' inputs, or None to leave them as they are.
        layers: Shell-style pattern of the layers' paths; several are parted by commas, and `!`
            before one leaves out.
        packed: Whether linear layers hold codes in place of weights.

    Example:
        >>> layer = nn.Linear(64, 96, bias=False)
        >>> batches = [(torch.randn(100, 64, generator=torch.Generator().manual_seed(0)),)]
        >>> small = VPTQ(bits=2, vector=2).apply(layer, calibration=batches)
        >>> small.nbytes, layer.weight.nbytes
        (1600, 24576)

    Source:
        Liu et al. 2024, "VPTQ: Extreme Low-bit Vector Post-Training Quantization for Large
        Language Models", arXiv:2409.17066; microsoft/VPTQ, branch algorithm, `vptq.py` and
        `quantizer.py`.
    Differs:
        Codebooks are fitted to a layer's outputs by conjugate gradients, which the authors do
        by gradient descent on norms, too, and then left to end-to-end training. Weights are not
        normalised, and columns that are no outliers share one codebook. k-means ends after
        fewer iterations (theirs: 100). Outlier columns are marked by a bit each, not moved.
    Checked:
        Codes and errors against a slow loop in the tests; fitted codebooks against least
        squares; packed layers against rounded ones; bits against the file.
    """

    needs: ClassVar[tuple[str, ...]] = ("calibration",)
    want: ClassVar[tuple[str, ...]] = ("gram",)
    distinguishing: ClassVar[str] = "solve"

    bits: int = 2
    vector: int = 4
    residual: int = 0
    outliers: float = 0.0
    iterations: int = 25
    refit: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        plain = self.format is None and self.group_size is None and self.symmetric
        if not plain or self.scale_format != "fp16":
            raise SettingError(
                "vectors have neither scales nor groups, and codebooks are held in fp16: leave "
                "format, group_size, symmetric and scale_format as they are"
            )
        if self.vector < 1 or self.iterations < 1:
            raise SettingError(
                "vector and iterations must be at least 1, got "
                f"{self.vector} and {self.iterations}"
            )
        if not 0 <= self.outliers < 1:
            raise SettingError(f"outliers must be in [0, 1), got {self.outliers}")
        first = self.bits * self.vector - self.residual
        if self.rounds_weights and not (0 < first <= 16 and 0 <= self.residual <= 16):
            raise SettingError(
                "an index has 1 to 16 bits, got bits * vector - residual = "
                f"{self.bits} * {self.vector} - {self.residual} = {first}; choose a shorter "
                "vector or another residual"
            )

    @classmethod
    def examples(cls) -> list[VPTQ]:
        """Gives short vectors in one layer, with all kinds of codebooks."""
        return [cls(bits=3, vector=2, residual=2, outliers=0.2, iterations=3, layers="2")]

    @classmethod
    def neutral(cls) -> VPTQ:
        """Gives the setting that rounds nothing."""
        return cls(bits=MOST_BITS)

    def solve(self, matrix: Tensor, spec: QuantSpec, seen: LayerStatistics | None) -> Solved:
        """Finds codebooks and codes of one weight.

        Args:
            matrix: (out, columns), float32.
            spec: Not used: vectors have no scales.
            seen: Products of the layer's inputs.

        Returns:
            The matrix as vectors from codebooks.
        """
        assert seen is not None
        hessian = seen.gram
        loop = _Loop(matrix, hessian, self._plan(hessian), self.iterations)
        loop.learn(self.bits * self.vector - self.residual)
        codes = loop.run()
        if self.residual:
            loop.learn(self.residual)
            codes = loop.run()
        return refitted(codes, matrix, hessian) if self.refit else codes

    def _plan(self, hessian: Tensor) -> list[tuple[Tensor, int]]:
        """Gives the columns of each part, and how long its vectors are."""
        diagonal = hessian.diagonal(dim1=-2, dim2=-1).reshape(-1, hessian.shape[-1]).sum(0)
        order = diagonal.argsort(descending=True, stable=True)
        count = math.ceil(self.outliers * len(order))
        if not 0 < count < len(order):
            return [(order.sort().values, self.vector)]
        short = max(1, self.vector // 2)
        return [
            (order[count:].sort().values, self.vector),
            (order[:count].sort().values, short),
        ]

    def pack(self, module: nn.Module, solved: Solved, given: Input | None) -> nn.Module | None:
        """Makes the layer of vectors, where the module is a linear layer."""
        if isinstance(module, nn.Conv2d) or not packable(module):
            return None
        assert isinstance(solved, VectorCodes)
        layer = VectorLinear.from_codes(module, solved)
        return layer if given is None else rounded_input(layer, given)


class _Loop:
    """Rounds the columns of a matrix by the codebooks that were learned so far.

    Args:
        matrix: (out, columns).
        hessian: Products of inputs.
        plan: The columns of each part, and the length of its vectors.
        iterations: Of k-means.
    """

    def __init__(
        self,
        matrix: Tensor,
        hessian: Tensor,
        plan: list[tuple[Tensor, int]],
        iterations: int,
    ) -> None:
        self.matrix, self.hessian, self.iterations = matrix, hessian, iterations
        self.columns = [columns for columns, _ in plan]
        self.lengths = [length for _, length in plan]
        self.books: list[list[Tensor]] = [[] for _ in plan]
        self.left = matrix.clone()
        """What the codebooks so far leave over, of each column when its turn came."""
        self.codes: list[list[Tensor]] = [[] for _ in plan]
        self.places = {
            column: (number, place)
            for number, columns in enumerate(self.columns)
            for place, column in enumerate(columns.tolist())
        }

    def learn(self, bits: int) -> None:
        """Learns one more codebook for each part.

        Args:
            bits: Of an index.
        """
        diagonal = self.hessian.diagonal(dim1=-2, dim2=-1).reshape(-1, self.matrix.shape[1])
        weight = diagonal.repeat_interleave(len(self.matrix) // len(diagonal), 0)
        for number, columns in enumerate(self.columns):
            length = self.lengths[number]
            counts = as_vectors(weight[:, columns], length).mean(-1).flatten()
            vectors = as_vectors(self.left[:, columns], length).flatten(0, 1)
            self.books[number].append(codebook(vectors, counts, 2**bits, self.iterations))

    def run(self) -> VectorCodes:
        """Rounds all columns, those with the largest inputs first."""
        self.codes = [
            [
                self.matrix.new_zeros(-(-len(self.matrix) // length), len(columns)).int()
                for _ in books
            ]
            for columns, length, books in zip(
                self.columns, self.lengths, self.books, strict=True
            )
        ]
        sweep(self.matrix, self.hessian, self._rounded, order="activation")
        parts = [
            VectorPart(columns, tuple(codes), tuple(books))
            for columns, codes, books in zip(self.columns, self.codes, self.books, strict=True)
        ]
        return VectorCodes(tuple(parts), self.matrix.shape)

    def _rounded(self, columns: Tensor, places: Tensor) -> Tensor:
        number, place = self.places[int(places)]
        left = as_vectors(columns, self.lengths[number])[:, 0]
        rounded = torch.zeros_like(left)
        for codes, book in zip(self.codes[number], self.books[number], strict=True):
            nearest = nearest_entries(left - rounded, book)
            codes[:, place] = nearest
            rounded = rounded + book[nearest]
        new = rounded.reshape(-1, 1)[: len(columns)]
        self.left[:, places] = columns - new
        return new
