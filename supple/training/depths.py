"""One forward that is read at several depths of a stack, as early exits are."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from supple.axes.base import selected
from supple.axes.depth import DepthSite
from supple.errors import SettingError
from supple.graph.blocks import Stack
from supple.network import Elastic
from supple.plan import Shadows
from supple.training.batches import Forward, mapped, run_model
from supple.training.features import WithFeatures

__all__ = ["Depths", "WithDepths", "prefix_site"]


def prefix_site(net: Elastic, where: str | None = None) -> DepthSite:
    """Finds the site that says how many of the first blocks of a stack run.

    Args:
        net: The network.
        where: Only sites whose name matches this shell-style pattern.

    Returns:
        The site.

    Raises:
        SettingError: There is none, there are several, or its sizes are not the first blocks.
    """
    found = [site for site in net.space.sites if isinstance(site, DepthSite) and site.stack]
    found = [site for site in found if selected(site.name, where)]
    if len(found) != 1 or any(_kept(net, found[0], n) is None for n in found[0].choices):
        have = [site.name for site in net.space.sites if site.axis == "depth"]
        raise SettingError(
            "reading at several depths needs one stack whose sizes are its first blocks "
            "(Depth(pattern='prefix')), named by where= if there are several; the network's "
            f"depth sites are {', '.join(have) or 'none'}, where is {where!r}"
        )
    return found[0]


def _kept(net: Elastic, site: DepthSite, choice: int) -> tuple[str, ...] | None:
    """The paths of the blocks that run at a choice, if these are the first ones."""
    stack: Stack | None = site.stack
    assert stack is not None
    paths = tuple(stack.path(block) for block in stack.blocks)
    dropped = net.patch_of(site.name, choice).dropped
    count = len(paths) - len(dropped)
    return paths[:count] if dropped == frozenset(paths[count:]) else None


@dataclass(frozen=True)
class WithDepths:
    """A `forward=` whose result can be read at every depth of a stack.

    The whole network runs once. To read a depth, its size runs once more with the outputs of
    its blocks put in from that first run: what is computed is what lies outside the stack
    (embeddings, the final norm, the head), and gradients reach the blocks through the first
    run.

    Args:
        net: The network, with a `prefix_site`.
        site: That site.
        forward: `forward(model, batch) -> output`; by default by the batch's type.
    """

    net: Elastic
    site: DepthSite
    forward: Forward = run_model

    def __call__(self, model: nn.Module, batch: Any) -> Depths:
        """Runs the model on a batch."""
        paths = _kept(self.net, self.site, self.site.full)
        assert paths is not None
        with self.net.at(self.net.space.largest()):
            ran = WithFeatures(paths, self.forward)(model, batch)
        return Depths(self, batch, ran.output, ran.features)


@dataclass(frozen=True)
class Depths:
    """A forward of the whole network, to be read at several depths.

    Args:
        source: What made it.
        batch: What the network ran on.
        output: What the whole network returned.
        blocks: What each block gave, by its path.
    """

    source: WithDepths
    batch: Any
    output: Any
    blocks: Mapping[str, Any]

    def at(self, depth: int) -> Any:
        """Gives what the network returns with so many blocks of the stack.

        Args:
            depth: One of the site's choices.

        Returns:
            The output of that size, on the same batch.

        Raises:
            SettingError: The blocks run under a checkpoint that hides their gradients.
        """
        net, site = self.source.net, self.source.site
        if depth == site.full:
            return self.output
        paths = _kept(net, site, depth)
        assert paths is not None
        blocks = {path: net.module.get_submodule(path) for path in paths}
        with net.at({site.name: depth}), self._replayed(blocks):
            return self.source.forward(net.module, self.batch)

    @contextlib.contextmanager
    def _replayed(self, blocks: Mapping[str, nn.Module]) -> Iterator[None]:
        """Blocks give what they gave in the first run, for the duration of the context."""
        shadows = Shadows()
        try:
            for path, block in blocks.items():
                shadows.put(vars(block), "forward", _giving(path, self.blocks[path]))
            yield
        finally:
            shadows.end()


def _giving(path: str, output: Any) -> Callable[..., Any]:
    learned: list[bool] = []
    mapped(output, lambda tensor: learned.append(tensor.requires_grad))

    def give(*args: Any, **kwargs: Any) -> Any:
        if any(learned) and not torch.is_grad_enabled():
            raise SettingError(
                f"block '{path}' runs under a reentrant checkpoint, which would lose the "
                "gradients of the depths that are read; use use_reentrant=False"
            )
        return output

    return give
