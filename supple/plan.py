"""A size worked out: which tensor is sliced how, which integer changes, which block goes."""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from supple.axes.base import InputTransform, Patch, Reshaped, parameters_of, without_added
from supple.graph.blocks import Stack
from supple.graph.couple import Graph
from supple.graph.dims import Atom, Dim, atoms, positions
from supple.graph.integers import AttributeKey
from supple.sharded import gathered, refuse_sharded

__all__ = ["Plan", "Slice"]


@dataclass(frozen=True)
class Slice:
    """Which positions of a tensor remain: per dimension all, a prefix or an index."""

    steps: tuple[tuple[int, int | Tensor], ...]

    def __call__(self, tensor: Tensor) -> Tensor:
        for dim, keep in self.steps:
            if isinstance(keep, int):
                tensor = tensor.narrow(dim, 0, keep)
            else:
                tensor = tensor.index_select(dim, keep.to(tensor.device))
        return tensor


def slice_of(dims: list[Dim], sizes: Mapping[Atom, int], device: torch.device) -> Slice:
    """The slice of a tensor with these dimensions when its atoms have these sizes."""
    steps: list[tuple[int, int | Tensor]] = []
    for number, dim in enumerate(dims):
        smaller = {a: np.arange(sizes[a]) for a in atoms(dim) if sizes.get(a, a.size) < a.size}
        if not smaller:
            continue
        index = positions(dim, smaller)
        if np.array_equal(index, np.arange(len(index))):
            steps.append((number, len(index)))
        else:
            steps.append((number, torch.as_tensor(index, device=device)))
    return Slice(tuple(steps))


class Plan:
    """The changes that a patch makes to a model, ready to be applied.

    Args:
        graph: What is known of the model.
        patch: The merged patch of a size; an empty one is the full network.
    """

    def __init__(self, graph: Graph, patch: Patch) -> None:
        self._graph = graph
        self._patch = patch
        self._model = graph.model
        self._modules = dict(graph.model.named_modules())
        self._attributes = {**graph.sizes.attributes(patch.sizes), **patch.attributes}
        self._slices = self._needed_slices()
        self._owners = _owners(graph.model)
        self._short = [
            s for s in graph.stacks if any(s.path(b) in patch.dropped for b in s.blocks)
        ]
        self.is_full = not (
            self._slices
            or self._attributes
            or patch.tensors
            or patch.modules
            or patch.dropped
            or patch.inputs
            or patch.downstream
        )

    def _needed_slices(self) -> dict[str, Slice]:
        tensors: dict[str, Tensor] = dict(self._model.named_parameters())
        tensors.update(self._model.named_buffers())
        found: dict[str, Slice] = {}
        for name, dims in self._graph.tensors.items():
            needed = slice_of(dims, self._patch.sizes, tensors[name].device)
            if needed.steps:
                found[name] = needed
        return found

    def sliced(self, name: str, tensor: Tensor) -> Tensor:
        """The sub-network's value of the tensor called `name`."""
        if name in self._slices:
            tensor = self._slices[name](tensor)
        change = self._patch.tensors.get(name)
        if change is not None:
            tensor = change(tensor, *map(self._parameter, parameters_of(change)))
        return tensor

    def _parameter(self, name: str) -> Tensor:
        module, store, attribute = self._owners[name]
        value: Tensor = gathered(getattr(module, store)[attribute])
        return value

    # --- in place -------------------------------------------------------------------------

    @contextmanager
    def applied(self, statistics: Mapping[str, Tensor] | None) -> Iterator[Shadows]:
        """Shadow the model's attributes for the duration of the block.

        Args:
            statistics: Running statistics of this size, used in evaluation mode.
        """
        undo = Shadows()
        try:
            if not self.is_full:
                self._shadow_tensors(undo, statistics)
                for key, value in self._attributes.items():
                    set_integer(self._modules[key.module], key, value, undo)
                placed = self._shorten(self._modules, undo)
                for path, change in self._patch.inputs.items():
                    module = placed.get(path, self._modules[path])
                    undo.put(vars(module), "forward", _changed(module.forward, change))
            yield undo
        finally:
            undo.undo()

    def _shadow_tensors(self, undo: Shadows, statistics: Mapping[str, Tensor] | None) -> None:
        aliases = self._graph.recording.aliases
        running = self._running_names()
        made: dict[str, Tensor] = {}
        with torch.enable_grad():
            for name, (module, store, attribute) in self._owners.items():
                # what an axis added was not there when the network was recorded
                owner, tensor = aliases.get(name, name), getattr(module, store)[attribute]
                if owner in running:
                    # a copy: training at a partial size must not reach what is kept
                    own = (statistics or {}).get(owner)
                    value = (self.sliced(owner, tensor) if own is None else own).clone()
                elif owner in self._slices or owner in self._patch.tensors:
                    if owner not in made:
                        made[owner] = self.sliced(owner, gathered(tensor))
                    value = made[owner]
                else:
                    continue
                undo.put(vars(module), attribute, value)
        self._shadow_lists(undo)

    def _shadow_lists(self, undo: Shadows) -> None:
        """Lists in which a module keeps its own parameters, or weak references to them.

        Recurrent layers do both, and renew the lists when a weight is not the one in them.
        """
        for module in self._modules.values():
            owned = {id(t): name for name, t in module._parameters.items() if t is not None}
            if not any(name in vars(module) for name in owned.values()):
                continue
            for name, items in list(vars(module).items()):
                if not isinstance(items, list):
                    continue
                weak = any(isinstance(item, weakref.ref) for item in items)
                tensors = [t() if isinstance(t, weakref.ref) else t for t in items]
                if any(id(tensor) in owned for tensor in tensors):
                    now = [vars(module).get(owned.get(id(t), ""), t) for t in tensors]
                    undo.put(vars(module), name, [*map(weakref.ref, now)] if weak else now)

    def _running_names(self) -> set[str]:
        """Buffers that hold running statistics of normalization layers."""
        return {
            f"{path}.{name}" if path else name
            for path, module in self._modules.items()
            if isinstance(module, nn.modules.batchnorm._NormBase)
            for name in module._buffers
            if module._buffers[name] is not None
        }

    def _shorten(self, modules: Mapping[str, nn.Module], undo: Shadows) -> dict[str, nn.Module]:
        """Leave out blocks, swap modules: shorter containers, renumbered blocks and lists.

        Returns:
            What stands at the paths at which something else stood.
        """
        placed: dict[str, nn.Module] = {}
        replaced = {path: self._standing(m, modules) for path, m in self._patch.modules.items()}
        for container, keep in self._kept().items():
            blocks = list(modules[container]._modules.values())
            for key, value in self._renumbered(container, keep):
                set_integer(modules[key.module], key, value, undo)
            for holder, name, items in per_layer_lists(modules, container, len(blocks)):
                undo.put(holder, name, type(items)(items[b] for b in keep))
            kept = {str(i): blocks[b] for i, b in enumerate(keep)}
            replaced[container] = _with_children(modules[container], kept)
        while replaced:  # innermost first: a container inside a container is not an attribute
            path = max(replaced, key=lambda p: (p.count("."), p))
            short = replaced.pop(path)
            parent, _, name = path.rpartition(".")
            if not path:
                undo.put(vars(modules[path]), "forward", short.forward)
                continue
            placed[path] = short
            if isinstance(modules[parent], _CONTAINERS):
                outer = replaced.get(parent, modules[parent])
                children = outer._modules.items()
                swapped = {k: short if c is modules[path] else c for k, c in children}
                replaced[parent] = _with_children(outer, swapped)
            else:
                undo.put(vars(modules[parent]), name, short)
        return placed

    @staticmethod
    def _standing(module: nn.Module | str, modules: Mapping[str, nn.Module]) -> nn.Module:
        """The module that stands in another's place."""
        return modules[module] if isinstance(module, str) else module

    def _kept(self) -> dict[str, list[int]]:
        """For every shortened container, the positions of the children that stay."""
        kept: dict[str, list[int]] = {}
        for stack in self._short:
            before = kept.get(stack.container, list(range(stack.length)))
            gone = {b for b in stack.blocks if stack.path(b) in self._patch.dropped}
            kept[stack.container] = [b for b in before if b not in gone]
        return kept

    def _renumbered(
        self, container: str, keep: list[int]
    ) -> Iterator[tuple[AttributeKey, int]]:
        stack = next(s for s in self._short if s.container == container)
        new = {old: position for position, old in enumerate(keep)}
        for key, block in positional_attributes(self._modules, stack):
            if new.get(block, block) != block:
                yield key, new[block]

    # --- standalone -----------------------------------------------------------------------

    def extracted(self, statistics: Mapping[str, Tensor] | None) -> nn.Module:
        """A copy of the model with the changes made for good; it shares nothing with it."""
        refuse_sharded(self._model, "extract")
        memo: dict[int, Any] = {}
        running = self._running_names()
        for name, tensor in _first_owners(self._model):
            value = self.sliced(name, tensor.detach())
            if statistics is not None and name in running and name in statistics:
                value = statistics[name]
            value = value.detach().clone(memory_format=torch.contiguous_format)
            if isinstance(tensor, nn.Parameter):
                value = nn.Parameter(value, requires_grad=tensor.requires_grad)
            memo[id(tensor)] = value
        model: nn.Module = without_added(copy.deepcopy(self._model, memo))
        modules = dict(model.named_modules())
        forgotten = Shadows()
        for key, integer in self._attributes.items():
            set_integer(modules[key.module], key, integer, forgotten)
        self._cut_blocks(modules, forgotten)
        for path, module in self._patch.modules.items():
            parent, _, name = path.rpartition(".")
            own = modules[module] if isinstance(module, str) else copy.deepcopy(module)
            setattr(modules[parent], name, own)
        for module in model.modules():
            describe(module)
        return with_changed_inputs(model, modules, self._patch)

    def _cut_blocks(self, modules: dict[str, nn.Module], undo: Shadows) -> None:
        for container, keep in self._kept().items():
            module = modules[container]
            blocks = list(module._modules.values())
            for key, value in self._renumbered(container, keep):
                set_integer(modules[key.module], key, value, undo)
            for holder, name, items in per_layer_lists(modules, container, len(blocks)):
                holder[name] = type(items)(items[b] for b in keep)
            module._modules.clear()
            for position, block in enumerate(keep):
                module._modules[str(position)] = blocks[block]


def with_changed_inputs(
    model: nn.Module, modules: Mapping[str, nn.Module], patch: Patch
) -> nn.Module:
    """The model with `Reshaped` modules where a patch changes inputs, innermost first."""
    for path, change in sorted(patch.inputs.items(), key=lambda item: -item[0].count(".")):
        if not path:
            continue
        parent, _, name = path.rpartition(".")
        setattr(modules[parent], name, Reshaped(modules[path], change))
    return Reshaped(model, patch.inputs[""]) if "" in patch.inputs else model


def _changed(forward: Callable[..., Any], change: InputTransform) -> Callable[..., Any]:
    def changed(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = change(args, kwargs)
        return forward(*args, **kwargs)

    return changed


_ABSENT = object()
_CONTAINERS = (nn.ModuleList, nn.Sequential)


def _with_children(container: nn.Module, children: Mapping[str, nn.Module | None]) -> nn.Module:
    """A container like this one that holds other children."""
    other = copy.copy(container)
    vars(other)["_modules"] = dict(children)
    return other


class Shadows:
    """Values put in place of others for a while."""

    def __init__(self) -> None:
        self._entries: list[tuple[dict[str, Any], str, Any, Any]] = []

    def put(self, holder: Any, name: str, value: Any) -> None:
        """Put `value` at `holder[name]`, which is the `__dict__` of a module or an object."""
        self._entries.append((holder, name, holder.get(name, _ABSENT), value))
        holder[name] = value

    def undo(self) -> None:
        """Put back what was there before."""
        for holder, name, before, _ in reversed(self._entries):
            if before is _ABSENT:
                del holder[name]
            else:
                holder[name] = before

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """Put back what was there before, for the duration of the block."""
        self.undo()
        try:
            yield
        finally:
            for holder, name, _, value in self._entries:
                holder[name] = value


def set_integer(module: nn.Module, key: AttributeKey, value: int, undo: Shadows) -> None:
    holder: Any = vars(module)
    for name in key.chain[:-1]:
        holder = vars(holder[name])
    name = key.chain[-1]
    if key.index is None:
        undo.put(holder, name, value)
        return
    items = list(holder[name])
    items[key.index] = value
    undo.put(holder, name, type(holder[name])(items))


def _owners(model: nn.Module) -> dict[str, tuple[nn.Module, str, str]]:
    """Where every parameter and buffer is, under every name: module, store and attribute."""
    return {
        f"{path}.{name}" if path else name: (module, store, name)
        for path, module in model.named_modules(remove_duplicate=False)
        for store in ("_parameters", "_buffers")
        for name, tensor in getattr(module, store).items()
        if tensor is not None
    }


def _first_owners(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def positional_attributes(
    modules: Mapping[str, nn.Module], stack: Stack
) -> Iterator[tuple[AttributeKey, int]]:
    """Integers that number the blocks of a container (`layer_idx`), and the blocks' positions.

    An integer is one if its name is found in every block, and wherever it stands in the same
    place of several blocks it is each block's position. Blocks need not be alike: the number
    may be in one place where a block attends and in another where it convolves.
    """
    if stack.length < 2 or computes_kinds(modules, stack.container, stack.length):
        return
    found: dict[tuple[str, str], dict[int, int]] = {}  # name and place: value by block
    for block in range(stack.length):
        child = modules.get(stack.path(block), nn.Module())  # a child may be None
        for inner, module in child.named_modules():
            for name, value in vars(module).items():
                if type(value) is int:
                    found.setdefault((name, inner), {})[block] = value
    numbers = {k: v for k, v in found.items() if all(b == value for b, value in v.items())}
    covered: dict[str, set[int]] = {}
    for (name, _), values in numbers.items():
        covered.setdefault(name, set()).update(values)
    for (name, inner), values in numbers.items():
        if len(covered[name]) == stack.length:
            for block in values:
                path = stack.path(block) + (f".{inner}" if inner else "")
                yield AttributeKey(path, (name,)), block


def per_layer_lists(
    modules: Mapping[str, nn.Module], container: str, length: int
) -> list[tuple[dict[str, Any], str, Any]]:
    """Lists that name a kind per block, in plain objects that the container's parents hold."""
    return [
        (vars(held), name, items)
        for held in _plain_objects(modules, container)
        for name, items in list(vars(held).items())
        if _names_kinds(items, length)
    ]


def computes_kinds(modules: Mapping[str, nn.Module], container: str, length: int) -> bool:
    """Whether one of these objects computes such a list anew whenever it is asked for it.

    Nobody can shorten that list; numbers of blocks that look up kinds in it stay as they are.
    """
    for held in _plain_objects(modules, container):
        for name, attribute in vars(type(held)).items():
            if isinstance(attribute, property):
                with contextlib.suppress(Exception):  # whatever it raises, it gives no list
                    if _names_kinds(getattr(held, name), length):
                        return True
    return False


def _plain_objects(modules: Mapping[str, nn.Module], container: str) -> list[Any]:
    """What the modules around a container hold that is neither a module nor a tensor, once."""
    found: dict[int, Any] = {}
    path = container
    while path:
        path = path.rpartition(".")[0]
        for value in vars(modules[path]).values():
            if hasattr(value, "__dict__") and not isinstance(value, (nn.Module, Tensor, type)):
                found.setdefault(id(value), value)
    return list(found.values())


def _names_kinds(items: Any, length: int) -> bool:
    listed = isinstance(items, (list, tuple)) and len(items) == length > 1
    return listed and all(isinstance(item, str) for item in items)


#: What PyTorch's own layers say of themselves: attribute to (parameter, dimension).
_DESCRIPTIONS: dict[type[nn.Module], dict[str, tuple[str, int]]] = {
    nn.Linear: {"out_features": ("weight", 0), "in_features": ("weight", 1)},
    nn.Embedding: {"num_embeddings": ("weight", 0), "embedding_dim": ("weight", 1)},
    nn.modules.batchnorm._NormBase: {"num_features": ("weight", 0)},
    nn.GroupNorm: {"num_channels": ("weight", 0)},
}


def describe(module: nn.Module) -> None:
    """Correct what a layer of PyTorch's own prints about its sizes."""
    for kind, attributes in _DESCRIPTIONS.items():
        weight = getattr(module, "weight", None)
        if isinstance(module, kind) and isinstance(weight, Tensor):
            for name, (_, dim) in attributes.items():
                setattr(module, name, weight.shape[dim])
    if isinstance(module, nn.modules.conv._ConvNd):
        module.kernel_size = tuple(module.weight.shape[2:])
        out, into = module.weight.shape[:2]
        if module.transposed:
            module.in_channels, module.out_channels = out, into * module.groups
        else:
            module.out_channels, module.in_channels = out, into * module.groups
