"""OFQ: training with rounding in which weights do not go to and fro between two values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.optim import Optimizer

from supple.errors import SettingError
from supple.formats import Int, Midrise, QuantSpec
from supple.layers.fake_quantize import FakeQuantize, FakeQuantized
from supple.network import Elastic
from supple.quantize._qat import Rounding, RoundingRule, toy, wrapped
from supple.technique import register
from supple.training.companion import Companion
from supple.training.step import Network, module_of
from supple.weights import from_matrix

__all__ = ["OFQ", "Annealing", "Oscillation", "near"]


@register(title="OFQ: oscillation-free quantization", paper="arXiv:2302.02210")
@dataclass(frozen=True, kw_only=True)
class OFQ(RoundingRule):
    r"""Trains with rounded weights whose scales are statistics, then lets few of them move.

    A scale that is learned makes weights oscillate about a threshold of rounding, and the scale
    with them. Here an output's scale follows from its weights, $s = 2\,\text{mean}|w|$, and
    has no gradient. With $n = 2^{b-1}$,

    $$\hat w = \frac{s}{n} \left(\text{round}\left(n \,\text{clip}(w / s, -1, 1) -
    \tfrac12\right) + \tfrac12\right),$$

    and the gradient of rounding is the identity's. Inputs have a learned step (LSQ), and learn
    what is added to them before and after they are rounded.

    In the last part of the training weights that are farther than `boundary` steps from every
    threshold are confident: they stay as they are, and only the others move (confidence-guided
    annealing).

    Args:
        bits: Of weights; at 16 they are not rounded.
        activations: Bits of the layers' inputs; at 16, or None, they are not rounded.
        delay: Share of the steps before the annealing begins, in [0, 1]; at 1 there is none.
        boundary: How near to a threshold a weight may move on, in steps, above 0; the paper
            studies 0.003 to 0.01.
        scale_format: How scales of weights are held; see `supple.formats.QuantSpec`.
        layers: Shell-style pattern of the layers' paths; several are parted by commas, and `!`
            before one leaves out. The paper gives a transformer's first and last layer 8 bits.
        packed: Whether linear layers and 2-d convolutions hold codes in place of weights in the
            end.

    Example:
        >>> layer = nn.Linear(4, 1, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[0.5, -0.5, 0.2, -2.8]]))
        >>> net = OFQ(bits=2, activations=None).wrap(layer)  # the scale is 2, a step 1
        >>> net.rounded().tolist()
        [[0.5, -0.5, 0.5, -1.5]]

    Source:
        Liu et al. 2023, "Oscillation-free Quantization for Low-bit Vision Transformers",
        arXiv:2302.02210; nbasyl/OFQ, `src/quantization/quantizer/statsq.py`, `cga.py`.
    Differs:
        Without the paper's third part: queries and keys are rounded apart, each as a layer of
        its own, and not the product of their weights. An input has one step, where the release
        has one for each place in the sequence, and the annealing is the end of the training and
        not a second one. Inputs of convolutions have no learned shifts.
    Checked:
        Rounding against the formula; which weights move and which stay by hand, also where the
        optimizer has momentum and weight decay.
    """

    distinguishing: ClassVar[str] = "of_weight"

    bits: int = 2
    activations: int | None = 2
    delay: float = 0.9
    boundary: float = 0.005
    scale_format: str = "fp32"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.delay <= 1:
            raise SettingError(f"delay must be in [0, 1], got {self.delay}")
        if not self.boundary > 0:
            raise SettingError(f"boundary must be above 0, got {self.boundary}")
        self._spec()

    @classmethod
    def examples(cls) -> list[Self]:
        """Gives few bits, with half of the steps for the annealing."""
        return [cls(bits=3, activations=4, delay=0.5, boundary=0.3, layers="2, 4")]

    @classmethod
    def neutral(cls) -> Self:
        """Gives the setting that rounds nothing."""
        return cls(bits=16, activations=None)

    @classmethod
    def toy(cls) -> Elastic:
        """Gives a network with layers that round."""
        return toy(cls.examples()[0])

    def _spec(self) -> QuantSpec:
        return QuantSpec(Midrise(self.bits), "channel", scale_format=self.scale_format)  # type: ignore[arg-type]

    def of_weight(self, module: nn.Module, matrix: Tensor) -> FakeQuantize | None:
        """Gives what rounds a weight with a scale that is a statistic."""
        if not self.rounds_weights:
            return None
        return FakeQuantize(self._spec(), observer="twice_mean")

    def of_input(self, module: nn.Module, values: Tensor) -> FakeQuantize | None:
        """Gives what rounds the input, with a learned step and learned shifts."""
        if self.activations is None or not self.rounds_inputs:
            return None
        negative = bool((values < 0).any())
        form = Int(self.activations, symmetric=negative)
        weight = module.weight
        assert isinstance(weight, Tensor)
        width = weight.shape[isinstance(module, nn.Linear)]
        return FakeQuantize(
            QuantSpec(form, "tensor", symmetric=negative),
            observer="learned",
            estimator="lsq",
            shift=0 if isinstance(module, _ConvNd) else width,
        )

    def companion(
        self,
        layers: Mapping[str, FakeQuantized],
        optimizer: Optimizer,
        steps: int,
        generator: torch.Generator,
    ) -> Annealing:
        """Gives what keeps confident weights in place, in the end."""
        return Annealing(self, layers, optimizer, steps, generator)


class Annealing(Rounding):
    """Keeps weights in place that are far from every threshold of rounding.

    Args:
        rule: The settings.
        layers: The layers that round, by path.
        optimizer: Over their parameters.
        steps: How many steps there will be.
        generator: Source of all randomness.
    """

    def __init__(
        self,
        rule: OFQ,
        layers: Mapping[str, FakeQuantized],
        optimizer: Optimizer,
        steps: int,
        generator: torch.Generator,
    ) -> None:
        super().__init__(layers, optimizer, steps, generator)
        self._rule = rule
        self._kept: list[tuple[Tensor, Tensor, Tensor]] = []

    def before(self) -> None:
        """Remembers confident weights, and takes their gradients."""
        self._kept = []
        if self.step < self._rule.delay * self.steps:
            return
        for layer in self.layers.values():
            if layer.of_weight is None:
                continue
            weight = layer.weight
            stays = ~from_matrix(layer.layer, near(layer, self._rule.boundary))
            self._kept.append((weight, stays, weight.detach().clone()))
            if weight.grad is not None:
                weight.grad.masked_fill_(stays, 0)

    def after(self) -> None:
        """Gives confident weights back what momentum and weight decay took."""
        super().after()
        for weight, stays, old in self._kept:
            weight.copy_(torch.where(stays, old, weight))


@torch.no_grad()
def near(layer: FakeQuantized, boundary: float) -> Tensor:
    """Tells which weights are near to a threshold between two values.

    Args:
        layer: A layer that rounds its weight to a `Midrise` format.
        boundary: How near, in steps.

    Returns:
        Of the matrix' shape, bool.
    """
    rounding = layer.of_weight
    assert isinstance(rounding, FakeQuantize)
    matrix = layer.matrix()
    level = matrix / rounding.scales(matrix)[0]
    threshold = level.round()
    inner = threshold.abs() < rounding.spec.format.most
    return inner & ((level - threshold).abs() <= boundary)


class Oscillation(Companion):
    """Measures how much weights go to and fro between values.

    A weight reverses where its code changes the other way than the last time that it changed.
    Its frequency is a running average of that, in which a step counts for 1 %.

    Args:
        net: What `wrap` gave.
        optimizer: Over its parameters.
        steps: How many steps there will be.

    Source:
        Nagel et al. 2022, "Overcoming Oscillations in Quantization-Aware Training",
        arXiv:2203.11086.
    """

    def __init__(self, net: Network | nn.Module, optimizer: Optimizer, steps: int) -> None:
        super().__init__(optimizer, steps)
        found = wrapped(module_of(net)).values()
        self._layers = [one for one in found if isinstance(one.of_weight, FakeQuantize)]
        self._codes = [self._now(layer) for layer in self._layers]
        self._ways = [torch.zeros_like(codes) for codes in self._codes]
        self._often = [torch.zeros_like(codes, dtype=torch.float32) for codes in self._codes]

    def _now(self, layer: FakeQuantized) -> Tensor:
        assert isinstance(layer.of_weight, FakeQuantize)
        return layer.of_weight.quantized(layer.matrix()).codes.int()

    def after(self) -> None:
        """Looks at the new codes."""
        for place, layer in enumerate(self._layers):
            codes = self._now(layer)
            way = (codes - self._codes[place]).sign()
            reversed_ = way * self._ways[place] < 0
            self._often[place].lerp_(reversed_.float(), 0.01)
            self._ways[place] = torch.where(way != 0, way, self._ways[place])
            self._codes[place] = codes

    def rate(self) -> float:
        """Gives the mean frequency of all weights."""
        return float(torch.cat([one.flatten() for one in self._often]).mean())

    def state_dict(self) -> dict[str, Any]:
        """Gives everything needed to go on later."""
        held = {"codes": self._codes, "ways": self._ways, "often": self._often}
        copies = {name: [one.clone() for one in kept] for name, kept in held.items()}
        return super().state_dict() | copies

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what `state_dict` gave."""
        super().load_state_dict(state)
        self._codes, self._ways, self._often = (
            [one.clone() for one in state[name]] for name in ("codes", "ways", "often")
        )
