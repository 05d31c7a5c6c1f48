"""A linear layer of 4-bit codes that are looked up as 8-bit floating-point numbers."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from supple.errors import SettingError
from supple.formats import Float, Int, Quantized
from supple.layers.packed import PackedLinear

__all__ = ["LookedUp", "LookupLinear"]

_EIGHT = Float(4, 3)


@dataclass(frozen=True, eq=False)
class LookedUp(Quantized):
    """Whole numbers of up to 4 bits whose products with a scale are numbers in e4m3.

    A group has a table with one entry for each code $c$: $\\mathrm{e4m3}(c\\,\\sigma / 8)$ with
    its scale $\\sigma$, itself in e4m3. One factor for the whole matrix lifts the largest scale
    to the top of the format, so that none is lost at its bottom.

    Raises:
        SettingError: Scales are not in e4m3, or codes no whole numbers of up to 4 bits without
            zero points.

    Example:
        >>> from supple.formats import QuantSpec, quantize
        >>> spec = QuantSpec("int4", "group", 2, scale_format="e4m3")
        >>> codes = quantize(torch.tensor([[7.5, 3.0, 1.5, 0.7]]), spec)
        >>> codes.dequantize().round(decimals=3).tolist()
        [[7.0, 3.0, 1.375, 0.7860000133514404]]
        >>> LookedUp.of(codes).dequantize()[0, :2].round(decimals=3).tolist()  # 392 is 384
        [6.85699987411499, 2.8570001125335693]
    """

    def __post_init__(self) -> None:
        form = self.spec.format
        whole = isinstance(form, Int) and form.bits <= 4 and self.spec.symmetric
        if not whole or self.spec.scale_format != "e4m3":
            raise SettingError(
                "tables hold whole numbers of up to 4 bits times scales in e4m3, without zero "
                f"points; got '{form.name}' and scale_format={self.spec.scale_format!r}"
            )

    @staticmethod
    def of(quantized: Quantized) -> LookedUp:
        """Looks the codes of a quantized matrix up.

        Args:
            quantized: The matrix.
        """
        return LookedUp(**{one.name: getattr(quantized, one.name) for one in fields(Quantized)})

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Gives the tensor that the codes stand for."""
        shape = self.spec.matrix_shape(self.shape)
        codes = self.spec.format.decode(self.codes).reshape(shape)
        level, factor = self.spec.scale_levels(self.scale)
        entries = _EIGHT.round(codes * self.spec.spread(level, self.shape) / 8)
        return (entries * (8 * factor)).reshape(self.shape).to(dtype)


class LookupLinear(PackedLinear):
    """A `PackedLinear` whose codes are looked up, group by group, as numbers in e4m3.

    It computes as a kernel would that multiplies 8-bit floating-point numbers; the product
    itself is the plain one.

    Example:
        >>> from torch import nn
        >>> from supple.formats import QuantSpec, quantize
        >>> linear = nn.Linear(8, 3)
        >>> spec = QuantSpec("int4", "group", 4, scale_format="e4m3")
        >>> LookupLinear.from_quantized(linear, quantize(linear.weight, spec)).nbytes
        34
    """

    def quantized(self) -> Quantized:
        """Gives codes and scales, unpacked, which look codes up."""
        return LookedUp.of(super().quantized())

    def engine_for(self, x: Tensor) -> str:
        """Tells what multiplies: always `"plain"`, as no kernel here rounds entries."""
        return "plain"
