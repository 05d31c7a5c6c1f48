"""How each ATen operator relates the dimensions of its inputs and outputs.

A rule receives the propagation state and one recorded call, states which dimensions are the
same (`unify`), which cannot vary (`pin`) and which integers in the code give which size
(`relate`), and returns the dimensions of the outputs. Operators without a rule here are learned
from their own meta kernel (`supple.graph.learned`). Rules are per operator, never per
architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch

from supple.graph.dims import (
    ONE,
    Atom,
    ConflictError,
    Dim,
    Sum,
    atoms,
    concatenation,
    keep_order,
    parts_of,
    pin,
    product,
    split,
    unify,
)
from supple.graph.integers import Expression, Operation, Size, TracedInt, expression_of
from supple.graph.record import Call, Ref

__all__ = ["RULES", "Propagation", "Relation"]

Dims = list[Dim]
Rule = Callable[["Propagation", Call], list[Dims]]
RULES: dict[str, Rule] = {}


@dataclass
class Relation:
    """The code computes the size of `dim` as `expression`, at the place `where`."""

    dim: Dim
    expression: Expression
    where: str


@dataclass
class Choice:
    """In `module`, as many positions of `source` as `count` has are chosen."""

    source: Dim
    count: Dim
    module: str


@dataclass
class Propagation:
    """Dimensions of every tensor seen so far, and what the code says about their sizes.

    Attributes:
        dims: Dimensions by tensor number.
        owned: Dimensions of parameters and buffers, by name.
        relations: Sizes that the code computes from integers.
        batched: Dimensions that are batch dimensions of a product of two activations (heads).
        indexed: For the number of an index tensor, the dimension its values are positions of.
        counts: Numbers of tensors that count, for each position of a dimension, how often it
            was chosen.
        chosen: What `topk` chose from, and how many.
        routed: Dimensions of tensors whose rows are looked up at chosen positions.
        reduced: Dimensions over which a normalization, a softmax, a mean or a product of two
            activations reduces: zeroing a unit there is not the same as removing it.
        multiples: Dimensions of which an operator takes only multiples of a number.
        literals: Values of index tensors that the code wrote out.
        used: Numbers of tensors that a call takes, or that the model returns.
        weights: Memory of the parameters of the run at hand.
        unknown: Operators for which no rule was found, with the reason.
    """

    dims: dict[int, Dims] = field(default_factory=dict)
    owned: dict[str, Dims] = field(default_factory=dict)
    relations: list[Relation] = field(default_factory=list)
    batched: Dims = field(default_factory=list)
    indexed: dict[int, Dim] = field(default_factory=dict)
    counts: set[int] = field(default_factory=set)
    chosen: list[Choice] = field(default_factory=list)
    routed: Dims = field(default_factory=list)
    reduced: Dims = field(default_factory=list)
    multiples: list[tuple[Dim, int]] = field(default_factory=list)
    literals: dict[int, list[int]] = field(default_factory=dict)
    used: set[int] = field(default_factory=set)
    weights: frozenset[int] = frozenset()
    unknown: dict[str, str] = field(default_factory=dict)

    def of(self, ref: Ref) -> Dims:
        """The dimensions of a tensor; those of one that the run did not make are pinned."""
        if ref.id not in self.dims:
            self.dims[ref.id] = [fixed(n, "a tensor that is no parameter") for n in ref.shape]
        return self.dims[ref.id]

    def contract(self, dim: Dim, *refs: Ref) -> None:
        """State that a product sums over `dim` of these tensors."""
        if not any(ref.storage in self.weights for ref in refs):
            self.reduced.append(dim)

    def relate(self, dim: Dim, integer: int | None, call: Call) -> None:
        """State that the code gives the size of `dim` as `integer` (None: it does not say)."""
        if integer is not None and dim.size != 1:
            self.relations.append(Relation(dim, expression_of(integer), call.where))


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for ATen operators, by name without overload."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES["aten::" + name] = function
        return function

    return register


def fresh(size: int) -> Dim:
    return ONE if size == 1 else Atom(size)


def fixed(size: int, reason: str) -> Dim:
    return ONE if size == 1 else Atom(size, reason)


def argument(call: Call, name: str, default: Any = None) -> Any:
    """An argument by its name in the operator's schema."""
    for position, schema in enumerate(call.op._schema.arguments):
        if schema.name == name:
            if position < len(call.args):
                return call.args[position]
            return call.kwargs.get(name, default)
    return call.kwargs.get(name, default)


def as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def broadcast(p: Propagation, all_dims: Sequence[Dims], why: str) -> Dims:
    """Dimensions of a broadcast, aligned at the right."""
    rank = max(map(len, all_dims), default=0)
    result: Dims = []
    for position in range(1, rank + 1):
        present = [d[-position] for d in all_dims if len(d) >= position]
        wide = [d for d in present if d.size != 1]
        for other in wide[1:]:
            unify(wide[0], other, why)
        result.append(wide[0] if wide else ONE)
    return result[::-1]


def pointwise(p: Propagation, call: Call) -> list[Dims]:
    dims = broadcast(p, [p.of(ref) for ref in call.inputs], call.name)
    return [list(dims) for _ in call.outputs]


@rule("clone", "detach", "alias", "_to_copy", "lift_fresh", "contiguous", "lift", "detach_")
@rule("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "fill_")
@rule("zero_", "native_dropout", "_conj", "view_as_real_copy", "dropout", "to")
def same_as_first(p: Propagation, call: Call) -> list[Dims]:
    return [list(p.of(call.inputs[0])) for _ in call.outputs]


@rule("tril", "triu", "tril_", "triu_")
def triangle(p: Propagation, call: Call) -> list[Dims]:
    dims = p.of(call.inputs[0])
    for dim in dims[-2:]:
        pin(dim, "a triangle of it is taken")
    return [list(dims)]


@rule("copy_")
def copy(p: Propagation, call: Call) -> list[Dims]:
    broadcast(p, [p.of(ref) for ref in call.inputs], call.name)
    return [list(p.of(call.inputs[0]))]


# --- views ----------------------------------------------------------------------------------


def regroup(old: Dims, shape: Sequence[int], why: str) -> Dims:
    """Dimensions after a reshape: runs of old and new dimensions with equal products match."""
    result: Dims = []
    i = j = 0
    old = [d for d in old if d.size != 1]
    while j < len(shape):
        if shape[j] == 1:
            result.append(ONE)
            j += 1
            continue
        left, right = [old[i]], [shape[j]]
        i, j = i + 1, j + 1
        while prod(d.size for d in left) != prod(right):
            if prod(d.size for d in left) < prod(right):
                left.append(old[i])
                i += 1
            else:
                right.append(shape[j])
                j += 1
        whole = product(left)
        wide = sum(n != 1 for n in right)
        new = [whole if n != 1 and wide == 1 else fresh(n) for n in right]
        if wide > 1:
            unify(whole, product(new), why)
        result.extend(new)
    return result


def given_sizes(call: Call, shape: Sequence[int]) -> list[int | None]:
    """For each size of `shape`, the integer that the code wrote for it; None where none."""
    integers = call.integers
    if call.function == "unflatten" and integers:
        dim = (integers[0] or 0) % max(1, len(shape) - len(integers) + 2)
        inner = [None if n == -1 else n for n in integers[1:]]
        tail = len(shape) - dim - len(inner)
        return [None] * dim + inner + [None] * tail
    if len(integers) == len(shape) and all(
        n == -1 or n == m for n, m in zip(integers, shape, strict=True)
    ):
        return [None if n == -1 else n for n in integers]
    for some in (integers[: len(shape)], integers[len(integers) - len(shape) :]):
        if shape and some == list(shape):
            return list(some)
    if call.function == "repeat_interleave" and integers:
        return [integers[0] if size == integers[0] else None for size in shape]
    if call.function in ("view", "reshape", "expand", "zeros", "ones", "empty", "full"):
        return [_traced(call, size) for size in shape]
    return [None] * len(shape)


def _traced(call: Call, value: int) -> int | None:
    """A traced integer of that value among those the code passed, if they all agree."""
    found = [n for n in call.integers if isinstance(n, TracedInt) and n == value]
    agree = found and all(n.expression == found[0].expression for n in found)
    return found[0] if agree else None


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "view_copy", "unflatten", "flatten")
def view(p: Propagation, call: Call) -> list[Dims]:
    shape = call.outputs[0].shape
    if prod(shape) == 0:
        return [[fixed(n, "an empty tensor") for n in shape]]
    dims = regroup(p.of(call.inputs[0]), shape, "a reshape")
    for dim, integer in zip(dims, given_sizes(call, shape), strict=True):
        p.relate(dim, integer, call)
    return [dims]


@rule("permute")
def permute(p: Propagation, call: Call) -> list[Dims]:
    dims = p.of(call.inputs[0])
    return [[dims[i] for i in argument(call, "dims")]]


@rule("transpose", "transpose_", "swapaxes")
def transpose(p: Propagation, call: Call) -> list[Dims]:
    dims = list(p.of(call.inputs[0]))
    i, j = call.args[1], call.args[2]
    dims[i], dims[j] = dims[j], dims[i]
    return [dims]


@rule("t", "numpy_T", "mT")
def matrix_transpose(p: Propagation, call: Call) -> list[Dims]:
    return [list(p.of(call.inputs[0])[::-1])]


@rule("unsqueeze", "unsqueeze_")
def unsqueeze(p: Propagation, call: Call) -> list[Dims]:
    dims = list(p.of(call.inputs[0]))
    dim = call.args[1]
    dims.insert(dim if dim >= 0 else dim + len(dims) + 1, ONE)
    return [dims]


@rule("squeeze", "squeeze_")
def squeeze(p: Propagation, call: Call) -> list[Dims]:
    dims = p.of(call.inputs[0])
    chosen = call.args[1] if len(call.args) > 1 else list(range(len(dims)))
    drop = {d % len(dims) for d in as_list(chosen) if dims} if dims else set()
    return [[d for i, d in enumerate(dims) if not (i in drop and d.size == 1)]]


@rule("expand", "expand_copy", "broadcast_to")
def expand(p: Propagation, call: Call) -> list[Dims]:
    old, shape = p.of(call.inputs[0]), call.outputs[0].shape
    padded = [ONE] * (len(shape) - len(old)) + list(old)
    given = given_sizes(call, shape)
    result: Dims = []
    for dim, size, integer in zip(padded, shape, given, strict=True):
        new = fresh(size) if dim.size == 1 and size != 1 else dim
        p.relate(new, integer, call)
        result.append(new)
    return [result]


@rule("as_strided", "as_strided_")
def as_strided(p: Propagation, call: Call) -> list[Dims]:
    """PyTorch's own functions use it to restate strides; in a model's code anything goes."""
    source, result = call.inputs[0], call.outputs[0]
    if source.shape == result.shape and not call.function.startswith("as_strided"):
        return [list(p.of(source))]
    return pinned_rule(p, call, "its memory is viewed with strides of the code's own")


@rule("slice")
def take_slice(p: Propagation, call: Call) -> list[Dims]:
    dims = list(p.of(call.inputs[0]))
    axis = argument(call, "dim", 0) % len(dims)
    dim, size = dims[axis], dims[axis].size
    start, end, step = (argument(call, n, d) for n, d in _SLICE)
    start = 0 if start is None else max(0, start + size if start < 0 else start)
    end = size if end is None else min(size, end + size if end < 0 else end)
    if (start, end, step) == (0, size, 1):
        _relate_stop(p, call, dim, size)
        return [dims]
    if step == 1 and start == end == size:  # nothing, behind everything
        p.relate(dim, next((n for n in call.integers if n == size), None), call)
        dims[axis] = Sum(())
        return [dims]
    if step > 1 and start < step and end == size and size % step == 0 and size > step:
        outer, inner = (
            fresh(size // step),
            fixed(step, "every so many of its entries are taken"),
        )
        unify(dim, product((outer, inner)), "a slice with a stride")
        dims[axis] = outer
        return [dims]
    if step != 1 or end <= start:
        pin(dim, "it is sliced with a stride")
        dims[axis] = fixed(call.outputs[0].shape[axis], "it is sliced with a stride")
        return [dims]
    try:
        kept, after = split(dim, end)
        before, kept = split(kept, start)
    except ConflictError:
        pin(dim, "a slice cuts through its inner structure")
        dims[axis] = fixed(end - start, "a slice cuts through its inner structure")
        return [dims]
    if start:
        _relate_cut(p, call, axis, start, size, before, concatenation((kept, after)))
    if end < size:
        _relate_cut(p, call, axis, end, size, concatenation((before, kept)), after)
    if call.function == "narrow":
        p.relate(kept, _traced(call, end - start), call)
    dims[axis] = kept
    return [dims]


_SLICE = (("start", 0), ("end", None), ("step", 1))


def _relate_stop(p: Propagation, call: Call, dim: Dim, size: int) -> None:
    """`x[:n]` where n happens to be the whole size still says what the size is computed as."""
    if call.function == "__getitem__" and any(
        isinstance(n, TracedInt) and n == size for n in call.integers
    ):
        p.relate(dim, _traced(call, size), call)


def _relate_cut(
    p: Propagation, call: Call, axis: int, at: int, size: int, head: Dim, tail: Dim
) -> None:
    """Relate the two sides of a cut to the integer that placed it."""
    mine = call.integers[2 * axis : 2 * axis + 2] if call.function == "__getitem__" else []
    for integer in [*mine, *call.integers]:
        if integer is not None and integer == at:
            p.relate(head, integer, call)
            return
        if integer is not None and integer == at - size:
            negated = Operation("-", 0, expression_of(integer))
            p.relate(tail, TracedInt(size - at, negated), call)
            return
    pin(head, f"a slice of fixed size{_at(call)}")


def _at(call: Call) -> str:
    return f" at {call.where}" if call.where else ""


@rule("select")
def select(p: Propagation, call: Call) -> list[Dims]:
    dims = list(p.of(call.inputs[0]))
    axis, index = call.args[1] % len(dims), call.args[2]
    dim = dims.pop(axis)
    if dim.size > 1 and call.outputs[0].id in p.used:  # else its shape is asked for at most
        _pin_position(dim, index % dim.size, call)
    return [dims]


def _pin_position(dim: Dim, position: int, call: Call) -> None:
    offset = position
    for part in parts_of(dim):
        if offset < part.size:
            pin(part, f"position {position} of it is selected{_at(call)}")
            return
        offset -= part.size


@rule("unbind")
def unbind(p: Propagation, call: Call) -> list[Dims]:
    dims = list(p.of(call.inputs[0]))
    dim = dims.pop(argument(call, "dim", 0) % len(dims))
    pin(dim, f"it is unpacked into separate tensors{_at(call)}")
    return [list(dims) for _ in call.outputs]


@rule("split", "split_copy", "unsafe_split", "split_with_sizes", "split_with_sizes_copy")
@rule("unsafe_split_with_sizes")
def split_parts(p: Propagation, call: Call) -> list[Dims]:
    dims = list(p.of(call.inputs[0]))
    axis = argument(call, "dim", 0) % len(dims)
    sizes = [ref.shape[axis] for ref in call.outputs]
    parts = [fresh(n) for n in sizes]
    unify(dims[axis], concatenation(parts), "a split")
    _relate_parts(p, call, parts, sizes, axis)
    return [[*dims[:axis], part, *dims[axis + 1 :]] for part in parts]


def _relate_parts(p: Propagation, call: Call, parts: Dims, sizes: list[int], axis: int) -> None:
    if call.function in ("chunk", "unsafe_chunk", "tensor_split"):
        for part in parts[1:]:
            p.relate(part, TracedInt(part.size, Size(call.outputs[0].id, axis)), call)
        return
    integers = [n for n in call.integers if n is not None]
    if len(integers) >= len(sizes) and integers[: len(sizes)] == sizes:
        for part, integer in zip(parts, integers, strict=False):
            p.relate(part, integer, call)
    elif integers:
        for part in parts:
            if part.size == integers[0]:
                p.relate(part, integers[0], call)


@rule("cat", "concat", "concatenate")
def cat(p: Propagation, call: Call) -> list[Dims]:
    tensors = [ref for ref in call.args[0] if ref.shape != (0,)]
    axis = argument(call, "dim", 0) % len(tensors[0].shape)
    rows = [p.of(ref) for ref in tensors]
    others = broadcast(p, [[*r[:axis], ONE, *r[axis + 1 :]] for r in rows], "a concatenation")
    others[axis] = concatenation([r[axis] for r in rows])
    return [others]


@rule("stack")
def stack(p: Propagation, call: Call) -> list[Dims]:
    dims = broadcast(p, [p.of(ref) for ref in call.args[0]], "a stack")
    axis = argument(call, "dim", 0) % (len(dims) + 1)
    dims.insert(axis, fixed(len(call.args[0]), "tensors are stacked along it"))
    return [dims]


@rule("constant_pad_nd")
def pad(p: Propagation, call: Call) -> list[Dims]:
    dims = list(p.of(call.inputs[0]))
    widths = list(call.args[1])
    given = call.integers[: len(widths)]
    if [n for n in given if n is not None] != widths:
        given = list(widths)
    for k in range(len(widths) // 2):
        axis = len(dims) - 1 - k
        before, after = widths[2 * k], widths[2 * k + 1]
        if min(before, after) < 0:
            pin(dims[axis], "it is cropped")
            dims[axis] = fixed(call.outputs[0].shape[axis], "it is cropped")
            continue
        edges = [fresh(n) if n else None for n in (before, after)]
        for edge, integer in zip(edges, given[2 * k : 2 * k + 2], strict=True):
            if edge is not None:
                p.relate(edge, integer, call)
        if before or after:
            dims[axis] = concatenation(
                [d for d in (edges[0], dims[axis], edges[1]) if d is not None]
            )
    return [dims]


@rule("flip", "roll", "cumsum", "cumprod", "logcumsumexp", "cummax", "cummin", "sort", "rot90")
@rule("argsort")
def ordered(p: Propagation, call: Call) -> list[Dims]:
    dims = p.of(call.inputs[0])
    chosen = argument(call, "dims", argument(call, "dim", -1))
    for axis in as_list(chosen) if chosen not in ([], ()) else range(len(dims)):
        if dims and isinstance(axis, int) and not _run_ends(p, call):
            name = call.name.removeprefix("aten::")
            keep_order(dims[axis], f"{name} depends on its order{_at(call)}")
    if "sort" in call.name and dims and isinstance(chosen, int):
        p.indexed[call.outputs[-1].id] = dims[chosen]
    return [list(dims) for _ in call.outputs]


def _run_ends(p: Propagation, call: Call) -> bool:
    """Whether counts are summed up to where each run of sorted rows ends.

    They follow the order of the rows, whatever it is.
    """
    return call.name == "aten::cumsum" and call.inputs[0].id in p.counts


@rule("topk", "kthvalue")
def topk(p: Propagation, call: Call) -> list[Dims]:
    """The indices that come out are positions in the dimension that was chosen from."""
    dims = list(p.of(call.inputs[0]))
    axis = argument(call, "dim", -1) % len(dims)
    source, count = dims[axis], fresh(call.outputs[0].shape[axis])
    given = argument(call, "k")
    p.relate(count, next((n for n in call.integers if n == given), None), call)
    p.indexed[call.outputs[-1].id] = source
    p.chosen.append(Choice(source, count, call.module))
    p.reduced.append(source)
    dims[axis] = count
    return [list(dims) for _ in call.outputs]


@rule("histc", "bincount")
def histogram(p: Propagation, call: Call) -> list[Dims]:
    """How often each position was chosen, where one bin stands for each."""
    size = call.outputs[0].shape[0]
    source = p.indexed.get(call.inputs[0].id)
    if source is None or source.size != size:
        for dim in p.of(call.inputs[0]):
            keep_order(dim, "a histogram of it is taken")
        return [[fixed(size, "the bins of a histogram")]]
    p.relate(source, next((n for n in call.integers if n == size), None), call)
    p.counts.add(call.outputs[0].id)
    return [[source]]


@rule("native_channel_shuffle", "channel_shuffle")
def channel_shuffle(p: Propagation, call: Call) -> list[Dims]:
    dims = list(p.of(call.inputs[0]))
    groups = call.args[1]
    group, inner = fresh(groups), fresh(dims[1].size // groups)
    unify(dims[1], product((group, inner)), "a channel shuffle")
    p.relate(group, next((n for n in call.integers if n == groups), None), call)
    dims[1] = product((inner, group))
    return [dims]


_WINDOW, _PATCHES = "the window of a patch", "the number of patches"
_FACTOR = "the factor by which pixels and channels are exchanged"


@rule("pixel_shuffle")
def pixel_shuffle(p: Propagation, call: Call) -> list[Dims]:
    *lead, channels, height, width = p.of(call.inputs[0])
    square = fixed(argument(call, "upscale_factor") ** 2, _FACTOR)
    left = fresh(channels.size // square.size)
    unify(channels, product((left, square)), "a pixel shuffle")
    return [[*lead, left, *_resized(call, height, width)]]


@rule("pixel_unshuffle")
def pixel_unshuffle(p: Propagation, call: Call) -> list[Dims]:
    *lead, channels, height, width = p.of(call.inputs[0])
    square = fixed(argument(call, "downscale_factor") ** 2, _FACTOR)
    return [[*lead, product((channels, square)), *_resized(call, height, width)]]


@rule("im2col")
def unfold_patches(p: Propagation, call: Call) -> list[Dims]:
    *lead, channels, height, width = p.of(call.inputs[0])
    window = fixed(prod(argument(call, "kernel_size")), _WINDOW)
    for place in (height, width):
        pin(place, "a spatial size")
    return [[*lead, product((channels, window)), fixed(call.outputs[0].shape[-1], _PATCHES)]]


@rule("col2im")
def fold_patches(p: Propagation, call: Call) -> list[Dims]:
    *lead, rows, patches = p.of(call.inputs[0])
    window = fixed(prod(argument(call, "kernel_size")), _WINDOW)
    channels = fresh(rows.size // window.size)
    unify(rows, product((channels, window)), "a fold of patches")
    pin(patches, _PATCHES)
    height, width = call.outputs[0].shape[-2:]
    return [[*lead, channels, fixed(height, "a spatial size"), fixed(width, "a spatial size")]]


def _resized(call: Call, *places: Dim) -> Dims:
    for place in places:
        pin(place, "a spatial size")
    return [fixed(n, "a spatial size") for n in call.outputs[0].shape[-len(places) :]]


@rule("repeat", "tile")
def repeat(p: Propagation, call: Call) -> list[Dims]:
    shape, counts = call.outputs[0].shape, list(call.args[1])
    old = [ONE] * (len(shape) - len(call.inputs[0].shape)) + list(p.of(call.inputs[0]))
    given = call.integers if call.integers == counts else list(counts)
    result: Dims = []
    for dim, count, integer in zip(old, counts, given, strict=True):
        copies = fresh(count)
        p.relate(copies, integer, call)
        result.append(product((copies, dim)))
    return [result]


# --- looking up ------------------------------------------------------------------------------

_LOOKUP = "its rows are looked up by index"
_WRITTEN = "it is written to by index"


def _look_up(p: Propagation, dim: Dim, places: Ref, reason: str) -> None:
    """Rows of `dim` are picked or written at the values of `places`."""
    source = p.indexed.get(places.id)
    if source is not None and source.size == dim.size:
        unify(dim, source, "choosing by index")
        p.routed.append(dim)
    else:
        keep_order(dim, reason)


@rule("embedding")
def embedding(p: Propagation, call: Call) -> list[Dims]:
    weight, indices = p.of(call.inputs[0]), p.of(call.inputs[1])
    _look_up(p, weight[0], call.inputs[1], _LOOKUP)
    return [[*indices, *weight[1:]]]


@rule("index_select")
def index_select(p: Propagation, call: Call) -> list[Dims]:
    dims, axis = list(p.of(call.inputs[0])), call.args[1]
    _look_up(p, dims[axis], call.inputs[1], _LOOKUP)
    dims[axis] = p.of(call.inputs[1])[0] if p.of(call.inputs[1]) else ONE
    return [dims]


@rule("gather", "take_along_dim")
def gather(p: Propagation, call: Call) -> list[Dims]:
    dims, index = p.of(call.inputs[0]), p.of(call.inputs[1])
    axis = call.args[1] % max(1, len(dims))
    for position, (a, b) in enumerate(zip(dims, index, strict=True)):
        if position == axis:
            _look_up(p, a, call.inputs[1], _LOOKUP)
        elif a.size == b.size:
            unify(a, b, "gather")
    return [list(index)]


@rule("index", "_unsafe_index")
def index(p: Propagation, call: Call) -> list[Dims]:
    dims, chosen = p.of(call.inputs[0]), list(call.args[1])
    chosen += [None] * (len(dims) - len(chosen))
    used = [i for i, c in enumerate(chosen) if c is not None]
    if len(used) == 1 and chosen[used[0]].id in p.literals:
        return [_written_out(list(dims), used[0], p.literals[chosen[used[0]].id], call)]
    for axis in used:
        _look_up(p, dims[axis], chosen[axis], _LOOKUP)
    if any(chosen[i].dtype in (torch.bool, torch.uint8) for i in used):
        for dim in dims:
            pin(dim, "entries of its tensor are chosen by a mask")
        return [[fixed(n, "the number of chosen entries") for n in call.outputs[0].shape]]
    picked = broadcast(p, [p.of(chosen[i]) for i in used], "indexing")
    kept = [d for i, d in enumerate(dims) if i not in used]
    adjacent = used == list(range(used[0], used[-1] + 1))
    place = used[0] if adjacent else 0
    return [[*kept[:place], *picked, *kept[place:]]]


def _written_out(dims: Dims, axis: int, places: list[int], call: Call) -> Dims:
    """Rows at positions that the code wrote out; negative ones count from the end."""
    size, picked = dims[axis].size, []
    for place in places:
        try:
            rest, _ = split(dims[axis], place % size + 1)
            _, one = split(rest, place % size)
        except ConflictError:
            one = ONE
        for atom in atoms(dims[axis] if place >= 0 else one):
            pin(atom, f"position {place} of it is selected{_at(call)}")
        picked.append(one)
    dims[axis] = Sum(picked) if len(picked) > 1 else picked[0]
    return dims


@rule("index_add", "index_add_", "index_copy", "index_copy_")
def write_rows(p: Propagation, call: Call) -> list[Dims]:
    dims, places, rows = (p.of(ref) for ref in call.inputs)
    written = argument(call, "dim") % max(1, len(dims))
    for axis, (dim, row) in enumerate(zip(dims, rows, strict=True)):
        if axis == written:
            _look_up(p, dim, call.inputs[1], _WRITTEN)
            keep_order(row, _WRITTEN)
            unify(row, places[0] if places else ONE, call.name)
        else:
            unify(dim, row, call.name)
    return [list(dims)]


@rule("masked_scatter", "masked_scatter_")
def write_masked(p: Propagation, call: Call) -> list[Dims]:
    for ref in call.inputs:
        for dim in p.of(ref):
            pin(dim, "its entries are written where a mask says")
    return [broadcast(p, [p.of(ref) for ref in call.inputs[:2]], call.name)]


@rule("index_put", "index_put_", "scatter", "scatter_", "scatter_add", "scatter_add_")
def write_at(p: Propagation, call: Call) -> list[Dims]:
    dims = p.of(call.inputs[0])
    axis = argument(call, "dim")
    chosen = argument(call, "indices")
    if isinstance(axis, int):
        written = [axis]
    elif chosen is not None:
        written = [i for i, c in enumerate(chosen) if c is not None]
    else:
        written = list(range(len(dims)))
    places = chosen if chosen is not None else {axis: argument(call, "index")}
    for i in written:
        place = places[i] if chosen is not None or i in places else None
        if isinstance(place, Ref):
            _look_up(p, dims[i], place, _WRITTEN)
        else:
            keep_order(dims[i], _WRITTEN)
    for ref in call.inputs[1:]:
        other = p.of(ref)
        if len(other) == len(dims):
            for i, (a, b) in enumerate(zip(dims, other, strict=True)):
                if i not in written and a.size == b.size:
                    unify(a, b, call.name)
        elif len(other) >= 1 and len(dims) > len(written) and other[-1].size == dims[-1].size:
            unify(other[-1], dims[-1], call.name)
    return [list(dims)]


# --- contractions ----------------------------------------------------------------------------


@rule("mm")
def mm(p: Propagation, call: Call) -> list[Dims]:
    a, b = (p.of(ref) for ref in call.inputs)
    unify(a[1], b[0], "a matrix product")
    p.contract(a[1], *call.inputs)
    return [[a[0], b[1]]]


@rule("addmm", "addmm_")
def addmm(p: Propagation, call: Call) -> list[Dims]:
    bias, a, b = (p.of(ref) for ref in call.inputs)
    unify(a[1], b[0], "a matrix product")
    result = [a[0], b[1]]
    broadcast(p, [bias, result], "a bias")
    return [result]


@rule("bmm", "baddbmm", "baddbmm_")
def bmm(p: Propagation, call: Call) -> list[Dims]:
    *bias, a, b = (p.of(ref) for ref in call.inputs)
    unify(a[0], b[0], "a batched matrix product")
    unify(a[2], b[1], "a batched matrix product")
    p.contract(a[2], *call.inputs[-2:])
    p.batched.append(a[0])
    result = [a[0], a[1], b[2]]
    broadcast(p, [*bias, result], "a bias")
    return [result]


@rule("mv")
def mv(p: Propagation, call: Call) -> list[Dims]:
    a, b = (p.of(ref) for ref in call.inputs)
    unify(a[1], b[0], "a matrix product")
    p.contract(a[1], *call.inputs)
    return [[a[0]]]


_ALIGNED = 16  # bytes that rows of the matrices must be a multiple of


@rule("_grouped_mm")
def grouped_mm(p: Propagation, call: Call) -> list[Dims]:
    a, b = p.of(call.inputs[0]), p.of(call.inputs[1])
    unify(a[-1], b[-2], "a grouped matrix product")
    bytes_each = call.inputs[1].dtype.itemsize
    for dim in (a[-1], b[-2], b[-1]):
        p.multiples.append((dim, max(1, _ALIGNED // bytes_each)))
    ends = argument(call, "offs")
    if isinstance(ends, Ref) and len(b) == 3:
        unify(p.of(ends)[0], b[0], "a grouped matrix product")
    return (
        [[*a[:-1], b[-1]]]
        if len(b) == 3 and len(a) == 2
        else [[fixed(n, "a grouped matrix product") for n in call.outputs[0].shape]]
    )


@rule("convolution", "_convolution", "mkldnn_convolution")
def convolution(p: Propagation, call: Call) -> list[Dims]:
    x, weight = p.of(call.inputs[0]), p.of(call.inputs[1])
    transposed, groups = argument(call, "transposed", False), argument(call, "groups", 1)
    batch, channel, space = x[: len(x) - len(weight) + 1], x[-len(weight) + 1], weight[2:]
    for kernel in space:
        pin(kernel, "the kernel size of a convolution")
    out = _grouped_channels(p, call, channel, weight, groups, transposed)
    if argument(call, "bias") is not None:
        unify(out, p.of(argument(call, "bias"))[0], "a bias")
    return [[*batch, out, *_convolved_places(call, x[len(x) - len(space) :], space)]]


def _convolved_places(call: Call, places: Dims, kernels: Dims) -> Dims:
    """Spatial dimensions after a convolution: where the kernel sees one place, as before."""
    result: Dims = []
    sizes = call.outputs[0].shape[-len(kernels) :]
    steps, edges = as_list(argument(call, "stride")), as_list(argument(call, "padding"))
    for i, (place, kernel, size) in enumerate(zip(places, kernels, sizes, strict=True)):
        alone = kernel.size == steps[i % len(steps)] == 1 and edges[i % len(edges)] == 0
        if not alone or place.size != size:
            pin(place, "a spatial size")
            place = fixed(size, "a spatial size")
        result.append(place)
    return result


def _grouped_channels(
    p: Propagation, call: Call, channel: Dim, weight: Dims, groups: int, transposed: bool
) -> Dim:
    """Couple the channels of a convolution; returns its output channels."""
    if groups == 1:
        unify(channel, weight[0 if transposed else 1], "a convolution")
        return weight[1] if transposed else weight[0]
    group = fresh(groups)
    place = -1 - (len(weight) - 2 if transposed else 0)  # the dilation follows it there
    if call.function.startswith("conv"):
        same = [n for n in call.integers if n == groups]
        at_its_place = call.integers[place:][:1] == [groups]
        given = same[0] if len(same) == 1 else call.integers[place] if at_its_place else groups
        p.relate(group, given, call)
    unify(weight[0], product((group, fresh(weight[0].size // groups))), "grouped convolution")
    if transposed:
        unify(channel, weight[0], "a grouped convolution")
        return product((group, weight[1]))
    unify(channel, product((group, weight[1])), "a grouped convolution")
    return weight[0]


@rule("mkldnn_rnn_layer")
def recurrent_layer(p: Propagation, call: Call) -> list[Dims]:
    x, into, state, *others = (p.of(ref) for ref in call.inputs)
    hidden = state[1]
    gates = state[0].size // hidden.size
    unify(x[-1], into[1], "a recurrent layer")
    for dims in (into, state, *others[:2]):
        unify(dims[0], concatenation([hidden] * gates), "the gates of a recurrent layer")
    for dims in others[2:]:
        unify(dims[-1], hidden, "the state of a recurrent layer")
    rest = [[fixed(n, "a workspace") for n in r.shape] for r in call.outputs[3:]]
    return [[*x[:-1], hidden], *(list(dims) for dims in others[2:]), *rest]


@rule("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_efficient_attention")
@rule("_scaled_dot_product_attention_math", "_scaled_dot_product_flash_attention")
@rule("_scaled_dot_product_fused_attention_overrideable", "scaled_dot_product_attention")
@rule("_scaled_dot_product_attention_math_for_mps", "_scaled_dot_product_cudnn_attention")
def attention(p: Propagation, call: Call) -> list[Dims]:
    query, key, value = (p.of(ref) for ref in call.inputs[:3])
    unify(query[-1], key[-1], "attention")
    unify(key[-2], value[-2], "attention")
    for q, k, v in zip(query[:-2], key[:-2], value[:-2], strict=True):
        unify(k, v, "attention")
        if q.size == k.size:
            unify(q, k, "attention")
        elif k.size > 1 and q.size % k.size == 0:
            unify(q, product((k, fresh(q.size // k.size))), "grouped-query attention")
    p.batched.extend(query[:-2])
    p.reduced.extend([key[-2], query[-1]])
    mask = argument(call, "attn_mask", argument(call, "attn_bias"))
    if isinstance(mask, Ref):
        broadcast(p, [p.of(mask), [*query[:-1], key[-2]]], "an attention mask")
    result = [*query[:-1], value[-1]]
    sums = call.inputs[0].shape[:-1]  # a log-sum-exp per query
    rest = [
        list(query[:-1]) if r.shape == sums else [fixed(n, "attention's own") for n in r.shape]
        for r in call.outputs[1:]
    ]
    return [result, *rest]


# --- normalization and reduction -------------------------------------------------------------


@rule("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training")
@rule("cudnn_batch_norm", "_batch_norm_with_update", "_batch_norm_no_update", "batch_norm")
@rule("_native_batch_norm_legit_functional")
def batch_norm(p: Propagation, call: Call) -> list[Dims]:
    x = p.of(call.inputs[0])
    for ref in call.inputs[1:]:
        unify(x[1], p.of(ref)[0], "a batch norm")
    if argument(call, "training", "no" not in call.name.rsplit("batch_norm", 1)[-1]):
        p.reduced.extend([x[0], *x[2:]])  # the statistics are those of the tensor itself
    rest: list[Dims] = []
    for ref in call.outputs[1:]:
        rest.append([x[1] if n == x[1].size else fixed(n, "a buffer") for n in ref.shape])
    return [list(x), *rest]


@rule("native_layer_norm", "_fused_rms_norm", "rms_norm", "layer_norm")
def layer_norm(p: Propagation, call: Call) -> list[Dims]:
    x, shape = p.of(call.inputs[0]), list(argument(call, "normalized_shape"))
    tail = x[len(x) - len(shape) :]
    for ref in call.inputs[1:]:
        broadcast(p, [p.of(ref), tail], "a layer norm")
    if [n for n in call.integers[: len(shape)] if n is not None] == shape:
        for dim, integer in zip(tail, call.integers, strict=False):
            p.relate(dim, integer, call)
    p.reduced.extend(tail)
    rest = [[*x[: len(x) - len(shape)], *([ONE] * len(shape))] for _ in call.outputs[1:]]
    return [list(x), *rest]


@rule("native_group_norm", "group_norm")
def group_norm(p: Propagation, call: Call) -> list[Dims]:
    x = p.of(call.inputs[0])
    groups = argument(call, "group", argument(call, "num_groups"))
    group, inner = fresh(groups), fresh(x[1].size // groups)
    unify(x[1], product((group, inner)), "a group norm")
    p.relate(group, next((n for n in call.integers if n == groups), None), call)
    for ref in call.inputs[1:]:
        unify(x[1], p.of(ref)[0], "a group norm")
    p.reduced.extend([inner, *x[2:]])
    rest = [[x[0], group] for _ in call.outputs[1:]]
    return [list(x), *rest]


@rule("_weight_norm_interface")
def weight_norm(p: Propagation, call: Call) -> list[Dims]:
    weight, gain = p.of(call.inputs[0]), p.of(call.inputs[1])
    axis = argument(call, "dim", 0)
    unify(weight[axis], gain[axis], "a weight norm")
    p.reduced.append(weight[axis])  # a unit of zeros has no norm that it could be divided by
    return [list(weight), [weight[axis] if n > 1 else ONE for n in call.outputs[1].shape]]


@rule("_softmax", "_log_softmax", "softmax", "log_softmax", "_safe_softmax")
def softmax(p: Propagation, call: Call) -> list[Dims]:
    dims = p.of(call.inputs[0])
    if dims:
        p.reduced.append(dims[call.args[1]])
    return [list(dims)]


_CHOOSE = frozenset({"aten::argmax", "aten::argmin", "aten::max", "aten::min"})


@rule("sum", "mean", "amax", "amin", "var", "std", "var_mean", "std_mean", "any", "all", "prod")
@rule("logsumexp", "argmax", "argmin", "max", "min", "norm", "linalg_vector_norm", "nansum")
@rule("median", "count_nonzero", "aminmax")
def reduce_dims(p: Propagation, call: Call) -> list[Dims]:
    if len(call.inputs) > 1:
        return pointwise(p, call)
    dims = p.of(call.inputs[0])
    chosen = argument(call, "dim")
    if not dims:
        return [[] for _ in call.outputs]
    axes = as_list(chosen) if chosen not in (None, [], ()) else list(range(len(dims)))
    gone = {axis % len(dims) for axis in axes}
    keep = bool(argument(call, "keepdim", False))
    p.reduced.extend(dims[i] for i in gone)
    if call.outputs[-1].dtype == torch.int64 and call.name in _CHOOSE:
        p.indexed[call.outputs[-1].id] = product(dims[i] for i in sorted(gone))
    left = [ONE if i in gone else d for i, d in enumerate(dims) if keep or i not in gone]
    return [list(left) for _ in call.outputs]


# --- pooling, resizing, making ---------------------------------------------------------------


@rule("max_pool2d_with_indices", "avg_pool1d", "avg_pool2d", "avg_pool3d", "max_pool1d")
@rule("_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_avg_pool1d", "max_pool2d")
@rule("adaptive_max_pool2d", "adaptive_max_pool1d", "max_pool3d_with_indices")
@rule("upsample_nearest1d", "upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d")
@rule("upsample_linear1d", "_upsample_nearest_exact2d", "_upsample_bilinear2d_aa")
@rule("_upsample_bicubic2d_aa", "reflection_pad1d", "reflection_pad2d", "replication_pad2d")
@rule("replication_pad1d", "upsample_nearest3d", "upsample_trilinear3d")
def resample(p: Propagation, call: Call) -> list[Dims]:
    dims = p.of(call.inputs[0])
    shape = call.outputs[0].shape
    tail = next((k for k in ("1d", "2d", "3d") if k in call.name), "2d")
    lead = len(dims) - int(tail[0])
    for size in dims[lead:]:
        pin(size, "a spatial size")
    result = [*dims[:lead], *(fixed(n, "a spatial size") for n in shape[lead:])]
    return [list(result) for _ in call.outputs]


@rule("zeros", "ones", "empty", "full", "rand", "randn", "new_zeros", "new_ones", "new_empty")
@rule("new_full", "randint", "empty_strided", "new_empty_strided")
def make(p: Propagation, call: Call) -> list[Dims]:
    shape = call.outputs[0].shape
    dims = [fresh(n) for n in shape]
    for dim, integer in zip(dims, given_sizes(call, shape), strict=True):
        p.relate(dim, integer, call)
    return [dims]


@rule("arange", "linspace", "eye", "tril_indices", "triu_indices")
def positions(p: Propagation, call: Call) -> list[Dims]:
    count = next((n for n in call.integers if n == call.outputs[0].shape[0]), None)
    source = expression_of(count) if count is not None else None
    if len(call.outputs[0].shape) == 1 and isinstance(source, Size) and source.tensor in p.dims:
        dim = p.dims[source.tensor][source.dim]
        keep_order(dim, "it counts positions")
        return [[dim]]
    return [[fixed(n, "it counts positions") for n in call.outputs[0].shape]]


def pinned_rule(p: Propagation, call: Call, reason: str) -> list[Dims]:
    """What is assumed of an operator that nobody understands: nothing about it may vary."""
    for ref in call.inputs:
        for dim in p.of(ref):
            pin(dim, reason)
    return [[fixed(n, reason) for n in ref.shape] for ref in call.outputs]
