"""Copies: sizes that would disturb one another have weights of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from supple.axes.base import Learned, Sharing, Transform, added
from supple.errors import SettingError
from supple.space import Config

__all__ = ["Copies", "copied"]

Part = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Copies(Sharing):
    """Several copies of all weights, each for a part of the space.

    The first copy is the module itself. A size belongs to the first part that admits it: whose
    every named site has one of the named choices. Sizes that no part admits have the module's
    own weights. Copies begin as what the module holds when they are added.

    Args:
        parts: Which sizes have which copy: `parts[i]` maps names of sites to the choices that
            are admitted, and belongs to copy `copy[i]`.
        copy: Numbers of the copies, from 0, the module itself; by default `parts[i]` has
            copy `i`.
        count: How many copies there are, at least as many as `copy` names; 0 for just as many.
            More leave room for a later split.

    Raises:
        SettingError: The copies' numbers are not those of the parts.

    Example:
        >>> from torch import nn
        >>> import torch, supple
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> net = supple.elastic(model, torch.ones(2, 4), axes=[supple.Width((0.5, 1.0))])
        >>> net.share(Copies(({"0": (8,)}, {"0": (4,)})))
        >>> sorted(net.added_parameters())[:2]
        ['0.supple_copy_1_bias', '0.supple_copy_1_weight']
    """

    name: ClassVar[str] = "copies"

    parts: tuple[Part, ...] = ()
    copy: tuple[int, ...] = ()
    count: int = 0

    def __post_init__(self) -> None:
        parts = tuple({site: tuple(c) for site, c in part.items()} for part in self.parts)
        object.__setattr__(self, "parts", parts)
        object.__setattr__(self, "copy", tuple(self.copy) or tuple(range(len(parts))))
        object.__setattr__(self, "count", self.count or max(self.copy, default=0) + 1)
        if len(self.copy) != len(parts) or any(not 0 <= c < self.count for c in self.copy):
            raise SettingError(
                f"copy must name one of {self.count} copies for each of {len(parts)} parts, "
                f"got {self.copy}"
            )

    def __hash__(self) -> int:
        return hash((len(self.parts), self.copy, self.count))

    def own(self, model: nn.Module) -> dict[str, Tensor]:
        return {
            copied(name, number): value
            for name, value in model.named_parameters()
            if not added(name)
            for number in range(1, self.count)
        }

    def chosen(self, config: Config) -> int:
        """Gives the number of the copy that a size has."""
        for part, copy in zip(self.parts, self.copy, strict=True):
            if all(config.get(site) in (*admitted, None) for site, admitted in part.items()):
                return copy
        return 0

    def weights(self, config: Config, model: nn.Module) -> dict[str, Transform]:
        number = self.chosen(config)
        if not number:
            return {}
        return {
            name: Learned(_other, (copied(name, number),))
            for name, _ in model.named_parameters()
            if not added(name)
        }


def copied(name: str, number: int) -> str:
    """Gives the full name under which a copy holds a parameter of the module.

    Example:
        >>> copied("stem.weight", 2), copied("stem.weight", 0)
        ('stem.supple_copy_2_weight', 'stem.weight')
    """
    path, dot, leaf = name.rpartition(".")
    return f"{path}{dot}supple_copy_{number}_{leaf}" if number else name


def _other(own: Tensor, copy: Tensor) -> Tensor:
    return copy
