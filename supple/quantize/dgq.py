"""4-bit groups within 8-bit rows: whole-number products with fine-grained weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from supple.calibrate import LayerStatistics, statistics
from supple.errors import SettingError
from supple.formats import Granularity, Int, QuantSpec
from supple.graph.feeds import Feed, feeds
from supple.layers.dual_grained import DualGrained, DualGrainedLinear
from supple.quantize._equivalent import scaled
from supple.quantize._ranges import fixed_ranges
from supple.quantize.base import MOST_BITS, Input, Quantizer, Solved
from supple.technique import register
from supple.transforms import Given

__all__ = ["DGQ"]

_CLIPS = tuple(1.02 - 0.22 * (step + 1) / 20 for step in range(20))
_FACTORS = tuple(1.02 - 0.82 * (step + 1) / 80 for step in range(80))
_LARGEST = 127


@register(title="DGQ: dual-grained quantization", paper="arXiv:2310.04836")
@dataclass(frozen=True, kw_only=True)
class DGQ(Quantizer):
    r"""Rounds weights to 4-bit groups whose scales are whole multiples of a row's 8-bit scale.

    A weight of group $g$ and output $o$ stands as a code $q$ of 4 bits,

    $$w = s_o \, k_{og} (q - z_{og}), \qquad |k_{og} (q - z_{og})| \le 127,$$

    with a whole $k$ and a zero point $z$ of 4 bits. So the product with 8-bit inputs is one of
    8-bit whole numbers, and the scales are as fine as the groups. Two searches find them, by
    the change of outputs on calibration data: for each group the clipping of its range (20
    ratios from 1.009 to 0.8), then for each output $s_o$ (80 ratios from 1.01 to 0.2 of its
    largest weight over 127), with $k$ rounded from the group scale. Before, channels of inputs
    whose largest magnitude is above a percentile of all channels' are divided down to it, in
    the norm or the layer that gives them.

    Args:
        bits: Of a weight's code, from 2 to 7; at 16 weights stay as they are.
        activations: Bits of the layers' inputs; 16 or None leaves them as they are.
        granularity: Who shares the scale of an input: a `"token"` (of a convolution an
            example), found as it comes, or the whole `"tensor"`, with the scale of the
            calibration data.
        percentile: Of the channels' largest magnitudes, above which they are divided down;
            above 0, and at 1 none is.
        group_size: Inputs of an output that share $k$ and $z$.
        layers: Shell-style pattern of the layers' paths; several are parted by commas, and `!`
            before one leaves out.
        packed: Whether linear layers hold codes in place of weights; convolutions hold rounded
            weights.

    Example:
        >>> layer, x = nn.Linear(4, 2), torch.eye(4)
        >>> small = DGQ(group_size=2).apply(layer, calibration=[x])
        >>> small.quantized().whole().dtype, small.engine_for(x)
        (torch.int8, 'integer')

    Source:
        Zhang et al. 2023, "Dual Grained Quantization: Efficient Fine-Grained Quantization for
        LLM", arXiv:2310.04836; ilur98/DGQ, `quantizer_helper.py` and `smooth.py`.
    Differs:
        Outputs are compared on all calibration data (by the Gram matrix), there on the last
        sample. Ranges take in zero, so that zero points are codes. All inputs are smoothed
        whose producer can take it, also those of the layer behind attention; a fixed range is
        that of all calibration data. Keys and values are not rounded. The kernel is PyTorch's.
    Checked:
        Both searches against plain loops; products of whole numbers against rounded ones; a
        smoothed network against the one before; nothing needs more than 8 bits.
    """

    distinguishing: ClassVar[str] = "solve"
    needs: ClassVar[tuple[str, ...]] = ("calibration",)
    want: ClassVar[tuple[str, ...]] = ("gram",)

    activations: int | None = 8
    granularity: Granularity = "token"
    percentile: float = 0.995
    group_size: int | None = 128
    symmetric: bool = False
    scale_format: str = "int8"

    def __post_init__(self) -> None:
        super().__post_init__()
        fixed = not self.symmetric and self.scale_format == "int8" and self.format is None
        if not fixed or self.group_size is None:
            raise SettingError(
                "groups have zero points and whole multiples of a row's scale: give "
                "group_size, and leave symmetric, scale_format and format as they are"
            )
        if not (self.bits <= 7 or self.bits == MOST_BITS):
            raise SettingError(f"bits must be from 2 to 7, or {MOST_BITS}, got {self.bits}")
        if self.granularity not in ("token", "tensor"):
            raise SettingError(f"granularity must be token or tensor, got {self.granularity!r}")
        if not 0 < self.percentile <= 1:
            raise SettingError(f"percentile must be above 0 and up to 1, got {self.percentile}")

    @classmethod
    def examples(cls) -> list[DGQ]:
        """Gives groups small enough for the toy, and few channels that stay."""
        return [cls(group_size=2, percentile=0.7)]

    @classmethod
    def neutral(cls) -> DGQ:
        """Gives the setting that changes nothing."""
        return cls(bits=MOST_BITS, activations=MOST_BITS, percentile=1.0)

    @classmethod
    def toy(cls) -> tuple[nn.Module, tuple[Tensor, ...]]:
        """Gives a layer behind a norm, as a hundred ratios are tried for each layer."""
        source = torch.Generator().manual_seed(3)
        model = nn.Sequential(nn.LayerNorm(7), nn.Linear(7, 5))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(generator=source)
        return model, (torch.randn(13, 7, generator=source),)

    @torch.no_grad()
    def change(self, model: nn.Module, given: Given) -> nn.Module:
        """Divides large channels down, then quantizes."""
        if self.percentile < 1:
            args, kwargs = given.inputs()
            found = feeds(model, args, kwargs, layers=self.layers)
            seen = statistics(model, given.batches, ["absmax"], self.layers)
            for feed in found:
                if feed.producer is not None and feed.consumers[0] in seen:
                    model = scaled(model, feed, self.smoothing(feed, seen[feed.consumers[0]]))
        return super().change(model, given)

    def smoothing(self, feed: Feed, seen: LayerStatistics) -> Tensor:
        """Gives what the channels of a layer's input are divided by, (channels,).

        Args:
            feed: The input.
            seen: Statistics of a layer that reads it, with `absmax`.

        Returns:
            1, or above it the largest magnitude over the percentile. Channels that need the
            same factor get the largest one's.
        """
        largest = seen.absmax.reshape(feed.size, -1).amax(1)
        # As the authors count: of n channels, these and so many above it are divided.
        rank = min(int(feed.size * (1 - self.percentile) + 1.5), feed.size)
        line = largest.sort().values[-rank]
        if not float(line) > 0:
            return torch.ones_like(largest)
        factors = (largest / line).clamp_min(1.0)
        places = feed.units.long()
        tied = torch.ones(int(places.max()) + 1).scatter_reduce(0, places, factors, "amax")
        return tied[places]

    def solve(self, matrix: Tensor, spec: QuantSpec, seen: LayerStatistics | None) -> Solved:
        """Finds the clipping of each group, then the scale of each row."""
        assert seen is not None
        gram = seen.gram.reshape(-1, matrix.shape[1], matrix.shape[1])
        scale, zero = self._clipped(matrix, spec, gram)
        best = torch.full((len(matrix),), torch.inf)
        kept = torch.ones(len(matrix), 1)
        top = matrix.abs().amax(1, keepdim=True)
        top = torch.where(top > 0, top, 1.0)
        for ratio in _FACTORS:
            factor = top * (ratio / _LARGEST)
            change = _dual(matrix, spec, scale, zero, factor).dequantize() - matrix
            kept, best = _better(kept, best, factor, _by_row(change, gram))
        return _dual(matrix, spec, scale, zero, kept)

    def _clipped(self, matrix: Tensor, spec: QuantSpec, gram: Tensor) -> tuple[Tensor, Tensor]:
        """Gives scales and zero points, (rows, groups), before they are multiples of any."""
        plain = dataclasses.replace(spec, scale_format="fp32")
        scales, zeros = [], []
        for start, stop in _spans(matrix.shape[1], spec):
            part, block = matrix[:, start:stop], gram[:, start:stop, start:stop]
            least, most = part.amin(1, keepdim=True), part.amax(1, keepdim=True)
            best = torch.full((len(matrix),), torch.inf)
            found = torch.ones(len(matrix), 2)
            for ratio in _CLIPS:
                scale, zero = plain.scales_of(ratio * least, ratio * most)
                change = plain.rounded(part, scale, zero) - part
                assert zero is not None
                pair = torch.cat((scale, zero), 1)
                found, best = _better(found, best, pair, _by_row(change, block))
            scales.append(found[:, :1])
            zeros.append(found[:, 1:])
        return torch.cat(scales, 1), torch.cat(zeros, 1)

    @property
    def inputs_wait(self) -> bool:
        """With one scale for all inputs, as ranges are those of the rounded network."""
        return self.granularity != "token"

    def inputs(self, model: nn.Module, given: Given) -> dict[str, Input]:
        """Gives how inputs are rounded: by token, or with the range of calibration data."""
        if self.granularity == "token":
            return super().inputs(model, given)
        if self.activations is None or not self.rounds_inputs:
            return {}
        spec = QuantSpec(Int(self.activations), "tensor")
        return fixed_ranges(model, given, spec, self.layers)

    def pack(self, module: nn.Module, solved: Solved, given: Input | None) -> nn.Module | None:
        """Makes the layer of whole-number products.

        Args:
            module: The layer, with the rounded weight.
            solved: What `solve` gave for it.
            given: How its input is rounded.

        Returns:
            The layer, or None for a convolution.
        """
        assert isinstance(solved, DualGrained)
        if type(module) not in (nn.Linear, Conv1D):
            return None
        spec, scales = given or (None, None)
        return DualGrainedLinear.from_quantized(module, solved, input=spec, input_range=scales)


def _spans(columns: int, spec: QuantSpec) -> Iterator[tuple[int, int]]:
    size = spec.group_size or columns
    for start in range(0, columns, size):
        yield start, min(start + size, columns)


def _dual(
    matrix: Tensor, spec: QuantSpec, scale: Tensor, zero: Tensor, factor: Tensor
) -> DualGrained:
    """Rounds a matrix with whole multiples of factors of the rows, (rows, 1)."""
    times = (scale / factor).round().clamp(1, _LARGEST)
    reach = (_LARGEST / times).floor()
    form = spec.format
    low = spec.spread((zero - reach).clamp_min(form.least), matrix.shape)
    high = spec.spread((zero + reach).clamp_max(form.most), matrix.shape)
    within = matrix.clamp(-_LARGEST * factor, _LARGEST * factor)
    numbers = within / spec.spread(times * factor, matrix.shape)
    numbers = numbers.round() + spec.spread(zero, matrix.shape)
    codes = form.encode(torch.minimum(torch.maximum(numbers, low), high))
    return DualGrained(codes, times * factor, zero, spec, matrix.shape, factor)


def _by_row(change: Tensor, gram: Tensor) -> Tensor:
    """Gives how much each output changes: the sum of its squares, (rows,)."""
    apart = change.reshape(len(gram), -1, change.shape[1])
    return ((apart @ gram) * apart).sum(-1).flatten()


def _better(kept: Tensor, best: Tensor, tried: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
    """Takes what was tried in the rows where it errs less than what is kept."""
    less = error < best
    return torch.where(less[:, None], tried, kept), torch.where(less, error, best)
