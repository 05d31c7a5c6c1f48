"""Bits: how many bits weights, and the inputs of layers, have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from supple.axes.base import Axis, Patch, RoundedInput, RoundedWeight, selected
from supple.errors import SettingError, nearest
from supple.formats import SCALE_SLACK, Int, Quantized, QuantSpec, fake_quantize, quantize
from supple.graph.couple import Graph
from supple.layers.pack import matrix_of, pack, packable, round_input, weight_of
from supple.observers import RANGES
from supple.space import Site

__all__ = [
    "AS_IT_IS",
    "Bits",
    "BitsSite",
    "Mode",
    "bytes_of",
    "learned_round",
    "packed_as",
    "straight",
]

Mode = Literal["channel", "tensor", "channel-asymmetric", "tensor-asymmetric"]
AS_IT_IS = 16
"""The choice at which nothing is rounded."""

_SCALE_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "e8m0": 1, "e8m0-up": 1}
_SMALLEST = 1e-8  # of a learned step


@dataclass(frozen=True)
class BitsSite(Site):
    """A site that rounds one weight, or what one layer is given."""

    path: str = field(default="", compare=False)
    input: bool = field(default=False, compare=False)
    layer: nn.Module | None = field(default=None, compare=False, repr=False)

    @property
    def module(self) -> nn.Module:
        """The layer as it was when the site was found; of it only the structure is asked."""
        assert self.layer is not None
        return self.layer


@dataclass(frozen=True)
class Bits(Axis):
    r"""Makes the bits of weights, and of what layers are given, elastic.

    Every `nn.Linear`, `nn.Conv2d` and `transformers`' `Conv1D` has a site `layer.bits`, and,
    where `inputs` are named, another one `layer.input_bits`. A choice is a number of bits; 16,
    the full choice, leaves numbers as they are. All choices round one set of weights, in
    floating point and with gradients that pass the rounding (straight-through). What is
    extracted holds packed codes (`supple.layers.packed`), and `weight_bytes` counts these,
    scales and all. `macs` and `activation_bytes` are those of the full network: what taking
    codes apart needs on the way is not counted.

    Scales follow the weights, whatever they and other axes make of them. With `learned` they
    are parameters instead: one for each site and choice, in a layer's
    `supple_weight_step_4` and `supple_input_step_4`, trained with the weights (with the
    gradient of LSQ). They begin as LSQ begins; for inputs that are distributed normally.

    With several `modes` a choice says mode and bits: 10 times the bits plus the mode's place,
    so that 41 are 4 bits in the second mode and 160 is the full choice.

    Args:
        choices: Bits of weights on offer, from 2 to 8; empty for none.
        inputs: Bits of inputs on offer, from 2 to 8; None leaves inputs as they are.
        modes: Who shares a scale of a weight, and whether there are zero points: some of
            `"channel"`, `"tensor"`, `"channel-asymmetric"`, `"tensor-asymmetric"`.
        input_modes: Of inputs: `"tensor"` or `"tensor-asymmetric"`. Unless learned, each token
            (of a convolution, each example) has a scale of its own.
        group_size: Inputs of an output that share a scale; None for all. Only with the mode
            `"channel"` or `"channel-asymmetric"`, and not learned.
        observer: How scales are found: a name of `supple.observers.RANGES`.
        scale_format: How scales of weights are held: `"fp32"`, `"fp16"`, `"bf16"`, `"e8m0"` or
            `"e8m0-up"`.
        learned: Whether scales are trained parameters. Rows must then stay: widths of layers
            whose outputs have scales of their own can't be elastic, too.
        where: Only layers whose path matches this shell-style pattern.

    Raises:
        SettingError: A value can't be used.

    Example:
        >>> import supple
        >>> net = supple.elastic(nn.Linear(64, 8), torch.ones(2, 64), axes=[Bits((2, 4))])
        >>> net.space.sites[0].choices, net.extract({"bits": 4})
        ((2, 4, 16), PackedLinear((8, 64), int4, channel))
        >>> net.costs([net.space.config({"bits": b}) for b in (2, 16)])["weight_bytes"].tolist()
        [176, 2080]

    Source:
        Learned steps: Esser et al. 2020, "Learned Step Size Quantization", arXiv:1902.08153.
    """

    name: ClassVar[str] = "bits"

    choices: tuple[int, ...] = (2, 3, 4, 8)
    inputs: tuple[int, ...] | None = None
    modes: tuple[str, ...] = ("channel",)
    input_modes: tuple[str, ...] = ("tensor",)
    group_size: int | None = None
    observer: str = "minmax"
    scale_format: str = "fp16"
    learned: bool = False
    where: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "choices", _bits("choices", self.choices))
        if self.inputs is not None:
            object.__setattr__(self, "inputs", _bits("inputs", self.inputs))
        if not self.choices and not self.inputs:
            raise SettingError("choices or inputs must name some numbers of bits")
        for setting in ("modes", "input_modes"):
            self._check_modes(setting)
        if self.observer not in RANGES:
            raise SettingError(
                f"there is no observer '{self.observer}'{nearest(self.observer, RANGES)} "
                f"(observers: {', '.join(RANGES)})"
            )
        if self.scale_format not in _SCALE_BYTES:
            raise SettingError(
                f"scale_format must be one of {', '.join(_SCALE_BYTES)}, got "
                f"{self.scale_format!r}{nearest(self.scale_format, _SCALE_BYTES)}"
            )
        if self.group_size is not None and (self.learned or self.group_size < 1):
            raise SettingError(
                f"group_size must be at least 1, and None where scales are learned, got "
                f"{self.group_size}"
            )
        if self.group_size is not None and any("tensor" in mode for mode in self.modes):
            raise SettingError("groups lie within rows: leave group_size=None for a tensor")

    def _check_modes(self, setting: str) -> None:
        given = tuple(getattr(self, setting))
        object.__setattr__(self, setting, given)
        allowed = [m for m in get_args(Mode) if setting == "modes" or "tensor" in m]
        for mode in given:
            if mode not in allowed:
                raise SettingError(
                    f"{setting} must be some of {', '.join(allowed)}, got {mode!r}"
                    f"{nearest(str(mode), allowed)}"
                )
        if not given or len(set(given)) < len(given):
            raise SettingError(f"{setting} must name each mode once, got {given}")

    # -- choices

    def told(self, choice: int, input: bool = False) -> tuple[int, str]:
        """Gives the bits and the mode that a choice stands for.

        Args:
            choice: Of a site.
            input: Whether the site is an input's.

        Returns:
            The bits, 16 for none rounded, and the mode.

        Example:
            >>> Bits((4, 8), modes=("channel", "tensor")).told(81)
            (8, 'tensor')
        """
        modes = self.input_modes if input else self.modes
        if len(modes) == 1:
            return choice, modes[0]
        return choice // 10, modes[choice % 10]

    def _offered(self, input: bool) -> tuple[int, ...]:
        bits, modes = (
            (self.inputs or (), self.input_modes) if input else (self.choices, self.modes)
        )
        if len(modes) == 1:
            return (*bits, AS_IT_IS)
        return (*(10 * b + i for b in bits for i in range(len(modes))), 10 * AS_IT_IS)

    # -- the contract

    def sites(self, graph: Graph) -> Sequence[Site]:
        """One site for each weight, and one for what each layer is given."""
        found: list[Site] = []
        for path, layer, reason in self._layers(graph.model):
            if not reason:
                for input in (False, True):
                    offered = self._offered(input)
                    if len(offered) > 1:
                        name = _site_name(path, input)
                        found.append(
                            BitsSite(
                                name,
                                self.name,
                                offered,
                                offered[-1],
                                path=path,
                                input=input,
                                layer=layer,
                            )
                        )
        return found

    def fixed(self, graph: Graph) -> Mapping[str, str]:
        """Layers with a matrix of weights that can't be packed."""
        return {
            _site_name(path, False): reason
            for path, _, reason in self._layers(graph.model)
            if reason
        }

    def patch(self, site: Site, choice: int) -> Patch:
        """The weight, or what the layer is given, rounded."""
        assert isinstance(site, BitsSite)
        if choice == site.full:
            return Patch()
        if site.input:
            return Patch(rounded_inputs={site.path: self._input(site, choice)})
        return Patch(rounded={_join(site.path, "weight"): self._weight(site, choice)})

    def paths(self, site: Site) -> tuple[str, ...]:
        """The layer."""
        assert isinstance(site, BitsSite)
        return (site.path,)

    def parameters(self, site: Site) -> Mapping[str, Tensor]:
        """Steps and zero points by choice, where they are learned."""
        assert isinstance(site, BitsSite)
        if not self.learned:
            return {}
        found: dict[str, Tensor] = {}
        for choice in site.choices[:-1]:
            way: RoundedWeight | Input
            if site.input:
                way = self._input(site, choice)
                values = _normal_range(way.spec)
            else:
                way = self._weight(site, choice)
                assert isinstance(way, Weight)
                values = way.first(site.module)
            found.update(zip(way.parameters, values, strict=True))
        return found

    # -- how

    def _weight(self, site: BitsSite, choice: int) -> RoundedWeight:
        bits, mode = self.told(choice)
        symmetric = not mode.endswith("asymmetric")
        granularity: Any = mode.removesuffix("-asymmetric")
        spec = QuantSpec(
            Int(bits, symmetric=symmetric),
            granularity if self.group_size is None else "group",
            self.group_size,
            symmetric,
            self.scale_format,  # type: ignore[arg-type]
        )
        transposed = isinstance(site.module, Conv1D)
        names = self._names(site, choice, symmetric)
        return Weight(names, spec, self.observer, transposed)

    def _input(self, site: BitsSite, choice: int) -> Input:
        bits, mode = self.told(choice, input=True)
        symmetric = not mode.endswith("asymmetric")
        by_example = "channel" if isinstance(site.module, nn.Conv2d) else "token"
        spec = QuantSpec(
            Int(bits, symmetric=symmetric),
            "tensor" if self.learned else by_example,  # type: ignore[arg-type]
            symmetric=symmetric,
        )
        return Input(self._names(site, choice, symmetric), spec)

    def _names(self, site: BitsSite, choice: int, symmetric: bool) -> tuple[str, ...]:
        if not self.learned:
            return ()
        kind = "input" if site.input else "weight"
        parts = ("step",) if symmetric else ("step", "zero")
        return tuple(_join(site.path, f"supple_{kind}_{part}_{choice}") for part in parts)

    def _layers(self, model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
        """Layers with a matrix of weights, each with the reason why it is no site, or none."""
        uses: dict[int, int] = {}
        for module in model.modules():
            for parameter in module._parameters.values():
                uses[id(parameter)] = uses.get(id(parameter), 0) + 1
        for path, module in model.named_modules():
            if isinstance(module, _KINDS) and selected(path, self.where):
                if not packable(module) or "weight" not in module._parameters:
                    yield path, module, f"a {type(module).__name__} can't hold packed codes"
                elif uses[id(module.weight)] > 1:
                    yield path, module, "its weight is another module's, too"
                else:
                    yield path, module, ""


_KINDS = (nn.Linear, nn.modules.conv._ConvNd, Conv1D)


def _bits(setting: str, given: Sequence[int]) -> tuple[int, ...]:
    for one in given:
        if isinstance(one, bool) or not isinstance(one, int) or not 2 <= one <= 8:
            raise SettingError(f"{setting} must be whole numbers from 2 to 8, got {one!r}")
    return tuple(sorted(set(given)))


def _site_name(path: str, input: bool) -> str:
    return _join(path, "input_bits" if input else "bits")


def _join(path: str, leaf: str) -> str:
    return f"{path}.{leaf}" if path else leaf


# ---------------------------------------------------------------------------------- rounding


@dataclass(frozen=True)
class Weight(RoundedWeight):
    """A weight rounded to few bits, with scales of its own or learned ones.

    Args:
        parameters: Names of the step and, where not symmetric, of the zero point; none where
            scales follow the weight.
        spec: How, as a matrix.
        observer: How scales are found.
        transposed: Whether the layer holds the transpose of its matrix.
    """

    parameters: tuple[str, ...]
    spec: QuantSpec
    observer: str
    transposed: bool

    def __call__(self, weight: Tensor, *values: Tensor) -> Tensor:
        """Rounds the weight."""
        matrix = matrix_of(weight, self.transposed).float()
        if values:
            rounded = learned_round(matrix, self.spec, *values)
        else:
            scale, zero = self._scales(matrix)
            seen = fake_quantize(matrix.detach(), self.spec, scale, zero)
            rounded = straight(matrix, seen, self._inside(matrix.detach(), scale, zero))
        return weight_of(rounded, weight, self.transposed).to(weight.dtype)

    def packed(
        self,
        layer: nn.Module,
        *values: Tensor,
        given: tuple[RoundedInput, tuple[Tensor, ...]] | None = None,
    ) -> nn.Module:
        """Gives the layer of codes."""
        weight = layer.weight
        assert isinstance(weight, Tensor)
        return packed_as(layer, self.quantized(weight, *values), given)

    def quantized(self, weight: Tensor, *values: Tensor) -> Quantized:
        """Gives codes and scales of the weight as a matrix."""
        matrix = self.matrix(weight)
        scales = _stored(self.spec, matrix, *values) if values else self._scales(matrix)
        return quantize(matrix, self.spec, *scales)

    def nbytes(self, shape: Sequence[Any]) -> Any:
        """Bytes of codes, scales and zero points."""
        return bytes_of(self.spec, shape, self.transposed)

    def matrix(self, weight: Tensor) -> Tensor:
        """Lays the weight out with a row for each output."""
        return matrix_of(weight, self.transposed).detach().float()

    def first(self, layer: nn.Module) -> tuple[Tensor, ...]:
        """Gives the step that LSQ begins with, and a zero point."""
        weight = layer.weight
        assert isinstance(weight, Tensor)
        return _as_parameters(*self.spec.scales(self.matrix(weight), RANGES["mean_abs"]))

    def _scales(self, matrix: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.spec.scales(matrix.detach(), RANGES[self.observer])

    def _inside(self, matrix: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """What is not clipped: there the gradient passes."""
        form = self.spec.format
        ready = matrix / self.spec.spread(scale, matrix.shape)
        if zero is not None:
            ready = ready + self.spec.spread(zero, matrix.shape)
        low, high = SCALE_SLACK * (form.least - 0.5), SCALE_SLACK * (form.most + 0.5)
        return (ready >= low) & (ready <= high)


@dataclass(frozen=True)
class Input(RoundedInput):
    """What a layer is given, rounded with scales of each token or with a learned one.

    Args:
        parameters: Names of the step and, where not symmetric, of the zero point, or none.
        spec: How.
    """

    parameters: tuple[str, ...]
    spec: QuantSpec

    def __call__(self, x: Tensor, *values: Tensor) -> Tensor:
        """Rounds what the layer is given."""
        if values:
            return learned_round(x.float(), self.spec, *values).to(x.dtype)
        seen = fake_quantize(x.detach(), self.spec)
        return straight(x, seen) if x.requires_grad else seen

    def packed(self, layer: nn.Module, *values: Tensor) -> nn.Module:
        """Gives a layer around this one."""
        return round_input(layer, self.spec, self.range(*values))

    def range(self, *values: Tensor) -> tuple[Tensor, Tensor | None] | None:
        """Gives the scale and the zero point for all inputs, if they are learned."""
        return _stored(self.spec, torch.ones(1, 1), *values) if values else None

    @property
    def nbytes(self) -> int:
        """Bytes of a learned scale and zero point."""
        return 4 * len(self.parameters)


def packed_as(
    layer: nn.Module,
    quantized: Quantized,
    given: tuple[RoundedInput, tuple[Tensor, ...]] | None,
) -> nn.Module:
    """Gives the layer that holds codes, and rounds its input, in a layer's place.

    Args:
        layer: The layer.
        quantized: Its weight as a matrix, quantized.
        given: How its input is rounded, an `Input`, with the values that this takes, if it is.
    """
    if given is None:
        return pack(layer, quantized)
    rounding, values = given
    assert isinstance(rounding, Input)
    return pack(layer, quantized, rounding.spec, rounding.range(*values))


def bytes_of(spec: QuantSpec, shape: Sequence[Any], transposed: bool) -> Any:
    """Gives the bytes of a weight's codes, scales and zero points in a file.

    Args:
        spec: How it is quantized, as a matrix.
        shape: Sizes of the weight: numbers, or arrays of such.
        transposed: Whether it is the transpose of its matrix.

    Example:
        >>> bytes_of(QuantSpec("int4", scale_format="fp16"), (8, 64), False)
        272
    """
    rows, *rest = reversed(shape) if transposed else shape
    columns: Any = 1
    for size in rest:
        columns = columns * size
    groups = -(-columns // spec.group_size) if spec.group_size else 1
    scales = groups * (1 if spec.granularity == "tensor" else rows)
    total = _eighths(rows * columns * spec.bits) + scales * _SCALE_BYTES[spec.scale_format]
    if spec.symmetric:
        return total
    return total + (_eighths(scales * spec.bits) if spec.zero_format == "code" else 2 * scales)


class _Straight(torch.autograd.Function):
    """Puts rounded numbers in the place of others; the gradient passes, where it may."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: Tensor, inside: Tensor | None) -> Tensor:
        ctx.save_for_backward(inside)
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,), (inside,) = gradients, ctx.saved_tensors
        return (gradient if inside is None else gradient * inside), None, None


def straight(x: Tensor, rounded: Tensor, inside: Tensor | None = None) -> Tensor:
    """Gives rounded numbers with the gradient of those before (straight-through).

    Args:
        x: The numbers.
        rounded: What stands for them, of the same shape and type.
        inside: Where the gradient passes; None for everywhere.

    Example:
        >>> x = torch.tensor([0.6, 1.2], requires_grad=True)
        >>> straight(x, x.detach().round()).sum().backward()
        >>> x.grad.tolist()
        [1.0, 1.0]
    """
    found: Tensor = _Straight.apply(x, rounded, inside)  # type: ignore[no-untyped-call]
    return found


def learned_round(
    x: Tensor, spec: QuantSpec, step: Tensor, zero: Tensor | None = None
) -> Tensor:
    r"""Rounds to multiples of a trained step.

    The gradient passes the rounding; the step's is divided by $\sqrt{p N}$, where $N$ numbers
    share a step and $p$ is the highest number of the format.

    Args:
        x: The numbers, float32; a matrix where rows have steps of their own.
        spec: How; of granularity channel or tensor.
        step: The steps, (rows,) or (1,); of one below 0 the magnitude counts.
        zero: Zero points, of the same shape, where the spec is not symmetric.

    Returns:
        The rounded numbers.

    Raises:
        SettingError: There is not a step for each row.

    Example:
        >>> x, spec = torch.tensor([[0.4, 1.6, 9.0]]), QuantSpec("int3", "tensor")
        >>> learned_round(x, spec, torch.ones(1)).tolist()
        [[0.0, 2.0, 3.0]]
    """
    scale, whole = _stored(spec, x, step, zero)
    size = step.abs().clamp_min(_SMALLEST)[:, None]
    factor = (max(spec.format.most, 1) * x.numel() / step.numel()) ** -0.5
    slow = size * factor
    # The value is that which is stored, the gradient that of the step, slowed down.
    held = straight(slow, scale.to(slow.dtype))
    if step.numel() == 1:
        held = held.reshape(())
        whole = None if whole is None else whole.reshape(())
    ready = x / held
    if whole is not None:
        ready = ready + whole
    ready = ready.clamp(spec.format.least, spec.format.most)
    rounded = straight(ready, ready.detach().round())
    return (rounded if whole is None else rounded - whole) * held


def _stored(
    spec: QuantSpec, x: Tensor, step: Tensor, zero: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Gives a learned step and zero point as a file holds them."""
    if step.shape[0] not in (1, x.shape[0]):
        raise SettingError(
            f"there are {step.shape[0]} learned steps for {x.shape[0]} rows: widths can't vary "
            "where rows have learned steps; set modes=('tensor',), or learned=False"
        )
    scale = spec.stored_scale(step.detach().float().abs().clamp_min(_SMALLEST)[:, None])
    return scale, None if zero is None else spec.stored_zero(zero.detach().float()[:, None])


def _as_parameters(scale: Tensor, zero: Tensor | None) -> tuple[Tensor, ...]:
    # One-dimensional, as gains are: optimizers let them not decay.
    if zero is None:
        return (scale.flatten(),)
    return scale.flatten(), nn.Parameter(zero.flatten(), requires_grad=False)


def _normal_range(spec: QuantSpec) -> tuple[Tensor, ...]:
    """Gives the range of normally distributed inputs: three standard deviations."""
    reach = torch.full((1, 1), 3.0)
    return _as_parameters(*spec.scales_of(-reach, reach))


def _eighths(bits: Any) -> Any:
    return -(-bits // 8)
