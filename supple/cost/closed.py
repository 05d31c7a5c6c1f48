"""Costs as closed forms: priced from the sizes, without building or running anything.

The recorded run gives every cost as a sum of products of sizes. Each product depends on the
choices of a few sites only, so it is tabulated over those; a million configs are then priced by
adding table look-ups. The definitions are those of `supple.cost.count`, which counts the same
on a real network.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import product as combinations
from math import prod
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from supple.axes.base import RoundedInput, RoundedWeight, added, below, merge
from supple.cost.products import macs_of
from supple.errors import SettingError
from supple.graph.couple import propagate
from supple.graph.dims import Atom, Dim, Monomial, atoms, monomials, multiply
from supple.graph.record import Call, Recording, Ref, record
from supple.graph.rules import Propagation
from supple.plan import Plan
from supple.space import Site

if TYPE_CHECKING:
    from supple.network import Elastic

__all__ = ["COSTS", "ClosedCosts", "Run", "Term", "runs"]

COSTS = ("params", "macs", "weight_bytes", "activation_bytes")
_LARGEST_TABLE = 4096
_CHUNK = 16384
_NEVER = np.zeros(1, dtype=np.int64)

_Kind = TypeVar("_Kind")
_Choices = tuple[int, list[_Kind | None]]
Columns = tuple[int, ...]
Tables = dict[Columns, np.ndarray]


class ClosedCosts:
    """Prices encoded configs of one network.

    Args:
        net: The elastic network.

    Raises:
        OperatorError: An operator may multiply and has no rule.
    """

    def __init__(self, net: Elastic) -> None:
        self._counts = [len(site.choices) for site in net.space.sites]
        self._sums: dict[str, Tables] = {name: {} for name in COSTS[:3]}
        self._peaks: list[Tables] = []
        for run in runs(net):
            for name, terms in run.sums().items():
                for term in terms:
                    self._add(self._sums[name], term)
            for point in run.points():
                tables: Tables = {}
                for term in point:
                    self._add(tables, term)
                self._peaks.append(self._packed(tables))
        self._packed_sums = {name: self._packed(t) for name, t in self._sums.items()}

    def __call__(self, rows: np.ndarray, names: Sequence[str] = COSTS) -> dict[str, np.ndarray]:
        """Price configs.

        Args:
            rows: Encoded configs, shape (n, sites).
            names: Which costs.

        Returns:
            For each name an integer array of shape (n,).
        """
        columns = np.ascontiguousarray(np.asarray(rows).T.astype(np.int32))
        count = columns.shape[1]
        result = {name: np.empty(count, dtype=np.int64) for name in names}
        for start in range(0, count, _CHUNK):
            part = columns[:, start : start + _CHUNK]
            for name in names:
                result[name][start : start + _CHUNK] = self._price(name, part)
        return result

    def expected(self, probabilities: Sequence[Tensor], name: str = "macs") -> Tensor:
        """Gives the mean cost of configs whose choices are drawn independently, differentiably.

        Args:
            probabilities: For each site those of its choices, shape (choices,).
            name: Which cost; not `activation_bytes`, a maximum of sums.

        Returns:
            A scalar.

        Raises:
            SettingError: There is no such cost, or it is no sum.
        """
        if name not in self._packed_sums:
            raise SettingError(
                f"the mean can be computed of {', '.join(self._packed_sums)}, got {name!r}"
            )
        total = probabilities[0].new_zeros(())
        for sites, table in self._packed_sums[name].items():
            mean = torch.from_numpy(table.reshape([self._counts[s] for s in sites])).to(total)
            for site in reversed(sites):
                mean = mean @ probabilities[site]
            total = total + mean
        return total

    def _price(self, name: str, columns: np.ndarray) -> np.ndarray:
        if name != "activation_bytes":
            return self._total(self._packed_sums[name], columns)
        peaks = (self._total(tables, columns) for tables in self._peaks)
        return reduce(np.maximum, peaks, np.zeros(columns.shape[1], dtype=np.int64))

    def _total(self, tables: Tables, columns: np.ndarray) -> np.ndarray:
        total = np.zeros(columns.shape[1], dtype=np.int64)
        for sites, table in tables.items():
            if not sites:
                total += int(table)
                continue
            index = columns[sites[0]]
            for site in sites[1:]:
                index = index * self._counts[site] + columns[site]
            total += table.reshape(-1).take(index)
        return total

    def _add(self, tables: Tables, term: Term | Table) -> None:
        if isinstance(term, Table):
            known = tables.get(term.sites)
            tables[term.sites] = term.values if known is None else known + term.values
            return
        sites = tuple(sorted(term.factors))
        shape = tuple(self._counts[s] for s in sites)
        value = np.full(shape, term.coefficient, dtype=np.int64)
        for axis, site in enumerate(sites):
            value = value * term.factors[site].reshape(
                [-1 if i == axis else 1 for i in range(len(sites))]
            )
        tables[sites] = tables[sites] + value if sites in tables else value

    def _packed(self, tables: Tables) -> Tables:
        """Fewer, larger tables: one look-up costs about the same whatever it holds."""
        packed: Tables = {}
        for sites in sorted(tables, key=len, reverse=True):
            home = next((known for known in packed if self._fits(known, sites)), None)
            if home is None:
                packed[sites] = tables[sites]
                continue
            union = tuple(sorted({*home, *sites}))
            merged = self._spread(packed.pop(home), home, union)
            packed[union] = merged + self._spread(tables[sites], sites, union)
        return packed

    def _fits(self, known: Columns, sites: Columns) -> bool:
        union = {*known, *sites}
        return prod(self._counts[s] for s in union) <= _LARGEST_TABLE

    def _spread(self, table: np.ndarray, sites: Columns, union: Columns) -> np.ndarray:
        shape = [self._counts[s] if s in sites else 1 for s in union]
        full = [self._counts[s] for s in union]
        return np.broadcast_to(table.reshape(shape), full).astype(np.int64)


@dataclass(frozen=True)
class Term:
    """A number times one factor per site: `factors[column][choice index]`."""

    coefficient: int
    factors: dict[int, np.ndarray]


@dataclass(frozen=True)
class Table:
    """A number for every combination of choices of some sites.

    Args:
        sites: Their columns, ascending.
        values: Shape (choices of the first, choices of the second, ...).
    """

    sites: Columns
    values: np.ndarray


# --- the recorded runs that together cover every choice ---------------------------------------


def runs(net: Elastic) -> Iterable[Run]:
    """The recorded run, and one more for each choice that changes which operators run."""
    structural = [(i, site) for i, site in enumerate(net.space.sites) if _kind(net, site)]
    inputs = [(i, s) for i, s in structural if _kind(net, s) == "inputs"]
    modules = [(i, s) for i, s in structural if _kind(net, s) == "modules"]
    for chosen in combinations(*(range(len(site.choices)) for _, site in inputs)):
        fixed = {i: _only(site, k) for (i, site), k in zip(inputs, chosen, strict=True)}
        named = {s.name: s.choices[k] for (_, s), k in zip(inputs, chosen, strict=True)}
        yield Run(net, named, fixed, {path: _only_full(s) for path, s in _paths(net, modules)})
        for column, site in modules:
            for k, choice in enumerate(site.choices):
                if choice == site.full:
                    continue
                gates = {
                    path: (column, _only(site, k)) for path in _replaced(net, site, choice)
                }
                yield Run(net, {**named, site.name: choice}, fixed, gates, only=True)


def _kind(net: Elastic, site: Site) -> str:
    for choice in site.choices:
        patch = net.patch_of(site.name, choice)
        if patch.reaches_on:
            return "inputs"
        if patch.modules:
            return "modules"
    return ""


def _only(site: Site, index: int) -> np.ndarray:
    mask: np.ndarray = np.arange(len(site.choices)) == index
    return mask


def _only_full(site: tuple[int, Site]) -> tuple[int, np.ndarray]:
    column, found = site
    return column, np.array([choice == found.full for choice in found.choices])


def _replaced(net: Elastic, site: Site, choice: int) -> list[str]:
    return list(net.patch_of(site.name, choice).modules)


def _paths(
    net: Elastic, modules: list[tuple[int, Site]]
) -> Iterable[tuple[str, tuple[int, Site]]]:
    for column, site in modules:
        for path in {p for c in site.choices for p in _replaced(net, site, c)}:
            yield path, (column, site)


class Run:
    """One recorded run, its sizes expressed in choices.

    Args:
        net: The elastic network.
        choices: Choices of the sites that change which operators run.
        fixed: For a column, the choices (as a mask) for which this run holds.
        gates: For a module path, the column and choices for which what runs below it counts.
        only: Whether nothing but what lies below these paths counts.
    """

    def __init__(
        self,
        net: Elastic,
        choices: Mapping[str, int],
        fixed: Mapping[int, np.ndarray],
        gates: Mapping[str, tuple[int, np.ndarray]],
        only: bool = False,
    ) -> None:
        self._net = net
        self._fixed = {c: m.astype(np.int64) for c, m in fixed.items()}
        self._gates = {p: (c, m.astype(np.int64)) for p, (c, m) in gates.items()}
        self._only = only
        self._patch = merge(net.patch_of(name, choice) for name, choice in choices.items())
        whole = {s.name: s.full for s in net.space.sites if _kind(net, s) == "modules"}
        self._present = merge(net.patch_of(n, c) for n, c in {**whole, **choices}.items())
        self.recording, self._p = self._record()
        self._sizes = self._atom_sizes()
        self._blocks = self._block_masks()
        self._rounded, self._rounded_inputs = self._roundings()
        self._blocks_memo: dict[str, dict[int, np.ndarray]] = {}

    def _record(self) -> tuple[Recording, Propagation]:
        graph = self._net.graph
        if not self._patch.structural:
            return graph.recording, graph.propagation
        with Plan(graph, self._patch).applied(None):
            recording = record(
                graph.model,
                self._net.args,
                self._net.kwargs,
                standing_in={
                    path: module
                    for path, module in self._patch.modules.items()
                    if isinstance(module, nn.Module)
                },
            )
        return recording, propagate(recording)

    def _atom_sizes(self) -> dict[Atom, tuple[int, np.ndarray]]:
        """For every atom that a site shrinks: its column and its size by choice."""
        sizes: dict[Atom, tuple[int, np.ndarray]] = {}
        for column, site in enumerate(self._net.space.sites):
            patches = [self._net.patch_of(site.name, choice) for choice in site.choices]
            by_choice = [{**patch.sizes, **patch.resized} for patch in patches]
            for atom in {a for sizes_ in by_choice for a in sizes_}:
                row = np.array([s.get(atom, atom.size) for s in by_choice], dtype=np.int64)
                sizes[atom] = (column, row)
        if self._p is self._net.graph.propagation:
            return sizes
        return self._translated(sizes)

    def _translated(self, sizes: dict[Atom, Any]) -> dict[Atom, tuple[int, np.ndarray]]:
        """The same for the atoms of another run, matched through the parameters."""
        here: dict[Atom, tuple[int, np.ndarray]] = {}
        for name, dims in self._net.graph.tensors.items():
            ref = self.recording.tensors.get(name)
            for base, other in zip(dims, self._p.dims[ref.id] if ref else (), strict=False):
                pairs = list(zip(atoms(base), atoms(other), strict=False))
                if [a.size for a, _ in pairs] == [b.size for _, b in pairs]:
                    here.update({b: sizes[a] for a, b in pairs if a in sizes})
        return here

    def _block_masks(self) -> dict[str, list[tuple[int, np.ndarray]]]:
        """For every block that can be left out: columns and the choices that keep it."""
        masks: dict[str, list[tuple[int, np.ndarray]]] = defaultdict(list)
        for column, site in enumerate(self._net.space.sites):
            dropped = [self._net.patch_of(site.name, c).dropped for c in site.choices]
            for block in {b for gone in dropped for b in gone}:
                kept = np.array([block not in gone for gone in dropped], dtype=np.int64)
                masks[block].append((column, kept))
        return masks

    def _roundings(
        self,
    ) -> tuple[dict[str, _Choices[RoundedWeight]], dict[str, _Choices[RoundedInput]]]:
        """For weights and layers whose inputs are rounded: the column, and how by choice."""
        weights: dict[str, _Choices[RoundedWeight]] = {}
        inputs: dict[str, _Choices[RoundedInput]] = {}
        for column, site in enumerate(self._net.space.sites):
            patches = [self._net.patch_of(site.name, choice) for choice in site.choices]
            for name in {name for patch in patches for name in patch.rounded}:
                weights[name] = column, [patch.rounded.get(name) for patch in patches]
            for path in {path for patch in patches for path in patch.rounded_inputs}:
                inputs[path] = column, [patch.rounded_inputs.get(path) for patch in patches]
        return weights, inputs

    def gate(self, path: str) -> dict[int, np.ndarray] | None:
        """For which choices something at a module path exists; None: never in this run."""
        if path not in self._blocks_memo:
            counts = not self._only or any(below(path, gated) for gated in self._gates)
            self._blocks_memo[path] = self._born(path, path) if counts else {-1: _NEVER}
        found = self._blocks_memo[path]
        return None if -1 in found else found

    def _born(self, path: str, place: str) -> dict[int, np.ndarray]:
        """For which choices a tensor made at `path` is there when something runs at `place`.

        What leaves a module that others can replace is there whichever of them runs.
        """
        factors = dict(self._fixed)
        for gated, (column, mask) in self._gates.items():
            if below(path, gated) and below(place, gated):
                factors[column] = factors.get(column, 1) * mask
        for block, masks in self._blocks.items():
            if below(path, block):
                for column, mask in masks:
                    factors[column] = factors.get(column, 1) * mask
        return factors

    def of(self, ref: Ref) -> list[Dim]:
        """The dimensions of a tensor of this run."""
        return self._p.of(ref)

    def terms(
        self, dims: Iterable[Dim], factor: int, gates: Mapping[int, np.ndarray]
    ) -> list[Term]:
        """A product of sizes times a number, as terms."""
        start: dict[Monomial, int] = {(): factor}
        polynomial = reduce(multiply, (monomials(d, self._sizes) for d in dims), start)
        found: list[Term] = []
        for monomial, coefficient in polynomial.items():
            factors = dict(gates)
            for atom in monomial:
                if atom in self._sizes:
                    column, row = self._sizes[atom]
                    factors[column] = factors[column] * row if column in factors else row
                else:
                    coefficient *= atom.size
            found.append(Term(coefficient, factors))
        return found

    # --- sums --------------------------------------------------------------------------------

    def sums(self) -> Mapping[str, Sequence[Term | Table]]:
        """Terms of `params`, `macs` and `weight_bytes`."""
        macs = [term for call in self.recording.calls for term in self._macs(call)]
        params, weights = self._tensors()
        return {"params": params, "macs": macs, "weight_bytes": weights}

    def _macs(self, call: Call) -> list[Term]:
        gates = self.gate(call.module)
        dims = macs_of(call, self._p.of)
        return [] if gates is None or dims is None else self.terms(*dims, gates)

    def _tensors(self) -> tuple[list[Term], list[Term | Table]]:
        params: list[Term] = []
        weights: list[Term | Table] = self._input_bytes()
        parameters = dict(self._net.module.named_parameters())
        saved = set(self._net.module.state_dict())
        aliases: dict[str, list[str]] = defaultdict(list)
        for name, owner in self.recording.aliases.items():
            aliases[owner].append(name)
        for name, ref in self.recording.tensors.items():
            gates = self._shared_gate(aliases[name])
            if gates is None or added(name):
                continue
            dims = self._p.dims[ref.id]
            if name in self._rounded:
                column, each = self._rounded[name]
                as_it_is = np.array([one is None for one in each], dtype=np.int64)
                params.extend(self.terms(dims, 1, _times(gates, {column: as_it_is})))
                weights.append(self._packed_bytes(name, dims, ref.dtype.itemsize, gates))
                continue
            if name in parameters:
                params.extend(self.terms(dims, 1, gates))
            if not saved.isdisjoint(aliases[name]):
                weights.extend(self.terms(dims, ref.dtype.itemsize, gates))
        for path, module in self._patch.modules.items():
            gates = self.gate(path)
            if self._only and gates is not None and isinstance(module, nn.Module):
                own = list(module.parameters())
                params.append(Term(sum(t.numel() for t in own), gates))
                kept = module.state_dict().values()
                weights.append(Term(sum(t.numel() * t.element_size() for t in kept), gates))
        return params, weights

    def _input_bytes(self) -> list[Term | Table]:
        """What files hold for inputs that are rounded."""
        found: list[Term | Table] = []
        for path, (column, each) in self._rounded_inputs.items():
            gates = self.gate(path)
            if gates is not None:
                sizes = np.array([0 if one is None else one.nbytes for one in each])
                found.append(Term(1, _times(gates, {column: sizes})))
        return found

    def _packed_bytes(
        self,
        name: str,
        dims: Sequence[Dim],
        itemsize: int,
        gates: Mapping[int, np.ndarray],
    ) -> Table:
        """Bytes of a weight that is held as codes at some choices: they round up to bytes."""
        column, each = self._rounded[name]
        varying = {self._sizes[a][0] for dim in dims for a in atoms(dim) if a in self._sizes}
        sites = tuple(sorted({column, *varying, *gates}))
        spread = {site: _along(place, len(sites)) for place, site in enumerate(sites)}
        shape = [self._size(dim, spread) for dim in dims]
        whole = reduce(np.multiply, shape) * itemsize
        by_choice = [whole if one is None else one.nbytes(shape) for one in each]
        counts = [len(self._net.space.sites[site].choices) for site in sites]
        place = sites.index(column)
        others = [*counts[:place], 1, *counts[place + 1 :]]
        values = np.concatenate([np.broadcast_to(v, others) for v in by_choice], place)
        for site, mask in gates.items():
            values = values * mask.reshape(spread[site])
        return Table(sites, values)

    def _size(self, dim: Dim, spread: Mapping[int, Sequence[int]]) -> Any:
        """The size of a dimension, an array over the choices that it depends on."""
        total: Any = 0
        for monomial, coefficient in monomials(dim, self._sizes).items():
            value: Any = np.full([1] * len(spread), coefficient, dtype=np.int64)
            for atom in monomial:
                if atom in self._sizes:
                    column, row = self._sizes[atom]
                    value = value * row.reshape(spread[column])
                else:
                    value = value * atom.size
            total = total + value
        return total

    def _shared_gate(self, names: list[str]) -> dict[int, np.ndarray] | None:
        """The gate of a tensor with several names: it exists while one of its owners does."""
        owners = [name.rpartition(".")[0] for name in names]
        found = [self.gate(owner) for owner in owners if self._present.runs(owner)]
        gates = [g for g in found if g is not None]
        if not gates:
            return None
        if len(gates) == 1:
            return gates[0]
        if all(g.keys() == gates[0].keys() for g in gates) and len(gates[0]) <= 1 + len(
            self._fixed
        ):
            return {c: reduce(np.maximum, (g[c] for g in gates)) for c in gates[0]}
        return dict(self._fixed)

    # --- peaks -------------------------------------------------------------------------------

    def points(self) -> list[list[Term]]:
        """For each moment of the run that may hold the peak, the terms of the live bytes."""
        live = self._first_live()
        standing_in = self._block_outputs()
        moments: list[dict[int, Ref]] = [dict(live)] if live else []
        places = [""] if live else []
        owned = {ref.storage for ref in self.recording.tensors.values()}
        origin = dict.fromkeys(live, "")
        for call in self.recording.calls:
            grew = False
            fresh = {ref.storage for ref in call.inputs} if "lift_fresh" in call.name else set()
            known = {ref.storage for ref in call.inputs} - fresh
            for ref in call.outputs:
                if ref.storage not in live and ref.storage not in owned | known:
                    live[ref.storage], origin[ref.storage] = ref, call.module
                    grew = True
            if grew:
                moments.append(dict(live))
                places.append(call.module)
            for storage in call.freed:
                live.pop(storage, None)
        return self._undominated(moments, places, origin, standing_in)

    def _first_live(self) -> dict[int, Ref]:
        return {ref.storage: ref for ref in self.recording.inputs}

    def _block_outputs(self) -> dict[int, tuple[str, int | None]]:
        """Main outputs of blocks that can be left out: the block, and its input's memory.

        Where the block is left out, its input stands in for its output.
        """
        found: dict[int, tuple[str, int | None]] = {}
        for call in self.recording.modules:
            if call.path in self._blocks and call.outputs:
                main = call.outputs[0]
                alike = (ref.storage for ref in call.inputs if ref.shape == main.shape)
                found[main.storage] = (call.path, next(alike, None))
        return found

    def _undominated(
        self,
        moments: list[dict[int, Ref]],
        places: list[str],
        origin: dict[int, str],
        standing_in: dict[int, tuple[str, int | None]],
    ) -> list[list[Term]]:
        seen: list[tuple[frozenset[int], frozenset[tuple[int, bytes]]]] = []
        found: list[tuple[frozenset[Any], list[Term]]] = []
        for live, place in zip(moments, places, strict=True):
            key = frozenset(live)
            gates = self.gate(place)
            if gates is None:
                continue
            gate_key = frozenset((c, m.tobytes()) for c, m in gates.items())
            if any(key <= known and gate_key == g for known, g in seen):
                continue
            seen.append((key, gate_key))
            terms = [
                term
                for storage, ref in live.items()
                for term in self._bytes(storage, live, place, gates, origin, standing_in)
            ]
            found.append((key, terms))
        return _without_dominated([terms for _, terms in found])

    def _bytes(
        self,
        storage: int,
        live: Mapping[int, Ref],
        place: str,
        gates: Mapping[int, np.ndarray],
        origin: Mapping[int, str],
        standing_in: Mapping[int, tuple[str, int | None]],
    ) -> list[Term]:
        """Bytes of one of the tensors alive at a moment."""
        block, _ = standing_in.get(storage, ("", None))
        if block and not below(place, block):
            found = self._sized(live[storage], 1, gates)
            same = self._is_another(storage, live, gates, standing_in)
            return found + (self._sized(live[storage], -1, same) if same is not None else [])
        born = self._born(origin.get(storage, ""), place)
        return self._sized(live[storage], 1, _times(gates, born))

    def _sized(self, ref: Ref, sign: int, gates: Mapping[int, np.ndarray]) -> list[Term]:
        if prod(ref.shape) * ref.dtype.itemsize != ref.nbytes:
            return [Term(sign * ref.nbytes, dict(gates))]
        return self.terms(self._p.of(ref), sign * ref.dtype.itemsize, gates)

    def _is_another(
        self,
        storage: int,
        live: Mapping[int, Ref],
        gates: Mapping[int, np.ndarray],
        standing_in: Mapping[int, tuple[str, int | None]],
    ) -> dict[int, np.ndarray] | None:
        """The choices for which a block's output is a tensor that is alive anyway.

        That is where the block is left out, and all blocks before it back to a tensor that
        lives. None if there is no such tensor.
        """
        factors = dict(gates)
        at: int | None = storage
        while at is not None and at in standing_in:
            block, at = standing_in[at]
            masks = self._blocks[block]
            if len(masks) > 1:  # left out by either of several sites: not a product
                return None
            factors = _times(factors, {column: 1 - kept for column, kept in masks})
            if at in live:
                return factors
        return None


def _along(place: int, count: int) -> list[int]:
    """The shape that lays an array out along one of so many dimensions."""
    return [-1 if at == place else 1 for at in range(count)]


def _times(
    left: Mapping[int, np.ndarray], right: Mapping[int, np.ndarray]
) -> dict[int, np.ndarray]:
    """Factors of both, multiplied where they are of one site."""
    result = dict(left)
    for column, factor in right.items():
        result[column] = result[column] * factor if column in result else factor
    return result


def _without_dominated(points: list[list[Term]]) -> list[list[Term]]:
    """Drop moments at which no more is alive than at another one, whatever the sizes."""
    summed = []
    for terms in points:
        total: dict[Any, int] = defaultdict(int)
        for term in terms:
            key = frozenset((c, f.tobytes()) for c, f in term.factors.items())
            total[key] += term.coefficient
        summed.append(total)
    order = sorted(range(len(points)), key=lambda i: -sum(summed[i].values()))
    kept: list[int] = []
    for i in order:
        mine = summed[i]
        if not any(_at_least(summed[k], mine) for k in kept):
            kept.append(i)
    return [points[i] for i in sorted(kept)]


def _at_least(more: Mapping[Any, int], less: Mapping[Any, int]) -> bool:
    """Whether no coefficient is smaller; what is absent counts 0."""
    return all(more.get(term, 0) >= less.get(term, 0) for term in more.keys() | less.keys())
