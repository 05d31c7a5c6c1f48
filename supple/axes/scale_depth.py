"""Scale depth: through how many blocks the late maps of a coarse-to-fine generator run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn

from supple.axes.base import Axis, Patch, check_choices, choices_of
from supple.errors import SettingError
from supple.graph.couple import Graph
from supple.graph.integers import AttributeKey
from supple.space import Site

__all__ = ["ScaleDepth"]


@dataclass(frozen=True)
class ScaleDepthSite(Site):
    """The one site of the axis; `stack` is the path of the container of the blocks."""

    stack: str = field(default="", compare=False, repr=False)


@dataclass(frozen=True)
class ScaleDepth(Axis):
    r"""Makes the depth of late generation scales elastic; early ones run through all blocks.

    Of $D$ blocks, a choice $d$ keeps those numbered
    $\lfloor i (D - 1) / (d - 1) \rfloor, i = 0 \ldots d - 1$, for the late scales: evenly
    spaced ones, the first and the last among them. Elsewhere the late positions pass by.

    Each block of the model has an integer that says how many leading positions it takes; the
    others pass by it unchanged and are not seen by it.

    Args:
        early: How many leading positions are those of early scales, at least 1.
        choices: Block counts for late scales: fractions (floats in (0, 1]) or counts, each 2
            or more. All blocks are always on offer.
        stack: Path of the container of the blocks.
        attribute: Name of the integer that each block has.

    Raises:
        SettingError: There is no such container or integer, or a setting is out of its range.

    Example:
        >>> ScaleDepth(early=5, choices=(4,)).choices
        (4,)

    Source:
        Chen et al. 2025, "Progressive Supernet Training for Efficient Visual Autoregressive
        Modeling", arXiv:2511.16546.
    """

    early: int
    choices: tuple[int | float, ...] = (0.25, 0.5)
    stack: str = "blocks"
    attribute: str = "tokens"
    name: ClassVar[str] = "scale_depth"

    def __post_init__(self) -> None:
        object.__setattr__(self, "choices", tuple(self.choices))
        check_choices(self.name, self.choices)
        if self.early < 1:
            raise SettingError(f"early must be at least 1, got {self.early}")

    def sites(self, graph: Graph) -> Sequence[Site]:
        """One site: the number of blocks that late positions run through."""
        container = dict(graph.model.named_modules()).get(self.stack)
        blocks = list(container.children()) if container is not None else []
        if not blocks or not all(map(self._counts, blocks)):
            raise SettingError(
                f"stack must be the path of blocks with an integer '{self.attribute}' above "
                f"early ({self.early}), got {self.stack!r}: "
                f"{'none' if container is None else type(container).__name__}"
            )
        full = len(blocks)
        offered = choices_of(full, 1, self.choices, 1)
        if offered[0] < 2:
            raise SettingError(
                f"choices of {self.name} must keep 2 of the {full} blocks at least, the first "
                f"and the last, got {self.choices}"
            )
        name = f"{self.stack}.{self.name}"
        site = ScaleDepthSite(name, self.name, offered, full, stack=self.stack)
        return [site] if offered[1:] else []

    def _counts(self, block: nn.Module) -> bool:
        value = vars(block).get(self.attribute)
        return type(value) is int and value > self.early

    def patch(self, site: Site, choice: int) -> Patch:
        """The early positions only, at the blocks that are left out for late ones."""
        assert isinstance(site, ScaleDepthSite)
        kept = {i * (site.full - 1) // (choice - 1) for i in range(choice)}
        attributes = {
            AttributeKey(f"{site.stack}.{block}", (self.attribute,)): self.early
            for block in range(site.full)
            if block not in kept
        }
        return Patch(attributes=attributes, downstream=True)
