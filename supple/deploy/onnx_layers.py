"""Packed layers as ONNX has them: few operators that hold codes, in place of many.

While a network is exported, each of its packed layers that ONNX can say in one operator gives
way to one of these:

- a linear layer of whole numbers of up to 8 bits becomes a `com.microsoft::MatMulNBits`, which
  takes codes of 2, 4 or 8 bits apart while it multiplies;
- a linear layer or convolution of which the inputs have a fixed range becomes a product between
  `QuantizeLinear` and `DequantizeLinear` ("QDQ"), which ONNX Runtime and OpenVINO carry out
  with whole numbers;
- a convolution of whole numbers keeps its codes, with a `DequantizeLinear` behind them.

All others are exported by the operators of their own forward, codes and all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.onnx.ops import symbolic

from supple.formats import Int, Quantized
from supple.layers.packed import PackedConv2d, PackedLinear, pack_codes
from supple.layers.quantized_input import QuantizedInput

__all__ = ["input_steps", "onnx_layers"]

_BLOCKS = (256, 128, 64, 32, 16)  # inputs of an output that share a scale, in MatMulNBits


def input_steps(module: nn.Module) -> int:
    """Gives the steps between the least and the most that a layer's rounded input can be.

    Args:
        module: The network.

    Returns:
        Those of the coarsest layer; 0 where no layer rounds what it is given.
    """
    specs = [getattr(one, "input", None) for one in module.modules() if _packed(one)]
    specs += [one.spec for one in module.modules() if isinstance(one, QuantizedInput)]
    return min((len(spec.format.values) - 1 for spec in specs if spec is not None), default=0)


@contextlib.contextmanager
def onnx_layers(module: nn.Module) -> Iterator[tuple[nn.Module, int]]:
    """Lets packed layers give way to operators of ONNX, until the context ends.

    Args:
        module: The network, in eval mode.

    Yields:
        What to export: the network, or what stands for it where it is a packed layer itself;
        and how many layers gave way.
    """
    made = {
        id(one): stand_in
        for one in module.modules()
        if _packed(one) and (stand_in := _stand_in(one)) is not None
    }
    places = [
        (parent, name, child)
        for parent in list(module.modules())
        for name, child in parent._modules.items()
        if child is not None and id(child) in made
    ]
    try:
        for parent, name, child in places:
            parent._modules[name] = made[id(child)]
        yield made.get(id(module), module), len(made)
    finally:
        for parent, name, child in places:
            parent._modules[name] = child


def _packed(module: nn.Module) -> bool:
    return isinstance(module, PackedLinear | PackedConv2d)


def _stand_in(layer: nn.Module) -> nn.Module | None:
    """Gives the layer's stand-in; None where its own operators have to do."""
    assert isinstance(layer, PackedLinear | PackedConv2d)
    form, given = layer.spec.format, layer.input
    if not isinstance(form, Int) or form.bits > 8 or layer.dtype != torch.float32:
        return None
    if type(layer.quantized()).dequantize is not Quantized.dequantize:
        return None  # its codes do not simply stand for s (q - z)
    whole_input = given is None or (isinstance(given.format, Int) and given.bits <= 8)
    by_row = layer.spec.granularity != "group" and layer.spec.zero_format == "code"
    if by_row and whole_input and given is not None and layer.fixed_input:
        return _Qdq(layer).eval()
    if isinstance(layer, PackedConv2d):
        return _Qdq(layer).eval() if by_row and given is None else None
    if _block(layer) is not None and (given is None or _by_token(layer)):
        return _MatMulNBits(layer).eval()
    return None


def _by_token(layer: PackedLinear) -> bool:
    """Whether inputs become symmetric whole numbers of 8 bits, as MatMulNBits can have it."""
    given = layer.input
    return (
        given is not None
        and isinstance(given.format, Int)
        and given.bits == 8
        and given.symmetric
        and given.granularity in ("token", "group")
        and not layer.fixed_input
    )


# ---------------------------------------------------------------------- products of few bits


def _block(layer: PackedLinear) -> int | None:
    """The largest block of MatMulNBits that lies within the layer's groups."""
    size = layer.spec.group_size
    if size is None or size >= layer.in_features:
        return next((one for one in _BLOCKS if one <= layer.in_features), _BLOCKS[-1])
    return next((one for one in _BLOCKS if size % one == 0), None)


class _MatMulNBits(nn.Module):
    """A linear layer as one operator: s (q - z) for each block of inputs, times the input.

    Inputs that the layer rounds to 8 bits for each token are rounded for each block.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None

    def __init__(self, layer: PackedLinear) -> None:
        super().__init__()
        block, held = _block(layer), layer.quantized()
        assert block is not None
        self.rows, self.columns, self.block = layer.out_features, layer.in_features, block
        self.bits = next(bits for bits in (2, 4, 8) if bits >= held.spec.bits)
        self.bias = layer.bias
        # Levels of 1 to 4: 4 multiplies whole numbers, which it rounds the input to.
        self.accuracy = 4 if layer.input is not None else 0
        codes, scale, zero = self._blocked(held)
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero)

    def _blocked(self, held: Quantized) -> tuple[Tensor, Tensor, Tensor | None]:
        """Codes, scales and zero points, of every block of every row."""
        form = held.spec.format
        assert isinstance(form, Int)
        blocks = -(-self.columns // self.block)
        middle = 2 ** (self.bits - 1) if held.spec.symmetric else 0
        whole = held.codes.int() - form.offset + middle
        whole = F.pad(whole, (0, blocks * self.block - self.columns), value=middle)
        codes = _bytes(whole.reshape(-1, self.block), self.bits)
        codes = codes.reshape(self.rows, blocks, -1)
        scale = self._each_block(held.scale, held, blocks)
        if held.zero is None:
            return codes, scale, None
        zero = self._each_block(held.zero, held, blocks)
        if held.spec.zero_format == "code":
            return codes, scale, _bytes(zero.int(), self.bits)
        return codes, scale, zero

    def _each_block(self, values: Tensor, held: Quantized, blocks: int) -> Tensor:
        """Gives one value for each row and block, (rows, blocks), float32."""
        each = (held.spec.group_size or self.columns) // self.block
        values = values.expand(self.rows, -1).float()
        if values.shape[1] > 1:
            return values.repeat_interleave(each, 1)[:, :blocks].contiguous()
        return values.expand(-1, blocks).contiguous()

    def forward(self, x: Tensor) -> Tensor:
        y = symbolic(
            "com.microsoft::MatMulNBits",
            [x, self.codes, self.scale] + ([] if self.zero is None else [self.zero]),
            {
                "K": self.columns,
                "N": self.rows,
                "bits": self.bits,
                "block_size": self.block,
                "accuracy_level": self.accuracy,
            },
            dtype=x.dtype,
            shape=(*x.shape[:-1], self.rows),
            version=1,
        )
        return y if self.bias is None else y + self.bias


def _bytes(whole: Tensor, bits: int) -> Tensor:
    """Packs rows of numbers, each row by itself: (rows, n) to (rows, bytes), the first low."""
    each = 8 // bits
    rows = F.pad(whole, (0, -whole.shape[-1] % each))
    return pack_codes(rows.to(torch.uint8), bits).reshape(len(rows), -1)


# ---------------------------------------------------------------------------- QDQ operators


class _Qdq(nn.Module):
    """A linear layer or convolution between operators that quantize and dequantize."""

    codes: Tensor
    scale: Tensor
    zero: Tensor
    input_scale: Tensor
    input_zero: Tensor

    def __init__(self, layer: PackedLinear | PackedConv2d) -> None:
        super().__init__()
        held = layer.quantized()
        form, rows = held.spec.format, len(held.codes)
        assert isinstance(form, Int)
        kind = torch.int8 if held.spec.symmetric else torch.uint8
        whole = (held.codes.int() - form.offset).to(kind)
        zero = torch.zeros(rows, 1) if held.zero is None else held.zero.expand(rows, 1)
        self.settings: tuple[Any, ...] | None = None
        if isinstance(layer, PackedConv2d):
            self.axis, whole = 0, whole.reshape(layer.dense_weight().shape)
            self.settings = (layer.stride, layer.padding, layer.dilation, layer.groups)
        else:
            self.axis, whole = 1, whole.T
        self.bias, self.given = layer.bias, layer.input
        self.register_buffer("codes", whole.contiguous())
        self.register_buffer("scale", held.scale.expand(rows, 1)[:, 0].float().contiguous())
        self.register_buffer("zero", zero[:, 0].to(kind).contiguous())
        if self.given is not None:
            scale, point = layer._input_range(torch.empty(0))
            kind = torch.int8 if point is None else torch.uint8
            point = torch.zeros(()) if point is None else point
            self.register_buffer("input_scale", scale.reshape(()).clone())
            self.register_buffer("input_zero", point.reshape(()).to(kind))

    def forward(self, x: Tensor) -> Tensor:
        if self.given is not None:
            x = self._seen(x)
        weight = _dequantize(self.codes, self.scale, self.zero, self.axis)
        if self.settings is not None:
            return F.conv2d(x, weight, self.bias, *self.settings)
        y = x @ weight
        return y if self.bias is None else y + self.bias

    def _seen(self, x: Tensor) -> Tensor:
        """Rounds the input to codes of 8 bits, within the range of its format."""
        assert self.given is not None
        form, scale = self.given.format, self.input_scale
        codes = symbolic(
            "QuantizeLinear",
            [x, scale, self.input_zero],
            dtype=self.input_zero.dtype,
            shape=x.shape,
        )
        ends = torch.iinfo(codes.dtype)
        if (form.least, form.most) != (ends.min, ends.max):
            # Not before: ONNX Runtime drops limits that come before a `QuantizeLinear`.
            codes = codes.clamp(int(form.least), int(form.most))
        return _dequantize(codes, scale, self.input_zero)


def _dequantize(codes: Tensor, scale: Tensor, zero: Tensor, axis: int = 0) -> Tensor:
    return symbolic(
        "DequantizeLinear",
        [codes, scale, zero],
        {"axis": axis} if scale.dim() else {},
        dtype=torch.float32,
        shape=codes.shape,
    )
