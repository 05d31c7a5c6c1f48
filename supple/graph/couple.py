"""From a recorded run to the groups of dimensions that shrink together.

`analyse` records a model, propagates the dimension algebra through the recorded calls and sorts
what it finds into groups (what an axis can offer), residual stacks, and what is fixed and why.
Nothing here knows an architecture.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from math import gcd
from typing import Any

import torch
from torch import nn

from supple.errors import UnsupportedModelError
from supple.graph.blocks import Stack, find_stacks
from supple.graph.dims import Atom, Dim, Product, Sum, atoms, evaluate, find, keep_order, pin
from supple.graph.equivalents import Equivalent, plain_implementations
from supple.graph.indices import follow_indices
from supple.graph.integers import AttributeKey, leaves
from supple.graph.learned import learned_rule
from supple.graph.opaque import hold_what_is_not_seen
from supple.graph.record import Recording, record
from supple.graph.repeats import Repeat, find_repeats
from supple.graph.rules import RULES, Dims, Propagation, fixed, pointwise
from supple.graph.sizes import Sizes

__all__ = ["Graph", "Group", "analyse", "final_outputs", "propagate"]


@dataclass(frozen=True, eq=False)
class Group:
    """Dimensions that shrink together, as one number.

    Attributes:
        name: Module path of the first parameter that has it, made unique.
        kind: `width`, `heads`, `queries` (query heads per key-value head), `head_dim`,
            `experts` (what a router chooses from) or `top_k` (how many it chooses).
        atoms: The atoms that change; all keep the same fraction.
        full: Size in the full model (of the first atom).
        unit: The size is always a multiple of this.
        members: Parameters and buffers that have it, with the dimension.
        least: The smallest size it can have.
        modules: Paths of modules that compute with it, where no parameter has it.
    """

    name: str
    kind: str
    atoms: tuple[Atom, ...]
    full: int
    unit: int
    members: tuple[tuple[str, int], ...]
    least: int = 1
    modules: tuple[str, ...] = ()

    def sizes(self, choice: int) -> dict[Atom, int]:
        """Size of every atom when the group has `choice` units left."""
        return {atom: atom.size * choice // self.full for atom in self.atoms}


@dataclass
class Graph:
    """What is known of a model.

    Attributes:
        model: The model itself.
        recording: The run it was learned from.
        propagation: Dimensions of every tensor of that run.
        tensors: Dimensions of parameters and buffers, by name of the first owner.
        groups: What can shrink.
        stacks: Runs of residual blocks that can be shortened.
        repeats: Residual modules that can be called fewer times.
        fixed: What cannot change, with the reason; by parameter dimension or block.
        sizes: The integers of sub-networks.
        ordered: Atoms of parameters whose positions have a meaning of their own.
    """

    model: nn.Module
    recording: Recording
    propagation: Propagation
    tensors: dict[str, Dims]
    groups: list[Group] = field(default_factory=list)
    stacks: list[Stack] = field(default_factory=list)
    repeats: list[Repeat] = field(default_factory=list)
    fixed: dict[str, str] = field(default_factory=dict)
    sizes: Sizes = field(init=False, repr=False)
    ordered: frozenset[Atom] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.sizes = Sizes(self.propagation, self.recording.equalities)
        self.sizes.learn_values(_attribute_values(self.model, self.propagation))
        owned = {a for dims in self.tensors.values() for dim in dims for a in atoms(dim)}
        self.ordered = frozenset(atom for atom in owned if atom.ordered)

    def reduces_over(self, group: Group) -> bool:
        """Whether a normalization, softmax or mean reduces over the group itself.

        So it is, too, with what no parameter has: there is nothing in it to be zeroed.
        """
        if not group.members:
            return True
        reduced = {atom for dim in self.propagation.reduced for atom in atoms(dim)}
        return any(atom in reduced for atom in group.atoms)


def propagate(recording: Recording, before: Propagation | None = None) -> Propagation:
    """Propagate dimensions through a recorded run.

    Args:
        recording: The run.
        before: What an earlier run of the same model told, to be added to; parameters of the
            two runs share their dimensions.
    """
    p = before or Propagation()
    p.weights = frozenset(ref.storage for ref in recording.tensors.values())
    p.literals.update(recording.literals)
    p.used.update(ref.id for call in recording.calls for ref in call.inputs)
    p.used.update(ref.id for ref in recording.outputs)
    for name, ref in recording.tensors.items():
        if name not in p.owned:
            p.owned[name] = [Atom(n) if n != 1 else fixed(1, "") for n in ref.shape]
        p.dims[ref.id] = p.owned[name]
    for ref in recording.inputs:
        p.dims.setdefault(ref.id, [fixed(n, "an input dimension") for n in ref.shape])
    for call in recording.calls:
        known_rule = RULES.get(call.name)
        if known_rule is None and _is_pointwise(call.op):
            known_rule = pointwise
        results = (known_rule or learned_rule)(p, call)
        follow_indices(p, call)
        for ref, dims in zip(call.outputs, results, strict=True):
            if [d.size for d in dims] != list(ref.shape):
                name = call.name.removeprefix("aten::")
                p.unknown[call.name] = "its rule does not give the shape that it returned"
                dims = [fixed(n, f"the operator {name} is not understood") for n in ref.shape]
            p.dims.setdefault(ref.id, dims)
    hold_what_is_not_seen(recording, p)
    for position in final_outputs(recording):
        for dim in p.of(recording.outputs[position]):
            pin(dim, "it is a dimension of the model's output")
        if recording.outputs[position].id in p.indexed:
            chosen = p.indexed[recording.outputs[position].id]
            keep_order(chosen, "the model's output holds positions in it")
    return p


def final_outputs(recording: Recording) -> list[int]:
    """Positions of the outputs whose shape is the model's interface.

    The first, and every other that the model does not itself compute with further.
    """
    used = {ref.id for call in recording.calls for ref in call.inputs}
    return [i for i, r in enumerate(recording.outputs) if i == 0 or r.id not in used]


def _is_pointwise(op: Any) -> bool:
    if torch.Tag.pointwise in op.tags:
        return True
    name = op._schema.name
    if not name.endswith("_"):
        return False
    plain = getattr(torch.ops.aten, name.removeprefix("aten::").removesuffix("_"), None)
    overloads = plain.overloads() if plain is not None else []
    return any(torch.Tag.pointwise in getattr(plain, o).tags for o in overloads)


def analyse(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    variants: Sequence[AbstractContextManager[None]] = (),
    equivalents: Sequence[Equivalent] = (),
) -> Graph:
    """Learn which dimensions of `model` can shrink, and what must shrink with them.

    Args:
        model: Any module that runs on the example inputs.
        args: Positional example inputs.
        kwargs: Keyword example inputs.
        variants: Contexts in which the model takes other ways; these are analysed as well.
        equivalents: Ways to compute the same, tried in order where the model's usual way
            cannot be recorded as a whole, before those that it declares itself.

    Returns:
        The graph; the model is left exactly as it was.

    Raises:
        UnsupportedModelError: The forward fails on the example inputs.
    """
    recording = _recorded(model, args, kwargs, (*equivalents, plain_implementations))
    propagation = propagate(recording)
    if not recording.fake:
        _add_traced_path(model, args, kwargs, recording, propagation)
    for variant in variants:
        with variant:
            propagate(record(model, args, kwargs), propagation)
    graph = Graph(model, recording, propagation, propagation.owned)
    _find_groups(graph)
    graph.stacks, left_in = find_stacks(model, recording, propagation)
    graph.fixed.update(left_in)
    sized = graph.sizes.defined
    graph.repeats, called = find_repeats(
        model, args, kwargs, recording, propagation, sized.__contains__
    )
    graph.fixed.update(called)
    return graph


def _recorded(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    equivalents: Sequence[Equivalent],
) -> Recording:
    """A run of the model, if need be in a way that is equivalent and leaves nothing opaque."""
    usual: Recording | UnsupportedModelError
    try:
        usual = record(model, args, kwargs)
        if not usual.opaque:
            return usual
    except UnsupportedModelError as error:
        usual = error
    for equivalent in equivalents:
        try:
            with equivalent(model):
                other = record(model, args, kwargs)
        except UnsupportedModelError:
            continue
        if not other.opaque:
            return other
    if isinstance(usual, UnsupportedModelError):
        raise usual
    return usual


def _add_traced_path(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    recording: Recording,
    p: Propagation,
) -> None:
    """Add what a run without values tells: code often takes a more general path then.

    Libraries skip work that the values at hand make needless (a mask of ones), and with it the
    integers that other values would need. Models that cannot run without values say no more.
    """
    try:
        traced = record(model, args, kwargs, fake=True)
    except UnsupportedModelError:
        return
    propagate(traced, p)
    recording.equalities.extend(traced.equalities)


def _attribute_values(model: nn.Module, p: Propagation) -> dict[AttributeKey, int]:
    modules = dict(model.named_modules())
    values: dict[AttributeKey, int] = {}
    for relation in p.relations:
        for leaf in leaves(relation.expression):
            if isinstance(leaf, AttributeKey):
                values[leaf] = _read(modules[leaf.module], leaf)
    return values


def _read(holder: Any, key: AttributeKey) -> int:
    for name in key.chain:
        holder = vars(holder)[name]
    return int(holder if key.index is None else holder[key.index])


# --- groups -----------------------------------------------------------------------------------


def _find_groups(graph: Graph) -> None:
    members = _members(graph.tensors, {n for n, _ in graph.model.named_parameters()})
    kinds = _kinds(graph)
    taken: set[Atom] = set()
    names: set[str] = set()
    reasons: dict[str, str] = {}
    for atom, places in members.items():
        if atom in taken:
            continue
        label = f"{places[0][0]}[{places[0][1]}]"
        reason = atom.pinned or atom.ordered or _lonely(places)
        together: tuple[Atom, ...] = (atom,)
        unit = 0
        if not reason:
            together, unit, reason = _satisfiable(graph, atom, taken)
        kind = kinds.get(atom, "width")
        if reason:
            heads = kind == "heads"  # others of the same dimension may be elastic
            reasons.setdefault(_name(places[0][0], kind) if heads else label, reason)
            continue
        taken.update(together)
        where = tuple(sorted({m for a in together for m in members.get(a, ())}))
        name = _unique(_name(places[0][0], kind, where), names)
        least = _least(graph, together, atom.size)
        graph.groups.append(Group(name, kind, together, atom.size, unit, where, least))
    _find_counts(graph, members, names)
    elastic = {f"{n}[{i}]" for group in graph.groups for n, i in group.members}
    graph.fixed = _condensed({n: r for n, r in reasons.items() if n not in elastic})


def _least(graph: Graph, together: tuple[Atom, ...], full: int) -> int:
    """The smallest size at which as many can be chosen as the full model chooses."""
    least = 1
    for choice in graph.propagation.chosen:
        if any(atom in together for atom in atoms(choice.source)):
            while least < full and choice.count.size > evaluate(
                choice.source, {a: a.size * least // full for a in together}
            ):
                least += 1
    return least


def _find_counts(
    graph: Graph, members: Mapping[Atom, list[tuple[str, int]]], names: set[str]
) -> None:
    """How many positions are chosen, where an integer of the model says it."""
    taken = {atom for group in graph.groups for atom in group.atoms} | set(members)
    for choice in graph.propagation.chosen:
        count = find(choice.count)
        owners = [members[a][0][0] for a in atoms(choice.source) if a in members]
        if not isinstance(count, Atom) or count in taken or count.pinned or not owners:
            continue
        together, unit, _ = _satisfiable(graph, count, taken)
        if unit and graph.sizes.attributes(dict.fromkeys(together, 0)):
            taken.update(together)
            name = _unique(_name(owners[0], "top_k"), names)
            where = tuple(
                c.module for c in graph.propagation.chosen if find(c.count) in together
            )
            graph.groups.append(
                Group(name, "top_k", together, count.size, unit, (), modules=where)
            )


def _condensed(reasons: Mapping[str, str]) -> dict[str, str]:
    """Dimensions of one parameter that are fixed for the same reason, on one line."""
    together: dict[tuple[str, str], list[str]] = defaultdict(list)
    for label, reason in reasons.items():
        name, _, dim = label.rstrip("]").rpartition("[")
        together[name or label, reason].append(dim if name else "")
    return {
        f"{name}[{', '.join(dims)}]" if dims[0] else name: reason
        for (name, reason), dims in together.items()
    }


def _lonely(places: list[tuple[str, int]]) -> str:
    if len({name for name, _ in places}) > 1:
        return ""
    return "no other parameter depends on it, so nothing shows what shrinking it would mean"


def _members(
    tensors: Mapping[str, Dims], parameters: set[str]
) -> dict[Atom, list[tuple[str, int]]]:
    """Every atom of a parameter, in order of the parameters, and where it occurs."""
    members: dict[Atom, list[tuple[str, int]]] = defaultdict(list)
    ordered = sorted(tensors, key=lambda name: name not in parameters)
    for name in ordered:
        for position, dim in enumerate(tensors[name]):
            for atom in dict.fromkeys(atoms(dim)):
                if name in parameters or atom in members:
                    members[atom].append((name, position))
    return members


def _kinds(graph: Graph) -> dict[Atom, str]:
    """Heads among atoms: outer factors of a parameter dimension that attention batches over."""
    batched = {atom for dim in graph.propagation.batched for atom in atoms(dim)}
    kinds: dict[Atom, str] = {}
    for dims in graph.tensors.values():
        for dim in dims:
            for outer, inner in _nested(dim):
                if any(atom in batched for atom in outer):
                    for atom in outer:
                        if atom in batched:
                            kinds.setdefault(atom, "heads")
                    for atom in inner:
                        kinds[atom] = "queries" if atom in batched else "head_dim"
    routed = [*graph.propagation.routed, *(c.source for c in graph.propagation.chosen)]
    kinds.update((atom, "experts") for dim in routed for atom in atoms(dim))
    return kinds


def _nested(dim: Dim) -> Iterable[tuple[list[Atom], list[Atom]]]:
    """Pairs of outer and inner atoms of every product in `dim`."""
    dim = find(dim)
    if isinstance(dim, Sum):
        for part in dim.parts:
            yield from _nested(part)
    elif isinstance(dim, Product):
        flat = [list(atoms(factor)) for factor in dim.factors]
        for position in range(len(flat) - 1):
            yield flat[position], [a for inner in flat[position + 1 :] for a in inner]


def _name(parameter: str, kind: str, members: Sequence[tuple[str, int]] = ()) -> str:
    module, _, _ = parameter.rpartition(".")
    if kind == "width":
        return module or parameter
    parent, _, _ = module.rpartition(".")
    if any(
        name.startswith(f"{module}.") and "." in name[len(module) + 1 :] for name, _ in members
    ):
        parent = module  # the module itself holds a parameter beside those of its layers
    leaf = "num_experts" if kind == "experts" else kind
    return f"{parent or module}.{leaf}" if (parent or module) else leaf


def _unique(name: str, taken: set[str]) -> str:
    candidate, count = name, 2
    while candidate in taken:
        candidate, count = f"{name}#{count}", count + 1
    taken.add(candidate)
    return candidate


def _satisfiable(
    graph: Graph, atom: Atom, taken: set[Atom]
) -> tuple[tuple[Atom, ...], int, str]:
    """The atoms that must change with `atom`, the unit of change, or why it cannot change."""
    reason = ""
    for together in _candidates(graph, atom, taken):
        unit, failed = _unit(graph, atom, together)
        if unit:
            return together, unit, ""
        reason = reason or failed
    return (atom,), 0, reason or "its size is tied to others"


def _candidates(graph: Graph, atom: Atom, taken: set[Atom]) -> Iterable[tuple[Atom, ...]]:
    """`atom` alone, then with one or more atoms that the code ties it to."""
    yield (atom,)
    together = [atom]
    for _ in range(64):
        half = {a: max(1, a.size // 2) for a in together}
        ties = graph.sizes.violated(half)
        if not ties:
            return
        ready = [i for _, i in ties]
        unusable = taken | set(together)
        options = [a for a in _flat(ready) if a not in unusable and _free(graph, a)]
        if not options:
            return
        together.append(_best(graph, together, options))
        yield tuple(together)


def _free(graph: Graph, atom: Atom) -> bool:
    return not atom.pinned and atom.size > 1 and atom not in graph.ordered


def _flat(sets: Iterable[set[Atom]]) -> list[Atom]:
    return sorted({a for s in sets for a in s}, key=lambda a: a.serial)


def _best(graph: Graph, together: list[Atom], options: Sequence[Atom]) -> Atom:
    """The option that leaves the fewest relations violated, the first of several."""
    best, fewest = options[0], None
    for option in options:
        trial = {a: max(1, a.size // 2) for a in (*together, option)}
        left = len(graph.sizes.violated(trial, limit=fewest))
        if fewest is None or left < fewest:
            best, fewest = option, left
    return best


def _uneven(graph: Graph, sizes: Mapping[Atom, int]) -> str:
    """Why an operator does not take these sizes; empty if all do."""
    for dim, step in graph.propagation.multiples:
        involved = any(atom in sizes for atom in atoms(dim))
        if involved and evaluate(dim, sizes) % step:
            return f"an operator takes only multiples of {step}"
    return ""


def _unit(graph: Graph, atom: Atom, together: tuple[Atom, ...]) -> tuple[int, str]:
    """The smallest step in which the atoms can change and all relations hold."""
    common = 0
    for a in together:
        common = gcd(common, a.size)
    step = atom.size // common
    failed = ""
    while step < atom.size:
        counts = {step, (atom.size // 2) // step * step, atom.size - step} - {0, atom.size}
        if not counts:
            break
        bad = ""
        for count in counts:
            sizes = {a: a.size * count // atom.size for a in together}
            violated = graph.sizes.violated(sizes)
            bad = violated[0][0] if violated else _uneven(graph, sizes)
            if bad:
                break
        if not bad:
            return step, ""
        failed = failed or bad
        step *= 2
        while step < atom.size and atom.size % step:
            step += atom.size // common
    return 0, failed
