"""PV-Tuning: codes change few at a time, and what they stand for is learned."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from supple.errors import SettingError
from supple.formats import Int, Quantized, QuantSpec, quantize
from supple.layers.fake_quantize import FakeQuantized
from supple.layers.tuned_codes import TunedCodes, TunedScalars, TunedVectors
from supple.layers.vector_linear import VectorLinear
from supple.network import Elastic
from supple.observers import RANGES
from supple.quantize._qat import Rounding, RoundingRule, toy
from supple.quantize._vectors import as_vectors, codebook, nearest_entries
from supple.quantize.base import MOST_BITS, Weights, packable
from supple.technique import register

__all__ = ["PVTuning", "Tuning"]

_EPSILON = 1e-8


@register(title="PV-Tuning", paper="arXiv:2405.14852")
@dataclass(frozen=True, kw_only=True)
class PVTuning(RoundingRule):
    r"""Tunes a quantized network within what its codes can stand for.

    A matrix $W$ is of vectors from a codebook, or of numbers with scales. Each step does two
    things with the gradient $G$ of the loss by $W$ as it is now:

    - P: codes stay. The gradient goes on to codebooks or scales, to which the optimizer of the
      training applies it, as it does to norms, biases and all else.
    - V: values stay. A step of Adam without momentum, $-\eta\,G / \sqrt{v}$ with $v$ a running
      average of $G^2$, tells where $W$ is to go. Of all codes the `share` farthest from there
      takes the nearest entry, or number; the others stay.

    Were all codes to follow, $\eta$ would have to be so small that none would change, or all
    would move about (straight-through estimation); among few, it can be large.

    Args:
        bits: Of the codes of a weight; at 16 nothing is done.
        vector: Weights in a vector, which run along the outputs; the codebook of a matrix,
            found by k-means, has $2^{bits \cdot vector}$ entries. At 1 weights are whole
            numbers with scales and zero points instead.
        group_size: With `vector=1`, inputs of an output that share a scale; None for all.
        share: Codes of a matrix that may change in a step, in [0, 1]; at 0 none does, and at 1
            it is straight-through estimation.
        lr: $\eta$, above 0; the optimizer's own rate is that of codebooks and scales.
        decay: Of the running average, in [0, 1).
        accumulate: Whether steps of a weight add up until its code changes. Else each begins at
            the value that the code stands for.
        iterations: Of k-means, at most.
        layers: Shell-style pattern of the layers' paths; several are parted by commas, and `!`
            before one leaves out.
        packed: Whether linear layers hold codes in place of weights in the end; in other
            layers weights stay in floating point where there are vectors.

    Raises:
        SettingError: A setting can't be used.

    Example:
        >>> rule = PVTuning(bits=1, vector=2)
        >>> net = rule.wrap(nn.Sequential(nn.Linear(64, 32, bias=False)))
        >>> rule.finished(net)[0].nbytes, net[0].weight.nbytes  # 256 bytes of codes, 16 of book
        (272, 8192)

    Source:
        Malinovskii et al. 2024, "PV-Tuning: Beyond Straight-Through Estimation for Extreme LLM
        Compression", arXiv:2405.14852; Vahe1994/AQLM, `src/pv_optimizer.py`,
        `src/beam_search_l2.py`. Teach by distillation, as there: `loss=` the divergence from
        what the network gave before.
    Differs:
        One codebook for a matrix, without scales by output, and vectors along outputs (there:
        along inputs); so the nearest entry is found at once, with no beam. Codes begin at
        k-means of the weights, not at AQLM. Zero points stay.
    Checked:
        Both steps by hand in the tests; codes that change never more than asked; packed layers
        against the trained ones.
    """

    least_bits: ClassVar[int] = 1
    distinguishing: ClassVar[str] = "companion"

    bits: int = 2
    activations: int | None = None
    vector: int = 4
    group_size: int | None = None
    share: float = 0.01
    lr: float = 0.01
    decay: float = 0.95
    accumulate: bool = True
    iterations: int = 25

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.activations is not None:
            raise SettingError("PVTuning rounds weights alone: leave activations=None")
        if self.vector < 1 or self.iterations < 1:
            raise SettingError(
                "vector and iterations must be at least 1, got "
                f"{self.vector} and {self.iterations}"
            )
        if self.rounds_weights and self.vector > 1 and self.bits * self.vector > 16:
            raise SettingError(
                f"a code has at most 16 bits, got bits * vector = {self.bits} * {self.vector} "
                "; choose a shorter vector"
            )
        if self.group_size is not None and self.vector > 1:
            raise SettingError("vectors have no scales: group_size goes with vector=1")
        if not 0 <= self.share <= 1:
            raise SettingError(f"share must be in [0, 1], got {self.share}")
        if not 0 < self.lr < math.inf:
            raise SettingError(f"lr must be above 0 and finite, got {self.lr}")
        if not 0 <= self.decay < 1:
            raise SettingError(f"decay must be in [0, 1), got {self.decay}")

    @classmethod
    def examples(cls) -> list[PVTuning]:
        """Gives numbers of few bits in one layer, of which many may change."""
        return [cls(vector=1, bits=3, share=0.1, layers="2")]

    @classmethod
    def neutral(cls) -> PVTuning:
        """Gives the setting that changes nothing."""
        return cls(bits=MOST_BITS)

    @classmethod
    def toy(cls) -> Elastic:
        """Gives a network with a layer of codes."""
        return toy(cls.examples()[0])

    def of_weight(self, module: nn.Module, matrix: Tensor) -> TunedCodes | None:
        """Gives codes that stand for a weight."""
        if not self.rounds_weights:
            return None
        matrix = matrix.detach().float()
        if self.vector == 1:
            spec = QuantSpec(
                Int(self.bits, symmetric=False),
                "channel" if self.group_size is None else "group",
                self.group_size,
                symmetric=False,
                scale_format="fp16",
            )
            return TunedScalars.from_quantized(quantize(matrix, spec, observer=RANGES["mse"]))
        vectors = as_vectors(matrix, self.vector)
        flat = vectors.flatten(0, 1)
        book = codebook(
            flat, flat.new_ones(len(flat)), 2 ** (self.bits * self.vector), self.iterations
        )
        shape = (matrix.shape[0], matrix.shape[1])
        return TunedVectors.from_codes(nearest_entries(vectors, book), book, shape)

    def of_input(self, module: nn.Module, values: Tensor) -> None:
        """Leaves inputs as they are."""
        return

    def companion(
        self,
        layers: Mapping[str, FakeQuantized],
        optimizer: Optimizer,
        steps: int,
        generator: torch.Generator,
    ) -> Tuning:
        """Gives what changes codes."""
        return Tuning(self, layers, optimizer, steps, generator)

    @torch.no_grad()
    def _wrapped(
        self, module: nn.Module, seen: Tensor | None, norm: nn.Module | None
    ) -> FakeQuantized:
        layer = super()._wrapped(module, seen, norm)
        # Where codes are to go begins where they are.
        layer.weight.copy_(layer.rounded())
        return layer

    def _packed(self, layer: FakeQuantized) -> nn.Module:
        plain, held = layer.layer, layer.of_weight
        assert isinstance(held, TunedCodes)
        solved = held.solved()
        plain.weight.copy_(layer.rounded())  # type: ignore[operator]
        made: nn.Module | None = None
        if self.packed and isinstance(solved, Quantized):
            made = Weights().pack(plain, solved, None)
        elif self.packed and packable(plain) and not isinstance(plain, nn.Conv2d):
            made = VectorLinear.from_codes(plain, solved)  # type: ignore[arg-type]
        return (plain if made is None else made).train(layer.training)


class Tuning(Rounding):
    """Changes few codes after each step of the optimizer.

    Args:
        rule: The settings.
        layers: The layers of codes, by path.
        optimizer: Over codebooks and scales, and whatever else is trained.
        steps: How many steps there will be.
        generator: Not used.

    Attributes:
        changed: Path of a layer to the share of its codes that the last step changed.
    """

    def __init__(
        self,
        rule: PVTuning,
        layers: Mapping[str, FakeQuantized],
        optimizer: Optimizer,
        steps: int,
        generator: torch.Generator,
    ) -> None:
        super().__init__(layers, optimizer, steps, generator)
        self.rule = rule
        self.changed: dict[str, float] = {}
        self._squares = {
            path: torch.zeros_like(layer.weight.detach()) for path, layer in layers.items()
        }

    def before(self) -> None:
        """Moves each weight to where it is to go; the optimizer is not to move it, too."""
        for path, layer in self.layers.items():
            weight, square = layer.weight, self._squares[path]
            if weight.grad is None:
                continue
            square.lerp_(weight.grad.square(), 1 - self.rule.decay)
            mean = square / (1 - self.rule.decay ** (self.step + 1))
            if not self.rule.accumulate:
                weight.copy_(layer.rounded())
            weight.sub_(self.rule.lr * weight.grad / (mean.sqrt() + _EPSILON))
            weight.grad = None

    def after(self) -> None:
        """Lets the codes that are farthest follow."""
        super().after()
        for path, layer in self.layers.items():
            if self.rule.share and isinstance(layer.of_weight, TunedCodes):
                aim = layer.matrix().float()
                self.changed[path] = layer.of_weight.follow(aim, self.rule.share)

    def state_dict(self) -> dict[str, Any]:
        """Gives everything needed to go on later."""
        squares = {path: one.clone() for path, one in self._squares.items()}
        return super().state_dict() | {"squares": squares}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what `state_dict` gave."""
        super().load_state_dict(state)
        for path, one in state["squares"].items():
            self._squares[path].copy_(one)
