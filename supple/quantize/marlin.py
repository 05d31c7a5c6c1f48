"""4-bit weights in the order in which tensor cores read them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from supple.calibrate import grouped
from supple.errors import SettingError
from supple.formats import Quantized
from supple.layers.marlin import MarlinLinear, suited
from supple.layers.packed import Engine
from supple.quantize.base import MOST_BITS, Input, Quantizer, Solved
from supple.technique import register
from supple.transforms import Given
from supple.weights import matrices

__all__ = ["Marlin"]


@register(title="MARLIN: 4-bit weights in tensor-core order", paper="arXiv:2408.11743")
@dataclass(frozen=True, kw_only=True)
class Marlin(Quantizer):
    r"""Stores weights as 4-bit codes laid out for a kernel that stays bound by memory.

    A linear layer of which inputs come in multiples of 128 and outputs of 256 becomes a
    `supple.layers.marlin.MarlinLinear`: whole numbers from -8 to 7 with a float16 scale for
    each 128 inputs of an output, 4.125 bits a weight, in the order of the authors' kernel. All
    other layers stay as they are. While reading the weights takes longest, that is up to
    $B^* = \frac{F}{W} \cdot \frac{4.125}{16}$ tokens on a machine of $F$ operations and $W$
    bytes a second, a product is up to 16 / 4.125 = 3.88 times as fast as with 16 bits; see
    `supple.quantize._roofline`.

    Args:
        bits: 4, or 16, at which weights stay as they are.
        group_size: Inputs of an output that share a scale: 128, or None for all.
        engine: What multiplies on a CPU, see `supple.layers.packed`.
        layers: Shell-style pattern of the layers' paths; several are parted by commas, and `!`
            before one leaves out.

    Example:
        >>> layer = nn.Linear(128, 256, bias=False)
        >>> small = Marlin().apply(layer)
        >>> small.nbytes, layer.weight.nbytes
        (16896, 131072)

    Source:
        Frantar et al. 2024, "MARLIN: Mixed-Precision Auto-Regressive Parallel Inference on
        Large Language Models", arXiv:2408.11743; layout as in github.com/IST-DASLab/marlin.
    Differs:
        The authors' kernel for GPUs is not part of it, nor the layout of 2:4-sparse matrices.
        On a CPU PyTorch's 4-bit kernel multiplies, for inputs in bfloat16.
    Checked:
        Words and scales against the authors' order, written out; packed layers against
        rounded ones; bytes against the file.
    """

    distinguishing: ClassVar[str] = "pack"

    group_size: int | None = 128
    engine: Engine = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        plain = self.symmetric and self.format is None and self.activations is None
        if not self.packed:
            raise SettingError("packed must be True: the layout is what MARLIN is about")
        if self.bits not in (4, MOST_BITS) or self.group_size not in (128, None) or not plain:
            raise SettingError(
                "the layout is of symmetric whole numbers of 4 bits with group_size=128 or "
                f"None, and of weights only, got bits={self.bits}, group_size="
                f"{self.group_size}, symmetric={self.symmetric}, format={self.format} and "
                f"activations={self.activations}"
            )
        if self.scale_format != "fp16":
            raise SettingError(f"scale_format must be fp16, got {self.scale_format!r}")

    @classmethod
    def neutral(cls) -> Marlin:
        """16 bits."""
        return cls(bits=MOST_BITS)

    @classmethod
    def toy(cls) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
        """The smallest layer that the layout holds, and one that it does not."""
        generator = torch.Generator().manual_seed(0)
        model = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 3)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(generator=generator)
        return model, (torch.randn(5, 128, generator=generator),)

    @torch.no_grad()
    def by_block(self, model: nn.Module, given: Given) -> Iterator[Mapping[str, Solved]]:
        """Quantizes the weights that the layout can hold.

        Args:
            model: The model; it is changed.
            given: Calibration batches, loss, generator.

        Yields:
            Name of a weight to its matrix, quantized; nothing at 16 bits.

        Raises:
            SettingError: No layer has such a weight.
        """
        if not self.rounds_weights:
            return
        layers = {
            name: layer
            for name, layer in matrices(model, self.layers).items()
            if isinstance(layer, nn.Linear) and suited(self.spec(), tuple(layer.weight.shape))
        }
        if not layers:
            raise SettingError(
                "no linear layer has inputs in multiples of 128 and outputs of 256, which "
                "Marlin's layout needs; another quantizer holds any sizes"
            )
        for names in grouped(model, layers):
            yield {name: self._rounded(name, layers.pop(name), None) for name in names}

    def pack(self, module: nn.Module, solved: Solved, given: Input | None) -> nn.Module:
        """Makes the layer whose codes lie in Marlin's order.

        Args:
            module: The layer.
            solved: Its quantized weight.
            given: Nothing: inputs are not rounded.

        Returns:
            The layer.
        """
        assert isinstance(module, nn.Linear)
        assert isinstance(solved, Quantized)
        return MarlinLinear.from_quantized(module, solved, engine=self.engine)
