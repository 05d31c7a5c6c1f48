"""Microscaling numbers of 4 bits: rotated in blocks, then rounded column by column."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from supple.calibrate import LayerStatistics
from supple.errors import SettingError, nearest
from supple.formats import Quantized, QuantSpec, Range
from supple.observers import RANGES, least_error
from supple.quantize._rotations import block_hadamards, inner, rotated
from supple.quantize._solvers import gptq
from supple.quantize.base import MOST_BITS, Input, Quantizer
from supple.technique import register
from supple.transforms import Given
from supple.weights import matrices

__all__ = ["MRGPTQ"]

_STEPS = 100


@register(title="MR-GPTQ: microscaling FP4", paper="arXiv:2509.23202")
@dataclass(frozen=True, kw_only=True)
class MRGPTQ(Quantizer):
    r"""Rounds weights and layers' inputs to 4-bit floats, few of which share a small scale.

    Numbers are 0, 1/2, 1, 3/2, 2, 3, 4, 6 and their negatives. In MXFP4, the default, 32 share
    a scale that is a power of two; in NVFP4 (`group_size=16, scale_format="e4m3"`) 16 share one
    of 8 bits. Powers of two are coarse, so heavy tails cost much: blocks of a layer's inputs
    are rotated by Hadamard matrices, as the network runs, and the weight is rotated along with
    them, once. Then

    1. the scales of the rotated weight are fixed, by the largest magnitude or by a search over
       100 of its shares from 1 down to 0.2;
    2. columns are rounded by GPTQ, in the order of falling second moments of their (rotated)
       inputs. Each keeps its own group's scale, so nothing is reordered at run time.

    Powers of two are $2^{\lfloor \log_2 \max |w| \rfloor - 2}$, times 4/3, with which the
    largest magnitude is never above 6 (`scale_format="e8m0-wide"`; `"e8m0"` without that
    factor).

    Args:
        bits: Of a weight's code; 4, or at 16 weights stay as they are.
        format: Name of the number format, `"e2m1"`; None for whole numbers.
        group_size: Inputs of an output, and numbers of an input, that share a scale.
        symmetric: Whether there are no zero points.
        scale_format: How scales are held; see `supple.formats.QuantSpec`.
        observer: How the range of a scale is chosen: `"mse"`, by search, or another name of
            `supple.observers.RANGES`.
        activations: Bits of the layers' inputs, as many as of the weights, or None (or 16) to
            leave them as they are.
        diagonal: Largest size of a Hadamard matrix; blocks are as large as the number of inputs
            allows, and at least as large as a group for rotations to be of use. 1 rotates
            nothing.
        layers: Shell-style pattern of the layers' paths; several are parted by commas, and `!`
            before one leaves out.
        packed: Whether linear layers and 2-d convolutions hold codes in place of weights.

    Example:
        >>> layer = nn.Linear(4, 1, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[8.0, 0.0, 0.0, 0.0]]))
        >>> small = MRGPTQ(group_size=4).apply(layer, calibration=[(torch.eye(4),)])
        >>> small.weight.tolist()
        [[4.0, 4.0, 4.0, 4.0]]
        >>> small(torch.tensor([[1.0, 0.0, 0.0, 0.0]])).tolist()
        [[8.0]]

    Source:
        Egiazarian et al. 2025, "Bridging the Gap Between Promise and Performance for
        Microscaling FP4 Quantization", arXiv:2509.23202; github.com/IST-DASLab/FP-Quant.
    Differs:
        With scales of 8-bit floats, the one factor that they have in common is found for each
        batch of inputs anew, not calibrated, and not shared by the layers of queries, keys and
        values. Convolutions are not rotated, and their inputs have a scale for each example.
        The kernels are not part of it.
    Checked:
        The function without rounding; rotated weights against GPTQ in the given order on
        rotated inputs; rounded inputs by hand.
    """

    distinguishing: ClassVar[str] = "change"
    want: ClassVar[tuple[str, ...]] = ("gram",)
    needs: ClassVar[tuple[str, ...]] = ("calibration",)

    format: str | None = "e2m1"
    group_size: int | None = 32
    scale_format: str = "e8m0-wide"
    observer: str = "mse"
    activations: int | None = 4
    diagonal: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.observer not in RANGES:
            raise SettingError(
                f"there is no observer '{self.observer}'{nearest(self.observer, RANGES)} "
                f"(observers: {', '.join(RANGES)})"
            )
        if self.activations not in (None, self.bits, MOST_BITS):
            raise SettingError(
                f"activations must be as many bits as weights have, {self.bits}, or None, got "
                f"{self.activations}"
            )
        if self.diagonal < 1 or self.diagonal & (self.diagonal - 1):
            raise SettingError(f"diagonal must be a power of two, got {self.diagonal}")

    @classmethod
    def examples(cls) -> list[MRGPTQ]:
        """Gives groups and rotations small enough for the toy."""
        return [cls(group_size=4, observer="minmax")]

    @classmethod
    def neutral(cls) -> MRGPTQ:
        """Gives the setting that rounds nothing."""
        return cls(bits=MOST_BITS, format=None, activations=None)

    @classmethod
    def toy(cls) -> tuple[nn.Module, tuple[Tensor, ...]]:
        """A layer that can be rotated, and is exported fast."""
        source = torch.Generator().manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 5), nn.ReLU()).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(generator=source)
        return model, (torch.randn(11, 8, generator=source),)

    @torch.no_grad()
    def change(self, model: nn.Module, given: Given) -> nn.Module:
        """Rotates layers' inputs and weights, then quantizes both.

        Args:
            model: A copy, which may be changed and returned.
            given: Calibration batches, loss, generator.

        Returns:
            The model.
        """
        if not self.rounds_weights:
            return super().change(model, given)
        names = list(matrices(model, self.layers))
        found = block_hadamards(model, self.layers, self.diagonal)
        model = rotated(model, found)
        paths = [(inner(name) if name in found else name).rpartition(".")[0] for name in names]
        within = dataclasses.replace(self, layers=", ".join(paths))
        return super(MRGPTQ, within).change(model, given)

    def solve(self, matrix: Tensor, spec: QuantSpec, seen: LayerStatistics | None) -> Quantized:
        """Rounds column by column with scales fixed before, those of large inputs first.

        Args:
            matrix: (out, columns), float32.
            spec: How.
            seen: Statistics of the layer's inputs.

        Returns:
            The quantized weight.
        """
        assert seen is not None
        searched: Range = partial(least_error, steps=_STEPS)
        observer = searched if self.observer == "mse" else RANGES[self.observer]
        return gptq(matrix, seen.gram, spec, order="activation", observer=observer)

    def inputs(self, model: nn.Module, given: Given) -> dict[str, Input]:
        """Says that inputs have the weights' format and groups.

        Args:
            model: The model, with rounded weights.
            given: Calibration batches, loss, generator.

        Returns:
            Name of a weight to the spec of its layer's input, and None.
        """
        names, spec = super().inputs(model, given), self.spec()
        layers = matrices(model, self.layers)
        by_example = QuantSpec(spec.format, "channel")
        return {
            name: (by_example if isinstance(layers[name], _ConvNd) else spec, None)
            for name in names
        }
