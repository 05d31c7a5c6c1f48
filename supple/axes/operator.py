"""Operator: which of several alternatives runs at a place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from supple.axes.base import Axis, Patch, selected
from supple.graph.couple import Graph
from supple.layers.choice import Choice, Exits
from supple.space import Site

__all__ = ["Operator", "each_option", "option"]


@dataclass(frozen=True)
class Operator(Axis):
    """Makes the alternatives of every `supple.layers.Choice` in the model elastic.

    A choice is the position of the option that runs; the extracted network holds that option
    in the place of the layer. Widths inside and around the options are elastic as anywhere.

    Args:
        where: Only layers whose path matches this shell-style pattern.

    Example:
        >>> Operator("stage2.*").where
        'stage2.*'

    Source:
        The mixed operations of Liu et al., "DARTS: Differentiable Architecture Search", 2019.
    """

    where: str | None = None
    name: ClassVar[str] = "operator"
    replaces: ClassVar[bool] = True

    def variants(self, model: nn.Module) -> Sequence[AbstractContextManager[None]]:
        """The model with each of its options in turn."""
        return each_option([layer for _, layer in self._layers(model)])

    def sites(self, graph: Graph) -> Sequence[Site]:
        """One site for each layer."""
        return [
            Site(path, self.name, tuple(range(len(layer.options))), layer.active)
            for path, layer in self._layers(graph.model)
        ]

    def patch(self, site: Site, choice: int) -> Patch:
        """The option in the place of the layer."""
        return Patch(modules={site.name: option(site.name, choice)})

    def paths(self, site: Site) -> tuple[str, ...]:
        """The layer."""
        return (site.name,)

    def _layers(self, model: nn.Module) -> list[tuple[str, Choice]]:
        return [
            (path, layer)
            for path, layer in model.named_modules()
            if isinstance(layer, Choice)
            and not isinstance(layer, Exits)
            and selected(path, self.where)
        ]


def option(path: str, position: int) -> str:
    """Path of an option of the layer at `path`."""
    return f"{path}.options.{position}"


def each_option(layers: Sequence[Choice]) -> list[AbstractContextManager[None]]:
    """Contexts in which the layers run their first options, their second ones, and so on."""
    most = max((len(layer.options) for layer in layers), default=0)
    return [_running(layers, position) for position in range(most)]


@contextmanager
def _running(layers: Sequence[Choice], position: int) -> Iterator[None]:
    before = [layer.active for layer in layers]
    for layer in layers:
        layer.active = min(position, len(layer.options) - 1)
    try:
        yield
    finally:
        for layer, active in zip(layers, before, strict=True):
            layer.active = active
