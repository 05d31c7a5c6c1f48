"""NUPES: powers of whole numbers, whose exponent is searched for or learned."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from supple.errors import SettingError, nearest
from supple.formats import NumberFormat, Power, Quantized, QuantSpec, fake_quantize
from supple.quantize._learned import LearnedRounding, Rounding, straight
from supple.quantize.base import MOST_BITS, Input, Solved
from supple.technique import register
from supple.transforms import Given
from supple.weights import as_matrix, matrices

__all__ = ["NUPES", "PowerRounding", "search", "signed_power", "soft_step"]

Scope = Literal["all", "layer"]
_COARSE = 5  # hundredths between the exponents that are tried first
_LEAST = 0.05  # exponent
_SOFTEST, _SHARPEST = 1.0, 12.0


@register(title="NUPES: power exponent search", paper="arXiv:2308.05600")
@dataclass(frozen=True, kw_only=True)
class NUPES(LearnedRounding):
    r"""Rounds powers of weights, so that there are finer steps near zero.

    With $m_o$ the largest magnitude of an output's weights and $n = 2^{b-1} - 1$, a weight has
    the code

    $$q = \text{round}\left(n\,\text{sign}(w)\left(\frac{|w|}{m_o}\right)^a\right), \quad
    \hat w = m_o\,\text{sign}(q) \left(\frac{|q|}{n}\right)^{1/a}.$$

    Powers keep products: that of two numbers so rounded is that of their codes, to the power.
    The exponent is searched for in $(0, 1]$ such that $\sum_l \lVert W_l - \hat W_l \rVert$ is
    least. That takes no data, and with `steps=0` it is all (PowerQuant). Else each block of
    the network then learns, on what the rounded ones before it give, to give what it gave
    before: (1) codes, over all of their range, by a shift of each weight's place, with the
    gradient of a soft step that grows hard; (2) the exponent of each weight matrix. Near zero
    slopes of powers vanish or have no bound; the slope at half a step stands for them.

    Args:
        bits: Of a weight's code, from 2; at 16 weights stay as they are.
        exponent: $a$ at first, above 0; None searches for it.
        scope: Whether one exponent is searched for `"all"` matrices, or for each `"layer"`.
        steps: Updates for each block, 0 for none; each sees one calibration batch.
        lr: Learning rate of shifts, in steps of the codes; it falls with a cosine.
        rate: Learning rate of exponents relative to it; 0 keeps them.
        activations: Bits of the layers' inputs, which are rounded as powers of the same
            exponent, with a scale for each token (of a convolution for each example); None
            leaves them as they are.
        scale_format: How scales are held; see `supple.formats.QuantSpec`.
        layers: Shell-style pattern of the layers' paths; several are parted by commas, and `!`
            before one leaves out.
        packed: Whether layers hold codes in place of weights.

    Raises:
        SettingError: A setting can't be used, or data is missing while `steps` is not 0.

    Example:
        >>> layer = nn.Linear(4, 1, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[-4.0, 1.0, 0.5, 0.1]]))
        >>> small = NUPES(bits=3, exponent=0.5, steps=0).apply(layer)
        >>> [round(value, 3) for value in small.weight[0].tolist()]
        [-4.0, 1.778, 0.444, 0.0]
        >>> search([layer.weight], 3), search([torch.eye(4)], 3)
        (0.24, 1.0)

    Source:
        Yvinec, Dapogny and Bailly 2023, "NUPES: Non-Uniform Post-Training Quantization via
        Power Exponent Search", arXiv:2308.05600, and "PowerQuant", arXiv:2301.09858; no code
        was published.
    Differs:
        The shape and schedule of the soft step, the rates and the bound of slopes are ours:
        what is openly known of the paper does not tell them. Values are rounded all along, and
        the soft step gives their gradient. The search goes through a grid twice (there:
        Nelder-Mead). Inputs of two signs keep them, and layers put weights together in
        floating point: no power is taken of sums.
    Checked:
        Codes, values and gradients by hand; the search against all exponents of the grid.
    """

    distinguishing: ClassVar[str] = "rounding"
    needs: ClassVar[tuple[str, ...]] = ()

    exponent: float | None = None
    scope: Scope = "all"
    steps: int = 1000
    lr: float = 0.03
    rate: float = 0.1
    observer: str = "minmax"

    def __post_init__(self) -> None:
        if self.exponent is not None and not 0 < self.exponent < math.inf:
            raise SettingError(f"exponent must be above 0 and finite, got {self.exponent}")
        super().__post_init__()
        if self.scope not in get_args(Scope):
            raise SettingError(
                f"scope must be one of {', '.join(get_args(Scope))}, got {self.scope!r}"
                f"{nearest(str(self.scope), get_args(Scope))}"
            )
        if not 0 <= self.rate < math.inf:
            raise SettingError(f"rate must be 0 or more and finite, got {self.rate}")
        if self.format is not None or not self.symmetric or self.group_size is not None:
            raise SettingError(
                "weights are powers with a scale for each output: leave format, symmetric and "
                "group_size as they are"
            )
        if self.observer != "minmax":
            raise SettingError(
                "powers reach to the largest magnitude: leave observer='minmax', got "
                f"{self.observer!r}"
            )

    @classmethod
    def examples(cls) -> list[NUPES]:
        """Gives a short run from an exponent that is known."""
        return [cls(bits=3, exponent=0.6, steps=1, activations=6)]

    @classmethod
    def neutral(cls) -> NUPES:
        """Gives the setting that rounds nothing."""
        return cls(bits=MOST_BITS)

    @classmethod
    def toy(cls) -> tuple[nn.Module, tuple[Tensor, ...]]:
        """Gives a network of one layer."""
        source = torch.Generator().manual_seed(5)
        layer = nn.utils.skip_init(nn.Linear, 7, 3)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.normal_(0, 0.5, generator=source)
        return nn.Sequential(layer, nn.ReLU()), (torch.randn(13, 7, generator=source),)

    def number_format(self) -> NumberFormat:
        """Gives powers of the exponent that is given, else of 1."""
        return Power(self.bits, self.exponent or 1.0)

    def spec_of(self, name: str, matrix: Tensor) -> QuantSpec:
        """Gives the spec with the exponent of this matrix."""
        if self.exponent is not None:
            return self.spec()
        form = Power(self.bits, search([matrix], self.bits))
        return dataclasses.replace(self, exponent=form.exponent).spec()

    def rounding(self, name: str, layer: nn.Module, matrix: Tensor) -> Rounding:
        """Gives the rounding of powers."""
        return PowerRounding(matrix, self.spec_of(name, matrix), self.rate)

    @torch.no_grad()
    def by_block(self, model: nn.Module, given: Given) -> Iterator[Mapping[str, Solved]]:
        """Searches for the exponent, then learns."""
        if not self.rounds_weights:
            return
        if self.steps and not given.batches:
            raise SettingError(
                "NUPES learns from data: pass calibration=, or set steps=0 to search for the "
                "exponent alone"
            )
        if self.exponent is not None or self.scope == "layer":
            yield from super().by_block(model, given)
            return
        weights = [
            as_matrix(layer, layer.weight.detach()).float()  # type: ignore[operator]
            for layer in matrices(model, self.layers).values()
        ]
        found = dataclasses.replace(self, exponent=search(weights, self.bits))
        yield from found.by_block(model, given)

    @property
    def inputs_wait(self) -> bool:
        """Always: inputs have the exponent of the layer's weight."""
        return True

    def install(self, model: nn.Module, found: Mapping[str, Solved], given: Given) -> nn.Module:
        """Puts layers in their places whose inputs are powers like their weights."""
        return super().install(model, found, _Rounded(**vars(given), found=found))

    def inputs(self, model: nn.Module, given: Given) -> dict[str, Input]:
        """Says how inputs are rounded: to powers of the exponent of the layer's weight."""
        whole = super().inputs(model, given)
        assert isinstance(given, _Rounded)
        assert self.activations is not None or not whole
        made: dict[str, Input] = {}
        for name, (spec, scales) in whole.items():
            exponent = self.exponent or 1.0
            if name in given.found:
                exponent = given.found[name].spec.format.exponent
            form = Power(spec.bits, exponent)
            made[name] = QuantSpec(form, spec.granularity), scales
        return made


@dataclass(frozen=True)
class _Rounded(Given):
    """What `apply` was given, and the rounded weights."""

    found: Mapping[str, Any] = field(default_factory=dict)


@torch.no_grad()
def search(weights: list[Tensor], bits: int) -> float:
    """Searches for the exponent whose powers are nearest to matrices.

    Args:
        weights: Each (out, columns).
        bits: Of the codes.

    Returns:
        A multiple of 0.01 up to 1; the largest of equally good ones.
    """

    def lost(hundredths: int) -> float:
        spec = QuantSpec(Power(bits, hundredths / 100))
        return sum(float((fake_quantize(one, spec) - one).norm()) for one in weights)

    best = min(range(100, 0, -_COARSE), key=lost)
    near = range(min(best + _COARSE - 1, 100), max(best - _COARSE, 0), -1)
    return min(near, key=lost) / 100


class PowerRounding(Rounding):
    """Rounds powers of numbers, at places that shift.

    Args:
        matrix: What is rounded, (out, columns), float32.
        spec: How; its format is a `Power`, and a row has one scale.
        rate: How much faster the exponent moves than the shifts do.
    """

    matrix: Tensor
    scale: Tensor

    def __init__(self, matrix: Tensor, spec: QuantSpec, rate: float = 0.1) -> None:
        super().__init__()
        assert isinstance(spec.format, Power)
        self.spec, self.rate, self.first = spec, rate, spec.format.exponent
        self.most = 2.0 ** (spec.bits - 1) - 1
        scale, _ = spec.scales(matrix)
        self.register_buffer("matrix", matrix)
        self.register_buffer("scale", scale)
        self.shift = nn.Parameter(torch.zeros_like(matrix))
        self.moved = nn.Parameter(matrix.new_zeros(()))

    @property
    def exponent(self) -> Tensor:
        """The exponent, a scalar."""
        return (self.first + self.rate * self.moved).clamp_min(_LEAST)

    def places(self) -> Tensor:
        """Gives the places between whole numbers that are rounded, (out, columns)."""
        power = signed_power(self.matrix / self.scale, self.exponent, 0.5 / self.most)
        return self.most * power + self.shift

    def forward(self) -> Tensor:
        """Gives the matrix, with the gradient of a soft step that grows hard."""
        sharpness = _SOFTEST + (_SHARPEST - _SOFTEST) * self.progress
        places = self.places()
        codes = straight(soft_step(places, sharpness), places.detach().round())
        codes = codes.clamp(-self.most, self.most)
        return self.scale * signed_power(
            codes / self.most, self.exponent.reciprocal(), 0.5 / self.most
        )

    @torch.no_grad()
    def result(self) -> Quantized:
        """Gives codes and scales, with the exponent in the format."""
        exponent = self.first + self.rate * float(self.moved)
        form = Power(self.spec.bits, max(exponent, _LEAST))
        spec = QuantSpec(**{**self.spec.settings(), "format": form})
        whole = self.places().round().clamp(-self.most, self.most)
        codes = (whole + self.most + 1).to(torch.uint8 if form.bits <= 8 else torch.int32)
        return Quantized(codes, self.scale, None, spec, self.matrix.shape)


def soft_step(places: Tensor, sharpness: float) -> Tensor:
    r"""Rounds softly: whole numbers and halves stay, what lies between moves to whole ones.

        With $f$ the fraction of a place it becomes
        $\lfloor p
    floor + rac{1}{2} + rac{	anh k (f - 1/2)}{2 	anh k/2}$.

        Args:
            places: Any numbers.
            sharpness: $k$, above 0; near 0 nothing moves.

        Example:
            >>> found = soft_step(torch.tensor([-1.0, 0.25, 0.5, 0.9]), 8.0)
        >>> [round(value, 3) for value in found.tolist()]
            [-1.0, 0.018, 0.5, 0.999]
    """
    whole = places.detach().floor()
    fraction = places - whole
    half = math.tanh(sharpness / 2)
    return whole + 0.5 + (sharpness * (fraction - 0.5)).tanh() / (2 * half)


def signed_power(x: Tensor, exponent: Tensor, least: float) -> Tensor:
    r"""Gives $	ext{sign}(x)\,|x|^a$ with gradients that stay within bounds near zero.

    Args:
        x: Any numbers.
        exponent: $a$, a scalar above 0.
        least: Magnitude, above 0, whose slope and logarithm smaller ones take.

    Example:
        >>> x = torch.tensor([0.0, -0.25], requires_grad=True)
        >>> found = signed_power(x, torch.tensor(0.5), 0.04)
        >>> found.tolist(), torch.autograd.grad(found.sum(), x)[0].tolist()
        ([0.0, -0.5], [2.5, 1.0])
    """
    found: Tensor = _SignedPower.apply(x, exponent, least)
    return found


class _SignedPower(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, exponent: Tensor, least: float) -> Tensor:
        power = x.sign() * x.abs() ** exponent
        ctx.save_for_backward(x, exponent, power)
        ctx.least = least
        return power

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, exponent, power = ctx.saved_tensors
        bounded = x.abs().clamp_min(ctx.least)
        by_x = grads[0] * exponent * bounded ** (exponent - 1)
        return by_x, (grads[0] * power * bounded.log()).sum(), None
