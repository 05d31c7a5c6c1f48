"""Points on pyramids: directions of groups of weights, with gains apart, and no codebook."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import numpy as np
import torch
from scipy.stats import beta
from torch import Tensor, nn
from torch.nn import functional as F

from supple.calibrate import LayerStatistics
from supple.errors import SettingError, nearest
from supple.formats import QuantSpec
from supple.layers.pyramid_linear import Pyramid, PyramidCodes, PyramidLinear
from supple.layers.rotations import Rotation
from supple.quantize._rotations import random_hadamards
from supple.quantize._solvers import sweep
from supple.quantize.base import MOST_BITS, Input, Quantizer, Solved, packable, rounded_input
from supple.technique import register
from supple.transforms import Given

__all__ = ["PVQ", "gain_levels"]

PyramidSolver = Literal["gptq", "nearest"]
_POINTS = 4096  # at which the law of the gains is looked at
_ROUNDS = 200


@register(title="Pyramid vector quantization", paper="arXiv:2410.16926")
@dataclass(frozen=True, kw_only=True)
class PVQ(Quantizer):
    r"""Replaces groups of weights by a gain times the direction of a point on a pyramid.

    Inputs of linear layers, and so the rows of their matrices, are rotated by a Hadamard matrix
    with random signs, after which weights look as drawn from a normal distribution. A group of
    $D$ neighbours in a row becomes $s\,g\,y / \lVert y \rVert$ with whole numbers $y$ of which
    $\sum_i |y_i| = K$: pulses in proportion to the magnitudes, the last ones where they help
    the direction most. There are $N(D, K)$ such points; codes are their numbers in an order
    that is computed, so no codebook is stored. $K$ is the largest with
    $\lceil \log_2 N(D, K) \rceil + b_g \le b D$.

    With one float16 scale $s$ a row, the square of a group's gain follows a Beta law with
    $D / 2$ and $(n - D) / 2$; $2^{b_g}$ levels that lose least under that law are the gains.
    The gain is the one nearest to the projection $x \cdot y / \lVert y \rVert$. With the
    solver `"gptq"` groups are rounded in turn, and the columns to come make up for the errors;
    then each row's scale is fitted to the layer's outputs.

    Args:
        bits: $b$, of a weight's direction and gain together, from 2; at 16 weights stay as
            they are.
        vector: $D$, weights in a group, at least 1. A direction takes at most 62 bits.
        gain: $b_g$, bits of a gain, from 0 to 8.
        pulses: $K$ itself, for a rate between two whole numbers of bits; `bits` then says
            only that weights are rounded.
        solver: `"gptq"`, which needs calibration data, or `"nearest"`.
        rotated: Whether inputs are rotated.
        activations: Bits of the layers' inputs, or None to leave them as they are.
        layers: Shell-style pattern of the layers' paths; several are parted by commas, and `!`
            before one leaves out.
        packed: Whether linear layers hold codes in place of weights.

    Example:
        >>> layer = nn.Linear(64, 96, bias=False)
        >>> small = PVQ(bits=3, solver="nearest").apply(layer)
        >>> small.layer.pyramid, small.layer.nbytes, layer.weight.nbytes
        (Pyramid(dimensions=16, pulses=23), 2528, 24576)

    Source:
        Van der Ouderaa et al. 2024, "Pyramid Vector Quantization for LLMs", arXiv:2410.16926;
        no code was published.
    Differs:
        How the paper finds levels of gains and lets the Hessian into the search is not told in
        full: here levels are those of Lloyd's algorithm on the Beta law, and the Hessian is
        used as in GPTQ, group by group, and for the scales. Activations are whole numbers, not
        points on pyramids. The authors' kernels for GPUs are not part of it.
    Checked:
        Codes against all points of small pyramids and random ones of large; points against a
        search through all; levels against a sample; packed layers against rounded ones.
    """

    distinguishing: ClassVar[str] = "solve"

    bits: int = 3
    vector: int = 16
    gain: int = 3
    pulses: int | None = None
    solver: PyramidSolver = "gptq"
    rotated: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        plain = self.format is None and self.group_size is None and self.symmetric
        if not plain or self.scale_format != "fp16":
            raise SettingError(
                "points have one scale a row, held in fp16: leave format, group_size, "
                "symmetric and scale_format as they are; vector is the size of a group"
            )
        if self.solver not in get_args(PyramidSolver):
            raise SettingError(
                f"solver must be one of {', '.join(get_args(PyramidSolver))}, got "
                f"{self.solver!r}{nearest(str(self.solver), get_args(PyramidSolver))}"
            )
        if not 0 <= self.gain <= 8:
            raise SettingError(f"gain must be from 0 to 8 bits, got {self.gain}")
        if self.rounds_weights:
            self.pyramid()

    @classmethod
    def examples(cls) -> list[PVQ]:
        """Gives small groups, in one layer."""
        return [cls(vector=2, gain=1, layers="2")]

    @classmethod
    def neutral(cls) -> PVQ:
        """Gives the setting that rounds nothing."""
        return cls(bits=MOST_BITS)

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        """Calibration data, where inputs are looked at."""
        return ("calibration",) if self.want else ()

    @property
    def want(self) -> tuple[str, ...]:  # type: ignore[override]
        """Products of inputs, where the solver needs them."""
        return ("gram",) if self.solver == "gptq" and self.rounds_weights else ()

    def pyramid(self) -> Pyramid:
        """Gives the points that directions are rounded to."""
        if self.pulses is not None:
            return Pyramid(self.vector, self.pulses)
        return Pyramid.fitting(self.vector, self.bits * self.vector - self.gain)

    def rotations(self, model: nn.Module, given: Given) -> Mapping[str, Rotation]:
        """Gives random Hadamard rotations of linear layers."""
        if not self.rotated or not self.rounds_weights:
            return {}
        return random_hadamards(model, given.random, self.layers)

    def solve(self, matrix: Tensor, spec: QuantSpec, seen: LayerStatistics | None) -> Solved:
        """Finds the points and gains of one weight.

        Args:
            matrix: (out, columns), float32.
            spec: Not used.
            seen: Products of the layer's inputs, for the solver `"gptq"`.

        Returns:
            The matrix as gains times directions.
        """
        columns = matrix.shape[1]
        levels = gain_levels(self.vector, columns, self.gain).to(matrix.device)
        rounding = _Rounding(self.pyramid(), levels, matrix)
        if seen is None:
            rounded = torch.cat(
                [
                    rounding.group(matrix[:, first : first + self.vector], first)
                    for first in range(0, columns, self.vector)
                ],
                1,
            )
            hessian = torch.eye(columns, device=matrix.device)
        else:
            hessian = seen.gram
            rounded = sweep(
                matrix,
                hessian,
                lambda group, places: rounding.group(group, int(places[0])),
                width=self.vector,
            )
        return rounding.fitted(rounded, matrix, hessian)

    def pack(self, module: nn.Module, solved: Solved, given: Input | None) -> nn.Module | None:
        """Makes the layer of points, where the module is a linear layer."""
        if isinstance(module, nn.Conv2d) or not packable(module):
            return None
        assert isinstance(solved, PyramidCodes)
        layer = PyramidLinear.from_codes(module, solved)
        return layer if given is None else rounded_input(layer, given)


def gain_levels(vector: int, columns: int, bits: int) -> Tensor:
    r"""Gives the gains that lose least for groups of a row that points in any direction.

    The square of a group's share of a row's length follows a Beta law with $D / 2$ and
    $(n - D) / 2$.

    Args:
        vector: $D$, numbers in a group.
        columns: $n$, numbers in a row.
        bits: Of a gain.

    Returns:
        $2^{bits}$ shares, ascending, float32.

    Example:
        >>> gain_levels(16, 64, 1), gain_levels(8, 8, 2)
        (tensor([0.4323, 0.5543]), tensor([1., 1., 1., 1.]))
    """
    if vector >= columns:  # a row is one group
        return torch.ones(2**bits)
    return torch.tensor(_lloyd(vector, columns, bits), dtype=torch.float32)


@functools.lru_cache(64)
def _lloyd(vector: int, columns: int, bits: int) -> list[float]:
    chances = (np.arange(_POINTS) + 0.5) / _POINTS
    gains = np.sqrt(beta.ppf(chances, vector / 2, (columns - vector) / 2))
    levels = np.quantile(gains, (np.arange(2**bits) + 0.5) / 2**bits)
    for _ in range(_ROUNDS):
        edges = np.searchsorted(gains, (levels[1:] + levels[:-1]) / 2)
        before, levels = levels, np.array([part.mean() for part in np.split(gains, edges)])
        if np.abs(levels - before).max() < 1e-9:
            break
    found: list[float] = levels.tolist()
    return found


class _Rounding:
    """Rounds groups of columns and remembers their codes.

    Args:
        pyramid: What directions are rounded to.
        levels: Of the gains.
        matrix: (out, columns), whose rows' lengths are the scales.
    """

    def __init__(self, pyramid: Pyramid, levels: Tensor, matrix: Tensor) -> None:
        self.pyramid, self.levels = pyramid, levels
        self.scale = _held(matrix.norm(dim=1))
        groups = -(-matrix.shape[1] // pyramid.dimensions)
        self.directions = torch.zeros(
            len(matrix), groups, dtype=torch.int64, device=matrix.device
        )
        self.gains = torch.zeros_like(self.directions)

    def group(self, columns: Tensor, first: int) -> Tensor:
        """Rounds a group of columns, of which the first one's number is given."""
        size = self.pyramid.dimensions
        x = F.pad(columns, (0, size - columns.shape[1]))
        points = self.pyramid.nearest(x)
        direction = points / points.norm(dim=1, keepdim=True)
        share = (x * direction).sum(1) / self.scale.clamp_min(1e-30)
        gains = (share[:, None] - self.levels).abs().argmin(1)
        self.directions[:, first // size] = self.pyramid.encode(points)
        self.gains[:, first // size] = gains
        rounded = direction * (self.levels[gains] * self.scale)[:, None]
        return rounded[:, : columns.shape[1]]

    def fitted(self, rounded: Tensor, matrix: Tensor, hessian: Tensor) -> PyramidCodes:
        """Gives the codes, with the scales for which the layer's outputs change least."""
        columns = matrix.shape[1]
        grouped = hessian.double().reshape(-1, columns, columns)
        seen = (rounded.double().reshape(len(grouped), -1, columns) @ grouped).flatten(0, 1)
        own = (seen * rounded).sum(1)
        better = (seen * matrix).sum(1) / torch.where(own > 0, own, 1.0)
        scale = torch.where((own > 0) & (better > 0), better, 1.0) * self.scale
        return PyramidCodes(
            self.directions,
            self.gains,
            self.levels,
            _held(scale.float()),
            self.pyramid,
            matrix.shape,
        )


def _held(scale: Tensor) -> Tensor:
    """Rounds to what float16 has."""
    return scale.clamp_max(torch.finfo(torch.float16).max).half().float()
