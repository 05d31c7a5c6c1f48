"""Which layers can hold codes in place of their weight, and the layers that do."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from supple.formats import Quantized, QuantSpec
from supple.layers.packed import PackedConv2d, PackedLinear
from supple.layers.quantized_input import QuantizedInput

__all__ = ["matrix_of", "pack", "packable", "round_input", "weight_of"]

Range = tuple[Tensor, Tensor | None]


def packable(module: nn.Module) -> bool:
    """Tells whether a layer that holds codes can take a layer's place.

    Args:
        module: A module; of a subclass of a linear layer, which may do more, it is not known.

    Example:
        >>> packable(nn.Linear(2, 3)), packable(nn.Conv1d(2, 3, 1))
        (True, False)
    """
    if type(module) is nn.Conv2d:
        return module.padding_mode == "zeros"
    return type(module) in (nn.Linear, Conv1D)


def matrix_of(weight: Tensor, transposed: bool) -> Tensor:
    """Lays a packable layer's weight out as (outputs, what each reads).

    Args:
        weight: The weight.
        transposed: Whether the layer is `transformers`' `Conv1D`, which holds the transpose.
    """
    return weight.T if transposed else weight.flatten(1)


def weight_of(matrix: Tensor, like: Tensor, transposed: bool) -> Tensor:
    """Undoes `matrix_of`.

    Args:
        matrix: The matrix.
        like: A tensor of the weight's shape.
        transposed: As there.
    """
    return matrix.T if transposed else matrix.reshape(like.shape)


def pack(
    module: nn.Module,
    quantized: Quantized,
    input: QuantSpec | None = None,
    input_range: Range | None = None,
) -> nn.Module:
    """Gives the layer that holds codes in a packable layer's place.

    Args:
        module: The layer, which gives the bias and the rest.
        quantized: Its weight as a matrix, quantized.
        input: How its input is rounded, if it is.
        input_range: Scale and zero point for all inputs; by default found for each.

    Returns:
        A layer of `supple.layers.packed`; where that can't round the input so, one around it
        does.

    Example:
        >>> from supple.formats import quantize
        >>> layer = nn.Linear(4, 2)
        >>> pack(layer, quantize(layer.weight, QuantSpec("int4")))
        PackedLinear((2, 4), int4, channel)
    """
    if not isinstance(module, nn.Conv2d):
        return PackedLinear.from_quantized(
            module, quantized, input=input, input_range=input_range
        )
    if input is None or input.granularity == "tensor":
        return PackedConv2d.from_quantized(
            module, quantized, input=input, input_range=input_range
        )
    packed = PackedConv2d.from_quantized(module, quantized)
    return round_input(packed, input, input_range)


def round_input(
    module: nn.Module, input: QuantSpec, input_range: Range | None = None
) -> QuantizedInput:
    """Gives a layer that rounds its input and is otherwise as the one inside.

    Args:
        module: The layer.
        input: How.
        input_range: Scale and zero point for all inputs; by default found for each.
    """
    layer = QuantizedInput(module, input, static=input_range is not None)
    if input_range is not None:
        layer.set_scale(*input_range)
    return layer.train(module.training)
