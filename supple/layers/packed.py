"""Layers that hold their weight as packed codes of a few bits, with scales.

Codes lie bit after bit, without gaps, and scales in the format that their spec says, so a file
is as small as `QuantSpec.nbytes` promises. Between the layer and its product stands an engine:

- `"plain"` puts the weight together and multiplies. It works everywhere: with gradients to the
  input, on any device, in exported programs. It reads far more memory than the codes take.
  Where none of the others serves, `"rows"` does so for some rows at a time, in the cache.
- `"integer"`, where inputs are quantized to whole numbers of up to 8 bits, too: an exact
  product of whole numbers.
- `"int4"` and `"int8"`, PyTorch's kernels for inputs in bfloat16 that take codes apart in
  registers.
- `"triton"`, on GPUs where Triton is installed, does so for whole numbers of up to 8 bits and
  inputs of any type (see `supple.layers.triton_linear`). Quantized inputs are rounded first.

`"auto"`, the default, takes the fastest of these that computes the same up to the rounding of
the input's own type; `"bfloat16"` lets inputs in float32 be rounded to bfloat16 for kernels.

Measured on one core of an EPYC with AVX-512, 2048 x 2048, for 1 token and for 32: dense in
bfloat16 0.38 and 1.8 ms, `"int4"` 0.21 and 3.2, `"int8"` 0.22 and 24, `"integer"` 0.06 and 1.3,
`"plain"` some 15 for either. So the kernels serve few tokens. Given float32 they are slower
than a dense layer, up to a hundred times, so they are not.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import _get_current_dispatch_mode

from supple.errors import SettingError, UnsupportedModelError, nearest
from supple.formats import (
    SHIFTS,
    Float,
    Int,
    NumberFormat,
    Quantized,
    QuantSpec,
    fake_quantize,
    quantize,
)
from supple.layers.factorized import FactorizedLinear

__all__ = [
    "Engine",
    "PackedConv2d",
    "PackedEmbedding",
    "PackedLinear",
    "PackedMatrix",
    "linear_shape",
    "pack_codes",
    "ready_integer",
    "unpack_codes",
]

Engine = Literal["auto", "bfloat16", "plain"]
_Layer = TypeVar("_Layer", bound="_Packed")
_HELD = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_KERNEL_GROUPS = (256, 128, 64, 32)  # sizes that the 4-bit kernel takes
_KERNEL_ROWS = 16  # outputs must come in so many for PyTorch's kernels
_AT_ONCE = 2**18  # weights that are put together at a time
_MOST_TOKENS = {"int4": 128, "int8": 16}  # beyond, taking all codes apart once is faster
# Without these instructions oneDNN's kernel adds products of bytes in 16 bits, which overflow.
_HAS_VNNI = torch.backends.mkldnn.enabled and torch.cpu._is_vnni_supported()

# ---------------------------------------------------------------------------------- bits


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Lays codes out bit after bit, the lowest bit first, without gaps.

    Args:
        codes: Whole numbers from 0 to 2^bits - 1, any shape.
        bits: From 1 to 16. Of codes with more than 8 bits, the low bytes come first.

    Returns:
        ceil(numbers * bits / 8) bytes, uint8; the last one is filled up with zeros.

    Raises:
        SettingError: `bits` is out of range.

    Example:
        >>> pack_codes(torch.tensor([1, 2, 3, 7]), 3).tolist()
        [209, 14]
    """
    _check_bits(bits)
    flat = codes.reshape(-1)
    if bits > 8:
        return torch.cat((flat.bitwise_and(255).byte(), pack_codes(flat >> 8, bits - 8)))
    if bits == 8:
        return flat.to(torch.uint8, copy=True)
    places = torch.arange(8, device=flat.device)
    eights = F.pad(flat.long(), (0, -len(flat) % 8)).reshape(-1, 8)
    words = (eights << (places * bits)).sum(1)
    packed = (words[:, None] >> (places[:bits] * 8)).bitwise_and(255).byte()
    return packed.reshape(-1)[: _bytes(len(flat), bits)].clone()


def unpack_codes(packed: Tensor, bits: int, count: int) -> Tensor:
    """Gives the codes that `pack_codes` laid out.

    Args:
        packed: The bytes, (..., ceil(count * bits / 8)); up to 8 bits, there may be rows of
            them.
        bits: From 1 to 16.
        count: How many codes there are in a row.

    Returns:
        Codes (..., count), uint8 up to 8 bits, else int32.

    Raises:
        SettingError: `bits` is out of range.

    Example:
        >>> unpack_codes(torch.tensor([209, 14], dtype=torch.uint8), 3, 4).tolist()
        [1, 2, 3, 7]
    """
    _check_bits(bits)
    if bits > 8:
        low, high = packed[:count].int(), unpack_codes(packed[count:], bits - 8, count)
        return low + (high.int() << 8)
    if bits == 8:
        return packed
    if 8 % bits == 0:
        parts = [_bits_of(packed, start, bits) for start in range(0, 8, bits)]
    else:
        # Eight codes fill as many bytes as a code has bits.
        padded = F.pad(packed, (0, -packed.shape[-1] % bits)).long()
        padded = padded.reshape(*packed.shape[:-1], -1, bits)
        places = torch.tensor([256**place for place in range(bits)], device=packed.device)
        words = (padded * places).sum(-1)
        parts = [_bits_of(words, start, bits).byte() for start in range(0, 8 * bits, bits)]
    return torch.stack(parts, -1).flatten(-2)[..., :count]


def _bits_of(numbers: Tensor, start: int, bits: int) -> Tensor:
    """Gives so many bits of numbers that are not negative, from a place on."""
    if torch.compiler.is_exporting():
        # OpenVINO has no shifts, and ONNX Runtime few operators on bytes.
        whole = numbers if numbers.dtype == torch.int64 else numbers.int()
        found: Tensor = whole // 2**start % 2**bits
    else:
        found = numbers >> start & 2**bits - 1
    return found


def _bytes(count: int, bits: int) -> int:
    return -(-count * bits // 8)


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 16:
        raise SettingError(f"bits must be from 1 to 16, got {bits}")


# -------------------------------------------------------------------------------- scales


@dataclass(frozen=True)
class _Scales:
    """How the scales and zero points of a spec lie in buffers.

    Args:
        spec: The spec.
        shape: Rows and groups, as `QuantSpec.scale_shape` gives them.
    """

    spec: QuantSpec
    shape: tuple[int, int]

    @property
    def levels(self) -> NumberFormat | None:
        """The format of scales that are held relative to a factor."""
        found: dict[str, NumberFormat] = {
            "e4m3": Float(4, 3),
            "int8": Int(8, False),
            "int4": Int(4, False),
            "shift4": SHIFTS,
        }
        return found.get(self.spec.scale_format)

    def pack(self, scale: Tensor, zero: Tensor | None) -> dict[str, Tensor]:
        """Gives the buffers, by name."""
        held: dict[str, Tensor] = {}
        if self.spec.scale_format in _HELD:
            held["scale"] = scale.to(_HELD[self.spec.scale_format])
        elif self.levels is None:
            powers = (scale / self.spec.stretch).log2().round()
            held["scale"] = (powers + 127).byte()
        else:
            levels, held["factor"] = self.spec.scale_levels(scale)
            held["scale"] = pack_codes(self.levels.encode(levels), self.levels.bits)
        if zero is not None and self.spec.zero_format == "code":
            held["zero"] = pack_codes(self.spec.format.encode(zero), self.spec.bits)
        elif zero is not None:
            held["zero"] = zero.to(_HELD[self.spec.zero_format])
        return held

    def readable(self, held: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Gives scales, and zero points where there are any, in the fewest bytes, as floats."""
        scale, zero = self.unpack(held)
        found = (held["scale"] if self.spec.scale_format in _HELD else scale,)
        if zero is None:
            return found
        # Zero points that are codes of up to 8 bits are whole numbers that float16 has.
        return *found, zero.half() if self.spec.zero_format == "code" else held["zero"]

    def unpack(self, held: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Gives scales and zero points, float32, (rows, groups)."""
        scale, zero = held["scale"], held.get("zero")
        if self.spec.scale_format in _HELD:
            scale = scale.float()
        elif self.levels is None:
            scale = torch.exp2(scale.float() - 127) * self.spec.stretch
        else:
            codes = unpack_codes(scale, self.levels.bits, self.shape[0] * self.shape[1])
            scale = self.levels.decode(codes).reshape(self.shape) * held["factor"]
        if zero is None:
            return scale, None
        if self.spec.zero_format != "code":
            return scale, zero.float()
        codes = unpack_codes(zero, self.spec.bits, self.shape[0] * self.shape[1])
        return scale, self.spec.format.decode(codes).reshape(self.shape)


# -------------------------------------------------------------------------------- layers


class _Packed(nn.Module):
    """What all of them hold: codes, scales, zero points, and how inputs are quantized."""

    _input_granularities: ClassVar[tuple[str, ...]] = ("token", "group", "tensor")

    codes: Tensor
    bias: Tensor | None

    def _hold(
        self,
        shape: tuple[int, int],
        spec: QuantSpec | Mapping[str, Any],
        dtype: torch.dtype,
        input: QuantSpec | Mapping[str, Any] | None = None,
        fixed_input: bool = False,
    ) -> None:
        self.matrix_shape, self.dtype = shape, dtype
        self.spec = spec if isinstance(spec, QuantSpec) else QuantSpec(**spec)
        if input is not None and not isinstance(input, QuantSpec):
            input = QuantSpec(**input)
        _check_input(input, fixed_input, self._input_granularities)
        self.input, self.fixed_input = input, fixed_input
        empty = Quantized(
            torch.zeros(shape, dtype=torch.uint8),
            torch.ones(self.spec.scale_shape(shape)),
            None if self.spec.symmetric else torch.zeros(self.spec.scale_shape(shape)),
            self.spec,
            torch.Size(shape),
        )
        self._fill(empty)
        if input is not None and fixed_input:
            self.register_buffer("input_scale", torch.ones(1, 1))
            if not input.symmetric:
                self.register_buffer("input_zero", torch.zeros(1, 1))

    @property
    def _scales(self) -> _Scales:
        return _Scales(self.spec, self.spec.scale_shape(self.matrix_shape))

    @torch.inference_mode(False)  # else changes of the buffers could not be told
    def _fill(self, quantized: Quantized) -> None:
        held = self._scales.pack(quantized.scale.detach(), quantized.zero)
        held["codes"] = pack_codes(quantized.codes, self.spec.bits)
        for name, tensor in held.items():
            self.register_buffer(name, tensor.clone())

    @classmethod
    def _made(
        cls: type[_Layer],
        settings: dict[str, Any],
        layer: nn.Module,
        quantized: Quantized,
        input_range: tuple[Tensor, Tensor | None] | None = None,
    ) -> _Layer:
        """Makes a layer in the place of another one."""
        weight = layer.weight
        assert isinstance(weight, Tensor)
        with torch.device("meta"):
            made = cls(**settings, dtype=weight.dtype)
        _check_matrix(quantized, made.matrix_shape)
        made = made.to_empty(device=weight.device)
        made._fill(quantized)
        if input_range is not None:
            made.register_buffer("input_scale", input_range[0].detach().float().reshape(1, 1))
            if input_range[1] is not None:
                made.register_buffer("input_zero", input_range[1].detach().reshape(1, 1))
        bias = getattr(layer, "bias", None)
        if bias is not None:
            made.bias = nn.Parameter(bias.detach().clone(), bias.requires_grad)
        return made.train(layer.training)

    @property
    def nbytes(self) -> int:
        """Bytes that the layer takes in a file: codes, scales, zero points, bias."""
        return sum(tensor.nbytes for tensor in self.state_dict().values())

    def quantized(self) -> Quantized:
        """Gives codes, scales and zero points, unpacked."""
        rows, columns = self.matrix_shape
        codes = unpack_codes(self.codes, self.spec.bits, rows * columns)
        scale, zero = self._scales.unpack(dict(self.named_buffers(recurse=False)))
        shape = torch.Size(self.matrix_shape)
        return Quantized(codes.reshape(shape), scale, zero, self.spec, shape)

    def _matrix(self) -> Tensor:
        return self.quantized().dequantize(self.dtype)

    def _rounded(self, x: Tensor) -> Tensor:
        """Rounds inputs to what they are quantized to."""
        if self.input is None:
            return x
        return fake_quantize(x, self.input, *self._input_range(x))

    def _input_range(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        assert self.input is not None
        if not self.fixed_input:
            return self.input.scales(x)
        scale, zero = self.input_scale, getattr(self, "input_zero", None)
        assert isinstance(scale, Tensor)
        return scale.float(), None if zero is None else zero.float()

    def _bias(self, x: Tensor) -> Tensor | None:
        return None if self.bias is None else self.bias.to(x.dtype)

    def _told(self) -> dict[str, Any]:
        told = {"spec": self.spec.settings(), "dtype": self.dtype}
        if self.input is not None:
            told |= {"input": self.input.settings(), "fixed_input": self.fixed_input}
        return told

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Gives the arguments with which the class makes a layer of this structure."""

    def extra_repr(self) -> str:
        """Tells shape and format."""
        scaled = f"group {self.spec.group_size}" * (self.spec.group_size is not None)
        told = (
            f"{self.matrix_shape}, {self.spec.format.name}, {scaled or self.spec.granularity}"
        )
        return told if self.input is None else f"{told}, input={self.input.format.name}"


class PackedMatrix(_Packed):
    """A matrix of packed codes, which layers are made of; it multiplies nothing itself.

    Args:
        rows: Its rows.
        columns: Its columns.
        spec: How it is quantized, or the settings of such a `QuantSpec`.
        dtype: Type of the values that the codes stand for.

    Raises:
        SettingError: A value can't be used.

    Example:
        >>> PackedMatrix(6, 64, QuantSpec("int4", scale_format="fp16")).nbytes
        204
    """

    bias = None

    def __init__(
        self,
        rows: int,
        columns: int,
        spec: QuantSpec | Mapping[str, Any],
        *,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self._hold((rows, columns), spec, dtype)

    def take(self, quantized: Quantized) -> None:
        """Holds other codes and scales from now on.

        Args:
            quantized: A matrix of this shape and spec.

        Raises:
            SettingError: It has another shape.
        """
        _check_matrix(quantized, self.matrix_shape)
        self._fill(quantized)

    def settings(self) -> dict[str, Any]:
        """Gives the arguments with which the class makes a matrix of this structure."""
        rows, columns = self.matrix_shape
        return {"rows": rows, "columns": columns, **self._told()}

    def values(self) -> Tensor:
        """Gives the matrix that the codes stand for, (rows, columns)."""
        return self._matrix()


class PackedLinear(_Packed, FactorizedLinear):
    """A linear layer whose matrix is held as packed codes.

    Args:
        in_features: Width of the input.
        out_features: Width of the output.
        spec: How the matrix is quantized, or the settings of such a `QuantSpec`.
        bias: Whether to add a bias.
        dtype: Type of the weight that the codes stand for, and of the bias.
        input: How inputs are quantized; None: not at all.
        fixed_input: Whether scale and zero point of inputs are held (then they are one for all
            inputs) instead of found for each input.
        engine: What multiplies: `"auto"`, `"bfloat16"` or `"plain"`, see this module.

    Shape:
        (..., in_features) to (..., out_features).

    Raises:
        SettingError: A value can't be used.

    Example:
        >>> from supple.formats import quantize
        >>> linear = nn.Linear(64, 6)
        >>> codes = quantize(linear.weight, QuantSpec("int4", "group", 32, scale_format="fp16"))
        >>> layer = PackedLinear.from_quantized(linear, codes)
        >>> layer(torch.ones(3, 64)).shape, layer.nbytes, linear.weight.nbytes
        (torch.Size([3, 6]), 240, 1536)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        spec: QuantSpec | Mapping[str, Any],
        *,
        bias: bool = True,
        dtype: torch.dtype = torch.float32,
        input: QuantSpec | Mapping[str, Any] | None = None,
        fixed_input: bool = False,
        engine: Engine = "auto",
    ) -> None:
        super().__init__()
        if engine not in get_args(Engine):
            raise SettingError(
                f"engine must be one of {', '.join(get_args(Engine))}, got {engine!r}"
                f"{nearest(str(engine), get_args(Engine))}"
            )
        self.in_features, self.out_features, self.engine = in_features, out_features, engine
        self._hold((out_features, in_features), spec, dtype, input, fixed_input)
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype)) if bias else None

    @classmethod
    def from_quantized(
        cls,
        linear: nn.Module,
        quantized: Quantized,
        *,
        input: QuantSpec | None = None,
        input_range: tuple[Tensor, Tensor | None] | None = None,
        engine: Engine = "auto",
    ) -> PackedLinear:
        """Takes the place of a linear layer.

        Args:
            linear: An `nn.Linear`, or `transformers`' `Conv1D`; gives the bias.
            quantized: Its matrix (`supple.weights.as_matrix`), quantized.
            input: How inputs are quantized: by `"token"`, `"group"` or `"tensor"`.
            input_range: Scale and zero point (None where symmetric) for all inputs, with an
                `input` of granularity `"tensor"`; by default found for each input.
            engine: As in the constructor.

        Returns:
            The layer.

        Raises:
            SettingError: The matrix has another shape, or settings don't go together.
        """
        weight = linear.weight
        assert isinstance(weight, Tensor)
        # `Conv1D` holds the transpose.
        rows, columns = weight.shape if isinstance(linear, nn.Linear) else weight.T.shape
        settings = {
            "in_features": columns,
            "out_features": rows,
            "spec": quantized.spec,
            "bias": linear.bias is not None,
            "input": input,
            "fixed_input": input_range is not None,
            "engine": engine,
        }
        return cls._made(settings, linear, quantized, input_range)

    def settings(self) -> dict[str, Any]:
        """Gives the arguments with which the class makes a layer of this structure."""
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bias": self.bias is not None,
            "engine": self.engine,
            **self._told(),
        }

    def dense_weight(self) -> Tensor:
        """Gives the matrix that the codes stand for, (out_features, in_features)."""
        return self._matrix()

    def macs(self, tokens: int) -> int:
        """Gives the multiply-accumulates of a forward with so many tokens."""
        return tokens * self.in_features * self.out_features

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., in_features) to (..., out_features)."""
        engine, bias = self.engine_for(x), self._bias(x)
        if engine == "plain":
            return F.linear(self._rounded(x), self.dense_weight().to(x.dtype), bias)
        if engine == "rows":
            seen = self._rounded(x)
            y = torch.cat([F.linear(seen, part.to(x.dtype)) for part in self._parts()], -1)
            return y if bias is None else y + bias
        y = _PRODUCTS[engine](self, x.reshape(-1, self.in_features)).to(x.dtype)
        y = y.reshape(*x.shape[:-1], self.out_features)
        return y if bias is None else y + bias

    def engine_for(self, x: Tensor) -> str:
        """Tells what would multiply an input: an engine, or `"rows"` or `"plain"`.

        Args:
            x: An input.
        """
        if (
            self.engine == "plain"
            or torch.compiler.is_compiling()
            or _get_current_dispatch_mode() is not None  # who records wants plain operators
            or x.device != self.codes.device
            or not x.numel()
            or (torch.is_grad_enabled() and x.requires_grad)
        ):
            return "plain"
        if x.is_cuda and self._suits_triton(x):
            return "triton"
        if not x.is_cpu:
            return "plain"
        if self.input is not None:
            return "integer" if self._is_whole(self.input) else self._whole_or_rows()
        half = x.dtype == torch.bfloat16 or self.engine == "bfloat16"
        if not half or self.out_features % _KERNEL_ROWS or self.in_features % 32:
            return self._whole_or_rows()
        tokens = x.numel() // self.in_features
        for engine, suits in (("int4", _suits_int4), ("int8", _suits_int8)):
            if suits(self.spec, self.in_features) and tokens <= _MOST_TOKENS[engine]:
                return engine
        return self._whole_or_rows()

    def _whole_or_rows(self) -> str:
        """Whether the matrix is put together at once, or some rows at a time, in the cache."""
        own = type(self).quantized is _Packed.quantized and self.spec.bits <= 8
        return "rows" if own and self.out_features > self._rows_at_once() else "plain"

    def _suits_triton(self, x: Tensor) -> bool:
        from supple.layers import triton_linear  # imports Triton, which takes a while

        return (
            type(self).quantized is _Packed.quantized
            and x.dtype in triton_linear.INPUTS
            and triton_linear.unsuited(self.spec, self.in_features) is None
            and triton_linear.works(x.device)
        )

    def _rows_at_once(self) -> int:
        return max(8, _AT_ONCE // self.in_features // 8 * 8)

    def _parts(self) -> Iterator[Tensor]:
        """Yields the matrix, some rows at a time."""
        scale, zero = self._scales.unpack(dict(self.named_buffers(recurse=False)))
        step, columns, bits = self._rows_at_once(), self.in_features, self.spec.bits
        for first in range(0, self.out_features, step):
            rows = min(step, self.out_features - first)
            start, shape = first * columns * bits // 8, torch.Size((rows, columns))
            packed = self.codes[start : start + _bytes(rows * columns, bits)]
            codes = unpack_codes(packed, bits, rows * columns).reshape(shape)
            mine = [
                None if one is None else one if len(one) == 1 else one[first : first + rows]
                for one in (scale, zero)
            ]
            assert mine[0] is not None
            part = Quantized(codes, mine[0], mine[1], self.spec, shape)
            yield part.dequantize(self.dtype)

    def _is_whole(self, input: QuantSpec) -> bool:
        """Whether the product is one of whole numbers, with scales taken out of the sum."""
        return _is_integer(self.spec, input)

    def _prepare(self, engine: str) -> tuple[Tensor, ...]:
        if engine == "triton":
            return self._scales.readable(dict(self.named_buffers(recurse=False)))
        return _PREPARED[engine](self.quantized())

    def _ready(self, engine: str) -> tuple[Tensor, ...]:
        """What an engine needs, made once for these codes and scales."""
        if any(tensor.is_inference() for tensor in self.buffers()):
            return self._prepare(engine)  # whether they changed can't be told
        state = tuple((t.data_ptr(), t._version) for t in self.buffers())
        kept = vars(self).get("_prepared")
        if kept is None or kept[0] != (engine, state):
            kept = ((engine, state), self._prepare(engine))
            vars(self)["_prepared"] = kept
        found: tuple[Tensor, ...] = kept[1]
        return found

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out what was made ready for an engine, which copies make anew."""
        return {name: value for name, value in vars(self).items() if name != "_prepared"}


class PackedConv2d(_Packed):
    """A convolution whose weight is held as packed codes.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Height and width of the kernel.
        spec: How the weight, as `supple.weights.as_matrix` lays it out, is quantized.
        stride: Down and to the right.
        padding: Rows and columns around, or `"same"` or `"valid"`.
        dilation: Down and to the right.
        groups: Groups of channels.
        bias: Whether to add a bias.
        dtype: Type of the weight that the codes stand for, and of the bias.
        input: How inputs are quantized: one scale for the whole `"tensor"`, or one for each
            example, which is a `"channel"` of the input; None: not at all.
        fixed_input: Whether scale and zero point of inputs are held instead of found.

    Shape:
        As `torch.nn.Conv2d`.

    Raises:
        SettingError: A value can't be used.

    Example:
        >>> from supple.formats import quantize
        >>> conv = nn.Conv2d(4, 8, 3, padding=1)
        >>> layer = PackedConv2d.from_quantized(conv, quantize(conv.weight, QuantSpec("int8")))
        >>> layer(torch.ones(1, 4, 5, 5)).shape, layer.nbytes, conv.weight.nbytes
        (torch.Size([1, 8, 5, 5]), 352, 1152)
    """

    _input_granularities = ("channel", "tensor")

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, int],
        spec: QuantSpec | Mapping[str, Any],
        *,
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] | str = (0, 0),
        dilation: tuple[int, int] = (1, 1),
        groups: int = 1,
        bias: bool = True,
        dtype: torch.dtype = torch.float32,
        input: QuantSpec | Mapping[str, Any] | None = None,
        fixed_input: bool = False,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride, self.padding = kernel_size, stride, padding
        self.dilation, self.groups = dilation, groups
        columns = in_channels // groups * kernel_size[0] * kernel_size[1]
        self._hold((out_channels, columns), spec, dtype, input, fixed_input)
        self.bias = nn.Parameter(torch.zeros(out_channels, dtype=dtype)) if bias else None

    @classmethod
    def from_quantized(
        cls,
        conv: nn.Conv2d,
        quantized: Quantized,
        *,
        input: QuantSpec | None = None,
        input_range: tuple[Tensor, Tensor | None] | None = None,
    ) -> PackedConv2d:
        """Takes the place of a convolution.

        Args:
            conv: The convolution, which gives the bias and the rest.
            quantized: Its weight, or that as a matrix, quantized.
            input: How inputs are quantized.
            input_range: Scale and zero point (None where symmetric) for all inputs; by default
                found for each input.

        Returns:
            The layer.

        Raises:
            SettingError: The weight has another shape, or settings don't go together.
            UnsupportedModelError: It pads by other than zeros.
        """
        if conv.padding_mode != "zeros":
            raise UnsupportedModelError(
                f"a packed convolution pads by zeros, this one by {conv.padding_mode!r}"
            )
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation")
        settings: dict[str, Any] = {name: getattr(conv, name) for name in names}
        settings |= {
            "groups": conv.groups,
            "bias": conv.bias is not None,
            "spec": quantized.spec,
            "input": input,
            "fixed_input": input_range is not None,
        }
        return cls._made(settings, conv, quantized, input_range)

    @property
    def weight(self) -> Tensor:
        """The weight that the codes stand for, computed anew each time."""
        return self.dense_weight()

    def settings(self) -> dict[str, Any]:
        """Gives the arguments with which the class makes a layer of this structure."""
        return {
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "kernel_size": self.kernel_size,
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "groups": self.groups,
            "bias": self.bias is not None,
            **self._told(),
        }

    def dense_weight(self) -> Tensor:
        """Gives the weight, (out_channels, in_channels / groups, height, width)."""
        return self._matrix().view(self.out_channels, -1, *self.kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, in_channels, H, W) to (N, out_channels, H', W')."""
        weight = self.dense_weight().to(x.dtype)
        rest: tuple[Any, ...] = (self.stride, self.padding, self.dilation, self.groups)
        return F.conv2d(self._rounded(x), weight, self._bias(x), *rest)


class PackedEmbedding(_Packed):
    """A table of vectors held as packed codes, of which only those asked for are taken apart.

    Args:
        num_embeddings: Vectors in the table.
        embedding_dim: Their width.
        spec: How the table is quantized; a channel is a vector.
        dtype: Type of the vectors.

    Shape:
        (...) to (..., embedding_dim).

    Raises:
        SettingError: A value can't be used.

    Example:
        >>> from supple.formats import quantize
        >>> table = nn.Embedding(10, 6)
        >>> codes = quantize(table.weight, QuantSpec("int4", scale_format="fp16"))
        >>> layer = PackedEmbedding.from_quantized(table, codes)
        >>> layer(torch.tensor([[3, 9]])).shape, layer.nbytes
        (torch.Size([1, 2, 6]), 50)
    """

    bias = None

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        spec: QuantSpec | Mapping[str, Any],
        *,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self._hold((num_embeddings, embedding_dim), spec, dtype)

    @classmethod
    def from_quantized(cls, embedding: nn.Embedding, quantized: Quantized) -> PackedEmbedding:
        """Takes the place of an embedding.

        Args:
            embedding: The embedding.
            quantized: Its table, quantized.

        Returns:
            The layer.

        Raises:
            SettingError: The table has another shape.
            UnsupportedModelError: It limits the norm of its vectors.
        """
        if embedding.max_norm is not None:
            raise UnsupportedModelError(
                "a packed embedding can't limit the norm of its vectors (max_norm)"
            )
        rows, columns = embedding.weight.shape
        settings = {
            "num_embeddings": rows,
            "embedding_dim": columns,
            "spec": quantized.spec,
        }
        return cls._made(settings, embedding, quantized)

    @property
    def weight(self) -> Tensor:
        """The table that the codes stand for, computed anew each time."""
        return self.dense_weight()

    def settings(self) -> dict[str, Any]:
        """Gives the arguments with which the class makes a layer of this structure."""
        sizes = {"num_embeddings": self.num_embeddings, "embedding_dim": self.embedding_dim}
        return {**sizes, **self._told()}

    def dense_weight(self) -> Tensor:
        """Gives the table, (num_embeddings, embedding_dim)."""
        return self._matrix()

    def forward(self, input: Tensor) -> Tensor:
        """Maps numbers (...) to vectors (..., embedding_dim)."""
        bits = self.spec.bits
        if bits > 8 or self.embedding_dim * bits % 8:  # vectors begin within bytes
            return F.embedding(input, self.dense_weight())
        packed = self.codes.view(self.num_embeddings, -1)[input.reshape(-1)]
        codes = unpack_codes(packed, bits, self.embedding_dim)
        scale, zero = self._scales.unpack(dict(self.named_buffers(recurse=False)))
        if len(scale) > 1:
            scale = scale[input.reshape(-1)]
            zero = None if zero is None else zero[input.reshape(-1)]
        found = Quantized(codes, scale, zero, self.spec, codes.shape)
        return found.dequantize(self.dtype).reshape(*input.shape, self.embedding_dim)


# ------------------------------------------------------------------------------- engines


def _is_integer(spec: QuantSpec, input: QuantSpec) -> bool:
    """Whether weight and inputs are whole numbers whose scales can be taken out of the sum."""
    return (
        isinstance(spec.format, Int)
        and isinstance(input.format, Int)
        and max(spec.bits, input.bits) <= 8
        and "group" not in (spec.granularity, input.granularity)
    )


def _suits_int4(spec: QuantSpec, columns: int) -> bool:
    whole = isinstance(spec.format, Int) and spec.bits <= 4
    return whole and _kernel_group(spec, columns) is not None


def _suits_int8(spec: QuantSpec, columns: int) -> bool:
    whole = isinstance(spec.format, Int) and spec.bits <= 8
    return whole and spec.symmetric and spec.granularity in ("channel", "tensor")


def _kernel_group(spec: QuantSpec, columns: int) -> int | None:
    """The largest group that the 4-bit kernel takes and that lies within groups of a spec."""
    own = spec.group_size or columns
    fits = [size for size in _KERNEL_GROUPS if own % size == 0 and columns % size == 0]
    return fits[0] if fits else None


def _ready_int4(quantized: Quantized) -> tuple[Tensor, ...]:
    """Codes in the kernel's layout, and scale and offset of each group: s (q - 8) + offset."""
    spec, (rows, columns) = quantized.spec, quantized.shape
    group = _kernel_group(spec, columns)
    assert group is not None
    assert isinstance(spec.format, Int)
    codes = torch.ops.aten._convert_weight_to_int4pack_for_cpu(quantized.codes.int(), 1)
    scale = quantized.scale.expand(rows, -1)
    zero = (
        torch.zeros_like(scale) if quantized.zero is None else quantized.zero.expand(rows, -1)
    )
    pairs = torch.stack((scale, scale * (8 - spec.format.offset - zero)), -1)
    pairs = pairs.repeat_interleave(columns // group // scale.shape[1], 1)
    return codes, pairs.transpose(0, 1).contiguous().bfloat16(), torch.tensor(group)


def _ready_int8(quantized: Quantized) -> tuple[Tensor, ...]:
    return _whole(quantized), quantized.scale.expand(len(quantized.codes), 1)[:, 0].bfloat16()


def _ready_integer(quantized: Quantized) -> tuple[Tensor, ...]:
    zero = None if quantized.zero is None else quantized.zero - _shift(quantized)
    return ready_integer(_whole(quantized), quantized.scale, zero)


def ready_integer(
    whole: Tensor, scale: Tensor, zero: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Prepares a matrix for products of whole numbers.

    Args:
        whole: Its numbers, int8, (rows, columns).
        scale: (rows, 1) or (1, 1).
        zero: Zero points, shaped like the scales, or None.

    Returns:
        The numbers as the product wants them; scales, (1, rows); sums over columns, times the
        scales; zero points times the scales, or a single 0.
    """
    each = scale.T.expand(1, len(whole)).contiguous()
    ready = whole.T
    if _HAS_VNNI:
        # Laid out for two rows of inputs it is fast for any number of them.
        ready = torch.ops.onednn.qlinear_prepack(whole, [2, whole.shape[1]])
    scaled = torch.zeros(()) if zero is None else each * zero.T
    return ready, each, each * whole.sum(1, dtype=torch.float32), scaled


def _sums(inputs: Quantized, ready: Tensor, scale: Tensor, sums: Tensor) -> Tensor:
    """Sums over s v w of whole inputs v and weights w, which have been summed themselves."""
    if not ready.is_mkldnn:
        product = torch._int_mm(_whole(inputs), ready).float() * scale
        return product + _shift(inputs) * sums if _shift(inputs) else product
    assert isinstance(inputs.spec.format, Int)
    offset, none = inputs.spec.format.offset, torch.zeros_like(scale[0], dtype=torch.int32)
    found: Tensor = torch.ops.onednn.qlinear_pointwise(
        *(inputs.codes, 1.0, offset, ready, scale[0], none, None),
        *(1.0, 0, torch.float32, "none", [], ""),
    )
    return found


def _whole(quantized: Quantized) -> Tensor:
    """The codes as int8: the numbers themselves, less 128 where they are not negative."""
    form = quantized.spec.format
    assert isinstance(form, Int)
    return (quantized.codes.int() - form.offset - _shift(quantized)).to(torch.int8)


def _shift(quantized: Quantized) -> int:
    """What is taken off numbers that may exceed 127."""
    return 128 if quantized.spec.format.most > 127 else 0


def _int4_product(layer: PackedLinear, x: Tensor) -> Tensor:
    codes, pairs, group = layer._ready("int4")
    product: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
        x.bfloat16(), codes, int(group), pairs
    )
    return product


def _int8_product(layer: PackedLinear, x: Tensor) -> Tensor:
    product: Tensor = torch.ops.aten._weight_int8pack_mm(x.bfloat16(), *layer._ready("int8"))
    return product


def _integer_product(layer: PackedLinear, x: Tensor) -> Tensor:
    """The sum of s (v - z) t (w - y) over inputs v and weights w, with whole v and w."""
    ready, scale, sums, zero = layer._ready("integer")
    assert layer.input is not None
    seen = quantize(x, layer.input, *layer._input_range(x))
    product = _sums(seen, ready, scale, sums)
    if seen.zero is not None:
        product = product - seen.zero * (sums - layer.in_features * zero)
    if zero.dim():
        assert isinstance(seen.spec.format, Int)
        total = seen.codes.sum(1, keepdim=True, dtype=torch.float32)
        product = product - (total - layer.in_features * seen.spec.format.offset) * zero
    return product * seen.scale


def _triton_product(layer: PackedLinear, x: Tensor) -> Tensor:
    from supple.layers import triton_linear

    return triton_linear.product(
        layer._rounded(x), layer.codes, layer.spec, *layer._ready("triton")
    )


_PREPARED = {"int4": _ready_int4, "int8": _ready_int8, "integer": _ready_integer}
_PRODUCTS = {
    "int4": _int4_product,
    "int8": _int8_product,
    "integer": _integer_product,
    "triton": _triton_product,
}

# -------------------------------------------------------------------------------- checks


def _check_input(input: QuantSpec | None, fixed: bool, allowed: tuple[str, ...]) -> None:
    if input is None:
        if fixed:
            raise SettingError("a range of inputs needs input=, how to quantize them")
        return
    if input.granularity not in allowed:
        raise SettingError(
            f"inputs are quantized by {' or '.join(map(repr, allowed))}, got granularity="
            f"{input.granularity!r}"
        )
    if fixed and input.granularity != "tensor":
        raise SettingError(
            "a range for all inputs needs input of granularity 'tensor', got "
            f"{input.granularity!r}"
        )


def linear_shape(linear: nn.Module, codes: Sequence[int]) -> tuple[int, int]:
    """Gives the outputs and inputs of a linear layer that codes are to stand for.

    Args:
        linear: An `nn.Linear`, or `transformers`' `Conv1D`, which holds the transpose.
        codes: The shape of the quantized matrix.

    Raises:
        SettingError: That is another one.
    """
    weight = linear.weight
    assert isinstance(weight, Tensor)
    rows, columns = weight.shape if isinstance(linear, nn.Linear) else weight.T.shape
    if tuple(codes) != (rows, columns):
        raise SettingError(
            f"the layer's weight is a matrix of shape {(rows, columns)}, got one of shape "
            f"{tuple(codes)}"
        )
    return rows, columns


def _check_matrix(quantized: Quantized, shape: tuple[int, int]) -> None:
    got, spec = tuple(quantized.shape), quantized.spec
    alike = spec.granularity in ("tensor", "channel") and got[:1] == shape[:1]
    same = quantized.codes.numel() == shape[0] * shape[1]
    if got != shape and not (alike and same):
        raise SettingError(
            f"the layer's weight is a matrix of shape {shape}, got one quantized in shape "
            f"{got}; quantize what supple.weights.as_matrix gives"
        )
