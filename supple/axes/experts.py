"""Experts: how many experts a routed layer has, and how many of them each token visits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from supple.axes.base import GroupAxis, check_choices, group_sites, selected
from supple.graph.couple import Graph
from supple.space import Site

__all__ = ["Experts"]


@dataclass(frozen=True)
class Experts(GroupAxis):
    """Makes mixtures of experts elastic: the number of experts, and how many a token visits.

    A router is what chooses positions by score (`topk`, `argmax`) that other weights are then
    looked up by; its rows and these weights shrink together. A layer has at least as many
    experts as its tokens visit in the full model. Where the number visited is an integer that
    a module holds, it is a site of its own, named `top_k`. The inner width of experts is a
    site of `Width`.

    Args:
        choices: Numbers of experts on offer: fractions of the full number (floats in (0, 1])
            or absolute numbers (integers). None offers every possible number.
        top_k: Numbers of visited experts on offer, likewise; None offers every number.
        where: Only sites whose name matches this shell-style pattern.

    Raises:
        SettingError: A choice is neither a fraction in (0, 1] nor a positive integer.

    Example:
        >>> Experts((4, 8)).choices
        (4, 8)
    """

    choices: tuple[int | float, ...] | None = (0.25, 0.5, 0.75, 1.0)
    top_k: tuple[int | float, ...] | None = None
    where: str | None = None
    name: ClassVar[str] = "experts"

    def __post_init__(self) -> None:
        for field in ("choices", "top_k"):
            given = getattr(self, field)
            if given is not None:
                object.__setattr__(self, field, tuple(given))
            check_choices(self.name, getattr(self, field))

    def sites(self, graph: Graph) -> Sequence[Site]:
        groups = [g for g in graph.groups if selected(g.name, self.where)]
        experts = [g for g in groups if g.kind == "experts"]
        visited = [g for g in groups if g.kind == "top_k"]
        return [
            *group_sites(self.name, experts, self.choices, divisor=1),
            *group_sites(self.name, visited, self.top_k, divisor=1),
        ]
