"""Patch size: into how large patches an image is cut."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from supple.axes.base import Axis, Patch, Transform
from supple.errors import SettingError
from supple.graph.couple import Graph
from supple.graph.integers import AttributeKey
from supple.space import Site

__all__ = ["PatchSize"]


@dataclass(frozen=True)
class PatchSite(Site):
    """The one site of the axis; `side` is the height and width of the image."""

    side: int = 0


@dataclass(frozen=True)
class PatchSize(Axis):
    """Makes the patch size of a vision transformer elastic: small patches are many tokens.

    The embedding's weights are resized so that a resized patch gives nearly the same token;
    the position embeddings are resized to the new grid. Images, patches and grid are square.

    Args:
        choices: Patch sizes in pixels; each divides the image's side. The model's own is
            always on offer, and is the full choice.
        at: Path of the convolution that embeds patches (its stride is its kernel size).
        positions: Name of the position embeddings, of shape (1, leading + grid * grid, width),
            with as many leading tokens as there are; None if the model has none.

    Raises:
        SettingError: The module or the parameter is not what it should be, or a choice does
            not divide the image's side.

    Example:
        >>> PatchSize((4, 8, 16), at="embed", positions="position").choices
        (4, 8, 16)

    Source:
        Beyer et al., "FlexiViT: One Model for All Patch Sizes", 2023 (section 3.4: the
        pseudo-inverse resize).
    """

    choices: tuple[int, ...]
    at: str
    positions: str | None = None
    name: ClassVar[str] = "patch_size"

    def __post_init__(self) -> None:
        object.__setattr__(self, "choices", tuple(self.choices))
        if not self.choices or any(type(c) is not int or c < 1 for c in self.choices):
            raise SettingError(
                f"choices of patch_size must be numbers of pixels, got {self.choices}"
            )

    def sites(self, graph: Graph) -> Sequence[Site]:
        """One site, named after the embedding."""
        full, side = self._embedding(graph)
        offered = tuple(sorted({*self.choices, full}))
        wrong = [size for size in offered if side % size]
        if wrong:
            raise SettingError(
                f"patch sizes must divide the image's side, {side} pixels, got {wrong}"
            )
        self._check_positions(graph, (side // full) ** 2)
        return [PatchSite(f"{self.at}.patch", self.name, offered, full, side=side)][
            : len(offered) - 1
        ]

    def _embedding(self, graph: Graph) -> tuple[int, int]:
        """The model's patch size, and the side of the images that it cuts."""
        module = dict(graph.model.named_modules()).get(self.at)
        calls = [call for call in graph.recording.modules if call.path == self.at]
        if isinstance(module, nn.Conv2d) and calls:
            sizes = {*module.kernel_size, *module.stride}
            height, width = calls[0].inputs[0].shape[-2:]
            if len(sizes) == 1 and height == width:
                return sizes.pop(), height
        raise SettingError(
            "at must be the path of a convolution with a square kernel as large as its "
            f"stride, on square images, got {self.at!r}: {module}"
        )

    def _check_positions(self, graph: Graph, patches: int) -> None:
        if self.positions is None:
            return
        found = dict(graph.model.named_parameters()).get(self.positions)
        if found is None or found.dim() != 3 or not 0 <= found.shape[1] - patches < patches:
            raise SettingError(
                f"positions must name a parameter of shape (1, leading + {patches}, width), "
                f"got {self.positions!r}: {'none' if found is None else tuple(found.shape)}"
            )

    def patch(self, site: Site, choice: int) -> Patch:
        """The embedding's weights, its stride and the position embeddings at another size."""
        if choice == site.full or not isinstance(site, PatchSite):
            return Patch()
        tensors: dict[str, Transform] = {f"{self.at}.weight": _ResizeWeight(site.full, choice)}
        if self.positions is not None:
            before, after = site.side // site.full, site.side // choice
            tensors[self.positions] = _ResizeGrid(before, after)
        attributes = {
            AttributeKey(self.at, (name,), index): choice
            for name in ("stride", "kernel_size")
            for index in (0, 1)
        }
        return Patch(tensors=tensors, attributes=attributes, downstream=True)

    def paths(self, site: Site) -> tuple[str, ...]:
        """The embedding."""
        return (self.at,)


@dataclass(frozen=True)
class _ResizeWeight:
    """Weights (width, channels, full, full) to (width, channels, size, size)."""

    full: int
    size: int

    def __call__(self, weight: Tensor) -> Tensor:
        change = _pseudo_inverse(self.full, self.size).to(weight)
        resized = weight.flatten(2) @ change.T
        return resized.reshape(*weight.shape[:2], self.size, self.size)


@functools.cache
def _pseudo_inverse(full: int, size: int) -> Tensor:
    """`P` with `P w` the weights at `size` that give resized patches the products of `w`.

    With `B` the matrix that resizes patches, `<x, w> = <B x, P w>` for all patches `x` as far
    as that is possible: `P` is the pseudo-inverse of `B` transposed.
    """
    patches = torch.eye(full * full, dtype=torch.float64).reshape(-1, 1, full, full)
    resized = F.interpolate(
        patches, size=(size, size), mode="bilinear", align_corners=False, antialias=True
    )
    inverse: Tensor = torch.linalg.pinv(resized.flatten(1))
    return inverse


@dataclass(frozen=True)
class _ResizeGrid:
    """Position embeddings of a grid of patches to another grid, leading tokens kept."""

    before: int
    after: int

    def __call__(self, positions: Tensor) -> Tensor:
        leading = positions.shape[1] - self.before**2
        grid = positions[:, leading:].transpose(1, 2)
        grid = grid.reshape(*grid.shape[:2], self.before, self.before)
        grid = F.interpolate(
            grid, size=(self.after, self.after), mode="bicubic", align_corners=False
        )
        return torch.cat([positions[:, :leading], grid.flatten(2).transpose(1, 2)], dim=1)
