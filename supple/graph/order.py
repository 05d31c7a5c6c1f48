"""Reordering the units of groups: the same network with its parameters permuted."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from supple.graph.couple import Graph, Group
from supple.graph.dims import Atom, Dim, positions
from supple.graph.rules import argument

__all__ = ["expand_order", "l1", "permute", "read_l1"]

_CONVOLUTIONS = ("convolution", "_convolution", "mkldnn_convolution")
#: Products of an activation and a weight, and which input the weight is.
_PRODUCTS = {"mm": -1, "addmm": -1} | dict.fromkeys(_CONVOLUTIONS, 1)


def expand_order(group: Group, order: np.ndarray) -> dict[Atom, np.ndarray]:
    """An order of a group's units as an order of the positions of each of its atoms.

    An atom with more positions than the group has units moves in runs; of one with fewer, the
    positions move with the first unit that belongs to them, or stay where the numbers do not
    divide (only sizes tie such atoms, not positions).
    """
    result: dict[Atom, np.ndarray] = {}
    for atom in group.atoms:
        if atom.size % group.full == 0:
            run = atom.size // group.full
            result[atom] = (order[:, None] * run + np.arange(run)[None, :]).reshape(-1)
        elif group.full % atom.size == 0:
            run = group.full // atom.size
            result[atom] = np.array(list(dict.fromkeys((order // run).tolist())))
    return result


@torch.no_grad()
def permute(
    model: nn.Module,
    graph: Graph,
    order: Mapping[Atom, np.ndarray],
    beside: Sequence[Mapping[str, Tensor]] = (),
) -> None:
    """Reorder the positions of parameters and buffers in place, coupled ones together.

    Tensors `beside` them, found by the same names, are reordered alike.
    """
    owned: dict[str, Tensor] = dict(model.named_parameters())
    owned.update(model.named_buffers())
    for name, dims in graph.tensors.items():
        tensors = [owned[name], *(group[name] for group in beside if name in group)]
        for dim, structure in enumerate(dims):
            index = positions(structure, order)
            if np.array_equal(index, np.arange(owned[name].shape[dim])):
                continue
            for tensor in tensors:
                moved = torch.as_tensor(index, device=tensor.device)
                tensor.copy_(tensor.index_select(dim, moved))


@torch.no_grad()
def l1(graph: Graph, group: Group) -> Tensor:
    """Sum of the absolute parameters that each unit of a group owns, shape (full,)."""
    return _summed(graph, group, group.members)


@torch.no_grad()
def read_l1(graph: Graph, group: Group) -> Tensor:
    """Sum of the absolute weights that the following layers read each unit with.

    These are the weights of products that sum over the units. Where none is known, all that a
    unit owns counts, as in `l1`.

    Returns:
        Shape (full,).
    """
    read = summed_over(graph)
    following = [(name, dim) for name, dim in group.members if dim in read.get(name, ())]
    return _summed(graph, group, following or group.members)


def summed_over(graph: Graph) -> dict[str, set[int]]:
    """The dimensions of every parameter that products with activations sum over."""
    names = {ref.storage: name for name, ref in graph.recording.tensors.items()}
    found: dict[str, set[int]] = defaultdict(set)
    for call in graph.recording.calls:
        kind = call.name.removeprefix("aten::")
        if kind not in _PRODUCTS:
            continue
        weight = call.inputs[_PRODUCTS[kind]]
        name = names.get(weight.storage)
        if name is None:
            continue
        if kind in _CONVOLUTIONS:
            found[name].add(0 if argument(call, "transposed", False) else 1)
        elif len(weight.shape) == 2:
            # A matrix that is not the parameter itself is its transpose, as in `linear`.
            found[name].add(0 if weight.id == graph.recording.tensors[name].id else 1)
    return dict(found)


def _summed(graph: Graph, group: Group, members: Iterable[tuple[str, int]]) -> Tensor:
    owned = dict(graph.model.named_parameters())
    total = torch.zeros(group.full, dtype=torch.float64)
    for name, dim in members:
        if name in owned:
            total += _per_unit(owned[name], dim, graph.tensors[name], group)
    return total.float()


def _per_unit(weight: Tensor, dim: int, dims: Sequence[Dim], group: Group) -> Tensor:
    others = [d for d in range(weight.dim()) if d != dim]
    row = weight.detach().abs().double()
    row = (row.sum(others) if others else row).cpu()
    total = torch.zeros(group.full, dtype=torch.float64)
    for unit in range(group.full):
        index = positions(dims[dim], expand_order(group, np.array([unit])))
        total[unit] = row[torch.as_tensor(index)].sum()
    return total
