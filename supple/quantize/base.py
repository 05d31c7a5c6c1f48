"""What quantizers have in common: which layers, which format, and what replaces the weights.

A quantizer walks the linear layers and convolutions of a model. `spec_of` says how each weight
is quantized, `solve` does it, block by block where it needs to see the layers' inputs, and
`inputs` says how layers see their inputs, and `install` puts layers that hold packed codes into
the model.

Published quantizers that others are measured against have names instead of classes:
`baseline("nf4", group_size=64)`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from supple.calibrate import LayerStatistics, Observer, grouped, in_order
from supple.errors import SettingError, nearest
from supple.formats import (
    Int,
    NumberFormat,
    Quantized,
    QuantSpec,
    number_format,
    quantize,
)
from supple.layers.pack import pack, packable, round_input
from supple.layers.quantized_input import QuantizedInput
from supple.layers.rotations import Rotation
from supple.observers import RANGES
from supple.quantize._half_quadratic import half_quadratic
from supple.quantize._rotations import (
    block_hadamards,
    inner,
    random_hadamards,
    rotated,
)
from supple.quantize._solvers import Order, gptq
from supple.rebuild import replace
from supple.transforms import Given, ModelTransform
from supple.weights import as_matrix, from_matrix, matrices

__all__ = [
    "BASELINES",
    "MOST_BITS",
    "Quantizer",
    "Solved",
    "Weights",
    "baseline",
    "bits_per_weight",
    "packable",
    "rounded_input",
]

Rotating = Literal["none", "blocks", "random"]
Solver = Literal["nearest", "half_quadratic", "gptq"]
Input = tuple[QuantSpec, tuple[Tensor, Tensor | None] | None]
"""How a layer's input is rounded, and a scale and zero point for all inputs, or None."""

MOST_BITS = 16
"""From so many bits on nothing is rounded."""


class Solved(Protocol):
    """The matrix of a weight as a solver gives it: a `Quantized`, or codes of another kind."""

    @property
    def shape(self) -> torch.Size:
        """Shape of the matrix."""

    @property
    def total_bits(self) -> int:
        """Bits that it takes, scales and all counted, codes not padded to bytes."""

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Gives the matrix that the codes stand for."""


@dataclass(frozen=True, kw_only=True)
class Quantizer(ModelTransform):
    """Rounds the weights of linear layers and convolutions to numbers of a few bits.

    Args:
        bits: Of a weight's code, from 2; at 16 weights stay as they are.
        format: Name of a number format of so many bits, such as `"e2m1"`, in place of whole
            numbers; see `supple.formats.number_format`.
        group_size: Inputs of an output that share a scale; None for all.
        symmetric: Whether there are no zero points.
        scale_format: How scales are held; see `supple.formats.QuantSpec`.
        activations: Bits of the layers' inputs, whole numbers with a scale for each token (of
            a convolution for each example), or None to leave them as they are.
        layers: Shell-style pattern of the layers' paths; several are parted by commas, and `!`
            before one leaves out.
        packed: Whether linear layers and 2-d convolutions hold codes in place of weights, as
            `supple.layers.packed` has them. Else, and in other layers, weights stay in
            floating point, rounded.
    """

    want: ClassVar[tuple[str, ...]] = ()
    """Statistics of layers' inputs that `solve` is given; see `supple.calibrate`."""

    bits: int = 4
    format: str | None = None
    group_size: int | None = None
    symmetric: bool = True
    scale_format: str = "fp16"
    activations: int | None = None
    layers: str = "*"
    packed: bool = True

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= MOST_BITS:
            raise SettingError(f"bits must be from 2 to {MOST_BITS}, got {self.bits}")
        if self.activations is not None and not 2 <= self.activations <= MOST_BITS:
            raise SettingError(
                f"activations must be from 2 to {MOST_BITS} bits, got {self.activations}"
            )
        bits = self.number_format().bits
        if bits != self.bits:
            raise SettingError(
                f"format '{self.format}' has {bits} bits, and bits is {self.bits}; make them "
                "agree"
            )
        self.spec()

    # -- what a technique says

    def number_format(self) -> NumberFormat:
        """Gives the weights' number format."""
        if self.format is not None:
            return number_format(self.format)
        return Int(self.bits, symmetric=self.symmetric)

    def spec(self) -> QuantSpec:
        """Gives how a weight is quantized by the settings alone."""
        return QuantSpec(
            self.number_format(),
            "channel" if self.group_size is None else "group",
            self.group_size,
            self.symmetric,
            self.scale_format,  # type: ignore[arg-type]
        )

    def spec_of(self, name: str, matrix: Tensor) -> QuantSpec:
        """Gives how one weight is quantized: by default as `spec` says.

        Args:
            name: Name of the weight.
            matrix: (out, columns), as `supple.weights.as_matrix` gives it.

        Returns:
            The spec, of which the matrix' rows are channels and the groups lie within rows.
        """
        return self.spec()

    def solve(self, matrix: Tensor, spec: QuantSpec, seen: LayerStatistics | None) -> Solved:
        """Quantizes one weight: by default to the nearest values.

        Args:
            matrix: (out, columns), float32.
            spec: How.
            seen: Statistics of the layer's inputs, with the fields of `want`; None where there
                are none to be seen. Those of a grouped convolution have the groups first.

        Returns:
            The quantized weight, of the matrix' shape.
        """
        return quantize(matrix, spec)

    def rotations(self, model: nn.Module, given: Given) -> Mapping[str, Rotation]:
        """Says what the inputs of layers are mapped by before anything is rounded: nothing.

        Args:
            model: The model, as it was.
            given: Calibration batches, loss, generator.

        Returns:
            Name of a weight to the map; see `supple.quantize._rotations`. It runs before the
            input is rounded, and the weight that is quantized is the one that reads its output.
        """
        return {}

    def observers(self) -> Mapping[str, Callable[[], Observer]] | None:
        """Gives observers for fields of `want` that `supple.calibrate` has none for."""
        return None

    # -- how it is done

    @property
    def rounds_weights(self) -> bool:
        """Whether weights get fewer bits at all."""
        return self.bits < MOST_BITS

    @property
    def rounds_inputs(self) -> bool:
        """Whether inputs of layers get fewer bits at all."""
        return self.activations is not None and self.activations < MOST_BITS

    @torch.no_grad()
    def change(self, model: nn.Module, given: Given) -> nn.Module:
        """Quantizes the weights, then puts the result into the model."""
        turned = self.rotations(model, given)
        if not turned:
            return self.replaced(model, given)
        names = [inner(one) if one in turned else one for one in matrices(model, self.layers)]
        layers = ", ".join(name.rpartition(".")[0] for name in names)
        within = dataclasses.replace(self, layers=layers)
        return within.replaced(rotated(model, turned), given)

    @torch.no_grad()
    def replaced(self, model: nn.Module, given: Given) -> nn.Module:
        """Quantizes a model block by block, and puts layers that hold codes in their places.

        A block's layers are replaced once the next block's weights are quantized: what they
        give has been kept by then. So no more than two blocks are there twice, as weights and
        as codes, unless `inputs` has to wait for all weights.

        Args:
            model: The model; it is changed.
            given: Calibration batches, loss, generator.

        Returns:
            The model.
        """
        if self.inputs_wait:
            return self.install(model, self.quantized(model, given), given)
        inputs, left = self.inputs(model, given), dict.fromkeys(matrices(model, self.layers))
        last: Mapping[str, Solved] = {}
        for found in self.by_block(model, given):
            model = self._put(model, last, last, inputs)
            last = found
            for name in found:
                del left[name]
        return self._put(model, [*last, *left], last, inputs)

    def quantized(self, model: nn.Module, given: Given) -> Mapping[str, Solved]:
        """Quantizes the weights of a model, which then holds the rounded ones.

        Args:
            model: The model; it is changed.
            given: Calibration batches, loss, generator.

        Returns:
            Name of a weight to its matrix, quantized; nothing at 16 bits.
        """
        found: dict[str, Solved] = {}
        for part in self.by_block(model, given):
            found |= part
        return found

    @torch.no_grad()
    def by_block(self, model: nn.Module, given: Given) -> Iterator[Mapping[str, Solved]]:
        """Quantizes the weights of one block after the other; each then holds the rounded ones.

        Args:
            model: The model; it is changed. A block's layers may be replaced by others once
                the block after it has come.
            given: Calibration batches, loss, generator.

        Yields:
            Name of a weight to its matrix, quantized; nothing at 16 bits.
        """
        if not self.rounds_weights:
            return
        for seen in self._statistics(model, given):
            found: dict[str, Solved] = {}
            for name in list(seen):
                layer = model.get_submodule(name.rpartition(".")[0])
                # What is known of a layer may be larger than it: it goes when that is done.
                found[name] = self._rounded(name, layer, seen.pop(name))
            yield found

    def _statistics(
        self, model: nn.Module, given: Given
    ) -> Iterator[dict[str, LayerStatistics | None]]:
        if self.want:
            found = in_order(
                model, given.batches, self.want, self.layers, observers=self.observers()
            )
            yield from map(dict[str, LayerStatistics | None], found)
        else:
            yield from map(dict.fromkeys, grouped(model, list(matrices(model, self.layers))))

    def _rounded(self, name: str, module: nn.Module, seen: LayerStatistics | None) -> Solved:
        weight = module.weight
        assert isinstance(weight, Tensor)
        matrix = as_matrix(module, weight).float()
        solved = self.solve(matrix, self.spec_of(name, matrix), seen)
        weight.copy_(from_matrix(module, solved.dequantize()))
        return solved

    @property
    def inputs_wait(self) -> bool:
        """Whether `inputs` looks at a model all of whose weights are rounded."""
        return False

    def inputs(self, model: nn.Module, given: Given) -> dict[str, Input]:
        """Says how the inputs of layers are rounded: by default as `activations` says.

        Args:
            model: The model, with rounded weights where `inputs_wait`.
            given: Calibration batches, loss, generator.

        Returns:
            Name of a weight to the spec of its layer's input and None, or a scale and a zero
            point that hold for all inputs. Layers that are left out see their inputs as is.
        """
        if self.activations is None or not self.rounds_inputs:
            return {}
        form = Int(self.activations)
        # A slice of a convolution's input along its first dimension is an example.
        return {
            name: (QuantSpec(form, "channel" if isinstance(one, _ConvNd) else "token"), None)
            for name, one in matrices(model, self.layers).items()
        }

    def pack(self, module: nn.Module, solved: Solved, given: Input | None) -> nn.Module | None:
        """Makes the layer that holds the codes of a weight: by default of packed codes.

        Args:
            module: The layer, with the rounded weight.
            solved: What `solve` gave for it.
            given: How its input is rounded, which the new layer has to do; None: not at all.

        Returns:
            The layer, or None where there is none that could take the place of such a module.
        """
        assert isinstance(solved, Quantized)
        return pack(module, solved, *(given or ())) if packable(module) else None

    def install(self, model: nn.Module, found: Mapping[str, Solved], given: Given) -> nn.Module:
        """Puts layers that hold codes, and layers that round their inputs, in their places.

        Args:
            model: The model, with rounded weights.
            found: The quantized weights, by name.
            given: Calibration batches, loss, generator.

        Returns:
            The model.
        """
        return self._put(model, matrices(model, self.layers), found, self.inputs(model, given))

    def _put(
        self,
        model: nn.Module,
        names: Iterable[str],
        found: Mapping[str, Solved],
        inputs: Mapping[str, Input],
    ) -> nn.Module:
        made: dict[str, nn.Module] = {}
        for name in names:
            path, layer, rounding = name.rpartition(".")[0], None, inputs.get(name)
            module = model.get_submodule(path)
            if self.packed and name in found:
                layer = self.pack(module, found[name], rounding)
            if layer is None:
                layer = module if rounding is None else rounded_input(module, rounding)
            if layer is not module:
                made[path] = layer.train(module.training)
        return replace(model, made) if made else model


def rounded_input(layer: nn.Module, given: Input) -> QuantizedInput:
    """Puts a layer behind one that rounds its input.

    Args:
        layer: The layer.
        given: How.

    Example:
        >>> rounded_input(nn.Linear(2, 3), (QuantSpec("int8", "token"), None)).static
        False
    """
    return round_input(layer, *given)


@dataclass(frozen=True, kw_only=True)
class Weights(Quantizer):
    """Rounds weights in a published way: see `baseline`.

    Args:
        observer: How the range of a scale is chosen: a name of `supple.observers.RANGES`.
        solver: `"nearest"`; `"half_quadratic"`, which moves the zero points (they are then
            fractions, held in float16); or `"gptq"`, which rounds column by column and lets
            those to come make up for the error, and needs calibration data.
        order: Of `"gptq"`: columns as they come, `"none"`, or those first whose inputs are
            largest, `"activation"`.
        damp: Of `"gptq"`: share of the mean of the Hessian's diagonal that is added to it.
        rotation: What the inputs of linear layers are rotated by: `"none"`; `"blocks"` of up
            to 128 channels, each by a Hadamard matrix; or `"random"`, all channels by such a
            matrix with random signs.
    """

    observer: str = "minmax"
    solver: Solver = "nearest"
    order: Order = "none"
    damp: float = 0.01
    rotation: Rotating = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rotation not in get_args(Rotating):
            raise SettingError(
                f"rotation must be one of {', '.join(get_args(Rotating))}, got "
                f"{self.rotation!r}{nearest(str(self.rotation), get_args(Rotating))}"
            )
        if self.observer not in RANGES:
            raise SettingError(
                f"there is no observer '{self.observer}'{nearest(self.observer, RANGES)} "
                f"(observers: {', '.join(RANGES)})"
            )
        if self.solver not in get_args(Solver):
            raise SettingError(
                f"solver must be one of {', '.join(get_args(Solver))}, got {self.solver!r}"
                f"{nearest(str(self.solver), get_args(Solver))}"
            )
        if self.solver == "half_quadratic" and self.symmetric:
            raise SettingError("solver='half_quadratic' moves zero points: set symmetric=False")
        if self.order not in get_args(Order):
            raise SettingError(
                f"order must be one of {', '.join(get_args(Order))}, got {self.order!r}"
                f"{nearest(str(self.order), get_args(Order))}"
            )

    def rotations(self, model: nn.Module, given: Given) -> Mapping[str, Rotation]:
        """Gives Hadamard rotations of all linear layers, where these are asked for."""
        if self.rotation == "none" or not (self.rounds_weights or self.rounds_inputs):
            return {}
        if self.rotation == "blocks":
            return block_hadamards(model, self.layers)
        return random_hadamards(model, given.random, self.layers)

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        """Calibration data, where inputs are looked at."""
        return ("calibration",) if self.want else ()

    @property
    def want(self) -> tuple[str, ...]:  # type: ignore[override]
        """Products of inputs, where the solver needs them."""
        return ("gram",) if self.solver == "gptq" and self.rounds_weights else ()

    def spec(self) -> QuantSpec:
        """Gives the spec, with zero points in float16 where they move."""
        spec = super().spec()
        if self.solver != "half_quadratic":
            return spec
        return QuantSpec(**{**spec.settings(), "zero_format": "fp16"})

    def solve(self, matrix: Tensor, spec: QuantSpec, seen: LayerStatistics | None) -> Quantized:
        """Rounds within the chosen range."""
        if self.solver == "half_quadratic":
            return half_quadratic(matrix, spec)
        observer = RANGES[self.observer]
        if self.solver == "gptq":
            assert seen is not None
            return gptq(
                matrix, seen.gram, spec, damp=self.damp, order=self.order, observer=observer
            )
        return quantize(matrix, spec, observer=observer)


BASELINES: Mapping[str, Mapping[str, Any]] = {
    "rtn": {},
    "rtn-asymmetric": {"symmetric": False},
    "rtn-mse": {"observer": "mse"},
    "hqq": {"solver": "half_quadratic", "symmetric": False, "group_size": 64},
    "gptq": {"solver": "gptq", "symmetric": False},
    "nf4": {"format": "nf4", "group_size": 64, "scale_format": "fp32"},
    "fp4": {"format": "e2m1", "group_size": 128},
    "mxfp4": {"format": "e2m1", "group_size": 32, "scale_format": "e8m0"},
    "nvfp4": {"format": "e2m1", "group_size": 16, "scale_format": "e4m3"},
    "fp8": {"format": "e4m3", "bits": 8},
    "quarot": {"rotation": "random", "activations": 4},
}
"""Settings of `Weights` by the name of a published quantizer."""


def baseline(name: str, **settings: Any) -> Weights:
    """Gives a published quantizer that is no technique of its own here, by its name.

    Args:
        name: One of `BASELINES`.
        **settings: Of `Weights`: `bits`, `group_size`, `layers`, or one of the baseline's own
            that is to differ.

    Returns:
        The quantizer.

    Raises:
        SettingError: There is no such baseline, or a setting can't be used.

    Example:
        >>> layer = nn.Linear(3, 1, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[-6.0, 2.4, 0.7]]))
        >>> baseline("fp4").apply(layer).weight.tolist()
        [[-6.0, 2.0, 0.5]]
    """
    if name not in BASELINES:
        raise SettingError(
            f"there is no baseline '{name}'{nearest(name, BASELINES)} "
            f"(baselines: {', '.join(BASELINES)})"
        )
    return Weights(**{**BASELINES[name], **settings})


def bits_per_weight(found: Mapping[str, Solved]) -> float:
    """Gives the bits that a quantized weight takes on average, scales and all counted.

    Args:
        found: What `Quantizer.quantized` gave; not empty.

    Returns:
        Bits, codes not padded to bytes.
    """
    weights = sum(one.shape.numel() for one in found.values())
    return sum(one.total_bits for one in found.values()) / weights
