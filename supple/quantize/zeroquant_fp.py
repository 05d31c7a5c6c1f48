"""Floating-point weights of 4 bits and inputs of 8; scales that differ by powers of two."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from supple.calibrate import LayerStatistics
from supple.errors import SettingError
from supple.formats import QuantSpec, number_format
from supple.layers.low_rank_branch import LowRankBranch, LowRankCorrected, low_rank_corrected
from supple.quantize._solvers import gptq
from supple.quantize.base import MOST_BITS, Input, Quantizer, Solved, packable, rounded_input
from supple.technique import register
from supple.transforms import Given

__all__ = ["ZeroQuantFP"]


@register(title="ZeroQuant-FP: 4-bit weights and 8-bit inputs", paper="arXiv:2307.09782")
@dataclass(frozen=True, kw_only=True)
class ZeroQuantFP(Quantizer):
    r"""Rounds weights to floating-point numbers of 4 bits, and layers' inputs to ones of 8.

    Floating-point numbers lie closer together near zero, so a few large inputs of a token don't
    push all others onto a few levels, as they do with whole numbers. Each token has its own
    scale. Weights are rounded by GPTQ, and a product of low rank, the best approximation of
    what rounding lost, is added to each matrix (LoRC).

    A product of both needs weights of 8 bits. They come without loss from those of 4 by a
    change of their exponents if scales differ by powers of two: with `"shift4"`, the default,
    the scales of an output are its largest one over powers of two,
    $s_i = s_{\max} / 2^{\lfloor \log_2 (s_{\max} / s_i) \rfloor}$ (the paper's M2), and with
    `"e8m0-up"` powers of two themselves, $s_i = 2^{\lceil \log_2 s_i \rceil}$ (M1). Any other
    format leaves them free.

    Args:
        bits: Of a weight's code, from 2; at 16 weights stay as they are.
        format: Name of the weights' number format, `"e2m1"` or `"e3m0"`; None for whole
            numbers.
        group_size: Inputs of an output that share a scale; None for all.
        symmetric: Whether there are no zero points.
        scale_format: How scales are held; see `supple.formats.QuantSpec`.
        activations: Bits of the layers' inputs, or None to leave them as they are.
        activation_format: Name of a number format of so many bits.
        rank: Of the product that makes up for what rounding lost, held in float16; 0 for none.
        layers: Shell-style pattern of the layers' paths; several are parted by commas, and `!`
            before one leaves out.
        packed: Whether linear layers and, without a product, 2-d convolutions hold codes in
            place of weights.

    Example:
        >>> layer = nn.Linear(4, 1, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[6.0, 2.4, 0.7, 0.1]]))
        >>> method = ZeroQuantFP(group_size=2, rank=0, activations=None)
        >>> small = method.apply(layer, calibration=[(torch.eye(4),)])
        >>> small.weight.tolist(), small.spec.bits_per_weight((1, 4))
        ([[6.0, 2.0, 0.75, 0.125]], 14.0)

    Source:
        Wu et al. 2023, "ZeroQuant-FP: A Leap Forward in LLMs Post-Training W4A8 Quantization
        Using Floating-Point Formats", arXiv:2307.09782; LoRC is of Yao et al. 2023,
        arXiv:2303.08302. In github.com/microsoft/DeepSpeed there is no code of the formats.
    Differs:
        The exponent of M2 is rounded down where the paper has $\lceil\cdot\rceil$, which makes
        scales too small and clips the largest weights. It is the whole output that shares
        $s_{\max}$, not a block of outputs. Products are computed from weights put together.
    Checked:
        Scales and values by hand; what GPTQ and the product of low rank give against both
        alone; rounded inputs against the format; bits against the file.
    """

    distinguishing: ClassVar[str] = "inputs"
    want: ClassVar[tuple[str, ...]] = ("gram",)
    needs: ClassVar[tuple[str, ...]] = ("calibration",)

    format: str | None = "e2m1"
    group_size: int | None = 256
    scale_format: str = "shift4"
    activations: int | None = 8
    activation_format: str = "e4m3"
    rank: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 0:
            raise SettingError(f"rank must be at least 0, got {self.rank}")
        bits = number_format(self.activation_format).bits
        if self.activations not in (None, MOST_BITS, bits):
            raise SettingError(
                f"activation_format '{self.activation_format}' has {bits} bits, and "
                f"activations is {self.activations}; make them agree"
            )

    @classmethod
    def examples(cls) -> list[ZeroQuantFP]:
        """Gives groups and a rank small enough for the toy."""
        return [cls(group_size=4, rank=1)]

    @classmethod
    def neutral(cls) -> ZeroQuantFP:
        """Gives the setting that rounds nothing."""
        return cls(bits=MOST_BITS, format=None, activations=MOST_BITS)

    @classmethod
    def toy(cls) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
        """A layer that is exported fast."""
        source = torch.Generator().manual_seed(0)
        model = nn.Sequential(nn.Linear(7, 5), nn.ReLU()).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(generator=source)
        return model, (torch.randn(11, 7, generator=source),)

    def solve(
        self, matrix: torch.Tensor, spec: QuantSpec, seen: LayerStatistics | None
    ) -> Solved:
        """Rounds column by column, then makes up for what that lost.

        Args:
            matrix: (out, columns), float32.
            spec: How.
            seen: Statistics of the layer's inputs.

        Returns:
            The quantized weight, with a product of low rank where there is one.
        """
        assert seen is not None
        solved = gptq(matrix, seen.gram, spec)
        return low_rank_corrected(matrix, solved, self.rank) if self.rank else solved

    def inputs(self, model: nn.Module, given: Given) -> dict[str, Input]:
        """Says that inputs are rounded to the floating-point format, token by token.

        Args:
            model: The model, with rounded weights.
            given: Calibration batches, loss, generator.

        Returns:
            Name of a weight to the spec of its layer's input, and None.
        """
        form = number_format(self.activation_format)
        return {
            name: (QuantSpec(form, spec.granularity), None)
            for name, (spec, _) in super().inputs(model, given).items()
        }

    def pack(self, module: nn.Module, solved: Solved, given: Input | None) -> nn.Module | None:
        """Makes the layer of packed codes, with the product beside it.

        Args:
            module: The layer, with the rounded weight.
            solved: What `solve` gave for it.
            given: How its input is rounded.

        Returns:
            The layer, or None for one that can't be packed, and convolutions with a product.
        """
        if not isinstance(solved, LowRankCorrected):
            return super().pack(module, solved, given)
        if isinstance(module, nn.Conv2d) or not packable(module):
            return None
        layer = super().pack(module, solved.quantized, None)
        assert layer is not None
        branch = LowRankBranch.of(layer, solved.up, solved.down)
        return branch if given is None else rounded_input(branch, given)
