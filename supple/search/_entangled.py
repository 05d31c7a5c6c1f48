"""Weight entanglement: a network whose weights are a mixture of those of its sizes.

All sizes of an elastic network are slices of the same tensors. A mixture of sizes is therefore
one tensor, the sum of the padded slices by their weights, and costs one pass whatever the
number of choices. No layer is known by name: the network's own plans say what a choice keeps.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from supple.axes.base import GroupSite, Learned, Patch, Transform, added, parameters_of
from supple.axes.depth import DepthSite
from supple.axes.kernel import KernelSite
from supple.errors import UnsupportedModelError
from supple.network import Elastic
from supple.plan import Layout, Plan, Shadows
from supple.search._relaxed import Relaxation, Weights
from supple.space import Site

__all__ = ["EntangledMixture"]

_KINDS = frozenset(("width", "heads", "queries", "head_dim"))


@dataclass(frozen=True)
class EntangledMixture(Relaxation):
    r"""Mixes weights: $W_\text{mix} = \sum_c p_c\,\text{pad}(\text{slice}_c(W))$, run once.

    Where several sites slice a tensor, the sum is over all combinations of their choices, with
    the products of their weights. For prefixes (widths, heads, ranks) that multiplies each
    element, for each site, by the weights of the choices that keep it. A site that slices two
    dimensions of a tensor counts once. Kernels are mixed with their centres in place, by their
    transforms where they have some. A stack of blocks gives the weighted sum of what stands
    after each number of blocks, a single block that of its output and its input.

    With one weight 1 the mixture computes what the size does, unless a normalization reduces
    over units that are not in it: it sees their zeros.

    Running statistics of normalization stay as they are: a mixture's are no size's.
    """

    def sites(self, net: Elastic) -> Sequence[Site]:
        """Gives widths, heads, ranks, kernels, and depths whose blocks stay in order.

        Args:
            net: An elastic network.
        """
        return [site for site in net.space.sites if _mixable(net, site)]

    @contextlib.contextmanager
    def mixed(self, net: Elastic, weights: Weights) -> Iterator[None]:
        """Puts mixtures in the place of the weights, and sums up after the blocks."""
        known = _mixing_of(net)
        patch = Patch(weights=known.transforms(weights))
        undo = Shadows()
        with Plan(net.graph, patch, known.layout).applied(None):
            try:
                for site in known.depths:
                    if site.name in weights:
                        _mix_depth(net, site, weights[site.name], undo)
                yield
            finally:
                undo.end()


def _mixable(net: Elastic, site: Site) -> bool:
    if isinstance(site, GroupSite):
        return site.coupled.kind in _KINDS and bool(site.coupled.members)
    if isinstance(site, DepthSite) and site.stack is not None:
        return site.block is not None or all(_is_prefix(net, site, n) for n in site.choices)
    return isinstance(site, KernelSite)


def _is_prefix(net: Elastic, site: DepthSite, count: int) -> bool:
    """Whether a number of blocks means the first ones."""
    assert site.stack is not None
    gone = {site.stack.path(block) for block in site.stack.blocks[count:]}
    return net.patch_of(site.name, count).dropped == gone


# ---------------------------------------------------------------------------------- tensors


@dataclass(frozen=True)
class _Levels:
    """Which choices of a site keep the elements of a tensor.

    Args:
        site: The site's name.
        first: Index of the first choice that keeps an element, in a shape that the tensor's
            elements broadcast to.
    """

    site: str
    first: Tensor

    def factors(self, weights: Tensor) -> Tensor:
        """For each element, the weights of the choices that keep it, added up."""
        kept = weights.flip(0).cumsum(0).flip(0)
        return kept[self.first.to(weights.device)]


class _Mixing:
    """What is known of a network before any weights are: where each site acts."""

    def __init__(self, net: Elastic) -> None:
        self.layout = Layout(net.graph)
        self._levels: dict[str, list[_Levels]] = defaultdict(list)
        self._kernels: dict[str, _Kernels] = {}
        self.depths: list[DepthSite] = []
        owned = {name for name, _ in net.module.named_parameters() if not added(name)}
        for site in net.space.sites:
            if not _mixable(net, site):
                continue
            if isinstance(site, KernelSite):
                self._kernels[site.cropped.name] = _Kernels(net, site)
            elif isinstance(site, DepthSite):
                self.depths.append(site)
            elif isinstance(site, GroupSite):
                for name, first in _first_choices(net, site, self.layout).items():
                    if name in owned:
                        self._levels[name].append(_Levels(site.name, first))

    def transforms(self, weights: Weights) -> dict[str, Transform]:
        """For each parameter that changes, what its mixture is made by."""
        found: dict[str, Transform] = {}
        for name in {**self._levels, **self._kernels}:
            factors = [
                level.factors(weights[level.site])
                for level in self._levels.get(name, ())
                if level.site in weights
            ]
            kernels = self._kernels.get(name)
            if kernels is not None and kernels.site in weights:
                mixed = _Mixture(tuple(factors), kernels, weights[kernels.site])
                found[name] = Learned(mixed, kernels.parameters)
            elif factors:
                found[name] = _Mixture(tuple(factors))
        return found


_known: WeakKeyDictionary[Elastic, _Mixing] = WeakKeyDictionary()


def _mixing_of(net: Elastic) -> _Mixing:
    if net not in _known:
        _known[net] = _Mixing(net)
    return _known[net]


def _first_choices(net: Elastic, site: GroupSite, layout: Layout) -> dict[str, Tensor]:
    """For each tensor that a site slices, the index of the first choice that keeps an element.

    Two dimensions of one site are looked at together: an element is kept where both are.
    """
    last = len(site.choices) - 1
    by_dim: dict[str, dict[int, Tensor]] = defaultdict(dict)
    for index in range(last - 1, -1, -1):  # smaller ones overwrite what they keep, too
        sizes = net.patch_of(site.name, site.choices[index]).sizes
        for name, slice_ in layout.slices(sizes).items():
            shape = net.graph.recording.tensors[name].shape
            for dim, keep in slice_.steps:
                first = by_dim[name].setdefault(dim, torch.full((shape[dim],), last))
                first[torch.arange(keep) if isinstance(keep, int) else keep.cpu()] = index
    found: dict[str, Tensor] = {}
    for name, dims in by_dim.items():
        rank = len(net.graph.recording.tensors[name].shape)
        joint = torch.zeros([1] * rank, dtype=torch.long)
        for dim, first in dims.items():
            along = [-1 if number == dim else 1 for number in range(rank)]
            joint = torch.maximum(joint, first.reshape(along))
        found[name] = joint
    return found


class _Kernels:
    """The kernels of a site, each made of the whole one and padded to it."""

    def __init__(self, net: Elastic, site: KernelSite) -> None:
        self.site = site.name
        self._dims = site.cropped.dims
        self._smaller = [
            net.patch_of(site.name, choice).tensors[site.cropped.name]
            for choice in site.choices[:-1]
        ]
        needed = (name for each in self._smaller for name in parameters_of(each))
        self.parameters = tuple(dict.fromkeys(needed))

    def mixed(self, kernel: Tensor, weights: Tensor, values: Sequence[Tensor]) -> Tensor:
        """The sum of all kernels by their weights."""
        by_name = dict(zip(self.parameters, values, strict=True))
        total = weights[-1] * kernel
        for weight, change in zip(weights[:-1], self._smaller, strict=True):
            smaller = change(kernel, *(by_name[name] for name in parameters_of(change)))
            total = total + weight * self._padded(smaller, kernel)
        return total

    def _padded(self, smaller: Tensor, kernel: Tensor) -> Tensor:
        """With zeros around, as many on each side."""
        edges: list[int] = []
        for dim in reversed(range(2, kernel.dim())):
            edge = (kernel.shape[dim] - smaller.shape[dim]) // 2
            edges += [edge, edge]
        return nn.functional.pad(smaller, edges)


@dataclass(frozen=True)
class _Mixture:
    """Makes a parameter's mixture of its whole value."""

    factors: tuple[Tensor, ...]
    kernels: _Kernels | None = None
    weights: Tensor | None = None

    def __call__(self, tensor: Tensor, *values: Tensor) -> Tensor:
        """Gives the mixture, differentiable in the tensor and the weights."""
        if self.kernels is not None and self.weights is not None:
            tensor = self.kernels.mixed(tensor, self.weights, values)
        for factor in self.factors:
            tensor = tensor * factor.to(tensor)
        return tensor


# ------------------------------------------------------------------------------------ depth


class _After:
    """A block's forward, whose output is mixed with what came before it.

    Args:
        forward: What the block does.
        path: Where it is, for messages.
        mix: `mix(stream, output) -> output`, of the tensor that enters the block and the one
            that leaves it.
    """

    forward: Callable[..., Any]

    def __init__(
        self,
        forward: Callable[..., Any],
        path: str,
        mix: Callable[[Tensor, Tensor], Tensor],
    ) -> None:
        # entered twice at once, the inner mixture is the one that counts
        while isinstance(forward, _After):
            forward = forward.forward
        self.forward = forward
        self.path = path
        self.mix = mix

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves, structure = tree_flatten(self.forward(*args, **kwargs))
        place = next(i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
        alike = (
            leaf
            for leaf in tree_leaves((args, kwargs))
            if isinstance(leaf, Tensor) and leaf.shape == leaves[place].shape
        )
        stream = next(alike, None)
        if stream is None:
            raise UnsupportedModelError(
                f"block {self.path} takes no tensor of its output's shape, "
                f"{tuple(leaves[place].shape)}, so its depth can't be mixed"
            )
        leaves[place] = self.mix(stream, leaves[place])
        return tree_unflatten(leaves, structure)


def _mix_depth(net: Elastic, site: DepthSite, weights: Tensor, undo: Shadows) -> None:
    assert site.stack is not None
    by_choice = dict(zip(site.choices, weights, strict=True))
    if site.block is not None:
        skipped, run = by_choice[0], by_choice[1]
        path = site.stack.path(site.block)
        _put(net, path, lambda stream, output: skipped * stream + run * output, undo)
        return
    paths = [site.stack.path(block) for block in site.stack.blocks]
    seen: dict[int, Tensor] = {}
    for before, path in enumerate(paths):
        last = before + 1 == len(paths)
        mix = _collecting(path, before, by_choice if last else {}, seen)
        _put(net, path, mix, undo)


def _collecting(
    path: str, before: int, weights: Mapping[int, Tensor], seen: dict[int, Tensor]
) -> Callable[[Tensor, Tensor], Tensor]:
    """Keeps what stands after each number of blocks; the last block sums it up."""

    def mix(stream: Tensor, output: Tensor) -> Tensor:
        if before == 0:
            seen[0] = stream
        seen[before + 1] = output
        if not weights:
            return output
        if missing := set(weights) - set(seen):
            raise UnsupportedModelError(
                f"block {path} sums up what stands after {sorted(weights)} blocks, and "
                f"{sorted(missing)} did not run before it; depth can't be mixed where blocks "
                "are computed again one by one (gradient checkpointing)"
            )
        terms = [weight * seen[count] for count, weight in weights.items()]
        return sum(terms[1:], terms[0])

    return mix


def _put(
    net: Elastic, path: str, mix: Callable[[Tensor, Tensor], Tensor], undo: Shadows
) -> None:
    module = net.module.get_submodule(path)
    undo.put(vars(module), "forward", _After(module.forward, path, mix))
