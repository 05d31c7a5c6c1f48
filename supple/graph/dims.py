"""Dimension algebra: what a tensor dimension is made of, and which dimensions are the same.

A dimension is a tree over three forms:

* an `Atom`: `size` interchangeable positions; two dimensions that must shrink together share
  their atoms,
* a `Product`: what a reshape makes (`heads x head_dim`), row-major, outermost factor first,
* a `Sum`: what a concatenation, a split or a pad makes (`a + b`).

`unify` states that two dimensions are the same positions in the same order. It binds atoms to
finer structure where one side knows more; where two structures cannot be reconciled, the atoms
of both are pinned (their size can no longer vary) and the reason is kept.
"""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from functools import reduce
from math import prod

import numpy as np

__all__ = [
    "ONE",
    "Atom",
    "Dim",
    "Product",
    "Sum",
    "atoms",
    "evaluate",
    "keep_order",
    "monomials",
    "pin",
]

_serial = itertools.count()


class Dim:
    """A dimension of `size` positions."""

    __slots__ = ("size",)
    size: int


class Atom(Dim):
    """Interchangeable positions.

    Attributes:
        size: Number of positions in the full model.
        link: The finer structure this atom turned out to have, if any.
        pinned: Why the size cannot vary; empty while it can.
        ordered: Why each position has a meaning of its own, so that parameters which have this
            dimension cannot lose any; empty while positions are interchangeable. A dimension
            of activations only (a number of chosen experts) can vary all the same.
    """

    __slots__ = ("link", "ordered", "pinned", "serial")

    def __init__(self, size: int, pinned: str = "", ordered: str = "") -> None:
        self.size = size
        self.link: Dim | None = None
        self.pinned = pinned
        self.ordered = ordered
        self.serial = next(_serial)

    def __repr__(self) -> str:
        return f"{'=' if self.pinned else ''}a{self.serial}:{self.size}"


class Product(Dim):
    """A row-major grid of positions; use `product` to build one."""

    __slots__ = ("factors",)

    def __init__(self, factors: Sequence[Dim]) -> None:
        self.factors = tuple(factors)
        self.size = prod(factor.size for factor in factors)

    def __repr__(self) -> str:
        return "(" + " x ".join(map(repr, self.factors)) + ")" if self.factors else "1"


class Sum(Dim):
    """Parts laid one after the other; use `concatenation` to build one."""

    __slots__ = ("parts",)

    def __init__(self, parts: Sequence[Dim]) -> None:
        self.parts = tuple(parts)
        self.size = sum(part.size for part in parts)

    def __repr__(self) -> str:
        return "(" + " + ".join(map(repr, self.parts)) + ")"


ONE = Product(())


def find(dim: Dim) -> Dim:
    """The structure that `dim` is known to have by now, at its top level."""
    while isinstance(dim, Atom) and dim.link is not None:
        if isinstance(dim.link, Atom) and dim.link.link is not None:
            dim.link = dim.link.link
        dim = dim.link
    return dim


def product(dims: Iterable[Dim]) -> Dim:
    """Row-major product; nested products are flattened and factors of size 1 dropped."""
    flat: list[Dim] = []
    for dim in map(find, dims):
        if isinstance(dim, Product):
            flat.extend(factors_of(dim))
        elif dim.size != 1 or isinstance(dim, Sum):
            flat.append(dim)
    flat = [dim for dim in flat if dim.size != 1]
    return flat[0] if len(flat) == 1 else Product(flat) if flat else ONE


def concatenation(dims: Iterable[Dim]) -> Dim:
    """Parts one after the other; nested sums are flattened and empty parts dropped."""
    flat: list[Dim] = []
    for dim in map(find, dims):
        flat.extend(parts_of(dim))
    flat = [dim for dim in flat if dim.size]
    return flat[0] if len(flat) == 1 else Sum(flat)


def factors_of(dim: Dim) -> list[Dim]:
    dim = find(dim)
    if isinstance(dim, Product):
        return [leaf for factor in dim.factors for leaf in factors_of(factor)]
    return [dim]


def parts_of(dim: Dim) -> list[Dim]:
    dim = find(dim)
    if isinstance(dim, Sum):
        return [leaf for part in dim.parts for leaf in parts_of(part)]
    return [dim]


def atoms(dim: Dim) -> Iterator[Atom]:
    """The unbound atoms of `dim`, outermost and leftmost first, repetitions included."""
    dim = find(dim)
    if isinstance(dim, Atom):
        yield dim
    elif isinstance(dim, Product):
        for factor in dim.factors:
            yield from atoms(factor)
    elif isinstance(dim, Sum):
        for part in dim.parts:
            yield from atoms(part)


def pin(dim: Dim, reason: str) -> None:
    """Fix the size of every atom in `dim`; the first reason given stays."""
    for atom in atoms(dim):
        atom.pinned = atom.pinned or reason


def keep_order(dim: Dim, reason: str) -> None:
    """Say that the positions of `dim` have a meaning of their own; the first reason stays."""
    for atom in atoms(dim):
        atom.ordered = atom.ordered or reason


def same(a: Dim, b: Dim) -> bool:
    """Whether two dimensions are known to be the same positions."""
    a, b = find(a), find(b)
    if a is b or a.size == b.size == 1:
        return True
    if isinstance(a, Product) and isinstance(b, Product):
        return _all_same(factors_of(a), factors_of(b))
    if isinstance(a, Sum) and isinstance(b, Sum):
        return _all_same(parts_of(a), parts_of(b))
    return False


def _all_same(left: Sequence[Dim], right: Sequence[Dim]) -> bool:
    return len(left) == len(right) and all(map(same, left, right))


class ConflictError(Exception):
    """Two structures that cannot both hold."""


def unify(a: Dim, b: Dim, why: str = "") -> None:
    """State that `a` and `b` are the same positions in the same order.

    Args:
        a: One dimension.
        b: Another of the same size. Sizes that differ are a broadcast if one of them is 1
            (nothing is stated then).
        why: What forces it, for the reason given when the structures cannot be reconciled.
    """
    if 1 in (a.size, b.size):
        return
    try:
        _unify(a, b)
    except ConflictError:
        reason = f"two incompatible inner structures meet{' in ' + why if why else ''}"
        pin(a, reason)
        pin(b, reason)


def _unify(a: Dim, b: Dim) -> None:
    a, b = find(a), find(b)
    if a is b or a.size == b.size == 1:
        return
    if a.size != b.size:
        raise ConflictError
    if isinstance(a, Atom) and isinstance(b, Atom):
        young, old = (a, b) if a.serial > b.serial else (b, a)
        _bind(young, old)
    elif isinstance(a, Atom):
        _bind(a, b)
    elif isinstance(b, Atom):
        _bind(b, a)
    elif isinstance(a, Product) and isinstance(b, Product):
        _unify_products(factors_of(a), factors_of(b))
    elif isinstance(a, Sum) and isinstance(b, Sum):
        _unify_sums(parts_of(a), parts_of(b))
    elif isinstance(a, Sum):
        _unify_mixed(parts_of(a), factors_of(b))
    else:
        _unify_mixed(parts_of(b), factors_of(a))


def _bind(atom: Atom, dim: Dim) -> None:
    if any(inner is atom for inner in atoms(dim)):
        raise ConflictError
    atom.link = dim
    if atom.pinned:
        pin(dim, atom.pinned)
    if atom.ordered:
        keep_order(dim, atom.ordered)


def _unify_products(left: list[Dim], right: list[Dim]) -> None:
    """Match factors from the innermost outwards, splitting the larger where needed."""
    while left and right:
        p, q = find(left.pop()), find(right.pop())
        if isinstance(p, Product) or isinstance(q, Product):
            left.extend(factors_of(p))
            right.extend(factors_of(q))
            continue
        if p.size == q.size:
            _unify(p, q)
        elif p.size > q.size:
            left.append(_outer(p, q))
        else:
            right.append(_outer(q, p))


def _outer(dim: Dim, inner: Dim) -> Dim:
    """The outer factor that `dim` has once `inner` is known to be its innermost one."""
    if dim.size % inner.size:
        raise ConflictError
    if isinstance(dim, Atom):
        outer = Atom(dim.size // inner.size, dim.pinned, dim.ordered)
        _bind(dim, product((outer, inner)))
        return outer
    outers, block = list[Dim](), list[Dim]()
    for part in parts_of(dim):
        block.append(part)
        times, rest = divmod(sum(piece.size for piece in block), inner.size)
        if rest:
            continue
        if times > 1 and len(block) > 1:
            raise ConflictError
        outers.append(Atom(times) if times > 1 else ONE)
        _unify(concatenation(block), product((outers[-1], inner)))
        block = []
    if block:
        raise ConflictError
    return concatenation(outers)


def _unify_sums(left: list[Dim], right: list[Dim]) -> None:
    """Match parts from the first onwards, splitting the larger where needed."""
    left.reverse()
    right.reverse()
    while left and right:
        p, q = find(left.pop()), find(right.pop())
        if isinstance(p, Sum) or isinstance(q, Sum):
            left.extend(reversed(parts_of(p)))
            right.extend(reversed(parts_of(q)))
            continue
        if p.size == q.size:
            _unify(p, q)
        elif p.size > q.size:
            head, tail = split(p, q.size)
            left.append(tail)
            _unify(head, q)
        else:
            head, tail = split(q, p.size)
            right.append(tail)
            _unify(head, p)


def split(dim: Dim, at: int) -> tuple[Dim, Dim]:
    """Cut `dim` into its first `at` positions and the rest.

    Raises:
        ConflictError: The cut would go through the inner factor of a product.
    """
    dim = find(dim)
    if at == 0:
        return Sum(()), dim
    if at == dim.size:
        return dim, Sum(())
    if isinstance(dim, Atom):
        sizes = (at, dim.size - at)
        head, tail = (Atom(n, dim.pinned, dim.ordered) if n > 1 else ONE for n in sizes)
        _bind(dim, concatenation((head, tail)))
        return head, tail
    if isinstance(dim, Product):
        outer, *inner = factors_of(dim)
        if at % prod(d.size for d in inner):
            raise ConflictError
        first, second = split(outer, at // prod(d.size for d in inner))
        return product((first, *inner)), product((second, *inner))
    heads: list[Dim] = []
    pieces = parts_of(dim)
    while pieces and pieces[0].size <= at:
        heads.append(pieces.pop(0))
        at -= heads[-1].size
    if at:
        first, second = split(pieces.pop(0), at)
        heads.append(first)
        pieces.insert(0, second)
    return concatenation(heads), concatenation(pieces)


def _unify_mixed(parts: list[Dim], factors: list[Dim]) -> None:
    """A sum meets a product: the cuts must fall between the product's outermost rows."""
    outer, inner = factors[0], factors[1:]
    row = prod(d.size for d in inner)
    offset, block = 0, list[Dim]()
    for part in parts:
        block.append(part)
        offset += part.size
        if offset % row:
            continue
        rows = sum(d.size for d in block) // row
        piece, rest = split(outer, rows) if rows < outer.size else (outer, ONE)
        if rows == 1:
            _unify(concatenation(block), product(inner))
            if outer.size == 1:
                rest = ONE
        elif len(block) == 1:
            _unify(block[0], product((piece, *inner)))
        else:
            raise ConflictError
        outer, block = rest, []
    if block:
        raise ConflictError


def evaluate(dim: Dim, sizes: Mapping[Atom, int]) -> int:
    """The size of `dim` when the atoms in `sizes` have those sizes and the rest are full."""
    dim = find(dim)
    if isinstance(dim, Atom):
        return sizes.get(dim, dim.size)
    if isinstance(dim, Product):
        return prod(evaluate(factor, sizes) for factor in dim.factors)
    assert isinstance(dim, Sum)
    return sum(evaluate(part, sizes) for part in dim.parts)


def positions(dim: Dim, order: Mapping[Atom, np.ndarray]) -> np.ndarray:
    """The positions of `dim` that remain, in order, when each atom keeps those in `order`.

    Args:
        dim: The dimension.
        order: For an atom, the positions of it that are kept, in the wanted order; an atom
            that is absent is kept whole.

    Returns:
        Integer array of positions in `[0, dim.size)`.
    """
    dim = find(dim)
    if isinstance(dim, Atom):
        kept = order.get(dim)
        return np.arange(dim.size) if kept is None else kept
    if isinstance(dim, Product):
        start = np.zeros(1, dtype=np.int64)
        return reduce(
            lambda done, f: (done[:, None] * f.size + positions(f, order)[None, :]).reshape(-1),
            dim.factors,
            start,
        )
    assert isinstance(dim, Sum)
    offsets = np.cumsum([0, *(part.size for part in dim.parts)])
    pieces = [positions(p, order) + o for p, o in zip(dim.parts, offsets, strict=False)]
    return np.concatenate(pieces)


Monomial = tuple[Atom, ...]


def monomials(dim: Dim, varying: Container[Atom] = ()) -> dict[Monomial, int]:
    """The size of `dim` as a polynomial: products of atoms to their coefficients.

    Pinned atoms are numbers, but for those in `varying`.
    """
    dim = find(dim)
    if isinstance(dim, Atom):
        return {(): dim.size} if dim.pinned and dim not in varying else {(dim,): 1}
    if isinstance(dim, Product):
        factors = (monomials(factor, varying) for factor in dim.factors)
        return reduce(multiply, factors, {(): 1})
    assert isinstance(dim, Sum)
    total: dict[Monomial, int] = {}
    for part in dim.parts:
        for key, coefficient in monomials(part, varying).items():
            total[key] = total.get(key, 0) + coefficient
    return total


def multiply(a: Mapping[Monomial, int], b: Mapping[Monomial, int]) -> dict[Monomial, int]:
    """The product of two polynomials."""
    result: dict[Monomial, int] = {}
    for left, x in a.items():
        for right, y in b.items():
            key = tuple(sorted(left + right, key=lambda atom: atom.serial))
            result[key] = result.get(key, 0) + x * y
    return result
