"""Tokens: what part of a sequence goes on from a block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from supple.axes.base import Axis, Inputs, Patch, check_choices, choices_of
from supple.errors import SettingError
from supple.graph.couple import Graph
from supple.space import Site

__all__ = ["Tokens"]

SCORES = ("norm", "first")


@dataclass(frozen=True)
class _Keep:
    """Keeps `part` of `whole` tokens of (batch, tokens, width), in their order."""

    part: int
    whole: int
    first: int
    score: str

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
        if args and _is_sequence(args[0]):
            return (self._kept(args[0]), *args[1:]), kwargs
        name = next(name for name, value in kwargs.items() if _is_sequence(value))
        return args, {**kwargs, name: self._kept(kwargs[name])}

    def _kept(self, x: Tensor) -> Tensor:
        others = x.shape[1] - self.first
        count = max(1, round(x.shape[1] * self.part / self.whole)) - self.first
        if count >= others:
            return x
        best = self._scores(x).topk(max(count, 0), dim=1).indices.sort(dim=1).values
        kept = x.gather(1, (best + self.first)[..., None].expand(-1, -1, x.shape[2]))
        return torch.cat([x[:, : self.first], kept], dim=1)

    def _scores(self, x: Tensor) -> Tensor:
        """How much each token behind the first ones matters, shape (batch, tokens - first)."""
        rest = x[:, self.first :]
        return rest.norm(dim=-1) if self.score == "norm" else (rest @ x[:, 0, :, None])[..., 0]


def _is_sequence(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 3 and value.is_floating_point()


@dataclass(frozen=True)
class Tokens(Axis):
    """Makes the number of tokens that enter a block elastic; the rest is dropped for good.

    The tokens that stay are those of the highest score; the first ones always stay. It suits
    networks whose blocks take nothing but the sequence, and whose output does not depend on
    its length (image classifiers, encoders without a mask). Where that does not hold,
    verification fixes the site and says so.

    Args:
        at: Paths of the blocks before which tokens are dropped. A choice counts the tokens of
            the example input; at another length the same part of them stays.
        choices: Numbers of tokens (integers) or parts of them (floats in (0, 1]).
        first: How many leading tokens always stay (1 for a class token).
        score: `"norm"`, the length of a token's vector, or `"first"`, its product with the
            first token.

    Raises:
        SettingError: A path is not a module that takes a sequence, or a setting is out of its
            range.

    Example:
        >>> Tokens(("blocks.4", "blocks.8")).at
        ('blocks.4', 'blocks.8')

    Source:
        The keep rate of Liang et al., "Not All Patches are What You Need: Expediting Vision
        Transformers via Token Reorganizations", 2022.
    """

    at: tuple[str, ...]
    choices: tuple[int | float, ...] = (0.5, 0.75, 1.0)
    first: int = 1
    score: str = "norm"
    name: ClassVar[str] = "tokens"

    def __post_init__(self) -> None:
        object.__setattr__(self, "at", (self.at,) if isinstance(self.at, str) else (*self.at,))
        object.__setattr__(self, "choices", tuple(self.choices))
        check_choices(self.name, self.choices)
        if self.first < 0 or (self.first == 0 and self.score == "first"):
            raise SettingError(f"first must be at least {int(self.score == 'first')}")
        if self.score not in SCORES:
            raise SettingError(f"score must be one of {SCORES}, got {self.score!r}")

    def sites(self, graph: Graph) -> Sequence[Site]:
        """One site for each block in `at`."""
        return [site for path in self.at for site in self._site(graph, path)]

    def _site(self, graph: Graph, path: str) -> list[Site]:
        calls = [call for call in graph.recording.modules if call.path == path]
        lengths = [ref.shape[1] for call in calls for ref in call.inputs if len(ref.shape) == 3]
        if len(calls) != 1 or not lengths:
            raise SettingError(
                f"at must name modules that run once and take a sequence of shape (batch, "
                f"tokens, width), got {path!r}, which "
                + ("takes none" if calls else "does not run")
            )
        full = lengths[0]
        offered = tuple(c for c in choices_of(full, 1, self.choices, 1) if c > self.first)
        return [Site(f"{path}.tokens", self.name, offered, full)] if offered[1:] else []

    def patch(self, site: Site, choice: int) -> Patch:
        """The block's input with fewer tokens."""
        path = site.name.removesuffix(".tokens")
        keep = _Keep(choice, site.full, self.first, self.score)
        return Patch() if choice == site.full else Patch(inputs={path: keep})

    def paths(self, site: Site) -> tuple[str, ...]:
        """The block."""
        return (site.name.removesuffix(".tokens"),)
