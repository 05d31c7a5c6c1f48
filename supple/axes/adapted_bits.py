"""Adapted bits: each number of bits has frozen codes, and an adapter, of its own."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from supple.axes.base import RoundedInput, RoundedWeight
from supple.axes.bits import Bits, BitsSite, bytes_of, packed_as, straight
from supple.errors import SettingError
from supple.formats import Int, Quantized, QuantSpec, quantize
from supple.layers.pack import matrix_of, weight_of
from supple.observers import RANGES
from supple.space import Site

__all__ = ["AdaptedBits", "AdaptedWeight"]

_FROZEN = ("codes", "scale", "zero")
_TRAINED = ("down", "up")


@dataclass(frozen=True)
class AdaptedBits(Bits):
    r"""Makes the bits of weights elastic, with frozen codes and an adapter for each choice.

    A weight is quantized for each number of bits by itself, so that no size disturbs another:
    $\hat W_b = s\,(q - z) + U D$ with codes $q$, scales $s$ and zero points $z$ of groups, and
    an adapter $D$ of shape (rank, groups), $U$ of shape (outputs, rank), whose product is
    the same for all weights of a group. It becomes part of the zero points,
    $z - U D / s$, which are fractions, so that what is extracted holds codes and nothing
    beside them. All of it are parameters of the layers (`supple_weight_codes_4`,
    `supple_weight_up_4`, ...), of which only adapters take gradients. Codes begin as the
    nearest ones; 16 bits, the full choice, are the weights as they are.

    Args:
        choices: Bits of weights on offer, from 2 to 8.
        inputs: Bits of inputs on offer, from 2 to 8; None leaves inputs as they are.
        modes: Always `("channel-asymmetric",)`.
        input_modes: As in `Bits`.
        group_size: Inputs of an output that share a scale, a zero point and an adaptation.
        observer: How ranges of codes are found: a name of `supple.observers.RANGES`.
        scale_format: How scales are held, as in `Bits`; zero points are held in float16.
        learned: Always False.
        where: Only layers whose path matches this shell-style pattern.
        rank: Of the adapters, at least 1.
        shared: Whether all numbers of bits share one adapter.

    Raises:
        SettingError: A value can't be used.

    Example:
        >>> import supple
        >>> axis = AdaptedBits((2, 4), group_size=16, rank=2)
        >>> net = supple.elastic(nn.Linear(64, 8), torch.ones(2, 64), axes=[axis])
        >>> net.module.supple_weight_up_2.shape, net.extract({"bits": 2})
        (torch.Size([8, 2]), PackedLinear((8, 64), uint2, group 16))

    Source:
        Yi et al. 2024, "One QuantLLM for ALL: Fine-tuning Quantized LLMs Once for Efficient
        Deployments", arXiv:2405.20202; adapters that become zero points: Xu et al. 2023,
        "QA-LoRA: Quantization-Aware Low-Rank Adaptation of Large Language Models",
        arXiv:2309.14717.
    """

    name: ClassVar[str] = "adapted_bits"

    choices: tuple[int, ...] = (2, 3, 4)
    modes: tuple[str, ...] = ("channel-asymmetric",)
    group_size: int | None = 32
    rank: int = 4
    shared: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.learned or self.modes != ("channel-asymmetric",) or self.group_size is None:
            raise SettingError(
                "codes have groups with zero points that are not trained: leave modes and "
                "learned as they are, and give a group_size"
            )
        if self.rank < 1:
            raise SettingError(f"rank must be at least 1, got {self.rank}")

    def parameters(self, site: Site) -> Mapping[str, Tensor]:
        """Codes, scales and zero points by choice, and adapters."""
        assert isinstance(site, BitsSite)
        found: dict[str, Tensor] = {}
        if site.input:
            return found
        weight = site.module.weight
        assert isinstance(weight, Tensor)
        for choice in site.choices[:-1]:
            way = self._weight(site, choice)
            codes = way.nearest(weight)
            assert codes.zero is not None
            held = zip(_FROZEN, (codes.codes, codes.scale, codes.zero), strict=True)
            frozen = [nn.Parameter(tensor, requires_grad=False) for _, tensor in held]
            shape = codes.scale.shape
            down = torch.empty(self.rank, shape[1])
            source = torch.Generator().manual_seed(zlib.crc32(way.parameters[3].encode()))
            down.uniform_(-1, 1, generator=source).mul_(1 / math.sqrt(shape[1]))
            values = (*frozen, down, torch.zeros(shape[0], self.rank))
            found.update(zip(way.parameters, values, strict=True))
        return found

    def _weight(self, site: BitsSite, choice: int) -> AdaptedWeight:
        spec = QuantSpec(
            Int(choice, symmetric=False),
            "group",
            self.group_size,
            False,
            self.scale_format,  # type: ignore[arg-type]
            "fp16",
        )
        start = f"{site.path}.supple_weight_".lstrip(".")
        names = (
            *(f"{start}{part}_{choice}" for part in _FROZEN),
            *(f"{start}{part}" + f"_{choice}" * (not self.shared) for part in _TRAINED),
        )
        return AdaptedWeight(names, spec, self.observer, isinstance(site.module, Conv1D))


@dataclass(frozen=True)
class AdaptedWeight(RoundedWeight):
    """Frozen codes, with zero points that an adapter moves, in a weight's place.

    Args:
        parameters: Names of codes, scales, zero points and of the adapter's two matrices.
        spec: How the weight is quantized, as a matrix.
        observer: How ranges are found.
        transposed: Whether the layer holds the transpose of its matrix.
    """

    parameters: tuple[str, ...]
    spec: QuantSpec
    observer: str
    transposed: bool

    def __call__(self, weight: Tensor, *values: Tensor) -> Tensor:
        """Gives what codes and adapter stand for; the weight itself is not looked at."""
        codes, scale, zero = self._held(*values)
        shape = codes.shape
        numbers = self.spec.format.decode(codes) - self.spec.spread(zero, shape)
        matrix = numbers * self.spec.spread(scale, shape)
        return weight_of(matrix, weight, self.transposed).to(weight.dtype)

    def packed(
        self,
        layer: nn.Module,
        *values: Tensor,
        given: tuple[RoundedInput, tuple[Tensor, ...]] | None = None,
    ) -> nn.Module:
        """Gives the layer of codes."""
        codes, scale, zero = self._held(*values)
        return packed_as(
            layer, Quantized(codes.clone(), scale, zero, self.spec, codes.shape), given
        )

    def nbytes(self, shape: Sequence[Any]) -> Any:
        """Bytes of codes, scales and zero points."""
        return bytes_of(self.spec, shape, self.transposed)

    def matrix(self, weight: Tensor) -> Tensor:
        """Lays the weight out with a row for each output."""
        return matrix_of(weight, self.transposed).detach().float()

    def nearest(self, weight: Tensor) -> Quantized:
        """Gives the codes that are nearest to a weight."""
        return quantize(self.matrix(weight), self.spec, observer=RANGES[self.observer])

    def _held(
        self, codes: Tensor, scale: Tensor, zero: Tensor, down: Tensor, up: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gives codes, scales, and zero points as a file holds them, the adapter in them."""
        scale = self.spec.stored_scale(scale)
        moved = zero.float() - (up @ down).float() / scale
        return codes, scale, straight(moved, self.spec.stored_zero(moved.detach()))
