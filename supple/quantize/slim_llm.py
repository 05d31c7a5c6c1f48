"""More bits for groups of columns that matter, fewer for as many that don't."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from supple.calibrate import LayerStatistics, Observer
from supple.errors import SettingError
from supple.formats import Int, QuantSpec, quantize
from supple.layers.mixed_packed import MixedPackedLinear, MixedQuantized, column_parts
from supple.quantize._sample import RowSample
from supple.quantize._solvers import inverse_factor, sweep
from supple.quantize.base import MOST_BITS, Input, Quantizer, Solved, rounded_input
from supple.technique import register

__all__ = ["SliMLLM"]

_REACH, _POWER, _FAR = 0.1, 2.4, 2.0


@register(title="SliM-LLM: bits by salience", paper="arXiv:2405.14917")
@dataclass(frozen=True, kw_only=True)
class SliMLLM(Quantizer):
    r"""Rounds weights by GPTQ, with one bit more or less for groups of columns by salience.

    With $U$ the upper Cholesky factor of the inverse of the Hessian of a layer's inputs, a
    weight's salience is $w_{ij}^2 / U_{jj}^2$, and that of a group of neighbouring columns the
    sum. The $i$ least salient groups of a matrix get $b - 1$ bits and the $i$ most salient ones
    $b + 1$, so the mean is $b$. All $i$ from 1 to below half of the groups are tried on weights
    rounded to the nearest; the one is taken with which the softmax of the layer's outputs is
    nearest to that of the layer before (Kullback-Leibler divergence, over some of the inputs).

    Columns are then rounded by GPTQ. Once a group's turn comes, the range of each output is
    searched among shares from 0.9 to 1.1 of the full one: the least sum of errors to the power
    2.4 wins, with those of salient weights (more than 2 deviations above the group's mean)
    counted `salient` times. Groups of 1 bit stand for the mean plus or minus the mean of
    magnitudes.

    Args:
        bits: Mean of a weight's code, 2 to 15; at 16 weights stay as they are.
        group_size: Columns that share their bits, and in an output a scale.
        symmetric: Whether there are no zero points; False.
        scale_format: How scales are held; see `supple.formats.QuantSpec`.
        salient: How often errors of salient weights count, above 0.
        steps: Ranges that are tried on either side of the full one.
        rows: Inputs of each layer on which outputs are compared.
        activations: Bits of the layers' inputs, or None to leave them as they are.
        layers: Shell-style pattern of the layers' paths; several are parted by commas, and `!`
            before one leaves out.
        packed: Whether linear layers hold codes in place of weights; convolutions hold rounded
            weights.

    Example:
        >>> layer, x = nn.Linear(32, 3), torch.eye(32)
        >>> _ = layer.weight.data.fill_(1.0)
        >>> layer.weight.data[:, 8:16] /= 2
        >>> x[:8] *= 9
        >>> small = SliMLLM(group_size=8).apply(layer, calibration=[(x,)])
        >>> [part.spec.bits for part in small.parts], small.quantized().layout.tolist()
        ([1, 2, 3], [2, 0, 1, 1])

    Source:
        Huang et al. 2024, "SliM-LLM: Salience-Driven Mixed-Precision Quantization for Large
        Language Models", arXiv:2405.14917; github.com/Aaronhuang-778/SliM-LLM.
    Differs:
        Divergences are of the inputs of rounded blocks and over a sample of them; the
        authors' are averaged over sequences. Where the last group is smaller it keeps $b$ bits,
        so that the mean stays exact. Scales are in float16. The variant with learned clipping
        (SliM-LLM+) is not part of it.
    Checked:
        Saliences, choice of $i$ and values by hand; mean bits; rounding against GPTQ where all
        groups have the same bits; packed layers against rounded ones.
    """

    distinguishing: ClassVar[str] = "solve"
    want: ClassVar[tuple[str, ...]] = ("gram", "sample")
    needs: ClassVar[tuple[str, ...]] = ("calibration",)

    bits: int = 2
    group_size: int | None = 128
    symmetric: bool = False
    salient: float = 1.0
    steps: int = 50
    rows: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_size is None or self.format is not None or self.symmetric:
            raise SettingError(
                "groups of whole numbers with zero points have different bits: give "
                "group_size, no format, and leave symmetric=False"
            )
        for name in ("steps", "rows"):
            if getattr(self, name) < 1:
                raise SettingError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.salient > 0:
            raise SettingError(f"salient must be above 0, got {self.salient}")

    @classmethod
    def examples(cls) -> list[SliMLLM]:
        """Gives groups small enough for the toy, and few tries."""
        return [cls(group_size=2, steps=2)]

    @classmethod
    def neutral(cls) -> SliMLLM:
        """Gives the setting that rounds nothing."""
        return cls(bits=MOST_BITS)

    @classmethod
    def toy(cls) -> tuple[nn.Module, tuple[Tensor, ...]]:
        """A layer whose groups get different bits, and is exported fast."""
        source = torch.Generator().manual_seed(0)
        model = nn.Sequential(nn.Linear(9, 2), nn.ReLU()).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(generator=source)
        return model, (torch.randn(11, 9, generator=source),)

    def observers(self) -> Mapping[str, Callable[[], Observer]]:
        """Gives what keeps inputs, on which outputs are compared."""
        return {"sample": partial(RowSample, self.rows)}

    def spec_of_bits(self, bits: int) -> QuantSpec:
        """Gives how groups of so many bits are quantized; of 1, zero points are fractions.

        Args:
            bits: From 1.
        """
        return QuantSpec(
            **{
                **self.spec().settings(),
                "format": Int(bits, symmetric=False),
                "zero_format": "fp16" if bits == 1 else "code",
            }
        )

    def solve(self, matrix: Tensor, spec: QuantSpec, seen: LayerStatistics | None) -> Solved:
        """Chooses bits, then rounds column by column.

        Args:
            matrix: (out, columns), float32.
            spec: How groups of the mean number of bits are quantized.
            seen: Statistics of the layer's inputs.

        Returns:
            The matrix, with groups of three numbers of bits, or all of one.
        """
        assert seen is not None
        assert self.group_size is not None
        columns = matrix.shape[1]
        weights = inverse_factor(seen.gram).diagonal(dim1=-2, dim2=-1).square().reciprocal()
        price = weights.reshape(-1, columns).float()
        price = price.repeat_interleave(len(matrix) // len(price), 0)
        bits = self.group_bits(matrix, matrix.square() * price, seen["sample"])
        rounding = _Rounding(self, bits, price, len(matrix))
        rounded = sweep(
            matrix,
            seen.gram,
            rounding.columns,
            group=self.group_size,
            begin=rounding.begin,
        )
        return rounding.solved(rounded)

    def group_bits(self, matrix: Tensor, salience: Tensor, sample: Tensor) -> Tensor:
        """Chooses the bits of each group of columns.

        Args:
            matrix: (out, columns).
            salience: Of each weight, (out, columns).
            sample: Inputs of the layer, (rows, columns), or (groups, rows, columns) of a
                convolution of several groups.

        Returns:
            (groups of columns,), whole numbers.
        """
        assert self.group_size is not None
        columns, size = matrix.shape[1], self.group_size
        bits = torch.full((-(-columns // size),), self.bits)
        whole = columns // size
        sums = salience.sum(0)[: whole * size].reshape(whole, size).sum(1)
        ranks = sums.argsort(stable=True)
        tries = []
        for many in range(1, whole // 2):
            tried = bits.clone()
            tried[ranks[:many]] -= 1
            tried[ranks[-many:]] += 1
            tries.append(tried)
        if not tries:
            return bits
        by_bits = {b: self._nearest(matrix, b) for b in {self.bits + k for k in (-1, 0, 1)}}
        inputs = sample.float().reshape(-1, sample.shape[-2], columns)

        def outputs(weight: Tensor) -> Tensor:
            grouped = weight.reshape(len(inputs), -1, columns)
            y: Tensor = (inputs @ grouped.mT).transpose(0, 1).flatten(1)
            return y.log_softmax(-1)

        before = outputs(matrix)
        divergences = []
        for tried in tries:
            each = column_parts(tried, size, columns)
            weight = sum(torch.where(each == b, one, 0.0) for b, one in by_bits.items())
            assert isinstance(weight, Tensor)
            after = outputs(weight)
            divergences.append(float((after.exp() * (after - before)).sum(-1).mean()))
        return tries[divergences.index(min(divergences))]

    def _nearest(self, matrix: Tensor, bits: int) -> Tensor:
        """Rounds all groups to so many bits."""
        spec = self.spec_of_bits(bits)
        if bits > 1:
            return quantize(matrix, spec).dequantize()
        parts = [_binary(part, spec) for part in spec.blocks(matrix)]
        scale, zero = (torch.cat(ends, 1) for ends in zip(*parts, strict=True))
        return quantize(matrix, spec, scale, zero).dequantize()

    def pack(self, module: nn.Module, solved: Solved, given: Input | None) -> nn.Module | None:
        """Makes the layer that holds groups of different bits.

        Args:
            module: The layer, with the rounded weight.
            solved: What `solve` gave for it.
            given: How its input is rounded.

        Returns:
            The layer, or None for a convolution with different bits.
        """
        if not isinstance(solved, MixedQuantized):
            return super().pack(module, solved, given)
        if type(module) not in (nn.Linear, Conv1D):
            return None
        layer = MixedPackedLinear.from_quantized(module, solved)
        return layer if given is None else rounded_input(layer, given)


def _binary(part: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Gives scales and zero points for the mean plus or minus the mean magnitude of groups.

    Args:
        part: (rows, groups, n).
        spec: Of 1 bit.
    """
    size, mean = part.abs().mean(-1), part.mean(-1)
    scale = spec.stored_scale(2 * size)
    return scale, spec.stored_zero(0.5 - mean / scale)


class _Rounding:
    """Rounds columns with the bits of their group, and scales found where it begins."""

    def __init__(self, method: SliMLLM, bits: Tensor, price: Tensor, rows: int) -> None:
        assert method.group_size is not None
        self.method, self.bits, self.price = method, bits, price
        self.size = method.group_size
        self.scale = torch.ones(rows, len(bits))
        self.zero = torch.zeros(rows, len(bits))

    def spec(self, group: int) -> QuantSpec:
        return self.method.spec_of_bits(int(self.bits[group]))

    def begin(self, columns: Tensor, first: int) -> None:
        group = first // self.size
        spec = self.spec(group)
        if spec.bits == 1:
            scale, zero = _binary(columns[:, None], spec)
        else:
            salience = columns.square() * self.price[:, first : first + columns.shape[1]]
            scale, zero = self.searched(columns, _weights(salience, self.method.salient), spec)
        self.scale[:, group], self.zero[:, group] = scale[:, 0], zero[:, 0]

    def searched(
        self, columns: Tensor, weights: Tensor, spec: QuantSpec
    ) -> tuple[Tensor, Tensor]:
        """Gives scales and zero points, (out, 1), of the range with the least error."""
        least, most = (end[:, None] for end in (columns.amin(1), columns.amax(1)))
        best = torch.full_like(least, torch.inf)
        factor = torch.ones_like(least)
        spread = torch.linspace(0, _REACH, self.method.steps + 1)[1:].tolist()
        for share in (1.0, *(1 + one for one in spread), *(1 - one for one in spread)):
            scale, zero = spec.scales_of(share * least, share * most)
            error = (spec.rounded(columns, scale, zero) - columns).abs().pow(_POWER)
            total = (error * weights).sum(1, keepdim=True)
            better = total < best
            best = torch.where(better, total, best)
            factor = torch.where(better, share, factor)
        scale, zero = spec.scales_of(factor * least, factor * most)
        assert zero is not None
        return scale, zero

    def columns(self, columns: Tensor, places: Tensor) -> Tensor:
        group = int(places[0]) // self.size
        scale, zero = self.scale[:, group, None], self.zero[:, group, None]
        return self.spec(group).rounded(columns, scale, zero)

    def solved(self, rounded: Tensor) -> Solved:
        """Gives codes for what the columns were rounded to, groups of equal bits together."""
        each = column_parts(self.bits, self.size, rounded.shape[1])
        present = self.bits.unique().tolist()
        parts = tuple(
            quantize(
                rounded[:, each == bits],
                self.method.spec_of_bits(bits),
                self.scale[:, self.bits == bits],
                self.zero[:, self.bits == bits],
            )
            for bits in present
        )
        if len(parts) == 1:
            return parts[0]
        layout = torch.tensor([present.index(bits) for bits in self.bits.tolist()])
        return MixedQuantized(parts, layout, self.size)


def _weights(salience: Tensor, salient: float) -> Tensor:
    """Gives how much the error of each weight counts."""
    far = salience > salience.mean() + _FAR * salience.std(correction=0)
    return torch.where(far, salient, 1.0)
