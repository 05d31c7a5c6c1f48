"""The dimension algebra, on cases computed by hand and against labels of single positions."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supple.graph.dims import (
    ONE,
    Atom,
    ConflictError,
    Dim,
    Product,
    Sum,
    atoms,
    concatenation,
    evaluate,
    find,
    monomials,
    multiply,
    parts_of,
    pin,
    positions,
    product,
    same,
    split,
    unify,
)


def index(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def pinned(dim: Dim) -> list[bool]:
    return [bool(atom.pinned) for atom in atoms(dim)]


# --- by hand -----------------------------------------------------------------------------


def test_product_drops_ones_and_flattens() -> None:
    a, b, c = Atom(2), Atom(3), Atom(5)
    assert product([a, ONE, Atom(1)]) is a
    assert product([]) is ONE
    nested = product([a, product([b, c])])
    assert isinstance(nested, Product)
    assert nested.factors == (a, b, c)
    assert nested.size == 30


def test_concatenation_drops_empty_parts_and_flattens() -> None:
    a, b = Atom(2), Atom(3)
    assert concatenation([a, Sum(())]) is a
    whole = concatenation([a, concatenation([b, a])])
    assert isinstance(whole, Sum)
    assert whole.parts == (a, b, a)
    assert whole.size == 7


def test_heads_keep_their_rows() -> None:
    """Of 4 heads of 3 rows, heads 0 and 2 are rows 0-2 and 6-8."""
    heads, width = Atom(4), Atom(3)
    dim = product([heads, width])
    assert positions(dim, {heads: index(0, 2)}).tolist() == [0, 1, 2, 6, 7, 8]
    assert positions(dim, {width: index(0)}).tolist() == [0, 3, 6, 9]
    kept = positions(dim, {heads: index(1), width: index(0, 2)})
    assert kept.tolist() == [3, 5]


def test_the_second_branch_of_a_concatenation_starts_after_the_first() -> None:
    a, b = Atom(3), Atom(4)
    dim = concatenation([a, b])
    assert positions(dim, {b: index(0, 1)}).tolist() == [0, 1, 2, 3, 4]
    assert positions(dim, {a: index(2), b: index(3)}).tolist() == [2, 6]


def test_a_permuted_atom_moves_whole_inner_blocks() -> None:
    outer, inner = Atom(3), Atom(2)
    dim = product([outer, inner])
    assert positions(dim, {outer: index(2, 0, 1)}).tolist() == [4, 5, 0, 1, 2, 3]


def test_an_atom_that_occurs_twice_moves_in_both_places() -> None:
    a = Atom(2)
    assert positions(concatenation([a, a]), {a: index(1)}).tolist() == [1, 3]
    assert positions(product([a, a]), {a: index(1)}).tolist() == [3]


def test_fused_qkv_of_equal_parts_becomes_a_sum_of_products() -> None:
    """qkv: one dimension of 24 is cut into three of 8, each seen as 2 heads of 4."""
    fused, q, k, v = Atom(24), Atom(8), Atom(8), Atom(8)
    unify(fused, concatenation([q, k, v]))
    heads, width = Atom(2), Atom(4)
    for part in (q, k):
        unify(part, product([heads, width]))
    value_width = Atom(4)
    unify(v, product([heads, value_width]))
    assert evaluate(fused, {heads: 1}) == 12
    assert evaluate(fused, {heads: 1, width: 2}) == 8
    kept = positions(fused, {heads: index(1)}).tolist()
    assert kept == [4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23]


def test_fused_qkv_as_a_product_meets_it_as_a_sum() -> None:
    """timm reshapes 24 to 3 x 2 x 4; GPT-2 cuts it into three: the same rows of each head."""
    three, heads, width = Atom(3), Atom(2), Atom(4)
    q, k, v = Atom(8), Atom(8), Atom(8)
    left, right = product([three, heads, width]), concatenation([q, k, v])
    unify(left, right)
    assert same(q, k)
    assert same(k, v)
    assert same(q, product([heads, width]))
    assert evaluate(right, {heads: 1}) == 12
    assert not any(pinned(product([heads, width])))


def test_rotary_halves_cut_every_head_in_the_middle() -> None:
    """(heads x 6) whose inner 6 is cut in two: the halves lie inside each head."""
    heads, width = Atom(2), Atom(6)
    dim = product([heads, width])
    first, second = split(width, 3)
    unify(first, second)
    assert same(first, second)
    assert positions(dim, {first: index(0, 1)}).tolist() == [0, 1, 3, 4, 6, 7, 9, 10]  # type: ignore[dict-item]
    assert evaluate(dim, {first: 1}) == 4  # type: ignore[dict-item]


def test_grouped_channels_couple_groups_but_not_their_insides() -> None:
    """A convolution with 2 groups: 6 inputs as 2 x 3, 8 outputs as 2 x 4."""
    inputs, outputs = Atom(6), Atom(8)
    groups, inner_in, inner_out = Atom(2), Atom(3), Atom(4)
    unify(inputs, product([groups, inner_in]))
    unify(outputs, product([groups, inner_out]))
    assert evaluate(inputs, {groups: 1}) == 3
    assert evaluate(outputs, {groups: 1}) == 4
    assert positions(inputs, {inner_in: index(0)}).tolist() == [0, 3]
    assert evaluate(outputs, {inner_in: 1}) == 8


def test_two_groupings_that_share_a_factor_refine_each_other() -> None:
    """2 x 6 and 4 x 3 meet as 2 x 2 x 3."""
    two, six, four, three = Atom(2), Atom(6), Atom(4), Atom(3)
    whole = product([two, six])
    unify(whole, product([four, three]))
    assert same(whole, product([two, *_inner(six)]))
    assert [atom.size for atom in atoms(whole)] == [2, 2, 3]
    assert [atom.size for atom in atoms(four)] == [2, 2]
    assert not any(pinned(whole))


def _inner(dim: Dim) -> tuple[Dim, ...]:
    found = find(dim)
    assert isinstance(found, Product)
    return found.factors


def test_structures_that_cannot_meet_are_pinned_with_the_reason() -> None:
    """12 as 4 x 3 and as 3 x 4 share no common refinement."""
    a, b, c, d = Atom(4), Atom(3), Atom(3), Atom(4)
    unify(product([a, b]), product([c, d]), "a test")
    for atom in (a, b, c, d):
        assert all(pinned(atom))
        assert "a test" in next(atoms(atom)).pinned


def test_a_cut_through_the_inner_factor_is_pinned() -> None:
    """2 x 6 against 4 + 8: the cut at 4 goes through the first row of 6."""
    two, six, left, right = Atom(2), Atom(6), Atom(4), Atom(8)
    unify(product([two, six]), concatenation([left, right]))
    assert all(pinned(product([two, six])))
    assert all(pinned(left))
    assert all(pinned(right))


def test_a_cut_between_rows_splits_the_outer_factor() -> None:
    """6 x 2 against 4 + 8: the cut falls after 2 rows."""
    six, two, left, right = Atom(6), Atom(2), Atom(4), Atom(8)
    unify(product([six, two]), concatenation([left, right]))
    assert [part.size for part in parts_of(six)] == [2, 4]
    assert not any(pinned(concatenation([left, right])))
    first, _ = parts_of(six)
    assert evaluate(left, {first: 1}) == 2  # type: ignore[dict-item]


def test_the_cycle_of_a_dimension_with_a_part_of_itself_is_pinned() -> None:
    a = Atom(4)
    half = Atom(2)
    unify(a, product([Atom(2), half]))
    whole = Atom(8)
    unify(whole, concatenation([a, whole_part := Atom(4)]))
    unify(whole_part, a)
    assert same(whole_part, a)
    assert not any(pinned(whole))


def test_sizes_that_differ_are_pinned_and_ones_are_broadcast() -> None:
    a, b = Atom(3), Atom(5)
    unify(a, b, "an addition")
    assert a.pinned
    assert b.pinned
    c = Atom(7)
    unify(c, ONE)
    unify(Atom(1), c)
    assert not c.pinned


def test_pinning_travels_along_equalities() -> None:
    a, b, c = Atom(6), Atom(6), Atom(6)
    pin(a, "first")
    unify(a, b)
    unify(c, b)
    assert next(atoms(c)).pinned == "first"
    pin(c, "second")
    assert next(atoms(b)).pinned == "first"


def test_pinning_travels_into_finer_structure() -> None:
    a = Atom(6)
    pin(a, "why")
    outer, inner = Atom(2), Atom(3)
    unify(a, product([outer, inner]))
    assert (outer.pinned, inner.pinned) == ("why", "why")
    head, tail = split(Atom(5, "cut"), 2)
    assert pinned(head) == pinned(tail) == [True]


def test_split_keeps_the_positions() -> None:
    outer, inner = Atom(4), Atom(3)
    dim = product([outer, inner])
    head, tail = split(dim, 9)
    assert (head.size, tail.size) == (9, 3)
    assert labels(dim) == labels(concatenation([head, tail]))
    with pytest.raises(ConflictError):
        split(product([Atom(4), Atom(3)]), 4)
    whole = Atom(5)
    assert split(whole, 5)[0] is whole
    assert split(whole, 0)[1] is whole


def test_monomials_by_hand() -> None:
    a, b = Atom(2), Atom(3)
    fixed = Atom(4, "fixed")
    dim = concatenation([product([a, b]), product([fixed, a]), fixed, ONE])
    assert monomials(dim) == {(a, b): 1, (a,): 4, (): 5}
    assert monomials(product([a, a])) == {(a, a): 1}
    assert multiply({(a,): 2, (): 1}, {(b,): 3}) == {(a, b): 6, (b,): 3}


def test_evaluate_by_hand() -> None:
    a, b = Atom(4), Atom(3)
    dim = concatenation([product([a, b]), b])
    assert evaluate(dim, {}) == 15
    assert evaluate(dim, {a: 1}) == 6
    assert evaluate(dim, {a: 2, b: 1}) == 3


# --- against labels of single positions --------------------------------------------------

Label = tuple[tuple[int, int], ...]


def labels(dim: Dim) -> list[Label]:
    """For every position of a dimension, the atoms' positions that make it up, naively."""
    dim = find(dim)
    if isinstance(dim, Atom):
        return [((dim.serial, i),) for i in range(dim.size)]
    if isinstance(dim, Product):
        inner = [labels(factor) for factor in dim.factors]
        return [tuple(itertools.chain(*row)) for row in itertools.product(*inner)]
    assert isinstance(dim, Sum)
    return [label for part in dim.parts for label in labels(part)]


@st.composite
def trees(draw: st.DrawFn, pool: list[Atom], depth: int = 3) -> Dim:
    """A random tree over a few atoms, some of them used several times."""
    kind = draw(st.sampled_from(["atom", "product", "sum"] if depth else ["atom"]))
    if kind == "atom":
        return draw(st.sampled_from(pool))
    children = draw(st.lists(trees(pool, depth - 1), min_size=2, max_size=3))
    dim = product(children) if kind == "product" else concatenation(children)
    return dim if dim.size <= 200 else draw(st.sampled_from(pool))


def new_pool() -> list[Atom]:
    return [Atom(n) for n in (1, 2, 3, 3, 5)]


@st.composite
def tree_and_kept(draw: st.DrawFn) -> tuple[Dim, dict[Atom, np.ndarray]]:
    pool = new_pool()
    dim = draw(trees(pool))
    kept = {}
    for atom in pool:
        if draw(st.booleans()):
            chosen = draw(st.sets(st.integers(0, atom.size - 1), min_size=1))
            kept[atom] = np.array(sorted(chosen), dtype=np.int64)
    return dim, kept


@given(tree_and_kept())
@settings(max_examples=80, deadline=None)
def test_positions_are_those_whose_every_label_is_kept(
    case: tuple[Dim, dict[Atom, np.ndarray]],
) -> None:
    dim, kept = case
    allowed = {atom.serial: set(order.tolist()) for atom, order in kept.items()}
    expected = [
        position
        for position, label in enumerate(labels(dim))
        if all(i in allowed.get(serial, {i}) for serial, i in label)
    ]
    assert positions(dim, kept).tolist() == expected
    assert evaluate(dim, {a: len(order) for a, order in kept.items()}) == len(expected)


@given(tree_and_kept(), st.randoms(use_true_random=False))
@settings(max_examples=50, deadline=None)
def test_an_order_of_atoms_is_an_order_of_positions(
    case: tuple[Dim, dict[Atom, np.ndarray]], random: object
) -> None:
    """The k-th position in the new order carries the k-th label, its indices reordered."""
    dim, kept = case
    order = {}
    for atom in kept:
        shuffled = list(range(atom.size))
        random.shuffle(shuffled)  # type: ignore[attr-defined]
        order[atom] = np.array(shuffled)
    moved = positions(dim, order)
    old = labels(dim)
    by_serial = {atom.serial: o.tolist() for atom, o in order.items()}
    for k, position in enumerate(moved.tolist()):
        expected = tuple((s, by_serial[s][i] if s in by_serial else i) for s, i in old[k])
        assert old[position] == expected
    assert sorted(moved.tolist()) == list(range(dim.size))


@given(tree_and_kept(), st.data())
@settings(max_examples=50, deadline=None)
def test_monomials_give_the_size(
    case: tuple[Dim, dict[Atom, np.ndarray]], data: st.DataObject
) -> None:
    dim, kept = case
    if data.draw(st.booleans()):
        pin(dim, "all of it")
        assert monomials(dim) == {(): dim.size}
        return
    sizes = {atom: len(order) for atom, order in kept.items()}
    value = sum(
        coefficient * prod(sizes.get(a, a.size) for a in key)
        for key, coefficient in monomials(dim).items()
    )
    assert value == evaluate(dim, sizes)


# --- unify -------------------------------------------------------------------------------


@dataclass
class Fine:
    """A tree of plain tuples from which two coarser views of one dimension are made."""

    kind: str
    size: int
    children: tuple[Fine, ...] = ()


@st.composite
def fine_trees(draw: st.DrawFn, depth: int = 2) -> Fine:
    kind = draw(st.sampled_from(["atom", "product", "sum"] if depth else ["atom"]))
    if kind == "atom":
        return Fine("atom", draw(st.sampled_from([2, 3, 4])))
    children = tuple(draw(st.lists(fine_trees(depth - 1), min_size=2, max_size=3)))
    sizes = [child.size for child in children]
    return Fine(kind, prod(sizes) if kind == "product" else sum(sizes), children)


def coarse(fine: Fine, hide: Iterator[bool], leaves: list[Atom]) -> Dim:
    """A view of the tree in which some subtrees are seen as atoms only."""
    if fine.kind == "atom" or next(hide):
        leaves.append(Atom(fine.size))
        return leaves[-1]
    children = [coarse(child, hide, leaves) for child in fine.children]
    return product(children) if fine.kind == "product" else concatenation(children)


def view(fine: Fine, choices: list[bool]) -> tuple[Dim, list[Atom]]:
    leaves: list[Atom] = []
    return coarse(fine, itertools.cycle([*choices, False]), leaves), leaves


hidden = st.lists(st.booleans(), min_size=1, max_size=7)


@given(fine_trees(), hidden, hidden)
@settings(max_examples=60, deadline=None)
def test_two_views_of_one_structure_meet_without_pinning(
    fine: Fine, left: list[bool], right: list[bool]
) -> None:
    (a, _), (b, _) = view(fine, left), view(fine, right)
    unify(a, b)
    assert labels(a) == labels(b)
    assert not any(pinned(a))
    assert not any(pinned(b))


@st.composite
def equal_pairs(draw: st.DrawFn) -> tuple[Fine, Fine]:
    """Two unrelated structures of one size."""
    left = draw(fine_trees(2).filter(lambda tree: tree.size <= 24))
    right = draw(fine_trees(2).filter(lambda tree: tree.size <= 24))
    if left.size == right.size:
        return left, right
    outer = Fine("product", left.size * right.size, (left, right))
    other = Fine("product", left.size * right.size, (right, left))
    if draw(st.booleans()):
        rest = Fine("atom", 2)
        size = left.size + right.size + 2
        return (
            Fine("sum", size, (left, rest, right)),
            Fine("sum", size, (right, left, rest)),
        )
    return outer, other


def effect(
    roots: list[Dim],
) -> tuple[list[list[tuple[tuple[int, int], ...]]], list[list[bool]]]:
    """What is known of dimensions, whatever their atoms are called."""
    numbers: dict[int, int] = {}
    found = []
    for root in roots:
        rows = []
        for label in labels(root):
            rows.append(tuple((numbers.setdefault(s, len(numbers)), i) for s, i in label))
        found.append(rows)
    return found, [pinned(root) for root in roots]


@given(equal_pairs(), hidden, hidden)
@settings(max_examples=60, deadline=None)
def test_unify_is_sound_and_symmetric(
    pair: tuple[Fine, Fine], left: list[bool], right: list[bool]
) -> None:
    effects = []
    for swapped in (False, True):
        (a, a_leaves), (b, b_leaves) = view(pair[0], left), view(pair[1], right)
        unify(b, a) if swapped else unify(a, b)
        all_pinned = all(pinned(a)) and all(pinned(b))
        assert labels(a) == labels(b) or all_pinned
        effects.append((all_pinned, effect([a, b, *a_leaves, *b_leaves])))
    (conflict, one), (other_conflict, two) = effects
    assert conflict == other_conflict
    if not conflict:
        assert one == two


@given(equal_pairs(), hidden, hidden)
@settings(max_examples=40, deadline=None)
def test_unify_twice_unbinds_nothing(
    pair: tuple[Fine, Fine], left: list[bool], right: list[bool]
) -> None:
    (a, _), (b, _) = view(pair[0], left), view(pair[1], right)
    unify(a, b)
    known, fixed = labels(a) == labels(b), pinned(a)
    unify(b, a)
    assert labels(a) == labels(b) or not known
    assert all(now or not before for now, before in zip(pinned(a), fixed, strict=True))


def test_unify_twice_changes_nothing() -> None:
    """(2 + 2) x 2 is 2 x (2 + 2): the second time it must not be a conflict."""
    inner = Atom(2)
    left = product([concatenation([Atom(2), Atom(2)]), inner])
    right = product([Atom(2), concatenation([Atom(2), Atom(2)])])
    unify(left, right)
    assert not inner.pinned
    unify(left, right)
    assert not inner.pinned


def subset_sizes(sizes: Mapping[Atom, int]) -> dict[Atom, int]:
    return {atom: max(1, n - 1) for atom, n in sizes.items()}


@given(equal_pairs(), hidden, hidden)
@settings(max_examples=50, deadline=None)
def test_after_unify_both_shrink_alike(
    pair: tuple[Fine, Fine], left: list[bool], right: list[bool]
) -> None:
    (a, _), (b, _) = view(pair[0], left), view(pair[1], right)
    unify(a, b)
    free = {atom: atom.size for atom in (*atoms(a), *atoms(b)) if not atom.pinned}
    sizes = subset_sizes(free)
    assert evaluate(a, sizes) == evaluate(b, sizes)
    kept = {atom: np.arange(n) for atom, n in sizes.items()}
    assert np.array_equal(positions(a, kept), positions(b, kept))
