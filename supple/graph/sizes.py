"""The integers of a sub-network: which attribute must have which value, and what cannot hold.

The code of a model computes sizes from integers stored on modules and from sizes of tensors.
Each such computation is a relation `size of a dimension == expression`. An attribute that gives
a size directly is defined by it; every other relation is a check that a choice of sizes must
pass.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

from supple.graph.dims import (
    Atom,
    Dim,
    atoms,
    concatenation,
    evaluate,
    factors_of,
    find,
    parts_of,
    product,
    same,
)
from supple.graph.integers import (
    ARITHMETIC,
    AttributeKey,
    Expression,
    Operation,
    Size,
    leaves,
)
from supple.graph.rules import Propagation, Relation

__all__ = ["Sizes"]


def _steps(expression: Expression) -> int:
    """How many steps of arithmetic an expression has."""
    if not isinstance(expression, Operation):
        return 0
    return 1 + _steps(expression.left) + _steps(expression.right)


Check = tuple[Expression, Expression, str]


class Sizes:
    """What the recorded code says about sizes.

    Args:
        propagation: The finished propagation.
        equalities: Pairs of expressions that the code compared and found equal.
        values: Value of every integer attribute in the full model that occurs in them.

    Attributes:
        defined: For each attribute that gives a size, the dimension whose size it is.
        checks: For each atom, the relations that must hold when its size changes.
    """

    def __init__(
        self, propagation: Propagation, equalities: Iterable[tuple[Expression, Expression]]
    ) -> None:
        self._dims = propagation.dims
        self.defined: dict[AttributeKey, list[Dim]] = defaultdict(list)
        self.checks: dict[Atom, list[Check]] = defaultdict(list)
        self._values: dict[AttributeKey, int] = {}
        self._seen: set[object] = set()
        checks: list[tuple[Dim | Expression, Expression, str]] = []
        given = (relation.expression for relation in propagation.relations)
        self._direct = {key for key in given if isinstance(key, AttributeKey)}
        for relation in sorted(propagation.relations, key=lambda r: _steps(r.expression)):
            self._sort_in_parts(relation, checks)
        for left, right in equalities:
            self._sort_in_equality(left, right, checks)
        for first, second, where in checks:
            self._index(first, second, where)
        for key, dims in self.defined.items():
            for other in dims[1:]:
                self._index(dims[0], other, f"the attribute {key}")

    def _sort_in_parts(
        self, relation: Relation, checks: list[tuple[Dim | Expression, Expression, str]]
    ) -> None:
        parts = self._factors(relation) or self._summands(relation)
        for part in parts:
            self._sort_in_parts(part, checks)
        if not parts:
            self._sort_in(relation, checks)

    def _summands(self, relation: Relation) -> list[Relation]:
        """A size computed as a sum with an unknown attribute in it, in parts."""
        expression = relation.expression
        if not isinstance(expression, Operation) or expression.symbol != "+":
            return []
        if all(self._known(leaf) for leaf in leaves(expression)):
            return []
        size = self.value(expression.left, {})
        rest, first = parts_of(relation.dim), list[Dim]()
        while rest and size is not None and sum(part.size for part in first) < size:
            first.append(rest.pop(0))
        if not rest or sum(part.size for part in first) != size:
            return []
        return [
            Relation(concatenation(first), expression.left, relation.where),
            Relation(concatenation(rest), expression.right, relation.where),
        ]

    def _known(self, leaf: AttributeKey | Size) -> bool:
        return isinstance(leaf, Size) or leaf in self._direct or leaf in self.defined

    def _factors(self, relation: Relation) -> list[Relation]:
        """A size computed as a product with an attribute that nothing else defines, in factors.

        `config.heads * self.head_dim` defines the heads, where it is the size of a grid with
        the head's width as its inner side.
        """
        expression = relation.expression
        if not isinstance(expression, Operation) or expression.symbol != "*":
            return []
        left, right = expression.left, expression.right
        if not isinstance(left, AttributeKey) or left in self._direct:
            left, right = right, left
        if not isinstance(left, AttributeKey) or left in self._direct:
            return []
        size = self.value(right, {})
        outer, inner = factors_of(relation.dim), list[Dim]()
        while outer and size is not None and product(inner).size < size:
            inner.insert(0, outer.pop())
        if not outer or product(inner).size != size:
            return []
        return [
            Relation(product(outer), left, relation.where),
            Relation(product(inner), right, relation.where),
        ]

    def _sort_in(
        self, relation: Relation, checks: list[tuple[Dim | Expression, Expression, str]]
    ) -> None:
        expression = relation.expression
        if isinstance(expression, AttributeKey):
            known = self.defined[expression]
            if not any(same(relation.dim, dim) for dim in known):
                known.append(relation.dim)
        elif not (isinstance(expression, Size) and same(self._dim(expression), relation.dim)):
            checks.append((relation.dim, expression, relation.where))

    def _sort_in_equality(
        self,
        left: Expression,
        right: Expression,
        checks: list[tuple[Dim | Expression, Expression, str]],
    ) -> None:
        for a, b in ((left, right), (right, left)):
            if isinstance(a, AttributeKey) and isinstance(b, Size):
                if not any(same(self._dim(b), dim) for dim in self.defined[a]):
                    self.defined[a].append(self._dim(b))
                return
        sizes = isinstance(left, Size) and isinstance(right, Size)
        if not (sizes and same(self._dim(left), self._dim(right))):  # type: ignore[arg-type]
            checks.append((left, right, "a comparison in the code"))

    def _dim(self, size: Size) -> Dim:
        return self._dims[size.tensor][size.dim]

    def _index(self, left: Dim | Expression, right: Dim | Expression, where: str) -> None:
        key = (self._key(left), self._key(right))
        if key in self._seen:
            return
        self._seen.add(key)
        involved = {atom for side in (left, right) for atom in self._atoms(side)}
        for atom in involved:
            self.checks[atom].append((left, right, where))  # type: ignore[arg-type]

    def _key(self, side: Dim | Expression) -> object:
        """The same for sides that have the same value at all sizes (though not only then)."""
        if isinstance(side, Dim):
            return id(find(side))
        if isinstance(side, Operation):
            return side.symbol, self._key(side.left), self._key(side.right)
        if isinstance(side, Size) and side.tensor in self._dims:
            return id(find(self._dim(side)))
        return side

    def _atoms(self, side: Dim | Expression) -> Iterator[Atom]:
        if isinstance(side, Dim):
            yield from atoms(side)
            return
        for leaf in leaves(side):
            if isinstance(leaf, Size):
                if leaf.tensor in self._dims:
                    yield from atoms(self._dim(leaf))
            elif leaf in self.defined:
                yield from atoms(self.defined[leaf][0])

    def value(self, side: Dim | Expression, sizes: Mapping[Atom, int]) -> int | None:
        """The number that an expression has at the given sizes; None if it cannot be known."""
        if isinstance(side, Dim):
            return evaluate(side, sizes)
        if isinstance(side, int):
            return int(side)
        if isinstance(side, Size):
            return evaluate(self._dim(side), sizes) if side.tensor in self._dims else None
        if isinstance(side, AttributeKey):
            if side in self.defined:
                return evaluate(self.defined[side][0], sizes)
            return self._values.get(side)
        assert isinstance(side, Operation)
        left, right = self.value(side.left, sizes), self.value(side.right, sizes)
        if left is None or right is None or (right == 0 and side.symbol in ("//", "%")):
            return None
        return ARITHMETIC[side.symbol](left, right)

    def learn_values(self, values: Mapping[AttributeKey, int]) -> None:
        """Give the values of attributes that no size defines."""
        self._values.update(values)

    def violated(
        self, sizes: Mapping[Atom, int], limit: int | None = None
    ) -> list[tuple[str, set[Atom]]]:
        """Relations that do not hold at these sizes: a description and the atoms involved.

        Args:
            sizes: Size of every atom that changes.
            limit: Stop looking when more than this many are found.
        """
        found: list[tuple[str, set[Atom]]] = []
        seen: set[int] = set()
        for atom in sizes:
            for check in self.checks.get(atom, ()):
                if id(check) in seen:
                    continue
                seen.add(id(check))
                left, right = (self.value(side, sizes) for side in check[:2])
                if left is None or left != right:
                    involved = {a for side in check[:2] for a in self._atoms(side)}
                    found.append((self._describe(check), involved))
                    if limit is not None and len(found) > limit:
                        return found
        return found

    def _describe(self, check: Check) -> str:
        _, right, where = check
        place = f" at {where}" if where and " " not in where else ""
        if where.startswith(("the attribute", "a comparison")):
            return f"{where} ties it to another size"
        if isinstance(right, int):
            return f"the code fixes a size at {int(right)}{place}"
        return f"the code computes a size as {self.text(right)}{place}"

    def text(self, expression: Expression) -> str:
        """An expression as a reader would write it."""
        if isinstance(expression, Operation):
            left, right = self.text(expression.left), self.text(expression.right)
            return f"{left} {expression.symbol} {right}"
        if isinstance(expression, Size):
            return str(self._dim(expression).size) if expression.tensor in self._dims else "?"
        return str(expression)

    def attributes(self, sizes: Mapping[Atom, int]) -> dict[AttributeKey, int]:
        """Attribute values that differ from the full model's at these sizes."""
        changed: dict[AttributeKey, int] = {}
        for key, dims in self.defined.items():
            value = evaluate(dims[0], sizes)
            if value != dims[0].size:
                changed[key] = value
        return changed
