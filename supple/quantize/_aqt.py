"""Training with rounding as in AQT: largest magnitudes for weights, held bounds for inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from supple.errors import SettingError
from supple.formats import Int, QuantSpec
from supple.layers.delayed_rounding import DelayedRounding
from supple.layers.fake_quantize import FakeQuantize, FakeQuantized
from supple.quantize._qat import Rounding, RoundingRule
from supple.quantize.base import MOST_BITS
from supple.weights import matrices

__all__ = ["AQT"]


@dataclass(frozen=True, kw_only=True)
class AQT(RoundingRule):
    """Trains with weights rounded from the start, and inputs from some time on.

    A weight has whole numbers without the lowest one and a scale for each output, the output's
    largest magnitude now. An input has one scale: its bound is the running average of the
    batches' largest magnitudes, which stays from when inputs are rounded. Inputs that were
    never negative have no codes for negative numbers. The first and the last layer have more
    bits.

    Args:
        edges: Least bits of weights and inputs of the first and the last layer.
        delay: Share of the steps before inputs are rounded, in [0, 1).
        decay: Of the running averages.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2))
        >>> AQT(bits=4).bits_of(model)
        {'0.weight': 8, '1.weight': 4, '2.weight': 8}

    Source:
        Abdolrashidi et al. 2021, "Pareto-Optimal Quantized ResNet Is Mostly 4-bit",
        arXiv:2105.03536; google-research/aqt, `get_bounds.py` and
        `imagenet/configs/paper/resnet50_w4_a4_init8_dense8_auto.py`. There inputs are rounded
        from step 7,500 on, with averages that forget a tenth with each batch.
    """

    edges: int = 8
    delay: float = 0.2
    decay: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 2 <= self.edges <= MOST_BITS:
            raise SettingError(f"edges must be from 2 to {MOST_BITS}, got {self.edges}")
        if not 0 <= self.delay < 1:
            raise SettingError(f"delay must be in [0, 1), got {self.delay}")
        if not 0 <= self.decay < 1:
            raise SettingError(f"decay must be in [0, 1), got {self.decay}")

    def bits_of(self, model: nn.Module) -> dict[str, int]:
        """Gives the bits of each weight, which are those of the layer's input, too.

        Args:
            model: The network, before `wrap`.
        """
        names = list(matrices(model, self.layers))
        found = dict.fromkeys(names, self.bits)
        return found | dict.fromkeys((names[0], names[-1]), max(self.bits, self.edges))

    def wrap(
        self,
        model: nn.Module,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> nn.Module:
        """Gives a copy whose layers round their weights and inputs; see `RoundingRule`."""
        wanted = self.bits_of(model)
        for bits in sorted(set(wanted.values())):
            chosen = [name for name, own in wanted.items() if own == bits]
            inputs = None if self.activations is None else max(self.activations, bits)
            rule = dataclasses.replace(
                self,
                bits=bits,
                activations=inputs,
                layers=", ".join(name.rpartition(".")[0] for name in chosen),
            )
            model = super(AQT, rule).wrap(model, args, kwargs)
        return model

    def of_weight(self, module: nn.Module, matrix: Tensor) -> FakeQuantize | None:
        """Gives what rounds a weight."""
        if not self.rounds_weights:
            return None
        return FakeQuantize(
            QuantSpec(Int(self.bits, narrow=True)),
            estimator="clipped",
            scales=(len(matrix), 1),
        )

    def of_input(self, module: nn.Module, values: Tensor) -> DelayedRounding | None:
        """Gives what rounds an input."""
        if self.activations is None or not self.rounds_inputs:
            return None
        spec = QuantSpec(Int(self.activations, narrow=True), "tensor")
        if not bool((values < 0).any()):
            spec = QuantSpec(Int(self.activations, symmetric=False), "tensor", symmetric=False)
        return DelayedRounding(spec, estimator="clipped", decay=self.decay)

    def companion(
        self,
        layers: Mapping[str, FakeQuantized],
        optimizer: Optimizer,
        steps: int,
        generator: torch.Generator,
    ) -> Rounding:
        """Gives what says when inputs are rounded."""
        return _Delayed(layers, optimizer, steps, generator, delay=self.delay)


class _Delayed(Rounding):
    """Lets inputs be rounded once it is time."""

    def __init__(self, *args: Any, delay: float) -> None:
        self._delay = delay
        super().__init__(*args)

    def _set(self, step: int) -> None:
        super()._set(step)
        for layer in self.layers.values():
            if isinstance(layer.of_input, DelayedRounding):
                layer.of_input.rounds = step >= self._delay * self.steps
