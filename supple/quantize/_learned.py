"""Rounding that is learned, block by block, such that each block gives what it gave before.

`LearnedRounding` walks through a network. A block gets what the blocks before it give with
their weights rounded, and is to give what it gave in the network as it was. What is learned is
a `Rounding` for each weight: a matrix of few values that depends on some parameters.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from supple.calibrate import block_by_block, blocks_of
from supple.errors import SettingError, nearest
from supple.formats import NumberFormat, Quantized, QuantSpec
from supple.observers import RANGES
from supple.quantize._reconstruct import Example, examples_of, reconstruct
from supple.quantize.base import Quantizer, Solved
from supple.transforms import Given
from supple.weights import as_matrix, from_matrix, matrices

__all__ = ["AdditiveRounding", "LearnedRounding", "Rounding", "Scaled", "straight"]


class Rounding(nn.Module):
    """A matrix of few values, which depends on parameters that can be learned."""

    progress = 0.0
    """The share of the learning that is done, from 0 to 1."""

    def forward(self) -> Tensor:
        """Gives the matrix, (out, columns), float32, with a gradient."""
        raise NotImplementedError

    def result(self) -> Quantized:
        """Gives codes and scales in the end."""
        raise NotImplementedError


class Scaled(Rounding):
    """Rounds numbers in steps of a scale, which `codes` gives.

    The gradient passes the rounding unchanged, but where codes are clipped.

    Args:
        matrix: What is rounded, (out, columns), float32.
        spec: How.
        scale: Scales, as `QuantSpec.scales` gives them.
        zero: Zero points, or None.
    """

    matrix: Tensor
    scale: Tensor
    zero: Tensor | None

    def __init__(
        self, matrix: Tensor, spec: QuantSpec, scale: Tensor, zero: Tensor | None
    ) -> None:
        super().__init__()
        self.spec = spec
        self.register_buffer("matrix", matrix)
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero)

    def codes(self) -> tuple[Tensor, Tensor]:
        """Gives what is to be rounded, in steps of the scale, and the scale, with gradients."""
        raise NotImplementedError

    def forward(self) -> Tensor:
        """Gives the matrix, with a gradient."""
        return self._back(*self.codes())

    @torch.no_grad()
    def result(self) -> Quantized:
        """Gives codes and scales."""
        codes, scale = self.codes()
        return Quantized(
            self.spec.format.encode(codes), scale, self.zero, self.spec, self.matrix.shape
        )

    def _spread(self, scales: Tensor) -> Tensor:
        return self.spec.spread(scales, self.matrix.shape)

    def _shifted(self, ready: Tensor) -> Tensor:
        return ready if self.zero is None else ready + self._spread(self.zero)

    def _back(self, codes: Tensor, scale: Tensor) -> Tensor:
        values = rounded(codes, self.spec.format)
        if self.zero is not None:
            values = values - self._spread(self.zero)
        return values * self._spread(scale)


class AdditiveRounding(Scaled):
    """Rounds up or down, as learned fractions of steps say that begin at the weights' own."""

    def __init__(
        self, matrix: Tensor, spec: QuantSpec, scale: Tensor, zero: Tensor | None
    ) -> None:
        super().__init__(matrix, spec, scale, zero)
        ready = self._shifted(matrix / self._spread(scale))
        self.register_buffer("whole", ready.floor())
        self.fraction = nn.Parameter(ready - ready.floor())

    whole: Tensor

    def codes(self) -> tuple[Tensor, Tensor]:
        """Gives the whole numbers below the weights, plus the fractions."""
        return self.whole + straight(self.fraction, self.fraction.clamp(0, 1)), self.scale


def straight(value: Tensor, rounded: Tensor) -> Tensor:
    """Gives a rounded tensor with the gradient of another one.

    Args:
        value: What the gradient goes to.
        rounded: What is given, of the same shape.
    """
    return value + (rounded - value).detach()


def rounded(codes: Tensor, form: NumberFormat) -> Tensor:
    """Rounds to a format's values; the gradient passes but where numbers are clipped.

    Args:
        codes: Numbers, scaled and shifted.
        form: The format.

    Example:
        >>> from supple.formats import number_format
        >>> codes = torch.tensor([0.4, 3.2, 9.0], requires_grad=True)
        >>> found = rounded(codes, number_format("uint2"))
        >>> found.tolist(), torch.autograd.grad(found.sum(), codes)[0].tolist()
        ([0.0, 3.0, 3.0], [1.0, 0.0, 0.0])
    """
    inside = codes.clamp(form.least, form.most)
    return straight(inside, form.round(codes.detach()))


@dataclass(frozen=True, kw_only=True)
class LearnedRounding(Quantizer):
    """Learns for each weight whether it is rounded up or down.

    It is what methods with more freedom are measured against, after AdaRound (Nagel et al.
    2020, arXiv:2004.10568), with a gradient straight through the rounding in place of the
    sigmoid and its penalty.

    Args:
        observer: How the range of a scale is chosen: a name of `supple.observers.RANGES`.
        steps: Updates for each block, 0 for none; each sees one calibration batch.
        lr: Learning rate of Adam, which falls with a cosine.
    """

    needs: ClassVar[tuple[str, ...]] = ("calibration",)

    observer: str = "mse"
    steps: int = 5000
    lr: float = 3e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.observer not in RANGES:
            raise SettingError(
                f"there is no observer '{self.observer}'{nearest(self.observer, RANGES)} "
                f"(observers: {', '.join(RANGES)})"
            )
        if self.steps < 0:
            raise SettingError(f"steps must be 0 or more, got {self.steps}")
        if not 0 < self.lr < math.inf:
            raise SettingError(f"lr must be above 0 and finite, got {self.lr}")

    def rounding(self, name: str, layer: nn.Module, matrix: Tensor) -> Rounding:
        """Gives the rounding that is learned for a weight: by default up or down.

        Args:
            name: Name of the weight.
            layer: Its layer.
            matrix: The weight as a matrix, (out, columns), float32.
        """
        spec = self.spec_of(name, matrix)
        return AdditiveRounding(matrix, spec, *spec.scales(matrix, RANGES[self.observer]))

    @torch.no_grad()
    def by_block(self, model: nn.Module, given: Given) -> Iterator[Mapping[str, Solved]]:
        """Learns how the weights of one block after the other are rounded."""
        if not self.rounds_weights:
            return
        for part in _parts(model, given.batches, self.layers, bool(self.steps)):
            roundings = {
                name: self.rounding(name, layer, _matrix(layer))
                for name, layer in part.layers.items()
            }
            if self.steps:
                self._learn(part, roundings, given.random)
            found: dict[str, Solved] = {}
            for name, layer in part.layers.items():
                found[name] = roundings[name].result()
                layer.weight.copy_(from_matrix(layer, found[name].dequantize()))  # type: ignore[operator]
            yield found

    def _learn(
        self, part: _Part, roundings: dict[str, Rounding], source: torch.Generator
    ) -> None:
        learner = _Learner(part, roundings)

        def before(step: int) -> None:
            for one in roundings.values():
                one.progress = step / self.steps

        reconstruct(
            learner,
            part.examples,
            list(learner.roundings.parameters()),
            lr=self.lr,
            steps=self.steps,
            generator=source,
            before=before,
        )
        before(self.steps)


# ------------------------------------------------------------------------------ the network


@dataclass(frozen=True)
class _Part:
    """A piece of the network whose weights are learned together.

    Args:
        module: The piece.
        path: Its path.
        layers: Name of a weight, in the whole network, to its layer.
        examples: Calls of the piece, and what it is to give.
    """

    module: nn.Module
    path: str
    layers: dict[str, nn.Module]
    examples: list[Example]

    def within(self, name: str) -> str:
        """Gives the name of a weight within the piece."""
        return name[len(self.path) + 1 :] if self.path else name


class _Learner(nn.Module):
    """A piece of the network with the weights that roundings give, all else held fast."""

    def __init__(self, part: _Part, roundings: dict[str, Rounding]) -> None:
        super().__init__()
        self.roundings = nn.ModuleList(roundings.values())
        self._layers = {
            part.within(name): (part.layers[name], one) for name, one in roundings.items()
        }
        self._part = (part.module,)  # not one of its own modules
        self.train(part.module.training)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Gives what the piece gives."""
        module = self._part[0]
        tensors = {name: one.detach() for name, one in module.named_parameters()}
        for name, (layer, rounding) in self._layers.items():
            tensors[name] = from_matrix(layer, rounding()).to(tensors[name].dtype)
        return functional_call(module, tensors, args, kwargs)


def _parts(
    model: nn.Module, batches: tuple[Any, ...], layers: str, learns: bool
) -> Iterator[_Part]:
    """Yields the pieces of a network: its blocks in order, then layers outside of them.

    Blocks are to give what they gave in the network as it was, which goes along one block
    ahead; layers outside of blocks what they give to the same input before they are rounded.
    """
    left = matrices(model, layers)
    if not learns:
        yield _Part(model, "", left, [])
        return
    paths = [p for p in blocks_of(model) if any(name.startswith(f"{p}.") for name in left)]
    if paths:
        ahead = block_by_block(_twin(model), batches, blocks=paths)
        reference = next(ahead, None)
        for pass_ in block_by_block(model, batches, blocks=paths):
            assert reference is not None
            targets = [target.detach().clone() for target in reference.outputs()]
            # Both share weights: the twin has to be past the block before these change.
            reference = next(ahead, None)
            held = {name: left.pop(name) for name in pass_.layers(layers) if name in left}
            if held:
                yield _Part(pass_.module, pass_.path, held, examples_of(pass_, targets))
    for name, layer in left.items():
        for pass_ in block_by_block(model, batches, blocks=[name.rpartition(".")[0]]):
            yield _Part(layer, pass_.path, {name: layer}, examples_of(pass_))


def _twin(model: nn.Module) -> nn.Module:
    """Copies a network, but not its tensors."""
    memo: dict[int, Any] = {id(one): one for one in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo)


def _matrix(layer: nn.Module) -> Tensor:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return as_matrix(layer, weight.detach()).float().clone()
