"""Exit: after how many blocks the network stops, with a classifier for each."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn

from supple.axes.base import Axis, Patch
from supple.axes.operator import each_option, option
from supple.errors import SettingError
from supple.graph.blocks import Stack
from supple.graph.couple import Graph
from supple.layers.choice import Exits
from supple.space import Site

__all__ = ["Exit"]


@dataclass(frozen=True)
class ExitSite(Site):
    """The exits of one stack: a choice is the number of its blocks that run."""

    stack: Stack | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Exit(Axis):
    """Makes the depth at which the network stops elastic, each exit with its own classifier.

    The model's classifier is a `supple.layers.Exits`. At an early exit the blocks behind it
    are left out, and its classifier runs in the place of the last; what lies between the
    blocks and the classifier (a norm, a pooling) is shared.

    Args:
        classifier: Path of the `Exits` layer in the model.
        stack: Path of the container of the blocks; None if the model has only one stack.

    Raises:
        SettingError: There is no `Exits` layer at `classifier`, the stack is not found or not
            the only one, or an exit lies beyond its blocks.

    Example:
        >>> Exit("classifier", stack="blocks").classifier
        'classifier'

    Source:
        Teerapittayanon et al., "BranchyNet: Fast Inference via Early Exiting from Deep Neural
        Networks", 2016.
    """

    classifier: str
    stack: str | None = None
    name: ClassVar[str] = "exit"
    replaces: ClassVar[bool] = True

    def variants(self, model: nn.Module) -> Sequence[AbstractContextManager[None]]:
        """The model with each of its classifiers in turn."""
        return each_option([self._exits(model)])

    def sites(self, graph: Graph) -> Sequence[Site]:
        """One site: the number of blocks that run."""
        exits, stack = self._exits(graph.model), self._stack(graph)
        full = len(stack.blocks)
        beyond = [count for count in exits.counts if count >= full]
        if beyond:
            raise SettingError(
                f"early exits must lie before the last of the {full} blocks of "
                f"{stack.container!r} that can be left out, got {beyond}"
            )
        choices = (*exits.counts, full)
        return [ExitSite(self.classifier, self.name, choices, full, stack=stack)]

    def patch(self, site: Site, choice: int) -> Patch:
        """The blocks behind the exit left out, and its classifier in the place of the last."""
        place = option(site.name, site.choices.index(choice))
        stack = getattr(site, "stack", None)
        behind = stack.blocks[choice:] if stack is not None else ()
        dropped = frozenset(stack.path(block) for block in behind) if stack else frozenset()
        return Patch(modules={site.name: place}, dropped=dropped)

    def _exits(self, model: nn.Module) -> Exits:
        found = dict(model.named_modules()).get(self.classifier)
        if not isinstance(found, Exits):
            have = [path for path, m in model.named_modules() if isinstance(m, Exits)]
            raise SettingError(
                f"classifier must be the path of a supple.layers.Exits, got "
                f"{self.classifier!r}, which is {type(found).__name__}; the model has "
                f"{have or 'none'}"
            )
        return found

    def _stack(self, graph: Graph) -> Stack:
        named = [s for s in graph.stacks if self.stack in (None, s.container)]
        if len(named) != 1:
            raise SettingError(
                f"stack must name one of {[s.container for s in graph.stacks]}, "
                f"got {self.stack!r}"
            )
        return named[0]
