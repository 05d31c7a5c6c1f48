"""What quantizers have in common that scale the channels which layers see before they round."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from supple.calibrate import (
    BlockPass,
    LayerStatistics,
    Observer,
    block_by_block,
    blocks_of,
    statistics,
)
from supple.errors import SettingError
from supple.graph.feeds import Feed, feeds
from supple.quantize._equivalent import by_channel, paths_of, scaled, within
from supple.quantize.base import Quantizer
from supple.transforms import Given
from supple.weights import as_matrix, matrices

__all__ = [
    "Scaling",
    "SmoothQuant",
    "in_turn",
    "largest_inputs",
    "largest_weights",
    "smoothing",
]


@dataclass(frozen=True, kw_only=True)
class Scaling(Quantizer):
    """A quantizer that first makes channels larger or smaller, which changes no output."""

    needs: ClassVar[tuple[str, ...]] = ("calibration",)

    @classmethod
    def toy(cls) -> tuple[nn.Module, tuple[Tensor, ...]]:
        """Gives a norm that takes factors, and an activation behind which nothing does."""
        source = torch.Generator().manual_seed(0)
        layers = nn.Sequential(nn.LayerNorm(5), nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 3))
        with torch.no_grad():
            for parameter in layers.parameters():
                parameter.uniform_(-0.5, 0.5, generator=source)
        return layers, (torch.randn(13, 5, generator=source),)

    def factors(
        self, model: nn.Module, found: Sequence[Feed], given: Given
    ) -> Iterable[tuple[Feed, Tensor]]:
        """Says by what channels are divided, and the weights that read them multiplied.

        Args:
            model: The model, which must not be changed.
            found: What its layers see.
            given: Calibration batches, loss, generator.

        Returns:
            Feeds and their factors, (size,); feeds that are left out stay as they are, and so
            do all by default.
        """
        return ()

    @property
    def rounds(self) -> bool:
        """Whether anything gets fewer bits."""
        return self.rounds_weights or self.rounds_inputs

    @torch.no_grad()
    def change(self, model: nn.Module, given: Given) -> nn.Module:
        """Scales channels, quantizes the weights, and puts the result into the model."""
        if not self.rounds:
            return model
        model, inner = self.prepared(model, given)
        return inner.replaced(model, given)

    @torch.no_grad()
    def prepared(self, model: nn.Module, given: Given) -> tuple[nn.Module, Scaling]:
        """Scales channels.

        Args:
            model: The model; it is changed.
            given: Calibration batches, loss, generator.

        Returns:
            The model, which computes the same, and this quantizer for it: paths of layers
            change where a layer has to scale its input itself.
        """
        layers = matrices(model, self.layers)
        found = [
            feed
            for feed in feeds(model, *given.inputs(), layers=self.layers)
            if all(name in layers for name in feed.consumers)
        ]
        for feed, scale in list(self.factors(model, found, given)):
            model = scaled(model, feed, scale)
        return model, dataclasses.replace(self, layers=paths_of(model, layers.values()))


@dataclass(frozen=True, kw_only=True)
class SmoothQuant(Scaling):
    r"""Rounds weights and inputs after it moved a part of the inputs' outliers to the weights.

    With the largest magnitudes of channel $j$ its factor is
    $s_j = \max|X_j|^\alpha / \max|W_j|^{1 - \alpha}$, where the producer can take it.

    Args:
        alpha: How much of the differences is moved, in [0, 1].

    Source:
        Xiao et al. 2023, "SmoothQuant: Accurate and Efficient Post-Training Quantization for
        Large Language Models", arXiv:2211.10438; mit-han-lab/smoothquant.
    """

    bits: int = 8
    activations: int | None = 8
    alpha: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise SettingError(f"alpha must be in [0, 1], got {self.alpha}")

    def factors(
        self, model: nn.Module, found: Sequence[Feed], given: Given
    ) -> Iterable[tuple[Feed, Tensor]]:
        """Gives factors from the largest inputs and weights, where they cost nothing."""
        return smoothing(model, found, given, self.alpha)


def smoothing(
    model: nn.Module, found: Iterable[Feed], given: Given, alpha: float
) -> Iterator[tuple[Feed, Tensor]]:
    r"""Gives factors from the largest inputs and weights, where they cost nothing.

    A channel's is $\max|X_j|^\alpha / \max|W_j|^{1 - \alpha}$.

    Args:
        model: The model, which must not be changed.
        found: What its layers see; feeds that no module could take the factors for are left
            out.
        given: Calibration batches.
        alpha: How much of the differences is moved to the weights, in [0, 1].

    Yields:
        Feeds and their factors, (size,).
    """
    found = [feed for feed in found if feed.producer is not None]
    seen = largest_inputs(model, found, given)
    for feed in found:
        inputs, weights = feed.tied(seen[feed]), feed.tied(largest_weights(model, feed))
        scale = inputs.pow(alpha) / weights.clamp_min(1e-5).pow(1 - alpha)
        yield feed, scale.clamp_min(1e-5)


def in_turn(
    model: nn.Module,
    found: Sequence[Feed],
    given: Given,
    want: Sequence[str],
    observers: Mapping[str, Callable[[], Observer]] | None,
) -> Iterator[tuple[BlockPass | None, list[Feed], Mapping[str, LayerStatistics]]]:
    """Walks through a network and gathers statistics of what layers see, block by block.

    Args:
        model: The model; the loop's body must not change it.
        found: What its layers see.
        given: Calibration batches.
        want: Statistics: see `supple.calibrate`.
        observers: More of these, by name.

    Yields:
        A block, the feeds whose layers all lie in it, and statistics by the name of a weight;
        in the end None and the feeds that belong to no block.
    """
    left = list(found)
    paths = [path for path in blocks_of(model) if any(within(feed, path) for feed in found)]
    for pass_ in block_by_block(model, given.batches, blocks=paths) if paths else ():
        inside = [feed for feed in left if within(feed, pass_.path)]
        left = [feed for feed in left if feed not in inside]
        if inside:
            layers = _layers(inside)
            yield pass_, inside, pass_.statistics(want, layers, observers=observers)
    if left:
        layers = _layers(left)
        yield None, left, statistics(model, given.batches, want, layers, observers=observers)


def _layers(found: Sequence[Feed]) -> str:
    return ", ".join(name.rpartition(".")[0] for feed in found for name in feed.consumers)


def largest_inputs(
    model: nn.Module, found: Sequence[Feed], given: Given
) -> Mapping[Feed, Tensor]:
    """Gives the largest magnitude of each channel that layers see.

    Args:
        model: The model.
        found: What its layers see.
        given: Calibration batches.

    Returns:
        Feed to (size,).
    """
    if not found:
        return {}
    seen = statistics(model, given.batches, ("absmax",), _layers(found))
    return {
        feed: by_channel(seen[feed.consumers[0]].absmax, feed.size).amax(1) for feed in found
    }


def largest_weights(model: nn.Module, feed: Feed) -> Tensor:
    """Gives the largest magnitude of the weights that read each channel.

    Args:
        model: The model.
        feed: What layers see.

    Returns:
        (size,), float32.
    """
    largest = []
    for name in feed.consumers:
        layer = model.get_submodule(name.rpartition(".")[0])
        weight = model.get_parameter(name)
        matrix = as_matrix(layer, weight).detach().float().abs()
        grouped = matrix.reshape(getattr(layer, "groups", 1), -1, matrix.shape[1])
        largest.append(by_channel(grouped.amax(1), feed.size).amax(1))
    return torch.stack(largest).amax(0)
