"""Every example of a batch runs through a sub-network of its own, in one forward.

The whole network computes, and what an example's size leaves out is zero for that example.
Masks come from the dimensions of the parameters, so nothing here knows an architecture:

- what a layer gives out (`linear`, `convolution`, `embedding`) is masked by the dimensions that
  its weight gives out, after the bias;
- a layer normalization takes its statistics over the channels that remain;
- parameters that are used by themselves (positions, class tokens, scales) are masked as they
  are, so that nothing leaks into a residual stream;
- a block that a size leaves out gives such examples back as they came.

Whether this is the same as the sub-networks is tried on a copy when training starts.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

from supple.errors import UnsupportedModelError
from supple.graph.dims import Atom, Dim, atoms, find, positions
from supple.graph.record import output_tensors
from supple.network import Elastic
from supple.plan import Shadows
from supple.space import Config
from supple.training.batches import batch_size

__all__ = ["check_masks", "masked", "masked_layer_norm"]

#: By function: the weight's place among the arguments, which of its dimensions comes out, and
#: which dimension of the output that is.
_LAYERS: dict[Any, tuple[int, int, int]] = {
    F.linear: (1, 0, -1),
    F.conv1d: (1, 0, 1),
    F.conv2d: (1, 0, 1),
    F.conv3d: (1, 0, 1),
    F.embedding: (1, 1, -1),
}
_TOLERANCE = 1e-3
"""Largest difference that rounding may make, relative to the largest output."""


def masked_layer_norm(
    x: Tensor,
    keep: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    r"""Normalizes each position over the channels that remain.

    With $n = \sum_c m_c$ channels left, $\mu = \frac{1}{n} \sum_c m_c x_c$ and
    $\sigma^2 = \frac{1}{n} \sum_c m_c (x_c - \mu)^2$; masked channels come out as 0.

    Args:
        x: Shape (..., channels).
        keep: 1 for channels that remain and 0 for others, of a shape that broadcasts to x's.
        weight: Gain, shape (channels,).
        bias: Shape (channels,).
        eps: Added to the variance.

    Returns:
        A tensor of x's shape: on what remains, what `nn.LayerNorm` gives for these channels.

    Example:
        >>> masked_layer_norm(torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([1.0, 1.0, 0.0]))
        tensor([[-1.0000,  1.0000,  0.0000]])
    """
    count = keep.sum(-1, keepdim=True)
    centred = (x - (x * keep).sum(-1, keepdim=True) / count) * keep
    scaled = centred * (centred.square().sum(-1, keepdim=True) / count + eps).rsqrt()
    if weight is not None:
        scaled = scaled * weight
    return scaled if bias is None else torch.addcmul(scaled, keep, bias)


@contextlib.contextmanager
def masked(net: Elastic, configs: Sequence[Config]) -> Iterator[None]:
    """Lets example i of a batch run at size i, for the duration of the block.

    Args:
        net: An elastic network, at full size, whose sites only shrink or leave out.
        configs: A size for each example, canonical.
    """
    masks = _Masks(net, configs)
    with _gated(net.module, masks.gates()), _Mode(masks):
        yield


class _Masks:
    """What remains of the dimensions of parameters, by example."""

    def __init__(self, net: Elastic, configs: Sequence[Config]) -> None:
        self.count = len(configs)
        self._dims = {id(p): (p, net.graph.tensors.get(n)) for n, p in _owned(net.module)}
        sizes: dict[Config, Mapping[Atom, int]] = {}
        self._dropped: dict[Config, frozenset[str]] = {}
        for config in dict.fromkeys(configs):
            patches = [net.patch_of(name, choice) for name, choice in config.items()]
            sizes[config] = {a: s for patch in patches for a, s in patch.sizes.items()}
            self._dropped[config] = frozenset().union(*(p.dropped for p in patches))
        self._sizes = sizes
        self._configs = configs
        self._device = net.device
        self._made: dict[int, Tensor | None] = {}

    def of(self, parameter: Any, dim: int) -> Tensor | None:
        """What remains of a parameter's dimension, (examples, size); None where all does."""
        _, dims = self._dims.get(id(parameter), (None, None))
        if dims is None:
            return None
        structure = find(dims[dim])
        if id(structure) not in self._made:
            self._made[id(structure)] = self._mask(structure, parameter.dtype)
        return self._made[id(structure)]

    def _mask(self, dim: Dim, dtype: torch.dtype) -> Tensor | None:
        inside = tuple(dict.fromkeys(atoms(dim)))
        rows: dict[tuple[int, ...], int] = {}
        index = []
        for config in self._configs:
            sizes = self._sizes[config]
            key = tuple(sizes.get(atom, atom.size) for atom in inside)
            index.append(rows.setdefault(key, len(rows)))
        if all(key == tuple(atom.size for atom in inside) for key in rows):
            return None
        table = np.zeros((len(rows), dim.size), dtype=np.float32)
        for key, row in rows.items():
            order = {a: np.arange(size) for a, size in zip(inside, key, strict=True)}
            table[row, positions(dim, order)] = 1
        return torch.from_numpy(table[index]).to(self._device, dtype)

    def by_itself(self, parameter: Tensor, dims: int) -> Tensor:
        """A parameter as each example has it, to broadcast with tensors of so many dims."""
        found = [self.of(parameter, dim) for dim in range(parameter.dim())]
        if all(keep is None for keep in found):
            return parameter
        leading = parameter.dim() == dims and parameter.shape[0] == 1
        rest = parameter.shape[1:] if leading else parameter.shape
        between = [1] * max(0, dims - 1 - len(rest))
        value = parameter.reshape(1, *between, *rest)
        for dim, keep in enumerate(found):
            if keep is not None and not (leading and dim == 0):
                place = value.dim() - parameter.dim() + dim
                value = value * _spread(keep, place, value.dim())
        return value

    def knows(self, tensor: Any) -> bool:
        """Whether it is one of the network's parameters."""
        return id(tensor) in self._dims

    def gates(self) -> dict[str, Tensor]:
        """For each block that some examples leave out, which of them have it."""
        paths = dict.fromkeys(path for gone in self._dropped.values() for path in gone)
        return {
            path: torch.tensor(
                [path not in self._dropped[config] for config in self._configs],
                device=self._device,
            )
            for path in paths
        }


def _owned(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    yield from module.named_parameters()


def _spread(keep: Tensor, dim: int, dims: int) -> Tensor:
    """A mask (examples, size) in the shape that dimension `dim` of a tensor needs."""
    shape = [1] * dims
    shape[0], shape[dim] = keep.shape
    return keep.reshape(shape)


class _Mode(TorchFunctionMode):
    """Masks what functions give out while a network runs."""

    def __init__(self, masks: _Masks) -> None:
        super().__init__()
        self._masks = masks

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _LAYERS:
            return self._layer(func, args, kwargs)
        if func is F.layer_norm:
            return self._layer_norm(*args, **kwargs)
        if getattr(func, "__name__", "") == "__get__":  # a look at a shape or a type
            return func(*args, **kwargs)
        given = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        if any(self._masks.knows(t) for t in given):
            dims = max(t.dim() for t in given)
            args, kwargs = tree_map(lambda t: self._own(t, dims), (args, kwargs))
        return func(*args, **kwargs)

    def _own(self, value: Any, dims: int) -> Any:
        return self._masks.by_itself(value, dims) if self._masks.knows(value) else value

    def _layer(self, func: Callable[..., Tensor], args: Any, kwargs: Any) -> Tensor:
        place, dim, out = _LAYERS[func]
        weight = args[place] if len(args) > place else kwargs["weight"]
        result = func(*args, **kwargs)
        keep = self._masks.of(weight, dim)
        if keep is None:
            return result
        return result * _spread(keep, out % result.dim(), result.dim())

    def _layer_norm(
        self,
        input: Tensor,
        normalized_shape: Sequence[int],
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Tensor:
        keep = self._masks.of(weight, 0) if len(normalized_shape) == 1 else None
        if keep is None:
            return F.layer_norm(input, normalized_shape, weight, bias, eps)
        keep = _spread(keep, input.dim() - 1, input.dim())
        return masked_layer_norm(input, keep, weight, bias, eps)


@contextlib.contextmanager
def _gated(module: nn.Module, gates: Mapping[str, Tensor]) -> Iterator[None]:
    """Lets blocks give back unchanged the examples that do not have them."""
    undo = Shadows()
    try:
        for path, gate in gates.items():
            block = module.get_submodule(path)
            undo.put(vars(block), "forward", _chosen(block.forward, gate))
        yield
    finally:
        undo.end()


def _chosen(forward: Callable[..., Any], gate: Tensor) -> Callable[..., Any]:
    def chosen(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return torch.where(_spread(gate[:, None], -1, x.dim()), forward(x, *args, **kwargs), x)

    return chosen


# --- whether it is true ---------------------------------------------------------------------


def check_masks(net: Elastic) -> None:
    """Checks that masked examples come out as from their sub-networks.

    On a copy with other weights (fresh ones hide leaks: biases are zero) and on the network's
    example inputs; the network itself is left alone.

    Args:
        net: The elastic network.

    Raises:
        UnsupportedModelError: They don't; the message names the sites at fault.
    """
    for site in net.space.sites:
        patches = [net.patch_of(site.name, choice) for choice in site.choices]
        if any(
            p.tensors or p.modules or p.inputs or p.attributes or p.resized for p in patches
        ):
            raise UnsupportedModelError(
                f"site '{site.name}' does more than shrink or leave out, so examples of one "
                "batch can't differ in it; make the network elastic in widths, heads and depth"
            )
    for name, module in net.module.named_modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            raise UnsupportedModelError(
                f"'{name}' takes its statistics over a batch, in which every example has a "
                "network of its own; networks with layer norm have no such trouble"
            )
    twin = _perturbed(net)
    count = batch_size(tree_flatten((net.args, net.kwargs))[0])
    source = np.random.default_rng(0)
    mixed = [net.space.random(source) for _ in range(count)]
    if _same(twin, [net.space.smallest()] * count) and _same(twin, mixed):
        return
    smallest = net.space.smallest()
    alone = {
        site.name: net.space.config({site.name: smallest.get(site.name, site.choices[0])})
        for site in net.space.sites
    }
    wrong = [name for name, config in alone.items() if not _same(twin, [config] * count)]
    raise UnsupportedModelError(
        "masked examples do not come out as from their sub-networks: "
        f"{type(net.module).__name__} computes in a way that masks don't reach; sites at "
        f"fault: {', '.join(wrong) or 'several together'}"
    )


def _perturbed(net: Elastic) -> Elastic:
    twin = net.on(copy.deepcopy(net.module).eval())
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in twin.module.parameters():
            noise = torch.randn(p.shape, generator=source)
            scale = 0.3 if p.dim() <= 1 else max(1, p[0].numel()) ** -0.5
            p.add_((scale * noise).to(p.device, p.dtype))
    return twin


@torch.no_grad()
def _same(net: Elastic, configs: Sequence[Config]) -> bool:
    """Whether masked examples come out as from their sub-networks."""
    try:
        with masked(net, configs):
            together = output_tensors(net.module(*net.args, **net.kwargs))
        for config in dict.fromkeys(configs):
            with net.at(config):
                alone = output_tensors(net.module(*net.args, **net.kwargs))
            rows = [i for i, other in enumerate(configs) if other == config]
            if not all(_near(a[rows], b[rows]) for a, b in zip(together, alone, strict=True)):
                return False
    except (RuntimeError, TypeError, IndexError):  # masks of a shape that something refuses
        return False
    return True


def _near(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    return float((a - b).abs().max()) <= _TOLERANCE * max(1e-12, float(b.abs().max()))
