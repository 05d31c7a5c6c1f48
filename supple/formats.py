"""Numbers of a few bits: which values they have, and how tensors are scaled to them.

A `NumberFormat` rounds numbers that were scaled already, and turns them into codes and back. A
`QuantSpec` says which numbers of a tensor share a scale, and how the scales themselves are
held. `quantize` gives codes and scales, and `fake_quantize` what they stand for:

    spec = QuantSpec("int4", granularity="group", group_size=128, scale_format="fp16")
    quantized = quantize(weight, spec)
    quantized.dequantize(), quantized.nbytes, spec.bits_per_weight(weight.shape)

None of it has a gradient; rounding that can be trained through is a layer of its own.
"""

from __future__ import annotations

import functools
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from supple.errors import SettingError, nearest

__all__ = [
    "SHIFTS",
    "Codebook",
    "Float",
    "Granularity",
    "Int",
    "Midrise",
    "NumberFormat",
    "Power",
    "QuantSpec",
    "Quantized",
    "fake_quantize",
    "number_format",
    "quantize",
]

Granularity = Literal["tensor", "channel", "token", "group"]
ScaleFormat = Literal[
    "fp32", "fp16", "bf16", "e4m3", "e8m0", "e8m0-up", "e8m0-wide", "int8", "int4", "shift4"
]
ZeroFormat = Literal["code", "fp32", "fp16"]
Range = Callable[[Tensor, "QuantSpec"], tuple[Tensor, Tensor]]
"""Gives the range of (..., n) numbers over their last dimension: least and most, (...)."""

_MOST_BITS = 16
_SCALE_BITS = {
    "fp32": 32,
    "fp16": 16,
    "bf16": 16,
    "e4m3": 8,
    "e8m0": 8,
    "e8m0-up": 8,
    "e8m0-wide": 8,
    "int8": 8,
    "int4": 4,
    "shift4": 4,
}
SCALE_SLACK = 1 + 2.0**-10
"""By how much a scale in half precision may be too small for the ends of its range."""
_SCALE_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# ------------------------------------------------------------------------------------- formats


class NumberFormat(ABC):
    """The values that a number of a few bits can have; an immutable value itself."""

    if TYPE_CHECKING:
        # Not there at run time: a field of a dataclass would take it for its default.
        @property
        def bits(self) -> int:
            """Bits of a code."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The format as text, which `number_format` reads."""

    @property
    @abstractmethod
    def values(self) -> tuple[float, ...]:
        """All values, ascending."""

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """Gives the code of the nearest value; what lies outside gets the outermost one.

        Args:
            x: Numbers, scaled such that the format's values suit them.

        Returns:
            Codes from 0 to 2^bits - 1: uint8 up to 8 bits, else int32; shaped like `x`.
        """

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor:
        """Gives the values of codes, float32."""

    def round(self, x: Tensor) -> Tensor:
        """Gives the value that `decode(encode(x))` gives, in the type of `x`."""
        return self.decode(self.encode(x)).to(x.dtype)

    @property
    def levels(self) -> Tensor:
        """All values, ascending, float32."""
        return torch.tensor(self.values)

    @property
    def least(self) -> float:
        """The lowest value."""
        return self.values[0]

    @property
    def most(self) -> float:
        """The highest value."""
        return self.values[-1]

    @property
    def ends(self) -> tuple[float, float]:
        """What a scale without a zero point may map the ends of a range to."""
        return (-self.most if self.least < 0 else 0.0, self.most)

    def scale(self, least: Tensor, most: Tensor) -> Tensor:
        """Gives the smallest scales, without zero points, whose `ends` ranges do not exceed.

        Args:
            least: Lower ends of ranges; they count where there are negative values.
            most: Upper ends, of the same shape.

        Returns:
            The same shape, 0 or more.

        Example:
            >>> least, most = torch.tensor([-5.0, -1.0]), torch.tensor([0.0, 3.0])
            >>> number_format("int2").scale(least, most)
            tensor([2., 2.])
        """
        low, high = self.ends
        found = most / high
        return (found if low == 0 else torch.maximum(least / low, found)).clamp_min(0)


@dataclass(frozen=True)
class Int(NumberFormat):
    """Whole numbers; of two equally near ones the even one is taken.

    A code is the number minus the lowest one of so many bits.

    Args:
        bits: From 1 (only where not symmetric) to 16.
        symmetric: Whether there are negative numbers: -2^(bits-1) to 2^(bits-1) - 1, else 0 to
            2^bits - 1.
        narrow: Leaves the lowest negative number out, so that the range is symmetric.

    Raises:
        SettingError: There are no such numbers.

    Example:
        >>> Int(3).encode(torch.tensor([-9.0, -0.6, 2.5])).tolist()
        [0, 3, 6]
        >>> Int(3, narrow=True).round(torch.tensor([-9.0, -0.6, 2.5])).tolist()
        [-3.0, -1.0, 2.0]
    """

    bits: int
    symmetric: bool = True
    narrow: bool = False

    def __post_init__(self) -> None:
        if not 1 + self.symmetric <= self.bits <= _MOST_BITS:
            raise SettingError(
                f"bits must be from {1 + self.symmetric} to {_MOST_BITS}, got {self.bits}"
            )
        if self.narrow and not self.symmetric:
            raise SettingError("narrow=True leaves a negative number out: it needs symmetric")

    @property
    def name(self) -> str:
        """`int4`, `uint4` where not symmetric, `int4-narrow`."""
        return f"{'' if self.symmetric else 'u'}int{self.bits}{'-narrow' * self.narrow}"

    @property
    def offset(self) -> int:
        """What is added to a number to get its code."""
        return 2 ** (self.bits - 1) if self.symmetric else 0

    @property
    def least(self) -> float:
        """The lowest number."""
        return float(self.narrow - self.offset)

    @property
    def most(self) -> float:
        """The highest number."""
        return float(2**self.bits - 1 - self.offset)

    @property
    def ends(self) -> tuple[float, float]:
        """As for every format; of `int2`, half a step beyond -2 and 1.

        So all numbers are in use and, like every other value, an end is off by no more than
        half a step. Without the lowest number, or the negative ones, ends are exact.
        """
        if self.narrow or not self.symmetric:
            return super().ends
        return (self.least - 0.5, self.most + 0.5)

    @property
    def values(self) -> tuple[float, ...]:
        """All numbers, ascending."""
        return tuple(map(float, range(int(self.least), int(self.most) + 1)))

    def round(self, x: Tensor) -> Tensor:
        """Gives the nearest number."""
        return x.round().clamp(self.least, self.most)

    def encode(self, x: Tensor) -> Tensor:
        """Gives codes: numbers counted from the lowest of so many bits."""
        return (self.round(x) + self.offset).to(_code_dtype(self.bits))

    def decode(self, codes: Tensor) -> Tensor:
        """Gives the numbers of codes, float32."""
        return codes.float() - self.offset


@dataclass(frozen=True)
class Midrise(NumberFormat):
    """Halves of odd numbers: as many above zero as below, and no zero.

    A code is the number counted from the lowest one. Half-way lie whole numbers: odd ones go
    down, even ones up.

    Args:
        bits: From 1 to 16.

    Raises:
        SettingError: There are no such numbers.

    Example:
        >>> Midrise(2).values, Midrise(1).round(torch.tensor([-9.0, 0.2])).tolist()
        ((-1.5, -0.5, 0.5, 1.5), [-0.5, 0.5])
    """

    bits: int

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= _MOST_BITS:
            raise SettingError(f"bits must be from 1 to {_MOST_BITS}, got {self.bits}")

    @property
    def name(self) -> str:
        """`midrise2`."""
        return f"midrise{self.bits}"

    @property
    def least(self) -> float:
        """The lowest number."""
        return -self.most

    @property
    def most(self) -> float:
        """The highest number."""
        return float(2**self.bits - 1) / 2

    @property
    def values(self) -> tuple[float, ...]:
        """All numbers, ascending."""
        return tuple(self.least + code for code in range(2**self.bits))

    def round(self, x: Tensor) -> Tensor:
        """Gives the nearest number."""
        return ((x - 0.5).round() + 0.5).clamp(self.least, self.most)

    def encode(self, x: Tensor) -> Tensor:
        """Gives codes: numbers counted from the lowest."""
        return (self.round(x) + self.most).to(_code_dtype(self.bits))

    def decode(self, codes: Tensor) -> Tensor:
        """Gives the numbers of codes, float32."""
        return codes.float() - self.most


class _Listed(NumberFormat):
    """A format whose values are looked up in a list, and rounded to by half-way points."""

    @property
    def codes(self) -> tuple[int, ...]:
        """The code of each value of `values`; by default its place."""
        return tuple(range(len(self.values)))

    @property
    def rounds_up(self) -> tuple[bool, ...]:
        """For each value but the last, whether what lies half-way to the next goes up."""
        return tuple(code % 2 == 1 for code in self.codes[:-1])

    def encode(self, x: Tensor) -> Tensor:
        """Gives the code of the nearest value."""
        dtype = x.dtype if x.dtype == torch.float64 else torch.float32
        levels = torch.tensor(self.values, dtype=dtype, device=x.device)
        halves = (levels[1:] + levels[:-1]) / 2
        below = torch.nextafter(halves, torch.full_like(halves, -torch.inf))
        up = torch.tensor(self.rounds_up, device=x.device)
        places = torch.bucketize(x.to(dtype).contiguous(), torch.where(up, below, halves))
        codes = torch.tensor(self.codes, dtype=_code_dtype(self.bits), device=x.device)
        return codes[places]

    def decode(self, codes: Tensor) -> Tensor:
        """Gives the values of codes, float32."""
        table = [0.0] * 2**self.bits
        for code, value in zip(self.codes, self.values, strict=True):
            table[code] = value
        return torch.tensor(table, device=codes.device)[codes.int()]


@dataclass(frozen=True)
class Float(_Listed):
    """Floating-point numbers with a sign, subnormal ones too; ties go to the even code.

    A code is the number's own bits: sign, exponent, mantissa. Minus zero is rounded to zero.

    Args:
        exponent: Bits of the exponent, at least 1; its bias is 2^(exponent-1) - 1.
        mantissa: Bits of the mantissa, 0 or more.
        finite: Whether the largest exponent holds numbers, too, as in the formats of the Open
            Compute Project (where there are 8 bits the last code is no number); else it stands
            for infinity, as in IEEE 754.

    Raises:
        SettingError: There are fewer than 3 bits or more than 8, sign included.

    Example:
        >>> Float(2, 1).levels[7:].tolist()
        [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
        >>> Float(4, 3).most, Float(5, 2, finite=False).most
        (448.0, 57344.0)

    Source:
        Rouhani et al. 2023, "OCP Microscaling Formats (MX) Specification v1.0".
    """

    exponent: int
    mantissa: int
    finite: bool = True

    def __post_init__(self) -> None:
        if self.exponent < 1 or self.mantissa < 0 or not 3 <= self.bits <= 8:
            raise SettingError(
                "a float has at least 1 bit of exponent, and 3 to 8 bits with its sign, got "
                f"exponent={self.exponent} and mantissa={self.mantissa}"
            )
        if not self.finite and self.exponent == 1:
            raise SettingError("one bit of exponent leaves none for infinity; set finite=True")

    @property
    def bits(self) -> int:
        """Bits of a code, sign included."""
        return 1 + self.exponent + self.mantissa

    @property
    def name(self) -> str:
        """`e2m1`; `e5m2` is the one of IEEE kind, others of that kind end in `-ieee`."""
        name = f"e{self.exponent}m{self.mantissa}"
        return _suffixed(name, self.finite)

    @property
    def _magnitudes(self) -> tuple[float, ...]:
        """What the codes without a sign stand for, ascending."""
        return _magnitudes(self.exponent, self.mantissa, self.finite)

    @property
    def values(self) -> tuple[float, ...]:
        """All numbers, ascending; zero once."""
        return (*(-value for value in self._magnitudes[:0:-1]), *self._magnitudes)

    @property
    def codes(self) -> tuple[int, ...]:
        """The numbers' own bits."""
        many, sign = len(self._magnitudes), 2 ** (self.bits - 1)
        return (*(sign + code for code in range(many - 1, 0, -1)), *range(many))


@functools.cache
def _magnitudes(exponent: int, mantissa: int, finite: bool) -> tuple[float, ...]:
    bias, steps = 2 ** (exponent - 1) - 1, 2**mantissa
    codes = range(2 ** (exponent + mantissa))
    if not finite:
        codes = codes[:-steps]
    elif exponent + mantissa == 7:
        codes = codes[:-1]
    return tuple(
        math.ldexp(code % steps + steps * (code >= steps), max(code // steps, 1) - bias) / steps
        for code in codes
    )


def _suffixed(name: str, finite: bool) -> str:
    if name == "e5m2":
        return f"{name}-finite" if finite else name
    return name if finite else f"{name}-ieee"


@dataclass(frozen=True)
class Power(NumberFormat):
    r"""Powers of whole numbers: finer steps near zero.

    The code of $x$, of magnitude up to 1, is $q = \text{round}(n\,\text{sign}(x)\,|x|^a)$ with
    $n = 2^{b-1} - 1$, and stands for $\text{sign}(q)\,(|q| / n)^{1/a}$. So $x$ is rounded to
    the value that is nearest in the power.

    Args:
        bits: $b$, from 2 to 16.
        exponent: $a$, above 0; 1 gives whole numbers over $n$.

    Raises:
        SettingError: A value is out of range.

    Example:
        >>> Power(3, 0.5).levels.tolist()[3:]
        [0.0, 0.1111111119389534, 0.4444444477558136, 1.0]

    Source:
        Yvinec et al. 2023, "PowerQuant: Automorphism Search for Non-Uniform Quantization",
        arXiv:2301.09858.
    """

    bits: int
    exponent: float

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= _MOST_BITS:
            raise SettingError(f"bits must be from 2 to {_MOST_BITS}, got {self.bits}")
        if not 0 < self.exponent < math.inf:
            raise SettingError(f"exponent must be above 0 and finite, got {self.exponent}")

    @property
    def name(self) -> str:
        """`power4^0.5`."""
        return f"power{self.bits}^{self.exponent!r}"

    @property
    def _whole(self) -> Int:
        return Int(self.bits, narrow=True)

    @property
    def values(self) -> tuple[float, ...]:
        """All values, from -1 to 1."""
        most = self._whole.most
        return tuple(
            math.copysign((abs(q) / most) ** (1 / self.exponent), q) for q in self._whole.values
        )

    def encode(self, x: Tensor) -> Tensor:
        """Gives codes, those of `Int` for the powers."""
        return self._whole.encode(x.sign() * x.abs() ** self.exponent * self._whole.most)

    def decode(self, codes: Tensor) -> Tensor:
        """Gives the values of codes, float32."""
        part = self._whole.decode(codes) / self._whole.most
        return part.sign() * part.abs() ** (1 / self.exponent)


@dataclass(frozen=True)
class Codebook(_Listed):
    """Any values, such as the 16 of NF4; of two equally near ones the lower is taken.

    Args:
        entries: The values, ascending, 2 to 256; a value's code is its place.

    Raises:
        SettingError: The values do not ascend, or there are too few or too many.

    Example:
        >>> Codebook((-1.0, 1.0)).round(torch.tensor([-0.2, 0.0, 7.0])).tolist()
        [-1.0, -1.0, 1.0]
        >>> number_format("nf4").bits
        4
    """

    entries: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "entries", tuple(map(float, self.entries)))
        if not 2 <= len(self.entries) <= 256:
            raise SettingError(f"a codebook has 2 to 256 values, got {len(self.entries)}")
        if any(
            not low < high for low, high in zip(self.entries, self.entries[1:], strict=False)
        ):
            raise SettingError(f"values of a codebook must ascend, got {self.entries}")

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return (len(self.entries) - 1).bit_length()

    @property
    def name(self) -> str:
        """`nf4`, or all values: `levels(-1.0,1.0)`."""
        return "nf4" if self.entries == _NF4 else f"levels({','.join(map(repr, self.entries))})"

    @property
    def values(self) -> tuple[float, ...]:
        """All values, ascending."""
        return self.entries

    @property
    def rounds_up(self) -> tuple[bool, ...]:
        """Nothing goes up from half-way."""
        return (False,) * (len(self.entries) - 1)


_NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""NF4: quantiles of the normal distribution, with an exact zero (arXiv:2305.14314)."""

SHIFTS = Codebook(tuple(2.0**shift for shift in range(-14, 1)))
"""What scales of the format `shift4` are multiples of their row's largest by."""


def number_format(text: str | NumberFormat) -> NumberFormat:
    """Gives the format of a name.

    Args:
        text: `int4`, `uint4`, `int8-narrow`, `midrise2`, `e2m1`, `e4m3`, `e5m2`, `nf4`,
            `power4^0.5`, `levels(-1,1)` and the like; a format is given back.

    Returns:
        The format.

    Raises:
        SettingError: There is no such format.

    Example:
        >>> number_format("uint3"), number_format("e3m0").most
        (Int(bits=3, symmetric=False, narrow=False), 16.0)
    """
    if isinstance(text, NumberFormat):
        return text
    if text == "nf4":
        return Codebook(_NF4)
    if found := re.fullmatch(r"(u?)int(\d+)(-narrow)?", text):
        return Int(int(found[2]), symmetric=not found[1], narrow=bool(found[3]))
    if found := re.fullmatch(r"midrise(\d+)", text):
        return Midrise(int(found[1]))
    if found := re.fullmatch(r"e(\d)m(\d)(-ieee|-finite)?", text):
        exponent, mantissa = int(found[1]), int(found[2])
        for finite in (True, False):
            if _suffixed(f"e{exponent}m{mantissa}", finite) == text:
                return Float(exponent, mantissa, finite)
    if found := re.fullmatch(r"power(\d+)\^([-+.\de]+)", text):
        return Power(int(found[1]), float(found[2]))
    if found := re.fullmatch(r"levels\(([-+.,\de ]+)\)", text):
        return Codebook(tuple(float(one) for one in found[1].split(",")))
    known = ("int4", "uint4", "int8-narrow", "e2m1", "e3m0", "e2m3", "e3m2", "e4m3", "e5m2")
    raise SettingError(
        f"there is no number format {text!r}{nearest(text, (*known, 'nf4'))} (formats: "
        f"{', '.join(known)}, nf4, power4^0.5, levels(-1,1) and the like)"
    )


def _code_dtype(bits: int) -> torch.dtype:
    return torch.uint8 if bits <= 8 else torch.int32


# --------------------------------------------------------------------------------------- specs


@dataclass(frozen=True, init=False)
class QuantSpec:
    r"""How a tensor is quantized: number format, who shares a scale, how scales are held.

    A number $x$ has the code of $x / s + z$, and a code of value $v$ stands for $s\,(v - z)$.

    Args:
        format: The numbers' format, or its name.
        granularity: Who shares a scale: the whole `"tensor"`; a `"channel"`, which is a slice
            of the first dimension; a `"token"`, all of the last dimension; a `"group"` of
            `group_size` neighbours of the last dimension. Weights are quantized as
            `supple.weights.as_matrix` lays them out, so that a channel is an output.
        group_size: Size of a group. Where it does not divide the last dimension, the last
            group is smaller.
        symmetric: Whether there is no zero point $z$; with one, the format has to be `Int`.
        scale_format: `"fp32"`, `"fp16"`, `"bf16"`; `"e8m0"`, powers of two chosen as the
            Microscaling formats do (the largest values may be clipped), `"e8m0-up"`, those not
            below the scale, `"e8m0-wide"`, the first kind times what is just enough not to clip
            (4/3 for `e2m1`); `"e4m3"` with one float32 factor for the tensor; `"int8"`,
            `"int4"`, whole numbers from 1 with a float32 factor for each row; `"shift4"`, the
            row's largest scale, in float32, over a power of two up to 2^14, rounded up.
        zero_format: `"code"` for whole zero points within the codes, which make zero exact, or
            `"fp32"` or `"fp16"`.

    Raises:
        SettingError: A value can't be used, or values don't go together.

    Example:
        >>> spec = QuantSpec("int4", "group", 2)
        >>> fake_quantize(torch.tensor([[7.5, 2.2, 15.0, 3.0, 0.0]]), spec).tolist()
        [[7.0, 2.0, 14.0, 4.0, 0.0]]
        >>> QuantSpec("int4", "group", 128, scale_format="fp16").bits_per_weight((4, 256))
        4.125
    """

    format: NumberFormat
    granularity: Granularity = "channel"
    group_size: int | None = None
    symmetric: bool = True
    scale_format: ScaleFormat = "fp32"
    zero_format: ZeroFormat = "code"

    def __init__(
        self,
        format: NumberFormat | str,
        granularity: Granularity = "channel",
        group_size: int | None = None,
        symmetric: bool = True,
        scale_format: ScaleFormat = "fp32",
        zero_format: ZeroFormat = "code",
    ) -> None:
        values = (
            number_format(format),
            granularity,
            group_size,
            symmetric,
            scale_format,
            zero_format,
        )
        for field, value in zip(self.__dataclass_fields__, values, strict=True):
            object.__setattr__(self, field, value)
        self._check()

    def _check(self) -> None:
        for field, options in (
            ("granularity", Granularity),
            ("scale_format", ScaleFormat),
            ("zero_format", ZeroFormat),
        ):
            got = getattr(self, field)
            if got not in get_args(options):
                raise SettingError(
                    f"{field} must be one of {', '.join(get_args(options))}, got {got!r}"
                    f"{nearest(str(got), get_args(options))}"
                )
        if (self.granularity == "group") != (self.group_size is not None):
            raise SettingError(
                "group_size goes with granularity='group' and only with it, got granularity="
                f"{self.granularity!r} and group_size={self.group_size}"
            )
        if self.group_size is not None and self.group_size < 1:
            raise SettingError(f"group_size must be at least 1, got {self.group_size}")
        if not self.symmetric and not isinstance(self.format, Int):
            raise SettingError(
                f"zero points need whole numbers, got '{self.format.name}'; set symmetric=True"
            )

    # -- as JSON

    def settings(self) -> dict[str, Any]:
        """Gives the spec as JSON can hold it; `QuantSpec(**settings)` makes it again."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return fields | {"format": self.format.name}

    # -- what it costs

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return self.format.bits

    def bits_per_weight(self, shape: Sequence[int]) -> float:
        """Gives the bits that a number takes, with its share of scales and zero points.

        Args:
            shape: Shape of the tensor.

        Returns:
            Bits, codes not padded to bytes. Values of a codebook that has no name are counted.
        """
        return self.total_bits(shape) / math.prod(shape)

    def nbytes(self, shape: Sequence[int]) -> int:
        """Gives the bytes of a tensor of some shape: all codes packed, scales, zero points."""
        codes = math.prod(shape) * self.bits
        return -(-codes // 8) + -(-(self.total_bits(shape) - codes) // 8)

    def total_bits(self, shape: Sequence[int]) -> int:
        """Gives the bits of a tensor of some shape, scales and all, not padded to bytes."""
        rows, groups = self.scale_shape(shape)
        bits = math.prod(shape) * self.bits + rows * groups * _SCALE_BITS[self.scale_format]
        if not self.symmetric:
            each = {"code": self.bits, "fp32": 32, "fp16": 16}[self.zero_format]
            bits += rows * groups * each
        if self.scale_format == "e4m3":
            bits += 32
        elif self.scale_format in ("int8", "int4", "shift4"):
            bits += 32 * rows
        if isinstance(self.format, Codebook) and self.format.name != "nf4":
            bits += 32 * len(self.format.entries)
        return bits

    # -- rows and groups

    def matrix_shape(self, shape: Sequence[int]) -> tuple[int, int]:
        """Gives the rows and columns as which a tensor is scaled: scales lie within rows."""
        count = math.prod(shape)
        if not count:
            raise SettingError(f"there is nothing to quantize in a tensor of shape {(*shape,)}")
        if self.granularity == "tensor" or not shape:
            return 1, count
        if self.granularity == "channel":
            return shape[0], count // shape[0]
        return count // shape[-1], shape[-1]

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, int]:
        """Gives the shape of the scales of a tensor: rows and groups in each."""
        rows, columns = self.matrix_shape(shape)
        return rows, -(-columns // (self.group_size or columns))

    def blocks(self, x: Tensor) -> Iterator[Tensor]:
        """Yields the numbers that share scales, (rows, groups, n); a smaller last group apart.

        Args:
            x: The tensor.
        """
        matrix = x.reshape(self.matrix_shape(x.shape))
        rows, columns = matrix.shape
        size = min(self.group_size or columns, columns)
        whole = columns // size * size
        yield matrix[:, :whole].reshape(rows, -1, size)
        if whole < columns:
            yield matrix[:, None, whole:]

    def spread(self, scale: Tensor, shape: Sequence[int]) -> Tensor:
        """Gives scales, or zero points, in a shape that broadcasts to the rows and columns.

        Args:
            scale: Shape `scale_shape(shape)`.
            shape: Shape of the tensor that they are of.

        Returns:
            Shape (rows, 1), or (rows, columns) where a row has several groups.
        """
        if scale.shape[1] == 1 or self.group_size is None:
            return scale
        columns = self.matrix_shape(shape)[1]
        return scale.repeat_interleave(self.group_size, 1)[:, :columns]

    # -- scales

    def scales(self, x: Tensor, observer: Range | None = None) -> tuple[Tensor, Tensor | None]:
        """Finds the scales of a tensor.

        Args:
            x: The tensor.
            observer: Gives the range of numbers that share a scale, such as a function of
                `supple.observers.RANGES`; by default least and most.

        Returns:
            Scales and zero points (None where symmetric), each of shape
            `scale_shape(x.shape)`, float32, values that the scale format has. A group of zeros
            has the largest scale of the others, or 1.

        Raises:
            SettingError: The tensor is empty.
        """
        ranges = [(observer or _minmax)(part.float(), self) for part in self.blocks(x)]
        least, most = (torch.cat(ends, 1) for ends in zip(*ranges, strict=True))
        return self.scales_of(least, most)

    def scales_of(self, least: Tensor, most: Tensor) -> tuple[Tensor, Tensor | None]:
        """Gives the scales, and zero points, that map ranges to the format's values.

        Args:
            least: Lower ends of the ranges, (rows, groups); zero is taken in.
            most: Upper ends.

        Returns:
            As `scales`.
        """
        form = self.format
        if self.symmetric:
            if self.scale_format in ("e8m0", "e8m0-wide"):
                # Powers of two follow the largest magnitude, whatever its sign.
                most = torch.maximum(most, -least)
            return self.stored_scale(form.scale(least, most)), None
        least, most = least.clamp_max(0), most.clamp_min(0)
        scale = self.stored_scale((most - least) / (form.most - form.least))
        return scale, self.stored_zero(form.least - least / scale)

    def stored_zero(self, zero: Tensor) -> Tensor:
        """Rounds zero points to what their format has, and to codes where they are such."""
        if self.zero_format == "code":
            return zero.round().clamp(self.format.least, self.format.most)
        return zero.half().float() if self.zero_format == "fp16" else zero

    def rounded(self, values: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        """Rounds numbers to what their codes stand for.

        Args:
            values: The numbers.
            scale: Scales, in a shape that broadcasts to the numbers.
            zero: Zero points, or None where there are none.

        Returns:
            Numbers of the same shape.
        """
        if zero is None:
            return self.format.round(values / scale) * scale
        return (self.format.round(values / scale + zero) - zero) * scale

    def stored_scale(self, scale: Tensor) -> Tensor:
        """Rounds scales to what their format has; none is zero or infinite afterwards.

        Args:
            scale: Shape (rows, groups), 0 or more.

        Returns:
            The same shape, float32.
        """
        scale = scale.float()
        scale = torch.where(scale > 0, scale, scale.flatten().amax(0))
        scale = torch.where(scale > 0, scale, 1.0)
        if self.scale_format in _SCALE_DTYPES:
            dtype = _SCALE_DTYPES[self.scale_format]
            info = torch.finfo(dtype)
            return scale.clamp(info.smallest_normal, info.max).to(dtype).float()
        if self.scale_format in ("e8m0", "e8m0-wide"):
            # The factor makes up for what the division by the format's end was rounded by.
            reach = (scale * (self.format.ends[1] * (1 + 2.0**-22))).log2().floor()
            power = (reach - math.floor(math.log2(self.format.most))).clamp(-126, 127)
            return torch.exp2(power) * self.stretch
        if self.scale_format == "e8m0-up":
            return torch.exp2(scale.log2().ceil().clamp(-126, 127))
        levels, factor = self.scale_levels(scale)
        return levels * factor

    @property
    def stretch(self) -> float:
        """What powers of two are multiplied by to give scales."""
        if self.scale_format != "e8m0-wide":
            return 1.0
        most = self.format.most
        return float(2.0 ** (math.floor(math.log2(most)) + 1) / most)

    def scale_levels(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Takes scales that are held relative to a factor apart.

        Args:
            scale: Shape (rows, groups), above 0; of scale format `e4m3`, `int8`, `int4` or
                `shift4`.

        Returns:
            Values that the scale format has, (rows, groups), and the factors: (1, 1) for
            `e4m3`, else (rows, 1). Scales that `stored_scale` gave come apart without loss.
        """
        if self.scale_format == "e4m3":
            form: NumberFormat = Float(4, 3)
            factor = scale.flatten().amax(0).reshape(1, 1) / form.most
            smallest = 2.0**-9
        elif self.scale_format == "shift4":
            factor = scale.amax(1, keepdim=True)
            # With 1/2 <= m < 1 a ratio of m 2^e lies between 2^(e-1) and 2^e.
            shift = (torch.frexp(factor / scale).exponent - 1).clamp(0, 14)
            return torch.exp2(-shift.float()), factor
        else:
            form = Int(_SCALE_BITS[self.scale_format], symmetric=False)
            factor, smallest = scale.amax(1, keepdim=True) / form.most, 1.0
        return form.round((scale / factor).clamp_min(smallest)), factor


def _minmax(values: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    return values.amin(-1), values.amax(-1)


# ---------------------------------------------------------------------------- quantized tensors


@dataclass(frozen=True, eq=False)
class Quantized:
    """A tensor as codes and scales.

    Args:
        codes: Codes of the spec's format, in the tensor's shape.
        scale: Scales, (rows, groups): see `QuantSpec.scale_shape`.
        zero: Zero points, of the same shape, or None.
        spec: How the tensor is quantized.
        shape: Shape of the tensor.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    spec: QuantSpec
    shape: torch.Size

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Gives the tensor that the codes stand for."""
        rows = self.spec.matrix_shape(self.shape)
        values = self.spec.format.decode(self.codes).reshape(rows)
        return _scaled_back(values, self.spec, self.scale, self.zero, self.shape).to(dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, packed, and of scales and zero points."""
        return self.spec.nbytes(self.shape)

    @property
    def total_bits(self) -> int:
        """Bits of codes, scales and zero points, not padded to bytes."""
        return self.spec.total_bits(self.shape)


def quantize(
    x: Tensor,
    spec: QuantSpec,
    scale: Tensor | None = None,
    zero: Tensor | None = None,
    *,
    observer: Range | None = None,
) -> Quantized:
    """Rounds a tensor to codes.

    Args:
        x: The tensor, not empty.
        spec: How.
        scale: Scales of shape `spec.scale_shape(x.shape)`; by default found by the observer.
        zero: Zero points for these scales.
        observer: As in `QuantSpec.scales`.

    Returns:
        Codes, scales and zero points.

    Raises:
        SettingError: The tensor is empty, or scales are of another shape.

    Example:
        >>> spec = QuantSpec("uint2", symmetric=False)
        >>> found = quantize(torch.tensor([[-1.0, 0.0, 3.0]]), spec)
        >>> found.codes.tolist(), found.scale.item(), found.zero.item(), found.nbytes
        ([[0, 1, 3]], 1.3333333730697632, 1.0, 6)
    """
    ready, scale, zero = _prepared(x, spec, scale, zero, observer)
    return Quantized(spec.format.encode(ready).reshape(x.shape), scale, zero, spec, x.shape)


def fake_quantize(
    x: Tensor,
    spec: QuantSpec,
    scale: Tensor | None = None,
    zero: Tensor | None = None,
    *,
    observer: Range | None = None,
) -> Tensor:
    """Gives what `quantize(...).dequantize()` gives, in the type of `x`.

    Args:
        x: The tensor, not empty.
        spec: How.
        scale: Scales; by default found by the observer.
        zero: Zero points for these scales.
        observer: As in `QuantSpec.scales`.

    Returns:
        A tensor of the same shape and type, of few different values.
    """
    ready, scale, zero = _prepared(x, spec, scale, zero, observer)
    return _scaled_back(spec.format.round(ready), spec, scale, zero, x.shape).to(x.dtype)


def _prepared(
    x: Tensor,
    spec: QuantSpec,
    scale: Tensor | None,
    zero: Tensor | None,
    observer: Range | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gives a tensor's rows, scaled and shifted, and the scales and zero points."""
    if scale is None:
        scale, zero = spec.scales(x, observer)
    for name, tensor in (("scale", scale), ("zero", zero)):
        if tensor is not None and tensor.shape != spec.scale_shape(x.shape):
            raise SettingError(
                f"{name} must be of shape {spec.scale_shape(x.shape)} for a tensor of shape "
                f"{tuple(x.shape)}, got {tuple(tensor.shape)}"
            )
    if (zero is None) != spec.symmetric:
        raise SettingError(
            "zero points go with symmetric=False and only with it: pass zero= with scale="
        )
    # One scale for all needs no rows, and no copy of what does not lie in order.
    one = spec.granularity == "tensor" and x.dim() > 1
    rows = x if one else x.reshape(spec.matrix_shape(x.shape))
    ready = rows.float() / spec.spread(scale, x.shape)
    return ready if zero is None else ready + spec.spread(zero, x.shape), scale, zero


def _scaled_back(
    values: Tensor, spec: QuantSpec, scale: Tensor, zero: Tensor | None, shape: Sequence[int]
) -> Tensor:
    if zero is not None:
        values = values - spec.spread(zero, shape)
    return (values * spec.spread(scale, shape)).reshape((*shape,))
