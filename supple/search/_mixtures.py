"""Ways in which an elastic network runs as a mixture of the choices of its sites."""

from __future__ import annotations

import contextlib
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from supple.axes.operator import Operator
from supple.errors import ConcurrencyError, SettingError, UnsupportedModelError
from supple.layers.choice import Choice
from supple.network import Elastic
from supple.recompute import recomputing
from supple.space import Site

__all__ = ["OutputMixture", "Relaxation", "Weights"]

Weights = Mapping[str, Tensor]
"""For a site's name, the weights of its choices in their order, shape (choices,)."""


class Relaxation(ABC):
    """A way in which a network runs as a mixture of the choices of some of its sites."""

    @abstractmethod
    def sites(self, net: Elastic) -> Sequence[Site]:
        """Gives the sites that can be mixed.

        Args:
            net: An elastic network.
        """

    @abstractmethod
    def mixed(self, net: Elastic, weights: Weights) -> AbstractContextManager[None]:
        """Makes the full network run as a mixture, for the duration of the block.

        Nothing of it stays afterwards; owners stay in place, and gradients reach them and the
        weights, also when backward runs after the block. It may be entered twice at once.

        Args:
            net: The network; no size of it is active.
            weights: By site; sites that it does not name are full. Weights may require
                gradients; choices whose weight is exactly 0 and does not may be left out.
        """

    def drawing_from(self, generator: torch.Generator) -> Relaxation:
        """Gives the relaxation of one run; by default itself, since nothing in it is random.

        Args:
            generator: Source of all randomness of the run.
        """
        return self

    @contextlib.contextmanager
    def applied(self, net: Elastic, weights: Weights) -> Iterator[None]:
        """Checks the weights and makes the network run as a mixture inside the block.

        What backward recomputes afterwards is mixed alike.

        Args:
            net: The network.
            weights: By site.

        Raises:
            SettingError: A site can't be mixed, or has another number of choices.
            ConcurrencyError: A size of the network is active.
        """
        if net.active is not None:
            raise ConcurrencyError(
                "a size of this network is active, and a mixture needs the full one; leave the "
                "block of net.at(...) first"
            )
        known = {site.name: len(site.choices) for site in self.sites(net)}
        for name, each in weights.items():
            if tuple(each.shape) != (known.get(name),):
                raise SettingError(
                    f"weights of site {name!r} must have the shape ({known.get(name)},), got "
                    f"{tuple(each.shape)}"
                    if name in known
                    else f"site {name!r} can't be mixed (these can: {', '.join(known)})"
                )
        with self.mixed(net, weights), recomputing(lambda: self.mixed(net, weights)):
            yield


@dataclass(frozen=True)
class OutputMixture(Relaxation):
    r"""Adds up the outputs of all options of each `supple.layers.Choice`: $\sum_i w_i f_i(x)$.

    An option whose weight is exactly 0 and needs no gradient does not run. Options must not
    change their inputs in place, since all of them get the same.
    """

    def sites(self, net: Elastic) -> Sequence[Site]:
        """Gives the sites of axis `operator`."""
        return [site for site in net.space.sites if site.axis == Operator.name]

    @contextlib.contextmanager
    def mixed(self, net: Elastic, weights: Weights) -> Iterator[None]:
        """Lets each layer's forward be the mixture."""
        with contextlib.ExitStack() as stack:
            for name, each in weights.items():
                layer = net.module.get_submodule(name)
                assert isinstance(layer, Choice)
                stack.enter_context(_shadowed(layer, functools.partial(_mix, layer, each)))
            yield


@contextlib.contextmanager
def _shadowed(layer: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    before = vars(layer).get("forward")
    vars(layer)["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del vars(layer)["forward"]
        else:
            vars(layer)["forward"] = before


def _mix(layer: Choice, weights: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Runs the options that count, and adds up what they give."""
    live = [
        index
        for index, weight in enumerate(weights.detach().tolist())
        if weight or weights.requires_grad
    ] or [0]  # with all weights 0, something must tell the shape
    inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    outputs = []
    for index in live:
        written = [_version(x) for x in inputs]
        outputs.append(layer.options[index](*args, **kwargs))
        if written != [_version(x) for x in inputs]:
            raise UnsupportedModelError(
                f"option {index} ({type(layer.options[index]).__name__}) of a choice changes "
                "its input in place, which the other options get too; use inplace=False"
            )

    def total(*leaves: Any) -> Any:
        if not isinstance(leaves[0], Tensor):
            return leaves[0]
        terms = [weights[index] * leaf for index, leaf in zip(live, leaves, strict=True)]
        return sum(terms[1:], terms[0])

    return tree_map(total, *outputs)


def _version(tensor: Tensor) -> int:
    # Tensors made in inference mode do not count how often they are written to.
    return 0 if tensor.is_inference() else tensor._version
