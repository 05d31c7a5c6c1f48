"""Tensors of indices: which dimension their values are positions of.

`topk`, `argmax` and `sort` give positions in the dimension that they chose from; reshapes and
copies carry them. Where such a tensor then picks rows of another one, these rows are the same
positions: that is how a router and the expert weights that it routes to shrink together. An
operator that computes with the positions themselves makes them mean something of their own.
"""

from __future__ import annotations

from supple.graph.dims import keep_order
from supple.graph.record import Call
from supple.graph.rules import Propagation

__all__ = ["follow_indices"]

_KEEP_VALUES = frozenset(
    f"aten::{name}"
    for name in (
        "_to_copy",
        "_unsafe_view",
        "alias",
        "clamp",
        "clamp_",
        "clone",
        "contiguous",
        "detach",
        "expand",
        "flip",
        "index",
        "permute",
        "repeat",
        "roll",
        "select",
        "slice",
        "sort",
        "split",
        "split_with_sizes",
        "squeeze",
        "t",
        "transpose",
        "unbind",
        "unsqueeze",
        "view",
    )
)
#: Operators that use the values of an index tensor as positions (each rule says how), or
#: nothing but its shape.
_LOOK_UP = frozenset(
    f"aten::{name}"
    for name in (
        "bincount",
        "embedding",
        "empty_like",
        "full_like",
        "gather",
        "histc",
        "index",
        "index_add",
        "index_add_",
        "index_put",
        "index_put_",
        "index_select",
        "new_empty",
        "new_full",
        "new_ones",
        "new_zeros",
        "ones_like",
        "scatter",
        "scatter_",
        "scatter_add",
        "scatter_add_",
        "zeros_like",
    )
)


def follow_indices(p: Propagation, call: Call) -> None:
    """Say which dimension the values of the call's outputs are positions of.

    Args:
        p: What is known so far; the call's rule has been applied.
        call: The call.
    """
    positions = [ref for ref in call.inputs if ref.id in p.indexed]
    if not positions:
        return
    source = call.inputs[0]
    if call.name in _KEEP_VALUES and source.id in p.indexed:
        for ref in call.outputs:
            p.indexed.setdefault(ref.id, p.indexed[source.id])
    elif call.name not in _LOOK_UP:
        name = call.name.removeprefix("aten::")
        for ref in positions:
            keep_order(p.indexed[ref.id], f"the operator {name} computes with positions in it")
