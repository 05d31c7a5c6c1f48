"""2-bit weights, of which each output holds its widest groups with 4 bits."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from supple.calibrate import LayerStatistics
from supple.errors import SettingError, nearest
from supple.formats import Int, QuantSpec, quantize
from supple.layers.aligned_packed import AlignedPackedLinear, AlignedQuantized, align
from supple.quantize.base import MOST_BITS, Input, Quantizer, Solved, rounded_input
from supple.technique import register

__all__ = ["Fast2Bit"]

Score = Literal["range", "sensitivity"]


@register(title="Fast 2-bit: aligned groups of 2 and 4 bits", paper="arXiv:2311.16442")
@dataclass(frozen=True, kw_only=True)
class Fast2Bit(Quantizer):
    r"""Rounds weights to 2 bits in small groups, and the groups of the widest range to 4.

    Within one matrix, groups of neighbouring inputs of an output differ in their range, and
    what rounding loses goes with its square. In each output the same number of groups gets more
    bits, those of the largest score: the range $r = \max w - \min w$, or the sensitivity
    $r^2 \sum_j H_{jj}$ with the mean squares $H_{jj}$ of the inputs. As all outputs have as
    many, codes of either kind lie at addresses that are multiples of a row's length, and a bit
    for each group tells where it belongs. Scales are held on two levels: whole numbers of 4
    bits, times one number for each output. On request the largest weights of each output that
    have 2 bits are kept with 16 instead.

    Args:
        bits: Of most weights' codes, from 2; at 16 weights stay as they are.
        more_bits: Of the codes of the chosen groups, from `bits`.
        share: Of an output's groups that are chosen, between 0 and 1; at least one is, and one
            is not. By default 4096 inputs take 2.84 bits a weight (the paper has 2.85). A
            matrix with one group only has `bits` throughout.
        score: What groups are chosen by: `"range"`, or `"sensitivity"`, which needs
            calibration data.
        outliers: Share of an output's weights that are kept in float16, from 0.
        group_size: Inputs of an output that share a scale.
        symmetric: Whether there are no zero points.
        scale_format: How scales are held; see `supple.formats.QuantSpec`.
        activations: Bits of the layers' inputs, or None to leave them as they are.
        layers: Shell-style pattern of the layers' paths; several are parted by commas, and `!`
            before one leaves out.
        packed: Whether linear layers hold codes in place of weights; convolutions hold rounded
            weights.

    Example:
        >>> layer = nn.Linear(4, 1, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[0.0, 3.0, 5.0, 15.0]]))
        >>> small = Fast2Bit(group_size=2, share=0.5, scale_format="fp16").apply(layer)
        >>> small.weight.tolist()
        [[0.0, 3.0, 5.0, 15.0]]

    Source:
        Li et al. 2023, "Enabling Fast 2-bit LLM on GPUs: Memory Alignment and Asynchronous
        Dequantization", arXiv:2311.16442; the sensitivity and the outliers are of its later
        version, "Fast and Efficient 2-bit LLM Inference on GPU". No code was published.
    Differs:
        The kernel, which decodes scales while it loads codes, is not part of it: products are
        computed from the weight put together. The authors' group size, share and form of the
        sensitivity are not known to us; zero points are whole numbers of a code's bits. Weights
        are rounded to the nearest values.
    Checked:
        Choices and values by hand; equal numbers in every row; packed layers against the
        rounded matrix; bits against the file.
    """

    distinguishing: ClassVar[str] = "solve"

    bits: int = 2
    more_bits: int = 4
    share: float = 0.18
    score: Score = "range"
    outliers: float = 0.0
    group_size: int | None = 16
    symmetric: bool = False
    scale_format: str = "int4"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_size is None or self.format is not None:
            raise SettingError("groups of whole numbers are chosen: give group_size, no format")
        if not self.bits <= self.more_bits <= MOST_BITS:
            raise SettingError(
                f"more_bits must be from bits={self.bits} to {MOST_BITS}, got {self.more_bits}"
            )
        for name in ("share", "outliers"):
            if not 0 <= getattr(self, name) < 1:
                raise SettingError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if self.score not in get_args(Score):
            raise SettingError(
                f"score must be one of {', '.join(get_args(Score))}, got {self.score!r}"
                f"{nearest(str(self.score), get_args(Score))}"
            )

    @classmethod
    def examples(cls) -> list[Fast2Bit]:
        """Gives groups small enough for the toy, with scales that are quick to export."""
        return [cls(group_size=2, outliers=0.2, score="sensitivity", scale_format="fp16")]

    @classmethod
    def neutral(cls) -> Fast2Bit:
        """Gives the setting that rounds nothing."""
        return cls(bits=MOST_BITS, more_bits=MOST_BITS)

    @classmethod
    def toy(cls) -> tuple[nn.Module, tuple[Tensor, ...]]:
        """Gives one layer, as exporting what holds two kinds of groups takes its time."""
        source = torch.Generator().manual_seed(3)
        model = nn.Sequential(nn.Linear(13, 5), nn.ReLU())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(generator=source)
        return model, (torch.randn(7, 13, generator=source),)

    @property
    def want(self) -> tuple[str, ...]:  # type: ignore[override]
        """Squares of inputs, where groups are chosen by them."""
        return ("input_sq",) if self.score == "sensitivity" else ()

    def solve(self, matrix: Tensor, spec: QuantSpec, seen: LayerStatistics | None) -> Solved:
        """Rounds a matrix with more bits for the groups of each row that score highest."""
        columns = matrix.shape[1]
        count = self._count(columns)
        if not count:
            return quantize(matrix, spec)
        many = dataclasses.replace(spec, format=Int(self.more_bits, symmetric=self.symmetric))
        assert self.group_size is not None
        outliers = min(round(self.outliers * columns), columns - count * self.group_size)
        return align(matrix, self._scores(matrix, seen), spec, many, count, outliers)

    def pack(self, module: nn.Module, solved: Solved, given: Input | None) -> nn.Module | None:
        """Makes the layer that holds both kinds of groups.

        Args:
            module: The layer, with the rounded weight.
            solved: What `solve` gave for it.
            given: How its input is rounded.

        Returns:
            The layer, or None for a convolution.
        """
        if not isinstance(solved, AlignedQuantized):
            return super().pack(module, solved, given)
        if type(module) not in (nn.Linear, Conv1D):
            return None
        layer = AlignedPackedLinear.from_quantized(module, solved)
        return layer if given is None else rounded_input(layer, given)

    def _count(self, columns: int) -> int:
        """Groups of each row that have more bits; 0 where there is nothing to choose from."""
        assert self.group_size is not None
        groups = columns // self.group_size
        most = groups if columns % self.group_size else groups - 1
        return min(max(round(self.share * groups), 1), most)

    def _scores(self, matrix: Tensor, seen: LayerStatistics | None) -> Tensor:
        assert self.group_size is not None
        rows, columns = matrix.shape
        whole = columns // self.group_size * self.group_size
        parts = matrix[:, :whole].reshape(rows, -1, self.group_size)
        ranges = parts.amax(-1) - parts.amin(-1)
        if self.score == "range":
            return ranges
        assert seen is not None
        squares = seen.by_row("input_sq", rows)[:, :whole].reshape(parts.shape)
        return ranges.square() * squares.sum(-1).float()
