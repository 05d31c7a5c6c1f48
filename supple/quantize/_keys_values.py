"""Keys and values of a few bits, in any network whose attention is PyTorch's.

They are rounded where the product is called, not in a cache class of one library: so a network
without a cache is rounded just as well, also in training and when its perplexity is measured,
and what was done is saved and exported with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from supple.errors import UnsupportedModelError
from supple.formats import Int, QuantSpec
from supple.graph.record import record
from supple.layers.quantized_attention import ProductsBy, QuantizedAttention
from supple.layers.rotations import Rotation
from supple.plan import Shadows
from supple.rebuild import replace

__all__ = ["attention_paths", "cache_spec", "rounding_keys", "watching"]


def cache_spec(bits: int, *, symmetric: bool = False) -> QuantSpec:
    """Gives how keys and values are rounded: each token of each head by itself.

    Args:
        bits: Of a number.
        symmetric: Whether there are no zero points. The largest number is exact then: queries
            may be large where keys are, and half a step off would count many times.
    """
    form = Int(bits, symmetric=symmetric, narrow=symmetric)
    return QuantSpec(form, "token", None, symmetric, "fp16")


def attention_paths(
    model: nn.Module, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
) -> list[str]:
    """Finds the modules that call PyTorch's fused attention.

    Args:
        model: The network; it is run once in evaluation mode.
        args: Positional example inputs.
        kwargs: Keyword example inputs.

    Returns:
        Their paths, in the order in which they run.

    Raises:
        UnsupportedModelError: There is none.

    Example:
        >>> import torch
        >>> layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> attention_paths(layer, (torch.ones(1, 3, 8),))
        ['self_attn']
    """
    calls = record(model, args, kwargs).calls
    found = dict.fromkeys(
        call.module
        for call in calls
        if call.function == "scaled_dot_product_attention" or "scaled_dot_product" in call.name
    )
    if not found:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no attention whose keys and values could be rounded: "
            "none of its modules calls scaled_dot_product_attention. Where attention is "
            "written out, choose the fused one (attn_implementation='sdpa' in transformers), "
            "or leave kv_bits=None"
        )
    return list(found)


def rounding_keys(
    model: nn.Module,
    paths: Sequence[str],
    spec: QuantSpec | None,
    key_maps: Mapping[str, Rotation] | None = None,
    value_maps: Mapping[str, Rotation] | None = None,
    queries: QuantSpec | None = None,
) -> nn.Module:
    """Lets attention round its keys and values.

    Args:
        model: The network; it is changed.
        paths: Of the modules that attend, see `attention_paths`. Each is at `path.layer` then.
        spec: How; None: not at all.
        key_maps: What keys are mapped by before, by path.
        value_maps: What values are mapped by before, by path.
        queries: How queries are rounded; None: not at all.

    Returns:
        The network.
    """
    made: dict[str, nn.Module] = {}
    for path in paths:
        module = model.get_submodule(path)
        made[path] = QuantizedAttention(
            module,
            spec,
            key_map=(key_maps or {}).get(path),
            value_map=(value_maps or {}).get(path),
            queries=queries,
        ).train(module.training)
    return replace(model, made) if made else model


@contextmanager
def watching(
    model: nn.Module,
    paths: Sequence[str],
    see: Callable[[str, Tensor, Tensor, Tensor], None],
) -> Iterator[None]:
    """Shows queries, keys and values of attention while a network runs.

    Args:
        model: The network.
        paths: Of the modules that attend, see `attention_paths`.
        see: Is called with the path, queries, keys and values, each (..., heads, tokens,
            channels).
    """
    undo = Shadows()
    try:
        for path in paths:
            module = model.get_submodule(path)
            watched = partial(_watched, module.forward, partial(see, path))
            undo.put(vars(module), "forward", watched)
        yield
    finally:
        undo.end()


def _watched(
    forward: Callable[..., Any], see: Callable[..., None], *args: Any, **kwargs: Any
) -> Any:
    def product(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **named: Any) -> Tensor:
        see(query, key, value)
        return F.scaled_dot_product_attention(query, key, value, *rest, **named)

    with ProductsBy(product):
        return forward(*args, **kwargs)
