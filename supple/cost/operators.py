"""What kind of work an operator call is, and of which sizes: the words of a device profile."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch

from supple.graph.dims import Dim
from supple.graph.record import Call, Ref
from supple.graph.rules import argument

__all__ = ["KINDS", "Kind", "Sizes", "kind_of"]

KINDS: dict[str, tuple[str, ...]] = {
    "conv": ("pixels", "inner", "outer", "taps"),
    "depthwise": ("pixels", "channels", "taps"),
    "matmul": ("rows", "inner", "outer"),
    "attention": ("heads", "queries", "keys", "width"),
    "batch norm": ("elements",),
    "layer norm": ("elements",),
    "softmax": ("elements",),
    "elementwise": ("elements",),
    "reduce": ("elements",),
    "copy": ("elements",),
}
"""Kinds of operators, and what their sizes are called."""

Sizes = list[tuple[list[Dim], int]]
"""For each size: dimensions to multiply, and a factor."""
Kind = tuple[str, Sizes]
_Of = Callable[[Ref], list[Dim]]


def kind_of(call: Call, of: _Of) -> Kind | None:
    """Gives the kind of a call and its sizes.

    A convolution in groups of one input channel each is *depthwise*; other groups are taken as
    a convolution from one group's channels to all outputs, which is as much work.

    Args:
        call: A recorded call.
        of: Gives the dimensions of a tensor.

    Returns:
        A key of `KINDS` with one size for each of its axes, or None for what computes nothing
        (a view).
    """
    name = call.name.removeprefix("aten::").removesuffix("_")
    if name in _SHAPED:
        return _SHAPED[name](call, of)
    tensors = [*call.inputs, *call.outputs]
    if call.op.is_view or name in _VIEWS or not tensors:
        return None
    largest = max(tensors, key=lambda ref: prod(ref.shape))
    return _memory_bound(call, name), [(of(largest), 1)]


def _memory_bound(call: Call, name: str) -> str:
    for word, kind in _WORDS.items():
        if word in name:
            return kind
    if torch.Tag.pointwise in call.op.tags:
        return "elementwise"
    return "reduce" if torch.Tag.reduction in call.op.tags else "copy"


def _convolution(call: Call, of: _Of) -> Kind:
    x, weight = call.inputs[:2]
    moved = of(x if argument(call, "transposed", False) else call.outputs[0])
    outer, inner = of(weight)[:2]
    pixels, taps = ([moved[0], *moved[2:]], 1), (of(weight)[2:], 1)
    if weight.shape[1] == 1 < x.shape[1]:
        return "depthwise", [pixels, ([outer], 1), taps]
    return "conv", [pixels, ([inner], 1), ([outer], 1), taps]


def _matmul(call: Call, of: _Of) -> Kind:
    a, b = call.inputs[-2:]
    *rows, inner = of(a)
    return "matmul", [(rows, 1), ([inner], 1), ([of(b)[-1]], 1)]


def _vector(call: Call, of: _Of) -> Kind:
    matrix = of(max(call.inputs, key=lambda ref: len(ref.shape)))
    return "matmul", [([], 1), ([matrix[-1]], 1), (matrix[:-1], 1)]


def _attention(call: Call, of: _Of) -> Kind:
    query, key = (of(ref) for ref in call.inputs[:2])
    sizes: Sizes = [(query[:-2], 1), ([query[-2]], 1), ([key[-2]], 1), ([query[-1]], 1)]
    return "attention", sizes


_SHAPED: dict[str, Callable[[Call, _Of], Kind]] = {
    "convolution": _convolution,
    "_convolution": _convolution,
    "mm": _matmul,
    "addmm": _matmul,
    "bmm": _matmul,
    "baddbmm": _matmul,
    "mv": _vector,
    "addmv": _vector,
    "dot": _vector,
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_fused_attention_overrideable": _attention,
    "_scaled_dot_product_flash_attention": _attention,
    "_scaled_dot_product_efficient_attention": _attention,
    "_scaled_dot_product_cudnn_attention": _attention,
}
_VIEWS = ("detach", "alias", "lift_fresh", "_unsafe_view")
_WORDS = {
    "batch_norm": "batch norm",
    "layer_norm": "layer norm",
    "rms_norm": "layer norm",
    "group_norm": "layer norm",
    "softmax": "softmax",
    "pool": "reduce",
}
