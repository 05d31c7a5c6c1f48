"""Placement: at which of several places of a network something happens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from math import comb
from typing import ClassVar

from torch import nn

from supple.axes.base import Axis, Patch
from supple.axes.operator import option
from supple.errors import SettingError
from supple.graph.couple import Graph
from supple.layers.choice import Choice
from supple.space import Site

__all__ = ["Placement", "arrangements"]

_MOST = 10_000


@dataclass(frozen=True)
class Placement(Axis):
    """Moves something along the network: which places have it, while their number stays.

    A place is a `supple.layers.choice.Choice` of two options, without and with it, such as an
    identity and a pooling. All places make one site, whose choices are the `arrangements`; the
    full choice is the one that the model has. So a network that halves its image twice does so
    in every size, and sizes that it could not compute never come up.

    Args:
        places: Paths of the layers.
        number: How many of them have it, as many as in the model, at least one and not all.

    Raises:
        SettingError: A path is not that of such a layer, the number is another, or there are
            more than 10,000 arrangements.

    Example:
        >>> from supple.models.base import build
        >>> import torch, supple
        >>> model = build("pooling-cnn", pools=(2, 4))
        >>> axis = Placement(tuple(f"places.{i}" for i in range(6)), 2)
        >>> net = supple.elastic(model, torch.ones(2, 3, 16, 16), axes=[axis])
        >>> site = net.space.sites[0]
        >>> len(site.choices), arrangements(6, 2)[site.full]
        (15, (2, 4))

    Source:
        The pooling configurations of Javan et al., "Balanced Mixture of SuperNets for Learning
        the CNN Pooling Architecture", 2023.
    """

    places: tuple[str, ...]
    number: int
    name: ClassVar[str] = "placement"
    replaces: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "places", tuple(self.places))
        places = len(self.places)
        if not 0 < self.number < places:
            raise SettingError(
                f"number must be above 0 and below the number of places, {places}, got "
                f"{self.number}"
            )
        if comb(places, self.number) > _MOST:
            raise SettingError(
                f"{self.number} of {places} places can be arranged in "
                f"{comb(places, self.number):,} ways, more than {_MOST:,}; name fewer places"
            )

    def variants(self, model: nn.Module) -> Sequence[AbstractContextManager[None]]:
        """The model with each place in use in turn."""
        layers = self._layers(model)
        starts = range(0, len(layers), self.number)
        turns = [{(s + i) % len(layers) for i in range(self.number)} for s in starts]
        return [_with(layers, used) for used in turns]

    def sites(self, graph: Graph) -> Sequence[Site]:
        """One site for all places."""
        layers = self._layers(graph.model)
        ways = arrangements(len(layers), self.number)
        used = tuple(i for i, layer in enumerate(layers) if layer.active)
        return [Site(self.places[0], self.name, tuple(range(len(ways))), ways.index(used))]

    def patch(self, site: Site, choice: int) -> Patch:
        """One option in the place of each layer; sizes behind them change."""
        used = arrangements(len(self.places), self.number)[choice]
        modules = {path: option(path, int(i in used)) for i, path in enumerate(self.places)}
        return Patch(modules=modules, downstream=True)

    def _layers(self, model: nn.Module) -> list[Choice]:
        found = dict(model.named_modules())
        layers = []
        for path in self.places:
            layer = found.get(path)
            if not isinstance(layer, Choice) or len(layer.options) != 2:
                raise SettingError(
                    f"places must be paths of a Choice of two options, '{path}' is "
                    f"{'not there' if layer is None else f'a {type(layer).__name__}'}"
                )
            layers.append(layer)
        used = sum(layer.active for layer in layers)
        if used != self.number:
            raise SettingError(f"number is {self.number}, but {used} places are in use")
        return layers


@cache
def arrangements(places: int, number: int) -> tuple[tuple[int, ...], ...]:
    """Lists the ways to choose so many of the places.

    Args:
        places: How many places there are.
        number: How many of them are chosen.

    Returns:
        The chosen places, ascending, for each choice of the axis.

    Example:
        >>> arrangements(3, 2)
        ((0, 1), (0, 2), (1, 2))
    """
    return tuple(combinations(range(places), number))


@contextmanager
def _with(layers: Sequence[Choice], used: set[int]) -> Iterator[None]:
    before = [layer.active for layer in layers]
    for i, layer in enumerate(layers):
        layer.active = int(i in used)
    try:
        yield
    finally:
        for layer, active in zip(layers, before, strict=True):
            layer.active = active
