"""The multiply-accumulates of an operator call, as a product of sizes."""

from __future__ import annotations

from collections.abc import Callable

from supple.cost.count import FREE, is_free
from supple.errors import OperatorError
from supple.graph.dims import Dim, concatenation
from supple.graph.record import Call, Ref
from supple.graph.rules import argument

__all__ = ["Factors", "macs_of"]

Factors = tuple[list[Dim], int]


def macs_of(call: Call, of: Callable[[Ref], list[Dim]]) -> Factors | None:
    """The multiply-accumulates of a call: sizes to multiply, and a factor; None if it has none.

    Raises:
        OperatorError: The operator may multiply and has no rule.
    """
    name = call.name.removeprefix("aten::").removesuffix("_")
    if name in _MACS:
        return _MACS[name](call, of)
    if f"aten.{name}" in FREE or is_free(call.op):
        return None
    raise OperatorError(
        f"operator '{call.name}' has no closed form for its MACs and may contain some; express "
        "it by matrix products and convolutions, or add a rule to supple.cost.products"
    )


def _matrix_product(call: Call, of: Callable[[Ref], list[Dim]]) -> Factors:
    a, b = call.inputs[-2:]
    return [*of(a), of(b)[-1]], 1


def _vector_product(call: Call, of: Callable[[Ref], list[Dim]]) -> Factors:
    return of(max(call.inputs, key=lambda ref: len(ref.shape))), 1


def _convolution(call: Call, of: Callable[[Ref], list[Dim]]) -> Factors:
    x, weight = call.inputs[:2]
    moved = x if argument(call, "transposed", False) else call.outputs[0]
    return [*of(moved), *of(weight)[1:]], 1


def _attention(call: Call, of: Callable[[Ref], list[Dim]]) -> Factors:
    """Scores and weighted values: queries times keys, by the widths of queries and values."""
    query, key, value = (of(ref) for ref in call.inputs[:3])
    return [*query[:-1], key[-2], concatenation((query[-1], value[-1]))], 1


def _grouped(call: Call, of: Callable[[Ref], list[Dim]]) -> Factors:
    left, right = call.inputs[:2]
    return [*of(left), of(right)[-1]], 1


def _recurrent(call: Call, of: Callable[[Ref], list[Dim]]) -> Factors:
    x, into, state = (of(ref) for ref in call.inputs[:3])
    return [*x[:-1], into[0], concatenation((into[1], state[1]))], 1


_MACS: dict[str, Callable[[Call, Callable[[Ref], list[Dim]]], Factors]] = {
    "mm": _matrix_product,
    "addmm": _matrix_product,
    "bmm": _matrix_product,
    "baddbmm": _matrix_product,
    "mv": _vector_product,
    "addmv": _vector_product,
    "dot": _vector_product,
    "convolution": _convolution,
    "_convolution": _convolution,
    "_grouped_mm": _grouped,
    "mkldnn_rnn_layer": _recurrent,
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_fused_attention_overrideable": _attention,
}
