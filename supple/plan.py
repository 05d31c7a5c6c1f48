"""A size worked out: which tensor is sliced how, which integer changes, which block goes."""

from __future__ import annotations

import contextlib
import copy
import functools
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from supple.axes.base import (
    InputTransform,
    Patch,
    Reshaped,
    RoundedInput,
    Transform,
    parameters_of,
    without_added,
)
from supple.graph.blocks import Stack
from supple.graph.couple import Graph
from supple.graph.dims import Atom, Dim, atoms, find, positions
from supple.graph.integers import AttributeKey
from supple.graph.joins import shortened
from supple.sharded import gathered, refuse_sharded

__all__ = ["Layout", "Plan", "Slice"]


@dataclass(frozen=True)
class Slice:
    """Which positions of a tensor remain: per dimension all, a prefix or an index."""

    steps: tuple[tuple[int, int | Tensor], ...]

    @functools.cached_property
    def _prefix(self) -> dict[int, int] | None:
        """The length by dimension, where all steps are prefixes."""
        lengths = {dim: keep for dim, keep in self.steps if isinstance(keep, int)}
        return lengths if len(lengths) == len(self.steps) else None

    def __call__(self, tensor: Tensor) -> Tensor:
        prefix = self._prefix
        if prefix is not None and type(tensor) in _PLAIN and _dense(tensor):
            # one view instead of one per dimension; also one zero-filled gradient, not several
            size = list(tensor.shape)
            for dim, length in prefix.items():
                size[dim] = length
            return tensor.as_strided(size, tensor.stride())
        for dim, keep in self.steps:
            if isinstance(keep, int):
                tensor = tensor.narrow(dim, 0, keep)
            else:
                tensor = tensor.index_select(dim, keep.to(tensor.device))
        return tensor


_PLAIN = (nn.Parameter, Tensor)


def _dense(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and tensor.is_contiguous()


def _compact(tensor: Tensor) -> Tensor:
    """The same values, without gaps where kernels would close these in each forward.

    Convolutions do, products of matrices don't.
    """
    return tensor.contiguous() if tensor.dim() > 3 else tensor


def slice_of(dims: list[Dim], sizes: Mapping[Atom, int], device: torch.device) -> Slice:
    """The slice of a tensor with these dimensions when its atoms have these sizes."""
    steps = ((number, _remaining(dim, sizes, device)) for number, dim in enumerate(dims))
    return Slice(tuple((number, keep) for number, keep in steps if keep is not None))


def _remaining(
    dim: Dim, sizes: Mapping[Atom, int], device: torch.device
) -> int | Tensor | None:
    """What remains of a dimension: a prefix of this length, an index, or (None) all of it."""
    smaller = {a: np.arange(sizes[a]) for a in atoms(dim) if sizes.get(a, a.size) < a.size}
    if not smaller:
        return None
    index = positions(dim, smaller)
    if np.array_equal(index, np.arange(len(index))):
        return len(index)
    return torch.as_tensor(index, device=device)


@dataclass(frozen=True)
class Place:
    """Where a module has a parameter or buffer, and whose it is.

    Attributes:
        module: The module.
        store: `_parameters` or `_buffers`.
        attribute: The name in the module.
        owner: The full name under which the tensor is known; tied ones share it.
        above: Paths of the module and of all that contain it, under each of its names.
    """

    module: nn.Module
    store: str
    attribute: str
    owner: str
    above: tuple[tuple[str, ...], ...]

    @property
    def tensor(self) -> Tensor:
        """What is there now; not kept, for it may be replaced."""
        found: Tensor = getattr(self.module, self.store)[self.attribute]
        return found

    def remains(self, dropped: frozenset[str]) -> bool:
        """Whether the module is still in the network without these blocks."""
        return not dropped or not all(any(p in dropped for p in paths) for paths in self.above)


class Layout:
    """What the plans of one model share: where its tensors are, and what was worked out before.

    Args:
        graph: What is known of the model; its modules must not be replaced from now on.

    Attributes:
        modules: Modules by path.
        owners: Where every parameter and buffer is, under every name.
        places: The same, each place once.
        running: Names of the running statistics of normalization layers.
        stacks: Runs of blocks that can be shortened, also those whose outputs are joined.
        lists: Modules that keep their own parameters, or weak references to them, in lists
            (recurrent layers do), with the lists' names.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self.modules = dict(graph.model.named_modules())
        self.owners = _owners(graph.model)
        self.places = self._places()
        self.running = _running_names(self.modules)
        self.stacks = shortened(graph)
        self.lists = _lists_of_parameters(self.modules.values())
        self._alike = self._alike_owners()
        self._memo: dict[tuple[int, torch.device, tuple[int, ...]], int | Tensor | None] = {}

    def _places(self) -> list[Place]:
        aliases = self._graph.recording.aliases
        names: dict[tuple[int, str], list[str]] = {}
        for name, (module, _, attribute) in self.owners.items():
            names.setdefault((id(module), attribute), []).append(name)
        places = []
        for same in names.values():
            module, store, attribute = self.owners[same[0]]
            above = tuple(_above(name) for name in same)
            # what an axis added was not there when the network was recorded
            owner = aliases.get(same[0], same[0])
            places.append(Place(module, store, attribute, owner, above))
        return places

    def _alike_owners(self) -> list[tuple[list[tuple[Dim, tuple[Atom, ...]]], list[str]]]:
        """Names of tensors that have the same dimensions, with these and their atoms."""
        alike: dict[tuple[int, ...], tuple[list[tuple[Dim, tuple[Atom, ...]]], list[str]]] = {}
        for name, dims in self._graph.tensors.items():
            found = [find(dim) for dim in dims]
            described = [(dim, tuple(dict.fromkeys(atoms(dim)))) for dim in found]
            alike.setdefault(tuple(map(id, found)), (described, []))[1].append(name)
        return list(alike.values())

    def slices(self, sizes: Mapping[Atom, int]) -> dict[str, Slice]:
        """The slice of every tensor that is not whole at these sizes."""
        found: dict[str, Slice] = {}
        for dims, names in self._alike:
            module, store, attribute = self.owners[names[0]]
            device = getattr(module, store)[attribute].device
            keeps = [self._kept(dim, inside, sizes, device) for dim, inside in dims]
            steps = tuple((n, keep) for n, keep in enumerate(keeps) if keep is not None)
            if steps:
                found.update(dict.fromkeys(names, Slice(steps)))
        return found

    def _kept(
        self,
        dim: Dim,
        inside: tuple[Atom, ...],
        sizes: Mapping[Atom, int],
        device: torch.device,
    ) -> int | Tensor | None:
        now = tuple([sizes.get(atom, atom.size) for atom in inside])
        key = (id(dim), device, now)
        if key not in self._memo:
            if len(self._memo) >= _REMEMBERED:
                self._memo.clear()
            self._memo[key] = _remaining(dim, sizes, device)
        return self._memo[key]


_REMEMBERED = 16_384


def _above(name: str) -> tuple[str, ...]:
    """Paths of the modules that contain the tensor of this name, from the root down."""
    path = name.rpartition(".")[0]
    parts = path.split(".") if path else []
    return tuple(".".join(parts[:count]) for count in range(len(parts) + 1))


def _above_last(name: str) -> str:
    """Path of the module that has the tensor of this name."""
    return name.rpartition(".")[0]


def _running_names(modules: Mapping[str, nn.Module]) -> frozenset[str]:
    """Buffers that hold running statistics of normalization layers."""
    return frozenset(
        f"{path}.{name}" if path else name
        for path, module in modules.items()
        if isinstance(module, nn.modules.batchnorm._NormBase)
        for name in module._buffers
        if module._buffers[name] is not None
    )


def _lists_of_parameters(modules: Iterable[nn.Module]) -> list[tuple[nn.Module, str]]:
    found = []
    for module in modules:
        owned = {id(t) for t in module._parameters.values() if t is not None}
        for name, items in vars(module).items():
            if owned and isinstance(items, list) and any(id(t) in owned for t in _held(items)):
                found.append((module, name))
    return found


def _held(items: list[Any]) -> list[Any]:
    """The items, and what weak references among them refer to."""
    return [item() if isinstance(item, weakref.ref) else item for item in items]


class Plan:
    """The changes that a patch makes to a model, ready to be applied.

    Args:
        graph: What is known of the model.
        patch: The merged patch of a size; an empty one is the full network.
        layout: What plans of the same graph share; its own by default.
    """

    def __init__(self, graph: Graph, patch: Patch, layout: Layout | None = None) -> None:
        self._patch = patch
        self._model = graph.model
        self._layout = layout or Layout(graph)
        self._modules = self._layout.modules
        self._attributes = {**graph.sizes.attributes(patch.sizes), **patch.attributes}
        self._slices = self._layout.slices(patch.sizes)
        self._short = [
            s for s in self._layout.stacks if any(s.path(b) in patch.dropped for b in s.blocks)
        ]
        self.is_full = not (
            self._slices
            or self._attributes
            or patch.tensors
            or patch.modules
            or patch.dropped
            or patch.inputs
            or patch.downstream
            or patch.weights
            or patch.rounded
            or patch.rounded_inputs
        )
        self._running, self._changed = self._changing_places()
        self._buffers = [p for p in (*self._running, *self._changed) if p.store == "_buffers"]
        self._forwards: dict[str, types.CodeType] = {}
        changing = {id(place.module) for place in self._changed}
        self._lists = [entry for entry in self._layout.lists if id(entry[0]) in changing]

    def _changing_places(self) -> tuple[list[Place], list[Place]]:
        """Where a running statistic, and where any other tensor is shadowed."""
        # a module that takes another's place may come from a block that is left out
        moved = any(isinstance(module, str) for module in self._patch.modules.values())
        dropped = frozenset() if moved else self._patch.dropped
        running: list[Place] = []
        changed: list[Place] = []
        for place in self._layout.places:
            if not place.remains(dropped):
                continue
            if place.owner in self._layout.running:
                running.append(place)
            elif any(
                place.owner in changes
                for changes in (
                    self._slices,
                    self._patch.tensors,
                    self._patch.weights,
                    self._patch.rounded,
                )
            ):
                changed.append(place)
        return running, changed

    def sliced(self, name: str, tensor: Tensor) -> Tensor:
        """The sub-network's value of the tensor called `name`, before it is rounded."""
        tensor = self._transformed(self._patch.weights.get(name), tensor)
        if name in self._slices:
            tensor = self._slices[name](tensor)
        return self._transformed(self._patch.tensors.get(name), tensor)

    def _shown(self, name: str, tensor: Tensor) -> Tensor:
        """The value that modules see."""
        value = self.sliced(name, tensor)
        rounded = self._patch.rounded.get(name)
        return value if rounded is None else rounded(value, *self._values(rounded.parameters))

    def _values(self, names: Iterable[str]) -> tuple[Tensor, ...]:
        return tuple(map(self._parameter, names))

    def _transformed(self, change: Transform | None, tensor: Tensor) -> Tensor:
        if change is None:
            return tensor
        return change(tensor, *map(self._parameter, parameters_of(change)))

    def _parameter(self, name: str) -> Tensor:
        module, store, attribute = self._layout.owners[name]
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
        buffers = [(place, place.tensor) for place in self._buffers]
        try:
            if not self.is_full:
                self._shadow_tensors(undo, statistics)
                for key, value in self._attributes.items():
                    set_integer(self._modules[key.module], key, value, undo)
                placed = {**self._modules, **self._shorten(self._modules, undo)}
                for path, change in self._patch.inputs.items():
                    module = placed[path]
                    assert module is not None
                    undo.put(vars(module), "forward", _changed(module.forward, change))
                for path, rounded in self._patch.rounded_inputs.items():
                    values = self._values(rounded.parameters)
                    layer = placed[path]
                    undo.put(vars(layer), "forward", _rounding(layer.forward, rounded, values))
                self._separate_compiled_code(undo)
                undo.put(vars(self._model), "__deepcopy__", self._copied_whole(undo))
            yield undo
        finally:
            undo.end()
            for place, owner in buffers:
                now = place.module._buffers.get(place.attribute)
                if now is not None and now.shape != owner.shape:
                    # the forward has assigned a buffer of its own size
                    place.module._buffers[place.attribute] = owner

    def _copied_whole(self, undo: Shadows) -> Callable[[dict[int, Any]], nn.Module]:
        """A copy that is made at a size is a copy of the full network."""

        def copied(memo: dict[int, Any]) -> nn.Module:
            with undo.lifted():
                return copy.deepcopy(self._model, memo)

        return copied

    def _separate_compiled_code(self, undo: Shadows) -> None:
        """Give the model, and modules that are compiled by themselves, a forward of this size.

        `torch.compile` keeps what it compiled beside the code that it compiled, and does not
        look for attributes that were not there: code of the full size would run at every size.
        """
        for path, module in self._modules.items():
            if not path or module._compiled_call_impl is not None:
                forward: Any = module.forward
                own = _passing(forward)
                functools.update_wrapper(own, forward)
                own.__code__ = self._forwards.setdefault(path, own.__code__.replace())
                undo.put(vars(module), "forward", own)

    def _shadow_tensors(self, undo: Shadows, statistics: Mapping[str, Tensor] | None) -> None:
        made: dict[str, Tensor] = {}
        own = statistics or {}
        with torch.enable_grad():
            for place in self._running:
                # a copy: training at a partial size must not reach what is kept
                value = own.get(place.owner)
                if value is None:
                    value = self.sliced(place.owner, place.tensor)
                undo.put(vars(place.module), place.attribute, value.clone())
            for place in self._changed:
                value = made.get(place.owner)
                if value is None:
                    value = _compact(self._shown(place.owner, gathered(place.tensor)))
                    made[place.owner] = value
                undo.put(vars(place.module), place.attribute, value)
        self._shadow_lists(undo)

    def _shadow_lists(self, undo: Shadows) -> None:
        """Lists in which a module keeps its own parameters, or weak references to them.

        Recurrent layers do both, and renew the lists when a weight is not the one in them.
        """
        for module, name in self._lists:
            owned = {id(t): name for name, t in module._parameters.items() if t is not None}
            items = vars(module)[name]
            weak = any(isinstance(item, weakref.ref) for item in items)
            now = [vars(module).get(owned.get(id(t), ""), t) for t in _held(items)]
            undo.put(vars(module), name, [*map(weakref.ref, now)] if weak else now)

    def _shorten(self, modules: Mapping[str, nn.Module], undo: Shadows) -> dict[str, nn.Module]:
        """Leave out blocks, swap modules: shorter containers, renumbered blocks and lists.

        Returns:
            What stands at the paths at which something else stood.
        """
        placed: dict[str, nn.Module] = {}
        replaced = {path: self._standing(m, modules) for path, m in self._patch.modules.items()}
        for container, keep in self._kept.items():
            blocks = list(modules[container]._modules.values())
            for key, value in self._numbers[container]:
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

    @functools.cached_property
    def _kept(self) -> dict[str, list[int]]:
        """For every shortened container, the positions of the children that stay."""
        kept: dict[str, list[int]] = {}
        for stack in self._short:
            before = kept.get(stack.container, list(range(stack.length)))
            gone = {b for b in stack.blocks if stack.path(b) in self._patch.dropped}
            kept[stack.container] = [b for b in before if b not in gone]
        return kept

    @functools.cached_property
    def _numbers(self) -> dict[str, list[tuple[AttributeKey, int]]]:
        """For every shortened container, the integers that number its blocks."""
        return {path: list(self._renumbered(path, keep)) for path, keep in self._kept.items()}

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
        running = self._layout.running
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
        model = self._packed(model, modules)
        return with_changed_inputs(model, modules, self._patch)

    @torch.no_grad()
    def _packed(self, model: nn.Module, modules: dict[str, nn.Module]) -> nn.Module:
        """Puts layers that hold codes, and that round their inputs, in place of layers."""
        for path in dict.fromkeys((*map(_above_last, self._patch.rounded), *self._inputs)):
            weight = self._patch.rounded.get(f"{path}.weight".lstrip("."))
            rounded = self._inputs.get(path)
            given = None
            if rounded is not None:
                given = rounded, self._values(rounded.parameters)
            if weight is not None:
                values = self._values(weight.parameters)
                layer = weight.packed(modules[path], *values, given=given)
            else:
                assert given is not None
                layer = given[0].packed(modules[path], *given[1])
            if modules[path] is model:
                model = layer
            for parent in model.modules():
                for name, child in parent._modules.items():
                    if child is modules[path] and parent is not layer:
                        parent._modules[name] = layer
            modules[path] = layer
        return model

    @property
    def _inputs(self) -> Mapping[str, RoundedInput]:
        return self._patch.rounded_inputs

    def _cut_blocks(self, modules: dict[str, nn.Module], undo: Shadows) -> None:
        for container, keep in self._kept.items():
            module = modules[container]
            blocks = list(module._modules.values())
            for key, value in self._numbers[container]:
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


def _passing(forward: Callable[..., Any]) -> Any:
    def pass_on(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    return pass_on


def _changed(forward: Callable[..., Any], change: InputTransform) -> Callable[..., Any]:
    def changed(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = change(args, kwargs)
        return forward(*args, **kwargs)

    return changed


def _rounding(
    forward: Callable[..., Any], rounded: RoundedInput, values: tuple[Tensor, ...]
) -> Callable[..., Any]:
    def seeing(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return forward(rounded(x, *values), *args, **kwargs)

    return seeing


_ABSENT = object()
_CONTAINERS = (nn.ModuleList, nn.Sequential)


def _with_children(container: nn.Module, children: Mapping[str, nn.Module | None]) -> nn.Module:
    """A container like this one that holds other children."""
    other = container.__new__(type(container))
    vars(other).update(vars(container), _modules=dict(children))
    return other


class Shadows:
    """Values put in place of others for a while."""

    def __init__(self) -> None:
        self._entries: list[tuple[dict[str, Any], str, Any, Any]] = []

    def put(self, holder: Any, name: str, value: Any) -> None:
        """Put `value` at `holder[name]`, which is the `__dict__` of a module or an object."""
        self._entries.append((holder, name, holder.get(name, _ABSENT), value))
        holder[name] = value

    def _put_back(self) -> None:
        for holder, name, before, _ in reversed(self._entries):
            if before is _ABSENT:
                del holder[name]
            else:
                holder[name] = before

    def end(self) -> None:
        """Put back what was there before, for good, and let go of what stood in its place.

        Some of that refers to this object: the tensors would otherwise stay in memory until
        the garbage collector comes.
        """
        self._put_back()
        self._entries.clear()

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """Put back what was there before, for the duration of the block."""
        self._put_back()
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
