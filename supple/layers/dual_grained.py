"""Linear layers of 4-bit groups whose scales are whole numbers, so that products are, too.

A weight is `factor * times * (code - zero)`: the code and the zero point have 4 bits, `times`
is a whole number for each group and `factor` a number for each output. What stands behind the
factor fits 8 bits, so a product with inputs of 8 bits is one of whole numbers throughout, and
the factor comes in once, at the end.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from supple.errors import SettingError
from supple.formats import Int, Quantized, QuantSpec
from supple.layers.packed import PackedLinear, ready_integer

__all__ = ["DualGrained", "DualGrainedLinear"]

_LARGEST = 127


@dataclass(frozen=True, eq=False)
class DualGrained(Quantized):
    """A quantized matrix whose groups' scales are whole multiples of a factor of their row.

    Args:
        factor: (rows, 1); `scale / factor` is a whole number from 1 to 127, and that times a
            code less its zero point from -127 to 127.
    """

    factor: Tensor

    @property
    def times(self) -> Tensor:
        """The whole numbers, (rows, groups), float32."""
        return (self.scale / self.factor).round()

    def whole(self) -> Tensor:
        """Gives the matrix without the factors, int8.

        Raises:
            SettingError: A number needs more than 8 bits.
        """
        values = self.spec.format.decode(self.codes)
        if self.zero is not None:
            values = values - self.spec.spread(self.zero, self.shape)
        found = values * self.spec.spread(self.times, self.shape)
        if bool((found.abs() > _LARGEST).any()):
            raise SettingError(
                f"a multiple of a code must be from -{_LARGEST} to {_LARGEST}, got "
                f"{float(found.abs().max()):g}"
            )
        return found.to(torch.int8)


class DualGrainedLinear(PackedLinear):
    """A linear layer whose matrix is a `DualGrained`.

    With inputs of up to 8 bits its engine is `"integer"`.

    Args:
        in_features: Width of the input.
        out_features: Width of the output.
        spec: How the matrix is quantized: whole numbers in groups, scales held as `"int8"`.
        **settings: As for `supple.layers.packed.PackedLinear`.

    Shape:
        (..., in_features) to (..., out_features).

    Raises:
        SettingError: The spec is another one, or a value can't be used.

    Example:
        >>> spec = QuantSpec("uint4", "group", 32, False, scale_format="int8")
        >>> layer = DualGrainedLinear(64, 6, spec, bias=False, input=QuantSpec("int8", "token"))
        >>> layer.engine_for(torch.ones(3, 64)), layer.nbytes
        ('integer', 234)
    """

    factor: Tensor

    @torch.inference_mode(False)
    def _fill(self, quantized: Quantized) -> None:
        spec = quantized.spec
        if not isinstance(spec.format, Int) or spec.scale_format != "int8":
            raise SettingError(
                "scales are whole multiples of a factor: the spec must be of whole numbers, "
                f"with scale_format='int8', got {spec.settings()}"
            )
        super()._fill(quantized)
        if isinstance(quantized, DualGrained):
            # Not what the scales alone tell: their factor need not make the largest one 255.
            self.register_buffer("scale", quantized.times.byte().flatten())
            self.register_buffer("factor", quantized.factor.detach().float().clone())

    def quantized(self) -> DualGrained:
        """Gives codes, scales, zero points and factors, unpacked."""
        found = super().quantized()
        return DualGrained(
            found.codes, found.scale, found.zero, found.spec, found.shape, self.factor
        )

    def _is_whole(self, input: QuantSpec) -> bool:
        form = input.format
        return isinstance(form, Int) and form.bits <= 8 and input.granularity != "group"

    def _prepare(self, engine: str) -> tuple[Tensor, ...]:
        if engine != "integer":
            return super()._prepare(engine)
        return ready_integer(self.quantized().whole(), self.factor)
