"""Whole-number inference: weights by channel, activations with fixed ranges, norms folded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from supple.errors import SettingError, nearest
from supple.formats import Granularity, Int, NumberFormat, QuantSpec
from supple.observers import RANGES
from supple.quantize._fold import fold_norms
from supple.quantize._ranges import fixed_ranges
from supple.quantize.base import MOST_BITS, Input, Quantizer
from supple.technique import register
from supple.transforms import Given

__all__ = ["Int8Whitepaper"]


@register(title="Quantization whitepaper: int8 by channel", paper="arXiv:1806.08342")
@dataclass(frozen=True, kw_only=True)
class Int8Whitepaper(Quantizer):
    r"""Makes a trained network ready for whole-number arithmetic; nothing is trained.

    Batch norms are folded into the layers before them. A weight $w$ gets the whole number
    $q = \text{clip}(\text{round}(w / s), -n, n)$ with $n = 2^{b-1} - 1$ and a scale
    $s = \max |w| / n$ for each output channel. What a layer is given gets
    $q = \text{clip}(\text{round}(x / s) + z, 0, 2^b - 1)$ with one scale and one whole zero
    point $z$ for each layer, from the range that calibration data has there; zero, and so
    padding, is exact.

    Args:
        bits: Of weights, from 2; at 16 they stay as they are.
        activations: Bits of the layers' inputs; 16 or None leaves them as they are.
        granularity: Who shares a weight's scale: a `"channel"`, or the whole `"tensor"`.
        observer: How the range of an input is found: `"minmax"`, `"ema"` (running averages of
            the batches' least and most) or a name of `supple.observers.RANGES`.
        decay: Of the running averages.
        layers: Shell-style pattern of the layers' paths; several are parted by commas, and `!`
            before one leaves out.
        packed: Whether layers hold codes in place of weights.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 1, bias=False))
        >>> _ = model[0].weight.data.copy_(torch.tensor([[1.27, 0.304]]))
        >>> small = Int8Whitepaper().apply(model, calibration=[(torch.tensor([[0.0, 2.55]]),)])
        >>> [round(value, 6) for value in small[0].weight.flatten().tolist()]
        [1.27, 0.3]
        >>> round(small(torch.tensor([[1.003, 9.0]])).item(), 6)
        2.035

    Source:
        Krishnamoorthi 2018, "Quantizing deep convolutional networks for efficient inference: A
        whitepaper", arXiv:1806.08342.
    Differs:
        Of the whitepaper's two ways this is the one without training. Numbers stay in floating
        point, of the values that whole-number arithmetic has; sums of a residual stream, the
        last layer's output and biases are not rounded. Ranges are those of the network whose
        weights are rounded already.
    Checked:
        Scales and zero points by hand; folding against the network before; a layer's output
        against whole-number arithmetic with an int32 accumulator.
    """

    distinguishing: ClassVar[str] = "inputs"
    needs: ClassVar[tuple[str, ...]] = ("calibration",)

    bits: int = 8
    scale_format: str = "fp32"
    activations: int | None = 8
    granularity: Granularity = "channel"
    observer: str = "minmax"
    decay: float = 0.9

    def __post_init__(self) -> None:
        if self.granularity not in ("channel", "tensor"):
            raise SettingError(
                f"granularity must be channel or tensor, got {self.granularity!r}"
            )
        super().__post_init__()
        if self.group_size is not None or not self.symmetric or self.format is not None:
            raise SettingError(
                "weights are symmetric whole numbers with a scale for each channel or tensor: "
                "leave group_size, symmetric and format as they are"
            )
        if self.observer not in (*RANGES, "ema"):
            raise SettingError(
                f"there is no observer '{self.observer}'"
                f"{nearest(self.observer, (*RANGES, 'ema'))} (observers: "
                f"{', '.join(RANGES)}, ema)"
            )
        if not 0 <= self.decay < 1:
            raise SettingError(f"decay must be in [0, 1), got {self.decay}")

    @classmethod
    def examples(cls) -> list[Int8Whitepaper]:
        """Gives few bits, and ranges that are averaged."""
        return [cls(bits=4, activations=6, observer="ema")]

    @classmethod
    def neutral(cls) -> Int8Whitepaper:
        """Gives the setting that changes nothing."""
        return cls(bits=MOST_BITS, activations=MOST_BITS)

    @classmethod
    def toy(cls) -> tuple[nn.Module, tuple[Tensor, ...]]:
        """Gives a small network with convolutions, norms and a linear layer."""
        source = torch.Generator().manual_seed(3)
        model = nn.Sequential(
            nn.Conv2d(2, 5, 3, padding=1, bias=False),
            nn.BatchNorm2d(5),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(45, 3),
        )
        with torch.no_grad():
            for tensor in model.state_dict().values():
                if tensor.is_floating_point():
                    tensor.uniform_(0.1, 0.5, generator=source)
        return model, (torch.randn(7, 2, 3, 3, generator=source),)

    def number_format(self) -> NumberFormat:
        """Gives whole numbers whose range is symmetric."""
        return Int(self.bits, narrow=True)

    def spec(self) -> QuantSpec:
        """Gives how weights are quantized."""
        return QuantSpec(self.number_format(), self.granularity)

    @torch.no_grad()
    def change(self, model: nn.Module, given: Given) -> nn.Module:
        """Folds norms, rounds the weights, and lets layers round their inputs."""
        if not self.rounds_weights and not self.rounds_inputs:
            return model
        return super().change(fold_norms(model, *given.inputs()), given)

    @property
    def inputs_wait(self) -> bool:
        """Always: ranges are those of the rounded network."""
        return True

    def inputs(self, model: nn.Module, given: Given) -> dict[str, Input]:
        """Gives the ranges that calibration data has, by layer."""
        if self.activations is None or not self.rounds_inputs:
            return {}
        spec = QuantSpec(Int(self.activations, symmetric=False), "tensor", symmetric=False)
        return fixed_ranges(
            model, given, spec, self.layers, observer=self.observer, decay=self.decay
        )
